"""Which implementation of `linear` a GPU gets where none is named, by tokens, dtype and size."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from qwen2_kernels import tuning
from qwen2_kernels.linear import api
from qwen2_kernels.linear.config import tuning_key

H100 = AbstractMesh(
    (), (), abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
)


def lower(function: Any, x: jax.ShapeDtypeStruct, kernel: jax.ShapeDtypeStruct) -> str:
    with jax.sharding.use_abstract_mesh(H100):
        return jax.jit(function).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()


def test_auto_takes_triton_for_one_token_and_for_what_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {"block_n": 16, "block_k": 64, "block_t": 16}
    table = {"linear": {tuning_key(5, 32, 64, gated=False): tiles}}
    monkeypatch.setattr(tuning, "_table", lambda name: table if name == "nvidia_h100_80gb_hbm3" else {})
    for tokens, dtype, calls in ((1, "bfloat16", 1), (1, "float32", 0), (5, "bfloat16", 1), (9, "bfloat16", 0)):
        x, kernel = jax.ShapeDtypeStruct((tokens, 64), dtype), jax.ShapeDtypeStruct((32, 64), dtype)
        assert lower(api.linear, x, kernel).count("triton_kernel_call") == calls


@pytest.mark.parametrize(
    ("tokens", "features", "implementation"),
    [(64, 4608, "mosaic"), (128, 4608, "xla"), (128, 1152, "mosaic"), (129, 1152, "xla"), (2048, 4608, "mosaic")],
)
def test_auto_on_hopper_follows_the_tokens_and_the_kernels_size(
    tokens: int, features: int, implementation: str
) -> None:
    x = jax.ShapeDtypeStruct((tokens, 3584), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((features, 3584), jnp.bfloat16)
    for op in (api.linear, api.linear_partial):
        assert ("mosaic_gpu_v2" in lower(op, x, kernel)) == (implementation == "mosaic")


def test_padding_is_skipped_where_the_mosaic_kernel_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = [jnp.dtype(name) for name in ("bfloat16", "float16", "float32")]
    assert [api.skips_padding(dtype) for dtype in dtypes] == [False] * 3
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(api, "has_triton", lambda: True)
    monkeypatch.setattr(api, "unsupported_gpu", lambda: None)
    assert [api.skips_padding(dtype) for dtype in dtypes] == [True, False, False]
    monkeypatch.setattr(api, "unsupported_gpu", lambda: "an Ampere GPU")
    assert not api.skips_padding(dtypes[0])
