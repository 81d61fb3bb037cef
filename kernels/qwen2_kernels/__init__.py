"""Attention, cache and matmul kernels for qwen2_jax: one folder per op, each with its API, its reference and its kernels.

Each op takes `implementation`: `"auto"` picks by platform and shape; a named one never falls back, but raises
`NotImplementedError` where it cannot do what is asked. Nothing here knows of a mesh, a config or an engine.
"""

from qwen2_kernels.flash_attention.api import flash_attention
from qwen2_kernels.linear.api import linear
from qwen2_kernels.paged_attention.api import paged_attention
from qwen2_kernels.write_kv.api import write_kv

__all__ = ["flash_attention", "linear", "paged_attention", "write_kv"]
