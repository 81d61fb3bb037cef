"""Attention, cache, norm, matmul and sampling kernels for qwen2_jax: a folder per op, with its API and reference.

Each op takes `implementation`: `"auto"` picks by platform and shape; a named one never falls back, but raises
`NotImplementedError` where it cannot do what is asked. Nothing here knows of a mesh, a config or an engine.
"""

from qwen2_kernels.adapted import Adapted
from qwen2_kernels.dispatch import by_platform
from qwen2_kernels.flash_attention.api import flash_attention
from qwen2_kernels.gumbel_argmax.api import gumbel_argmax
from qwen2_kernels.linear.api import linear, linear_partial, skips_padding
from qwen2_kernels.lora.api import lora_delta, lora_gated
from qwen2_kernels.lora.batch import LoRABatch
from qwen2_kernels.lora.linear_gated import lora_linear_gated
from qwen2_kernels.norm_linear.api import norm_linear
from qwen2_kernels.paged_attention.api import paged_attention
from qwen2_kernels.rms_norm.api import rms_norm
from qwen2_kernels.thresholds.api import top_k_threshold, top_k_top_p_threshold, top_p_threshold
from qwen2_kernels.token_ranks.api import token_ranks
from qwen2_kernels.top_logits.api import top_logits
from qwen2_kernels.write_kv.api import write_kv

__all__ = [
    "Adapted",
    "LoRABatch",
    "by_platform",
    "flash_attention",
    "gumbel_argmax",
    "linear",
    "linear_partial",
    "lora_delta",
    "lora_gated",
    "lora_linear_gated",
    "norm_linear",
    "paged_attention",
    "rms_norm",
    "skips_padding",
    "token_ranks",
    "top_k_threshold",
    "top_k_top_p_threshold",
    "top_logits",
    "top_p_threshold",
    "write_kv",
]
