"""The activations of the gated projection, by the names that `linear` takes."""

import functools
from collections.abc import Callable

import jax
from jax import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""Hugging Face's `silu`, `gelu` and `gelu_pytorch_tanh`; every implementation has all of them."""
