"""A gated projection with adapters in one kernel, without a GPU: interpreters against the formula, lowering."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu
from qwen2_kernels.linear.mosaic_config import SHARED_MEMORY, MosaicConfig
from qwen2_kernels.lora import mosaic_gated
from qwen2_kernels.lora.batch import GATE_UP_PROJECTION, RANKS, LoRABatch
from qwen2_kernels.lora.config import default_config
from qwen2_kernels.lora.linear_gated import lora_linear_gated
from qwen2_kernels.lora.segments import PageUse, TokenGroup, build_lora_tables, table_sizes
from qwen2_kernels.lora.triton_lora import shrink
from qwen2_kernels.specs import QWEN2_5

from tests.kernels.interpreter import triton_interpreter
from tests.kernels.lora_steps import make_batch
from tests.kernels.test_linear_mosaic import gpu

WINDOW, SIZE, FEATURES, PAGES = 128, 192, 80, 9
CONFIGS = {
    "plain": MosaicConfig(block_n=16, consumers=2, stages=2, piece_bytes=32),
    "cluster": MosaicConfig(block_n=32, consumers=2, stages=2, cluster=2, share="weights", piece_bytes=32, programs=4),
    "two_products": MosaicConfig(block_n=144, consumers=2, stages=2, piece_bytes=32, programs=2),
}
GROUPS = [
    TokenGroup(pages=(PageUse(page=7, modules=0b1111111),)),
    TokenGroup(pages=(PageUse(page=2, modules=0b0010000), PageUse(page=5, modules=0b0110000, weight=-0.5))),
    TokenGroup(pages=tuple(PageUse(page=page, modules=0b0100000) for page in (0, 8, 3))),
    TokenGroup(pages=(PageUse(page=1, modules=0b0001111),)),
]
"""Adapters with a page, with a weight, with three pages of up alone, and without this projection."""


def draw(tokens: int) -> tuple[Any, ...]:
    """Tokens of rows with and without adapters, kernel and banks; pages that no group has are NaN."""
    rng = np.random.default_rng(tokens)
    cuts = np.sort(rng.integers(0, tokens, 6))
    groups = np.repeat([1, -1, 0, 2, 3, 1, -1], np.diff([0, *cuts, tokens]))
    x = rng.standard_normal((tokens, SIZE))
    kernel = rng.standard_normal((2, FEATURES, SIZE)) / SIZE**0.5
    a = rng.standard_normal((PAGES, 2, RANKS, SIZE)) / SIZE**0.5
    b = rng.standard_normal((PAGES, RANKS, 2, FEATURES)) / 4
    for group in GROUPS:
        for use in group.pages:
            for part in range(2):
                has = use.modules >> (4 + part) & 1
                a[use.page, part] *= has
                b[use.page, :, part] *= has
    a[[4, 6]], b[[4, 6]] = np.nan, np.nan
    return groups, *(jnp.asarray(array, jnp.bfloat16) for array in (x, kernel, a, b))


def formula(groups: np.ndarray, *arrays: jax.Array) -> np.ndarray:
    x, kernel, a, b = (np.asarray(array, np.float32) for array in arrays)
    both = np.einsum("td,pfd->tpf", x, kernel)
    for index, group in enumerate(GROUPS):
        for use in group.pages:
            ranks = np.einsum("td,prd->tpr", x[groups == index], a[use.page]) * use.weight
            both[groups == index] += np.einsum("tpr,rpf->tpf", ranks, b[use.page])
    gate, up = both[:, 0], both[:, 1]
    return gate / (1 + np.exp(-gate)) * up


def ranks_of(groups: np.ndarray, batch: Any, x: jax.Array, a: jax.Array) -> np.ndarray:
    """What `window_ranks` makes, in numpy; NaN behind the last item."""
    out = np.full((len(batch.entry_items), 2, WINDOW, RANKS), np.nan, np.float32)
    tokens, factors = np.asarray(x, np.float32), np.asarray(a, np.float32)
    item = 0
    for start in range(0, len(groups), WINDOW):
        part = groups[start : start + WINDOW]
        for group in sorted(set(part) - {-1}):
            for use in GROUPS[group].pages:
                out[item] = 0
                product = np.einsum("td,prd->ptr", tokens[start : start + WINDOW], factors[use.page]) * use.weight
                out[item, :, : len(part)] = np.where((part == group)[:, None], product, 0)
                item += 1
    assert item == batch.window_entries[-1]
    return out.reshape(-1, RANKS)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [130, 400])
def test_is_the_formula(name: str, tokens: int) -> None:
    groups, x, kernel, a, b = draw(tokens)
    batch: Any = make_batch(groups, GROUPS, 50, window=WINDOW)
    ranks = jnp.asarray(ranks_of(groups, batch, x, a), jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)), gpu():
        pages = batch.item_pages[batch.entry_items]
        arrays = (x, kernel, ranks, b, pages, batch.window_entries)
        out, some = (
            np.asarray(mosaic_gated.add_and_gate(*arrays, n, config=CONFIGS[name]).astype(jnp.float32))
            for n in (None, jnp.int32(70))
        )
    assert not get_races().races_found
    np.testing.assert_allclose(out, formula(groups, x, kernel, a, b), rtol=0.02, atol=0.02)
    end = CONFIGS[name].token_tile * CONFIGS[name].cluster
    np.testing.assert_array_equal(some[:end], out[:end])
    assert np.isnan(some[end:]).all()


@pytest.mark.parametrize("tokens", [130, 400])
def test_ranks_of_windows(tokens: int) -> None:
    groups, x, _, a, _ = draw(tokens)
    batch: Any = make_batch(groups, GROUPS, 50, window=WINDOW)
    x, a = x.astype(jnp.float32), a.astype(jnp.float32)
    config = default_config(tokens, SIZE, FEATURES, batch.tile, is_gated=True)
    with triton_interpreter():
        ranks = shrink(x, a, batch, GATE_UP_PROJECTION, config.shrink)
        found = np.asarray(mosaic_gated.window_ranks(ranks, batch, x.dtype))
    used = int(batch.window_entries[-1]) * 2 * WINDOW
    np.testing.assert_allclose(found[:used], ranks_of(groups, batch, x, a)[:used], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [512, 1536, 8192])
@pytest.mark.parametrize("model", ["0.5b", "7b"])
def test_lowers(model: str, tokens: int) -> None:
    _, inner, size = QWEN2_5[model].projections["gate_up"]
    sizes = table_sizes(tokens, max_groups=32, max_pages=4, max_runs=257)
    tables = build_lora_tables(np.full(tokens, -1), [], sizes)
    tables = {name: jax.ShapeDtypeStruct(table.shape, table.dtype) for name, table in tables.items()}
    make: Any = LoRABatch
    batch = make(**tables, tile=sizes.tile, window=WINDOW, max_pages=4)
    shapes = ((tokens, size), (2, inner, size), (64, 2, RANKS, size), (64, RANKS, 2, inner))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    assert mosaic_gated.shared_memory(mosaic_gated.default_gated_config()) <= SHARED_MEMORY
    run = functools.partial(lora_linear_gated, activation="silu", implementation="mosaic")
    with gpu():
        text = jax.jit(run).trace(*arrays, batch).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1


def test_what_it_cannot_do_is_refused_or_done_separately() -> None:
    groups, x, kernel, a, b = draw(130)
    batch: Any = make_batch(groups, GROUPS, 16)
    run: Any = lora_linear_gated
    with gpu(), pytest.raises(NotImplementedError, match="tables with windows of 128 tokens, not None"):
        run(x, kernel, a, b, batch, activation="silu", implementation="mosaic")
    bias = jnp.zeros((3, 2, FEATURES))
    with gpu(), pytest.raises(NotImplementedError, match="no biases and magnitudes"):
        run(x, kernel, a, b, batch, activation="silu", bias_bank=bias, implementation="mosaic")
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        run(x, kernel, a, b, batch, activation="silu", implementation="triton")


@pytest.mark.parametrize("implementation", ["auto", "reference", "separate"])
def test_other_implementations(implementation: str) -> None:
    groups, x, kernel, a, b = draw(130)
    batch: Any = make_batch(groups, GROUPS, 50, window=WINDOW)
    run: Any = lora_linear_gated
    out = run(x, kernel, a, b, batch, activation="silu", implementation=implementation).astype(jnp.float32)
    np.testing.assert_allclose(out, formula(groups, x, kernel, a, b), rtol=0.03, atol=0.03)
