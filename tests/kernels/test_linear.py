"""`linear`: its reference against numpy, every implementation against its reference, and what Triton makes of it."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton.triton_lib
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from qwen2_kernels.linear import api
from qwen2_kernels.linear.config import Config, default_config
from qwen2_kernels.specs import QWEN2_5

from tests.kernels.interpreter import triton_interpreter

linear: Any = api.linear
EPS = 1e-5
KINDS = ("plain", "norm", "norm_bias", "residual", "gated", "norm_gated")
GEMV = Config(block_n=4, block_k=32, num_stages=1)
GEMV_CONFIGS = {
    "tiles": GEMV,
}
DOT_CONFIGS = {
    "one_tile": Config(block_n=16, block_k=128, block_t=16),
    "tiles": Config(block_n=16, block_k=16, block_t=16),
    "slices": Config(block_n=16, block_k=16, block_t=16, slices_k=2),
    "split_k": Config(block_n=16, block_k=32, block_t=16, split_k=2),
    "uneven_split_k": Config(block_n=16, block_k=32, block_t=16, split_k=3),
    "separate_norm": Config(block_n=32, block_k=32, block_t=16, fuse_norm=False),
}
H100, A100 = (
    AbstractMesh((), (), abstract_device=AbstractDevice(device_kind=name, platform="gpu", num_cores=cores))
    for name, cores in (("NVIDIA H100 80GB HBM3", 132), ("NVIDIA A100-SXM4-80GB", 108))
)


def draw(kind: str, tokens: int, features: int = 40, size: int = 96) -> dict[str, Any]:
    """The arguments of one projection."""
    rng = np.random.default_rng(tokens)
    gated = "gated" in kind
    arguments: dict[str, Any] = {
        "x": 3 * rng.standard_normal((tokens, size), np.float32),
        "kernel": rng.standard_normal((*((2,) if gated else ()), features, size), np.float32) / size**0.5,
    }
    if "norm" in kind:
        arguments |= {"norm_weight": rng.uniform(0.5, 2, size).astype(np.float32), "eps": EPS}
    if "bias" in kind:
        arguments["bias"] = rng.standard_normal(features, np.float32)
    if "residual" in kind:
        arguments["residual"] = rng.standard_normal((tokens, features), np.float32)
    return arguments | ({"activation": "silu"} if gated else {})


def formula(
    x: np.ndarray,
    kernel: np.ndarray,
    norm_weight: np.ndarray | None = None,
    eps: float = 0.0,
    bias: float | np.ndarray = 0.0,
    residual: float | np.ndarray = 0.0,
    activation: str | None = None,
) -> np.ndarray:
    """`linear` in numpy; the only activation is `silu`."""
    if norm_weight is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * norm_weight
    if activation is not None:
        gate, up = x @ kernel[0].T, x @ kernel[1].T
        return gate / (1 + np.exp(-gate)) * up
    return x @ kernel.T + bias + residual


def to_arrays(arguments: dict[str, Any], dtype: Any = jnp.float32) -> dict[str, Any]:
    return {key: jnp.asarray(v, dtype) if isinstance(v, np.ndarray) else v for key, v in arguments.items()}


@pytest.mark.parametrize("implementation", ["reference", "xla", "auto"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_formula(kind: str, tokens: int, implementation: str) -> None:
    arguments = draw(kind, tokens)
    out = linear(**to_arrays(arguments), implementation=implementation)
    np.testing.assert_allclose(out, formula(**arguments), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: str, implementation: str) -> None:
    arrays = to_arrays(draw(kind, 7), jnp.bfloat16)
    exact: dict[str, Any] = {
        key: np.asarray(v, np.float32) if isinstance(v, jax.Array) else v for key, v in arrays.items()
    }
    for dtype in (None, jnp.float32):
        out = linear(**arrays, out_dtype=dtype, implementation=implementation)
        assert out.dtype == (dtype or jnp.bfloat16)
        np.testing.assert_allclose(out.astype(jnp.float32), formula(**exact), rtol=0.03, atol=0.06)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations(activation: str) -> None:
    arguments = to_arrays(draw("gated", 3)) | {"activation": activation}
    expected = linear(**arguments, implementation="reference")
    np.testing.assert_allclose(linear(**arguments, implementation="xla"), expected, rtol=1e-5, atol=1e-5)
    with triton_interpreter():
        out = linear(**arguments, implementation="triton", config=DOT_CONFIGS["tiles"])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GEMV_CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_gemv_kernels(kind: str, name: str) -> None:
    for features, size in ((40, 96), (18, 80)):
        arguments = to_arrays(draw(kind, 1, features, size))
        with triton_interpreter():
            out = linear(**arguments, implementation="triton", config=GEMV_CONFIGS[name])
        np.testing.assert_allclose(out, linear(**arguments, implementation="reference"), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", DOT_CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_dot_kernel(kind: str, name: str) -> None:
    for tokens in (2, 16, 21):
        arguments = to_arrays(draw(kind, tokens))
        with triton_interpreter():
            out = linear(**arguments, implementation="triton", config=DOT_CONFIGS[name])
        np.testing.assert_allclose(out, linear(**arguments, implementation="reference"), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["norm_bias", "residual", "norm_gated"])
def test_nan_stays_in_its_token(kind: str) -> None:
    arguments = draw(kind, 6)
    clean = formula(**arguments)
    arguments["x"][4] = np.nan
    runs: dict[str, dict[str, Any]] = {"xla": {}, **{name: {"config": c} for name, c in DOT_CONFIGS.items()}}
    with triton_interpreter():
        for name, extra in runs.items():
            implementation = "triton" if extra else name
            out = np.asarray(linear(**to_arrays(arguments), implementation=implementation, **extra))
            np.testing.assert_allclose(np.delete(out, 4, 0), np.delete(clean, 4, 0), rtol=1e-5, atol=2e-5, err_msg=name)


@functools.cache
def lowered(
    model: str, projection: str, tokens: int, config: Config | None = None, gpu: AbstractMesh = H100
) -> tuple[str, str]:
    """The StableHLO and the PTX of a projection of Qwen2.5, compiled for a GPU; default tiles without a config.

    Its next projection reads the same kernel again.
    """
    geometry = QWEN2_5[model]
    hidden, intermediate = geometry.hidden_size, geometry.intermediate_size
    qkv = (geometry.num_attention_heads + 2 * geometry.num_key_value_heads) * geometry.head_dim
    kernels = {"qkv": (qkv, hidden), "gate_up": (2, intermediate, hidden), "down": (hidden, intermediate)}

    def struct(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    features, size = kernels[projection][-2:]
    extra = {
        "qkv": {"norm_weight": struct(size), "bias": struct(features)},
        "gate_up": {"norm_weight": struct(size)},
        "down": {"residual": struct(tokens, features)},
    }[projection]
    activation = "silu" if projection == "gate_up" else None
    run = functools.partial(linear, activation=activation, implementation="triton", config=config)
    kernel = struct(*kernels[projection])
    binaries = []

    def compile_to_ptx(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        binaries.append(result.binary)
        return result

    original = jax_triton.triton_lib.compile_ttir_to_ptx_inplace
    with pytest.MonkeyPatch.context() as patch, jax.sharding.use_abstract_mesh(gpu):
        patch.setattr(jax_triton.triton_lib, "compile_ttir_to_ptx_inplace", compile_to_ptx)
        traced = jax.jit(run).trace(struct(tokens, size), kernel, prefetch=kernel, **extra)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text, "".join(binary if isinstance(binary, str) else binary.decode() for binary in binaries)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 8, 128])
@pytest.mark.parametrize("projection", ["qkv", "gate_up", "down"])
@pytest.mark.parametrize("model", ["0.5b", "7b"])
def test_compiles_for_an_h100_with_wide_reads(model: str, projection: str, tokens: int) -> None:
    text, ptx = lowered(model, projection, tokens)
    assert text.count("triton_kernel_call") == 1
    if tokens == 1:
        assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global", ptx)
    else:
        assert "cp.async.cg.shared.global" in ptx
        assert ("wgmma.mma_async" if "wgmma" in ptx else "mma.sync") in ptx


@pytest.mark.slow
def test_reads_past_the_first_level_cache() -> None:
    ptx = lowered("7b", "gate_up", 1, Config(block_n=2, block_k=512, num_warps=2, num_stages=1, bypass_l1=True))[1]
    assert re.search(r"ld\.global\.cg\.v4\.b32", ptx)
    assert "cg.L1" not in ptx, "PTX refuses an eviction priority beside .cg"


@pytest.mark.slow
@pytest.mark.parametrize("tokens, tiles", [(1, {}), (8, {"block_t": 16})])
def test_asks_for_the_next_kernel(tokens: int, tiles: dict[str, int]) -> None:
    request = "cp.async.bulk.prefetch.L2.global"
    make_config: Any = Config
    for size, gpu, count in ((0, H100, 0), (1 << 20, H100, 1), (1 << 20, A100, 0)):
        config = make_config(block_n=16, block_k=128, prefetch_bytes=size, **tiles)
        assert lowered("0.5b", "down", tokens, config, gpu)[1].count(request) == count


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 32, 33, 64, 128, 200, 256, 1000])
@pytest.mark.parametrize("model", QWEN2_5)
def test_default_configs_cover_every_geometry(model: str, tokens: int) -> None:
    geometry = QWEN2_5[model]
    hidden, intermediate = geometry.hidden_size, geometry.intermediate_size
    for features, size, gated in ((hidden, intermediate, False), (intermediate, hidden, True)):
        config = default_config(tokens, features, size, gated=gated)
        assert config.block_t >= min(tokens, 256)
        tile = config.slices_k * config.block_k * 2
        assert config.num_stages * tile * (config.block_n * (1 + gated) + config.block_t) <= 227 * 1024


@pytest.mark.parametrize(
    "name, shape",
    [
        ("x", (5, 95)),
        ("x", (0, 96)),
        ("kernel", (2, 40, 96)),
        ("norm_weight", (40,)),
        ("bias", (96,)),
        ("residual", (4, 40)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    arguments = to_arrays(draw("norm_bias_residual", 5)) | {name: jnp.zeros(shape)}
    with pytest.raises(ValueError, match=re.escape(f"{name} {shape}")):
        linear(**arguments)


def test_what_a_gated_projection_has_not_is_refused() -> None:
    arguments = to_arrays(draw("gated", 5))
    with pytest.raises(ValueError, match="do not fit a gated projection"):
        linear(**arguments, bias=jnp.zeros(40))
    with pytest.raises(ValueError, match="activation 'tanh' is not one of silu, gelu, gelu_tanh"):
        linear(**arguments | {"activation": "tanh"})


def test_what_triton_cannot_do_is_refused() -> None:
    arguments = to_arrays(draw("plain", 5))
    with pytest.raises(NotImplementedError, match="not x float32 with kernel bfloat16"):
        linear(**arguments | {"kernel": jnp.zeros((40, 96), jnp.bfloat16)}, implementation="triton")
    with pytest.raises(NotImplementedError, match="one token, not 5"):
        linear(**arguments, implementation="triton", config=GEMV)
    with pytest.raises(ValueError, match="a Config is not for implementation='auto'"):
        linear(**arguments, config=GEMV)
    with pytest.raises(ValueError, match="no implementation 'cuda'; use one of auto, reference, xla, triton, mosaic"):
        linear(**arguments, implementation="cuda")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"block_n": 12}, r"powers of two are needed, not \{'block_n': 12\}"),
        ({"num_stages": 0}, r"out of range: \{'num_stages': 0\}"),
        ({"split_k": 2}, "belong to the dot kernel"),
        ({"block_t": 16, "bypass_l1": True}, "belongs to the multiply-reduce kernel"),
    ],
)
def test_impossible_configs_are_refused(wrong: dict[str, Any], message: str) -> None:
    make_config: Any = Config
    with pytest.raises(ValueError, match=message):
        make_config(**{"block_n": 16, "block_k": 64} | wrong)
