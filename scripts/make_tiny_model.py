"""Writes a small random Qwen2 checkpoint in Hugging Face's layout, for tests and trials. Needs numpy and safetensors.

python scripts/make_tiny_model.py /tmp/tiny --set tie_word_embeddings=true --set num_hidden_layers=3
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """Return the config of a tiny Qwen2 with `changes` laid over it."""
    return {**CONFIG, **changes}


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the model that `config` describes, by Hugging Face's name."""
    d, f, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    h = config.get("head_dim", d // heads)
    rows = {"q": heads * h, "k": config["num_key_value_heads"] * h, "v": config["num_key_value_heads"] * h}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (d,)
        for name, size in rows.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, d)
            if config["model_type"] == "qwen2":
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (d, heads * h)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (d,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (f, d)
        shapes[f"{layer}.mlp.up_proj.weight"] = (f, d)
        shapes[f"{layer}.mlp.down_proj.weight"] = (d, f)
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"] and config["architectures"][0].endswith("ForCausalLM"):
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return shapes


def tiny_tensors(config: Mapping[str, Any], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random weights in the config's dtype: norms around 1, all else around 0."""
    rng = np.random.default_rng(seed)
    scale, dtype = config["initializer_range"], DTYPES[config["torch_dtype"]]
    return {
        name: (rng.normal(float("norm" in name), scale, shape)).astype(dtype)
        for name, shape in tensor_shapes(config).items()
    }


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, shards: int = 1
) -> Path:
    """Write `config.json` and the tensors, with an index where there are several shards; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    weight_map = {
        name: f"model-{i * shards // len(names) + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
    }
    for file in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def make_tiny_model(folder: Path, *, seed: int = 0, shards: int = 1, **changes: Any) -> Path:
    """Write a tiny random checkpoint whose config has `changes` laid over it; returns `folder`."""
    config = tiny_config(**changes)
    return write_checkpoint(folder, config, tiny_tensors(config, seed=seed), shards=shards)


def make_tiny_sentence_transformer(
    folder: Path,
    *,
    embedding_dim: int = 12,
    bias: bool = True,
    pooling: str = "mean_tokens",
    activation: str = "linear.Identity",
    **changes: Any,
) -> Path:
    """Write a tiny sentence-transformers folder: transformer, pooling, a dense layer, normalisation; returns it."""
    config = tiny_config(**{"architectures": ["Qwen2Model"], **changes})
    write_checkpoint(folder, config, tiny_tensors(config))
    names = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": "3_Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in names.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    dense = {"bias": bias, "activation_function": f"torch.nn.modules.{activation}"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    rng = np.random.default_rng(3)
    tensors = {"linear.weight": rng.normal(size=(embedding_dim, config["hidden_size"])).astype(np.float32)}
    if bias:
        tensors["linear.bias"] = rng.normal(size=embedding_dim).astype(np.float32)
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
    return folder


def main() -> None:
    """Write the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="a key of the config")
    args = parser.parse_args()
    changes = {key: json.loads(value) for key, _, value in (item.partition("=") for item in args.set)}
    print(make_tiny_model(args.folder, seed=args.seed, shards=args.shards, **changes))


if __name__ == "__main__":
    main()
