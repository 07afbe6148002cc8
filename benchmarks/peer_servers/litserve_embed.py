"""LitServe with MiniLM: batches of up to 32. PORT MODEL-DIRECTORY"""

import sys

import litserve
import torch
from transformers import AutoModel, AutoTokenizer


class Embed(litserve.LitAPI):
    def setup(self, device):  # noqa: ARG002  LitServe calls it so
        self.tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
        self.model = AutoModel.from_pretrained(sys.argv[2]).eval()

    def decode_request(self, request):
        return request["input"]

    def batch(self, inputs):
        return inputs

    @torch.inference_mode()
    def predict(self, texts):
        batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (self.model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"data": [{"index": 0, "embedding": output.tolist()}]}


if __name__ == "__main__":
    api = Embed(max_batch_size=32, batch_timeout=0.0, api_path="/v1/embeddings")
    litserve.LitServer(api, accelerator="cpu").run(
        host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, generate_client_file=False, log_level="warning"
    )
