"""The Hopper kernels without a GPU: their tables of tiles, that they lower for one, and what they refuse."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from qwen2_kernels.flash_attention.mosaic import flash_attention_mosaic
from qwen2_kernels.hopper_config import Config, Mask
from qwen2_kernels.hopper_tiles import Rows, make_tiles
from qwen2_kernels.paged_attention.mosaic import paged_attention_mosaic, supported
from qwen2_kernels.specs import QWEN2_5, Row

GEOMETRIES = ("0.5b", "7b")
LAYOUTS = (
    Config(query_buffers=2),
    Config(kv_tile=64, stages=4, qk_first=False, take_turns=False, programs=None),
)
MASKS = ({"window": None, "causal": True}, {"window": 1000, "causal": True}, {"window": None, "causal": False})
TILE_CASES: tuple[tuple[tuple[Row, ...], int | None, bool], ...] = (
    (((5, 5), (300, 300), (1, 1), (0, 0), (594, 594), (21, 21)), None, True),
    (((300, 1000), (1, 700), (128, 128), (77, 2000)), None, True),
    (((300, 1000), (1, 700), (128, 128), (77, 2000)), 90, True),
    (((9, 0), (40, 64), (130, 130)), None, False),
)


def gpu(model: str) -> AbstractMesh:
    device = AbstractDevice(device_kind=model, platform="gpu", num_cores=132)
    return AbstractMesh((), (), abstract_device=device)


def lower(run: Any, *arguments: tuple[tuple[int, ...], Any]) -> str:
    """Lower for an H100, which runs all of Mosaic GPU's checks of shapes, layouts and shared memory."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arguments]
    with jax.sharding.use_abstract_mesh(gpu("NVIDIA H100 80GB HBM3")):
        return jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("rows, window, causal", TILE_CASES)
@pytest.mark.parametrize("skip_single", [False, True])
def test_tiles_hold_every_query_once_and_all_that_it_sees(
    rows: tuple[Row, ...], window: int | None, causal: bool, skip_single: bool
) -> None:
    config = Config()
    query_lens, context_lens = (np.asarray(lens, np.int32) for lens in zip(*rows, strict=True))
    starts = np.append(0, np.cumsum(query_lens)).astype(np.int32)
    tokens = 1024
    positions = context_lens - query_lens
    none, stops = jnp.zeros(len(rows), jnp.int32), jnp.asarray(context_lens)
    table, num_tiles = make_tiles(
        jnp.asarray(starts),
        tokens,
        Rows(positions=jnp.asarray(positions), key_low=none, key_stop=stops, clean_start=none, clean_stop=stops),
        mask=Mask(causal=causal, window=window, bounded=False),
        config=config,
        skip_single=skip_single,
    )
    stored = np.zeros(tokens, int)
    costs = []
    real = np.asarray(table)[: int(num_tiles[0])]
    for row, start, store_start, store_stop, position, key_start, _, key_stop, _, _ in real:
        assert start % 8 == 0 and store_start - start < 8 and store_stop - start <= config.query_tile
        assert key_start % config.kv_tile == 0
        stored[store_start:store_stop] += 1
        costs.append(-(-(key_stop - key_start) // config.kv_tile))
        for token in range(store_start, store_stop) if row < len(rows) and context_lens[row] else ():
            query = positions[row] + token - starts[row]
            assert query == position + token - start
            assert key_start <= (0 if window is None else max(query - window + 1, 0))
            assert key_stop >= (query + 1 if causal else context_lens[row])
    assert costs == sorted(costs, reverse=True)
    single = np.repeat(query_lens == 1, query_lens) & skip_single
    np.testing.assert_array_equal(stored, np.append(np.where(single, 0, 1), np.ones(tokens - starts[-1], int)))


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_flash_lowers(name: str, options: dict[str, Any]) -> None:
    geometry = QWEN2_5[name]
    kv = (8192, geometry.num_key_value_heads, geometry.head_dim)
    q = (*kv[:2], geometry.group, geometry.head_dim)
    run = functools.partial(flash_attention_mosaic, scale=0.1, **options)
    text = lower(run, (q, jnp.bfloat16), (kv, jnp.bfloat16), (kv, jnp.bfloat16), ((17,), jnp.int32))
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_paged_lowers(name: str, options: dict[str, Any]) -> None:
    geometry = QWEN2_5[name]
    pool = ((512, 64, geometry.num_key_value_heads, geometry.head_dim), jnp.bfloat16)
    q = (2048, geometry.num_key_value_heads, geometry.group, geometry.head_dim)
    run = functools.partial(paged_attention_mosaic, scale=0.1, k_scale=1.0, v_scale=1.0, skip_single=True, **options)
    text = lower(run, (q, jnp.bfloat16), pool, pool, *((shape, jnp.int32) for shape in ((8, 64), (8,), (9,))))
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("config", LAYOUTS)
def test_other_layouts_lower(config: Config) -> None:
    pool = ((64, 64, 4, 128), jnp.float16)
    run = functools.partial(
        paged_attention_mosaic, scale=0.1, k_scale=1.0, v_scale=1.0, window=None, causal=True, config=config
    )
    text = lower(run, ((256, 4, 7, 128), jnp.float16), pool, pool, *((n, jnp.int32) for n in ((8, 64), (8,), (9,))))
    assert "mosaic_gpu" in text


def test_layers_share_one_kernel() -> None:
    def layers(*arrays: jax.Array) -> list[jax.Array]:
        return [flash_attention_mosaic(*arrays, scale=0.1, window=None, causal=True) for _ in range(3)]

    kv = ((64, 2, 64), jnp.bfloat16)
    text = lower(layers, ((64, 2, 7, 64), jnp.bfloat16), kv, kv, ((3,), jnp.int32))
    assert text.count("@mosaic_gpu") == 1


def flash(
    dtype: Any = jnp.bfloat16, *, tokens: int = 16, head_dim: int = 64, run: Any = flash_attention_mosaic
) -> None:
    k = jnp.zeros((tokens, 2, head_dim), dtype)
    run(k[:, :, None], k, k, jnp.asarray([0, 16]), scale=1.0, window=None, causal=True)


def test_flash_refuses_what_it_cannot_do() -> None:
    with pytest.raises(NotImplementedError, match="bfloat16 or float16 throughout, not float32"):
        flash(jnp.float32)
    with pytest.raises(NotImplementedError, match="head dimensions 64 and 128, not 32"):
        flash(head_dim=32)
    with pytest.raises(NotImplementedError, match="tokens that 8 divides, not 20"):
        flash(tokens=20)


@pytest.mark.parametrize(
    "starts, block_size, message",
    [
        (None, 64, "rows of several queries, not decode"),
        ([0, 8], 32, "blocks of a multiple of 64 that fits 128, not 32"),
        ([0, 8], 192, "blocks of a multiple of 64 that fits 128, not 192"),
    ],
)
def test_paged_refuses_what_it_cannot_do(starts: list[int] | None, block_size: int, message: str) -> None:
    pool = jnp.zeros((4, block_size, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=message):
        paged_attention_mosaic(
            jnp.zeros((8, 2, 1, 64), jnp.bfloat16),
            pool,
            pool,
            jnp.zeros((1, 2), jnp.int32),
            jnp.asarray([8]),
            None if starts is None else jnp.asarray(starts),
            scale=1.0,
            window=None,
            causal=True,
            k_scale=1.0,
            v_scale=1.0,
        )


@pytest.mark.parametrize(
    "q, pool, model, message",
    [
        ("bfloat16", (64, 64), "NVIDIA H200", None),
        ("float16", (128, 128), "NVIDIA GH200 480GB", "bfloat16 or float16 throughout, not bfloat16 and float16"),
        ("bfloat16", (64, 32), "NVIDIA H200", "head dimensions 64 and 128, not 32"),
        ("bfloat16", (16, 64), "NVIDIA H200", "blocks of a multiple of 64 that fits 128, not 16"),
        ("bfloat16", (64, 64), "NVIDIA A100-SXM4-80GB", "compute capability 9.0, not NVIDIA A100-SXM4-80GB"),
        ("bfloat16", (64, 64), "NVIDIA B200", "compute capability 9.0, not NVIDIA B200"),
    ],
)
def test_supported_gives_the_reason(q: str, pool: tuple[int, int], model: str, message: str | None) -> None:
    block_size, head_dim = pool
    k_pool = jax.ShapeDtypeStruct((4, block_size, 2, head_dim), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(gpu(model)):
        reason = supported(jax.ShapeDtypeStruct((8, 2, 3, head_dim), q), k_pool)
    assert reason is None if message is None else message in (reason or "")
