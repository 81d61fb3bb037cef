"""Writes a small random GGUF file of the qwen2 or the llama architecture, for tests and trials. Needs the gguf library.

python scripts/make_tiny_gguf.py /tmp/tiny.gguf --architecture llama --quantise Q8_0
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from scripts.make_tiny_model import tiny_config, tiny_tensors

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
VALUE_TYPES = {
    str: gguf.GGUFValueType.STRING,
    float: gguf.GGUFValueType.FLOAT32,
    int: gguf.GGUFValueType.UINT32,
    bool: gguf.GGUFValueType.BOOL,
}


def gguf_name(name: str) -> str:
    """Return llama.cpp's name for a tensor with Hugging Face's."""
    module, _, kind = name.rpartition(".")
    if module in TOP_NAMES:
        return f"{TOP_NAMES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}.{kind}"


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Order each head's rows as llama.cpp does for a Llama: 0, H/2, 1, H/2 + 1, ..."""
    size = rows.shape[0] // heads
    order = [head * size + i + half * size // 2 for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    quant: gguf.GGMLQuantizationType | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write `tensors` (Hugging Face's names), matrices in the type `quant`, and `extra` metadata; returns `path`."""
    writer = gguf.GGUFWriter(path, config["model_type"])
    _add_metadata(writer, config, extra or {})
    for name, tensor in tensors.items():
        rows = _rows(name, tensor, config)
        if quant is not None and tensor.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(rows, quant), raw_dtype=quant)
        else:
            writer.add_tensor(gguf_name(name), rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    if config["num_key_value_heads"] is not None:
        writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_token_list(["<|endoftext|>", "<|im_end|>", "é"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(2)
    for key, value in extra.items():
        writer.add_key_value(key, value, VALUE_TYPES[type(value)])


def _rows(name: str, tensor: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    queries = config["num_attention_heads"]
    heads = {"q_proj": queries, "k_proj": config["num_key_value_heads"] or queries}.get(name.split(".")[-2])
    return interleave(tensor, heads) if heads and config["model_type"] == "llama" else tensor


def main() -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--architecture", choices=["qwen2", "llama"], default="qwen2")
    parser.add_argument("--quantise", metavar="TYPE", help="one of ggml's types, e.g. Q8_0")
    args = parser.parse_args()
    architecture = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[args.architecture]
    config = tiny_config(architectures=[architecture], model_type=args.architecture, intermediate_size=64)
    quant = gguf.GGMLQuantizationType[args.quantise] if args.quantise else None
    print(write_gguf(args.path, config, tiny_tensors(config), quant=quant))


if __name__ == "__main__":
    main()
