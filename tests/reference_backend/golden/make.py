"""Makes the golden models beside this file with Hugging Face transformers, the implementation to be equal to.

    pip install torch transformers==5.0.0 && python tests/reference_backend/golden/make.py

Three tiny decoders of random weights, each with the features of its architecture that could be got wrong, and the
logits that transformers gives for a fixed text; and an encoder (made with transformers 5.24) with its last states.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "qwen2": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False),
}

for name, config in MODELS.items():
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are born as ones and zeros: wrong ones would not show
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        tokens = torch.randint(0, 64, (2, 48))
        logits = model(tokens).logits
    directory = Path(__file__).parent / name
    model.save_pretrained(directory, max_shard_size="20KB" if name == "qwen2" else "5GB")
    (directory / "generation_config.json").unlink(missing_ok=True)
    save_file({"tokens": tokens, "logits": logits[:, ::6].contiguous()}, directory / "golden.safetensors")
    print(name, transformers.__version__, sorted(path.name for path in directory.iterdir()))

torch.manual_seed(1)
shape = {name: size for name, size in SHAPE.items() if name != "num_key_value_heads"}
model = transformers.BertModel(transformers.BertConfig(**shape), add_pooling_layer=False).float().eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    tokens = torch.randint(0, 64, (2, 48))
    states = model(tokens).last_hidden_state
directory = Path(__file__).parent / "bert"
model.save_pretrained(directory)
save_file({"tokens": tokens, "states": states.contiguous()}, directory / "golden.safetensors")
