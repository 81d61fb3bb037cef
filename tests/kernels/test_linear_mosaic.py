"""The Hopper kernel of `linear` without a GPU: Mosaic's interpreter against numpy, and that it lowers for one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh
from qwen2_kernels.linear import api
from qwen2_kernels.linear.mosaic import supported
from qwen2_kernels.linear.mosaic_config import SHARED_MEMORY, MosaicConfig, default_config
from qwen2_kernels.specs import QWEN2_5

linear: Any = functools.partial(api.linear, implementation="mosaic")
linear_partial: Any = api.linear_partial
make_config: Any = MosaicConfig
TOKENS = (8, 16, 32, 64, 128, 256)
CONFIGS = {
    "one_tile": (40, MosaicConfig(block_n=48, stages=2)),
    "tiles": (20, MosaicConfig(block_n=16, stages=3)),
    "few_tokens": (3, MosaicConfig(block_n=24, stages=2)),
    "many_tiles_a_program": (10, MosaicConfig(block_n=8, stages=2, programs=4)),
    "consumers": (100, MosaicConfig(block_n=16, consumers=2, stages=2)),
    "tiles_of_tokens": (140, MosaicConfig(block_n=32, stages=2, programs=3)),
    "rows": (150, MosaicConfig(block_n=16, consumers=2, rows=128, stages=2)),
    "deep_tiles": (20, MosaicConfig(block_n=16, block_k=128, stages=2)),
    "cluster": (40, MosaicConfig(block_n=16, cluster=2, stages=2)),
    "groups": (300, MosaicConfig(block_n=16, group=2, stages=2, programs=4)),
    "cluster_on_tokens": (210, MosaicConfig(block_n=16, cluster=2, share="weights", stages=2)),
    "many_tokens": (
        400,
        MosaicConfig(block_n=32, consumers=2, cluster=2, share="weights", group=1, piece_bytes=32, programs=4),
    ),
    "cluster_that_stays": (33, MosaicConfig(block_n=8, cluster=2, stages=2, programs=4)),
}
SPLITS = {
    "two": (20, MosaicConfig(block_n=16, split_k=2, stages=2)),
    "uneven": (5, MosaicConfig(block_n=40, split_k=3, stages=2)),
    "cluster": (70, MosaicConfig(block_n=16, split_k=2, cluster=2, consumers=2, stages=2)),
}
FEATURES, SIZE = 80, 320


def gpu(model: str = "NVIDIA H100 80GB HBM3") -> Any:
    device = AbstractDevice(device_kind=model, platform="gpu", num_cores=132)
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def interpret(run: Any, *arrays: jax.Array, **options: Any) -> np.ndarray:
    """Run on the CPU with Mosaic's interpreter, which looks for races and fills what was not written with NaN."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)), gpu():
        out = np.asarray(run(*arrays, **options).astype(jnp.float32))
    assert not get_races().races_found
    return out


def draw(tokens: int, *shape: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, shape[-1]))
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(rng.standard_normal(shape) / shape[-1] ** 0.5, jnp.bfloat16)


def formula(x: jax.Array, kernel: jax.Array) -> np.ndarray:
    """The projection in numpy, gated with silu where the kernel is."""
    tokens, weights = np.asarray(x, np.float32), np.asarray(kernel, np.float32)
    if weights.ndim == 2:
        return tokens @ weights.T
    gate, up = tokens @ weights[0].T, tokens @ weights[1].T
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_is_the_formula(name: str, gated: bool) -> None:
    tokens, config = CONFIGS[name]
    x, kernel = draw(tokens, *((2,) if gated else ()), FEATURES, SIZE)
    activation = "silu" if gated else None
    out = interpret(linear, x, kernel, activation=activation, config=config, out_dtype=jnp.float32)
    np.testing.assert_allclose(out, formula(x, kernel), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SPLITS)
def test_partial_sums(name: str) -> None:
    tokens, config = SPLITS[name]
    x, kernel = draw(tokens, FEATURES, SIZE)
    parts = interpret(linear_partial, x, kernel, implementation="mosaic", config=config)
    assert parts.shape == (config.split_k, tokens, FEATURES)
    step = -(-SIZE // 64 // config.split_k) * 64
    for index, part in enumerate(parts):
        columns = slice(index * step, (index + 1) * step)
        np.testing.assert_allclose(part, formula(x[:, columns], kernel[:, columns]), rtol=1e-4, atol=1e-4)
    out = interpret(linear, x, kernel, config=config, out_dtype=jnp.float32)
    np.testing.assert_allclose(out, parts.sum(axis=0), rtol=1e-6, atol=1e-6)


def test_one_share_of_k_is_one_partial_sum() -> None:
    x, kernel = draw(8, FEATURES, SIZE)
    parts = interpret(linear_partial, x, kernel, implementation="mosaic", config=MosaicConfig(block_n=16))
    np.testing.assert_allclose(parts, formula(x, kernel)[None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split_k", [1, 2])
def test_norm_bias_and_residual(split_k: int) -> None:
    x, kernel = draw(9, FEATURES, SIZE)
    rng = np.random.default_rng(0)
    norm, bias, residual = (
        jnp.asarray(rng.uniform(0.5, 2, shape), jnp.bfloat16) for shape in (SIZE, FEATURES, (9, FEATURES))
    )
    extra = {"norm_weight": norm, "eps": 1e-5, "bias": bias, "residual": residual, "out_dtype": jnp.float32}
    out = interpret(linear, x, kernel, **extra, config=MosaicConfig(block_n=16, split_k=split_k))
    expected = api.linear(x, kernel, **extra, implementation="reference")
    np.testing.assert_allclose(out, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("config", [CONFIGS["consumers"][1], CONFIGS["cluster"][1], SPLITS["two"][1]])
def test_nan_stays_in_its_token(config: MosaicConfig) -> None:
    x, kernel = draw(30, FEATURES, SIZE)
    clean = interpret(linear, x, kernel, config=config)
    poisoned = interpret(linear, x.at[jnp.asarray([4, 29])].set(jnp.nan), kernel, config=config)
    np.testing.assert_array_equal(np.delete(poisoned, [4, 29], 0), np.delete(clean, [4, 29], 0))


@pytest.mark.parametrize("name", ["groups", "cluster_on_tokens", "many_tokens", "tiles_of_tokens"])
@pytest.mark.parametrize("gated", [False, True])
def test_takes_no_time_for_tokens_that_do_not_matter(name: str, gated: bool) -> None:
    tokens, config = CONFIGS[name]
    x, kernel = draw(tokens, *((2,) if gated else ()), FEATURES, SIZE)
    options = {"activation": "silu" if gated else None, "config": config}
    whole = interpret(linear, x, kernel, **options)
    tile = config.token_tile * (config.cluster if config.share == "weights" else 1)
    for some in (0, 1, tile, tile + 1, tokens):
        out = interpret(linear, x, kernel, num_tokens=jnp.int32(some), **options)
        end = -(-some // tile) * tile
        np.testing.assert_array_equal(out[:end], whole[:end])
        assert np.isnan(out[end:]).all()


def test_partial_sums_of_tokens_that_matter() -> None:
    config = MosaicConfig(block_n=16, split_k=2, stages=2)
    x, kernel = draw(200, FEATURES, SIZE)
    options = {"implementation": "mosaic", "config": config}
    whole, some = (interpret(linear_partial, x, kernel, num_tokens=n, **options) for n in (None, jnp.int32(70)))
    np.testing.assert_array_equal(some[:, :128], whole[:, :128])
    assert np.isnan(some[:, 128:]).all()


@functools.cache
def lower(tokens: int, *shape: int, config: MosaicConfig | None = None, dtype: Any = None) -> str:
    """Lower for an H100, which runs all of Mosaic GPU's checks of shapes, layouts and shared memory."""
    x, kernel = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((tokens, shape[-1]), shape))
    options = {"activation": "silu" if len(shape) == 3 else None, "config": config, "out_dtype": dtype}
    with gpu():
        run = jax.jit(lambda x, kernel: linear(x, kernel, **options))
        return run.trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()


def projections(name: str) -> dict[str, tuple[int, ...]]:
    geometry = QWEN2_5[name]
    hidden, intermediate = geometry.hidden_size, geometry.intermediate_size
    heads = geometry.num_attention_heads * geometry.head_dim
    return {
        "gate_up": (2, intermediate, hidden),
        "down": (hidden, intermediate),
        "qkv": (heads + 2 * geometry.num_key_value_heads * geometry.head_dim, hidden),
        "o": (hidden, heads),
        "head": (geometry.vocab_size, hidden),
    }


@pytest.mark.parametrize("tokens", [3, 32, 128, 256])
@pytest.mark.parametrize("projection", ["gate_up", "down", "qkv", "o", "head"])
@pytest.mark.parametrize("model", ["0.5b", "7b"])
def test_lowers(model: str, projection: str, tokens: int) -> None:
    dtype = jnp.float32 if projection == "head" else None
    assert lower(tokens, *projections(model)[projection], dtype=dtype).count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("model", QWEN2_5)
def test_default_configs_fit_every_geometry(model: str, tokens: int) -> None:
    for projection, shape in projections(model).items():
        gated = projection == "gate_up"
        config = default_config(tokens, *shape[-2:], gated=gated)
        assert config.token_tile >= min(tokens, 128 if gated else 256)
        assert all(config.shared_memory(tokens, gated=gated, out_bytes=size) <= SHARED_MEMORY for size in (2, 4))
        tiles = -(-tokens // config.token_tile) * -(-shape[-2] // config.block_n) * config.split_k
        assert tiles <= 132 or tiles / 132 / -(-tiles // 132) > 0.7, "the last wave is nearly empty"


@pytest.mark.parametrize("tokens", [512, 1536, 2048, 6144, 8000, 8192])
@pytest.mark.parametrize("projection", ["gate_up", "down"])
@pytest.mark.parametrize("model", ["0.5b", "7b"])
def test_lowers_for_many_tokens(model: str, projection: str, tokens: int) -> None:
    shape = projections(model)[projection]
    config = default_config(tokens, *shape[-2:], gated=projection == "gate_up")
    assert config.shared_memory(tokens, gated=projection == "gate_up", out_bytes=2) <= SHARED_MEMORY
    assert lower(tokens, *shape).count("mosaic_gpu_v2") == 1


def test_layers_share_one_kernel() -> None:
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 128), (128, 128)))

    def layers(x: jax.Array, kernel: jax.Array) -> list[jax.Array]:
        return [linear(x, kernel) for _ in range(3)]

    with gpu():
        text = jax.jit(layers).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"block_n": 12}, "block_n 12 is not a multiple of 8"),
        ({"block_k": 32}, "block_k 32 is not a multiple of 64"),
        ({"consumers": 4}, r"consumers 4 is not one of \(1, 2, 3\)"),
        ({"rows": 32}, r"rows 32 is not one of \(64, 128\)"),
        ({"cluster": 3}, r"cluster 3 is not one of \(1, 2, 4\)"),
        ({"split_k": 0}, "split_k 0 is less than 1"),
        ({"stages": 1}, "stages 1 is less than 2"),
        ({"group": 0}, "group 0 is less than 1"),
        ({"share": "kernel"}, r"share kernel is not one of \('tokens', 'weights'\)"),
        ({"piece_bytes": 256}, r"piece_bytes 256 is not one of \(32, 64, 128\)"),
        ({"block_n": 24, "cluster": 2, "share": "weights"}, "block_n 24 is not a multiple of 16"),
        ({"cluster": 4, "programs": 2}, "programs 2 is less than 4"),
    ],
)
def test_impossible_configs_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**{"block_n": 16} | wrong)


def test_configs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="split_k=2 is for projections that are not gated"):
        lower(8, 2, 128, 128, config=MosaicConfig(block_n=16, split_k=2))
    with pytest.raises(ValueError, match="block_n=80 with rows=128 needs 160 registers"):
        lower(200, 2, 128, 128, config=MosaicConfig(block_n=80, rows=128))
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        lower(8, 128, 1280, config=MosaicConfig(block_n=128, stages=16))
    with pytest.raises(ValueError, match="out_dtype bfloat16 or float32, not float16"):
        lower(8, 128, 128, dtype=jnp.dtype(jnp.float16))
    with pytest.raises(ValueError, match="a MosaicConfig is not for implementation='triton'"):
        api.linear(jnp.zeros((8, 64)), jnp.zeros((16, 64)), implementation="triton", config=MosaicConfig(block_n=16))


@pytest.mark.parametrize(
    "x, kernel, activation, model, message",
    [
        ("bfloat16", (64, 128), None, "NVIDIA H200", None),
        ("bfloat16", (2, 64, 128), "silu", "NVIDIA GH200 480GB", None),
        ("float32", (64, 128), None, "NVIDIA H200", "bfloat16 throughout, not x float32 with kernel bfloat16"),
        ("bfloat16", (64, 96), None, "NVIDIA H200", "N a multiple of 16 and D of 64, not a kernel of (64, 96)"),
        ("bfloat16", (72, 128), None, "NVIDIA H200", "N a multiple of 16 and D of 64, not a kernel of (72, 128)"),
        ("bfloat16", (2, 64, 128), "gelu", "NVIDIA H200", "the activation 'silu', not 'gelu'"),
        ("bfloat16", (64, 128), None, "NVIDIA B200", "compute capability 9.0, not NVIDIA B200"),
    ],
)
def test_supported_gives_the_reason(
    x: str, kernel: tuple[int, ...], activation: str | None, model: str, message: str | None
) -> None:
    tokens = jax.ShapeDtypeStruct((8, kernel[-1]), x)
    with gpu(model):
        reason = supported(tokens, jax.ShapeDtypeStruct(kernel, jnp.bfloat16), activation)
    assert reason is None if message is None else message in (reason or "")


def test_what_it_cannot_do_is_refused() -> None:
    x, kernel = jnp.zeros((8, 64)), jnp.zeros((16, 64))
    with pytest.raises(NotImplementedError, match="bfloat16 throughout"):
        linear(x, kernel)
    with pytest.raises(NotImplementedError, match="bfloat16 throughout"):
        linear_partial(x, kernel, implementation="mosaic")


def test_partial_sums_by_another_name_are_refused() -> None:
    with pytest.raises(ValueError, match="linear_partial has no implementation 'triton'"):
        linear_partial(jnp.zeros((8, 64)), jnp.zeros((16, 64)), implementation="triton")


def test_tiles_are_for_the_mosaic_kernel() -> None:
    with pytest.raises(ValueError, match="config is for implementation='mosaic', not 'auto'"):
        linear_partial(jnp.zeros((8, 64)), jnp.zeros((16, 64)), config=MosaicConfig(block_n=16))


def test_a_whole_product_is_one_part() -> None:
    x, kernel = jnp.arange(12.0).reshape(3, 4), jnp.ones((5, 4))
    np.testing.assert_array_equal(linear_partial(x, kernel), linear(x, kernel, implementation="reference")[None])
