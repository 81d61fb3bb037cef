"""Steps of tokens with random adapters in pages, and from the adapters' dense factors what comes of them, in numpy."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from qwen2_kernels.lora.batch import (
    DOWN_PROJECTION,
    GATE_UP_PROJECTION,
    O_PROJECTION,
    RANKS,
    LoRABatch,
    LoRAProjection,
    qkv_projection,
)
from qwen2_kernels.lora.segments import PageUse, TokenGroup, build_lora_tables, table_sizes

HEADS, GROUP, HEAD_DIM = 2, 2, 16
PROJECTIONS: dict[str, tuple[LoRAProjection, int, int]] = {
    "qkv": (qkv_projection(GROUP, HEAD_DIM), 40, HEADS * (GROUP + 2) * HEAD_DIM),
    "o": (O_PROJECTION, 64, 40),
    "gate_up": (GATE_UP_PROJECTION, 40, 2 * 40),
    "down": (DOWN_PROJECTION, 96, 40),
}
"""Of each projection of a tiny model, its modules, inputs and outputs."""
ALL = 0b1111111


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """Adapters, and which of them each token uses."""

    token_groups: tuple[int, ...]
    ranks: tuple[int, ...] = ()
    """Of each adapter."""
    modules: tuple[int, ...] = ()
    """Of each adapter; not given: all."""
    merges: tuple[tuple[tuple[int, float], ...], ...] | None = None
    """Of each group, its adapters and their weights; None: a group for each adapter."""
    tile: int = 4

    @property
    def groups(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        """Of each group, its adapters and their weights."""
        return self.merges or tuple(((adapter, 1.0),) for adapter in range(len(self.ranks)))

    def mask(self, adapter: int) -> int:
        """The bits of an adapter's modules."""
        return self.modules[adapter] if self.modules else ALL

    @property
    def num_pages(self) -> int:
        """Pages of a bank in which some are nobody's."""
        return sum(-(-rank // RANKS) for rank in self.ranks) + 3


STEPS = {
    "one_token": StepSpec(token_groups=(0,), ranks=(16,)),
    "one_base_token": StepSpec(token_groups=(-1,)),
    "ranks": StepSpec(token_groups=(0, 3, 2, -1, 1, 0, 2, 4, 4), ranks=(1, 16, 17, 40, 8)),
    "modules": StepSpec(token_groups=(2, 0, 1, 1, 3, 2), ranks=(4, 20, 33, 16), modules=(0b10, 0b1010101, 0b101010, 0)),
    "merges": StepSpec(
        token_groups=(1, 0, 2, 1, -1, 0),
        ranks=(8, 16, 24),
        merges=(((0, 1.0), (1, -0.5)), ((2, 0.25), (0, 2.0), (1, 1.0)), ((2, 1.0),)),
    ),
    "hot": StepSpec(token_groups=(*[1] * 4, -1, 0, *[1] * 5, -1), ranks=(16, 24)),
    "large_tile": StepSpec(token_groups=(*[0] * 17, -1, 1), ranks=(16, 40), tile=16),
    "base": StepSpec(token_groups=(-1,) * 6, ranks=(16,)),
    "rank_100": StepSpec(token_groups=(0, 1), ranks=(100, 3)),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """The arguments of an op and its result; the banks are NaN where no item lists a page."""

    x: np.ndarray
    a_bank: np.ndarray
    b_bank: np.ndarray
    batch: LoRABatch
    vectors: np.ndarray
    """Rows of a bias bank [V, N]; NaN where no token uses one."""
    delta: np.ndarray
    token_vectors: np.ndarray
    """Of each token the row that it uses, -1 for none."""


def make_step(spec: StepSpec, name: str, seed: int = 0) -> Step:
    """Draw the adapters of one projection, lay them into pages in random order, and multiply."""
    projection, size, columns = PROJECTIONS[name]
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(spec.token_groups), size), np.float32)
    uses = place_adapters(spec, rng)
    a_bank = np.full((spec.num_pages, len(projection.modules), RANKS, size), np.nan, np.float32)
    b_bank = np.full((spec.num_pages, RANKS, columns), np.nan, np.float32)
    module_of = column_modules(projection, columns)
    dense = []
    for adapter, rank in enumerate(spec.ranks):
        mask = spec.mask(adapter)
        has_slice = np.array([mask >> module & 1 for module in projection.modules], np.float32)
        a = rng.standard_normal((len(has_slice), rank, size), np.float32) / size**0.5 * has_slice[:, None, None]
        b = rng.standard_normal((rank, columns), np.float32) * (mask >> module_of & 1)
        dense.append(sum((x @ a[i].T) @ (b * (module_of == module)) for i, module in enumerate(projection.modules)))
        for i, use in enumerate(uses[adapter]):
            a_bank[use.page], b_bank[use.page] = 0, 0
            some = slice(i * RANKS, min((i + 1) * RANKS, rank))
            count = some.stop - some.start
            a_bank[use.page, :, :count], b_bank[use.page, :count] = a[:, some], b[some]

    groups = make_groups(spec, uses)
    vectors = np.full((len(groups) + 2, columns), np.nan, np.float32)
    delta, token_groups = np.zeros((len(x), columns), np.float32), np.array(spec.token_groups)
    for index, (parts, group) in enumerate(zip(spec.groups, groups, strict=True)):
        if group.vector >= 0:
            vectors[group.vector] = rng.standard_normal(columns, np.float32)
        member = token_groups == index
        delta[member] = sum(weight * dense[adapter][member] for adapter, weight in parts)
    return Step(
        x=x,
        a_bank=a_bank,
        b_bank=b_bank,
        batch=make_batch(token_groups, groups, spec.tile),
        vectors=vectors,
        delta=delta,
        token_vectors=np.array([-1, *(group.vector for group in groups)])[token_groups + 1],
    )


def place_adapters(spec: StepSpec, rng: np.random.Generator) -> list[list[PageUse]]:
    """Give each adapter pages of a bank of `spec.num_pages`, in random order."""
    places = iter(rng.permutation(spec.num_pages).tolist())
    return [
        [PageUse(page=next(places), modules=spec.mask(adapter)) for _ in range(-(-rank // RANKS))]
        for adapter, rank in enumerate(spec.ranks)
    ]


def make_groups(spec: StepSpec, uses: list[list[PageUse]]) -> list[TokenGroup]:
    """What each group adds: the pages of its adapters, and for two groups of three the row of a vector bank."""
    return [
        TokenGroup(
            pages=tuple(replace(use, weight=weight) for adapter, weight in parts for use in uses[adapter]),
            vector=index + 1 if index % 3 != 1 else -1,
        )
        for index, parts in enumerate(spec.groups)
    ]


def column_modules(projection: LoRAProjection, columns: int) -> np.ndarray:
    """The module of each column of a `b` bank, [N]."""
    blocks = np.array(projection.blocks(columns))
    return np.repeat(np.array(projection.modules)[blocks], columns // len(blocks))


def make_batch(token_groups: np.ndarray, groups: list[TokenGroup], tile: int | None, **limits: Any) -> LoRABatch:
    """Return the tables of a step whose sizes leave some room, on the device."""
    most = max([1, *(len(group.pages) for group in groups)])
    options = {"max_groups": len(groups) + 1, "max_pages": most, "tile": tile} | limits
    sizes = table_sizes(len(token_groups), **options)
    tables = build_lora_tables(token_groups, groups, sizes)
    arrays = {name: jnp.asarray(table) for name, table in tables.items()}
    return LoRABatch(**arrays, tile=sizes.tile, window=sizes.window, max_pages=sizes.max_pages)
