"""LitServe with the small network: batches of up to 64, as its documentation advises. PORT MODEL.onnx"""

import sys

import litserve
import numpy as np
import onnxruntime


class Mlp(litserve.LitAPI):
    def setup(self, device):  # noqa: ARG002  LitServe calls it so
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[2], options)

    def decode_request(self, request):
        return np.asarray(request["inputs"][0]["data"], np.float32)

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, x):
        return self.session.run(None, {"x": x})[0]

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"outputs": [{"name": "y", "shape": [1, 10], "datatype": "FP32", "data": output.tolist()}]}


if __name__ == "__main__":
    api = Mlp(max_batch_size=64, batch_timeout=0.0, api_path="/predict")
    litserve.LitServer(api, accelerator="cpu").run(
        host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, generate_client_file=False, log_level="warning"
    )
