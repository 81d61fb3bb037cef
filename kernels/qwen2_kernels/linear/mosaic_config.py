"""How the Hopper kernel of `linear` cuts a projection into programs: see `mosaic`."""

import itertools
import math
from dataclasses import dataclass

PROGRAMS = 132
"""An H100's multiprocessors, each of which holds one program."""
ALIGNMENT = 8
"""TMA reads and writes the tiles of shared memory in groups of 8 rows."""
WARPGROUP_ROWS = 64
"""Tokens of a wgmma."""
MAX_COLUMNS = 256
"""Rows of the kernel in a wgmma."""
MAX_ACCUMULATORS = 144
"""Registers for sums that a thread has to spare."""
SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that a program can have."""
OUT_COLUMNS = 64
"""Output features in a piece of the result on its way through shared memory, at most."""


@dataclass(frozen=True, kw_only=True)
class MosaicConfig:
    """How the kernel is laid out on the GPU."""

    block_n: int
    """Output features of a tile, a multiple of 8; of a gated projection as many of the gate and of the up kernel."""
    consumers: int = 1
    """Warpgroups that multiply: 1, 2 or 3."""
    rows: int = WARPGROUP_ROWS
    """Tokens of a consumer: 64 or 128."""
    block_k: int = 64
    """Input features of a tile, a multiple of 64."""
    split_k: int = 1
    """Tiles of the same output, each a share of K: with several, the result is float32 partial sums."""
    stages: int = 4
    """Tiles in shared memory."""
    cluster: int = 1
    """Programs side by side on N that copy the tokens to all of them, each a part: 1, 2 or 4."""
    programs: int = PROGRAMS
    """Programs at most; each works off tiles until none is left."""

    def __post_init__(self) -> None:
        wrong = {}
        for name, step in (("block_n", ALIGNMENT), ("block_k", 64)):
            if getattr(self, name) < step or getattr(self, name) % step:
                wrong[name] = f"{getattr(self, name)} is not a multiple of {step}"
        for name, allowed in (("consumers", (1, 2, 3)), ("rows", (64, 128)), ("cluster", (1, 2, 4))):
            if getattr(self, name) not in allowed:
                wrong[name] = f"{getattr(self, name)} is not one of {allowed}"
        for name, least in (("split_k", 1), ("stages", 2), ("programs", self.cluster)):
            if getattr(self, name) < least:
                wrong[name] = f"{getattr(self, name)} is less than {least}"
        if wrong:
            raise ValueError(f"linear: {', '.join(f'{name} {problem}' for name, problem in wrong.items())}")

    @property
    def token_tile(self) -> int:
        """Tokens of a tile."""
        return self.consumers * self.rows

    def accumulators(self, *, gated: bool) -> int:
        """Return the registers of a consumer's thread that hold sums."""
        return self.rows * self.block_n * (1 + gated) // 128

    def out_columns(self, out_bytes: int) -> int:
        """Return the output features of a piece of the result: the most that divide the tile's."""
        most = OUT_COLUMNS if out_bytes == 2 else OUT_COLUMNS // 2
        return max(n for n in range(ALIGNMENT, most + 1, ALIGNMENT) if self.block_n % n == 0)

    def shared_memory(self, *, gated: bool, out_bytes: int) -> int:
        """Return the bytes of shared memory that a program needs, where results have `out_bytes` an element."""
        stage = (self.block_n * (1 + gated) + self.token_tile) * self.block_k * 2
        return self.stages * (stage + 16) + 2 * self.token_tile * self.out_columns(out_bytes) * out_bytes + 2048


def default_config(tokens: int, out_features: int, in_features: int, *, gated: bool) -> MosaicConfig:
    """Return what should suit an H100 for `tokens` [T] and a kernel [`out_features`, `in_features`], gated or not."""
    consumers = 1 if tokens <= WARPGROUP_ROWS else 2
    rows = WARPGROUP_ROWS if tokens <= 128 else 128
    cluster = 1 if tokens <= 32 else 2
    parts = 1 + gated
    most = min(MAX_COLUMNS, MAX_ACCUMULATORS * 128 // rows // parts)
    splits = [split for split in range(1, 2 if gated else 17) if split == 1 or in_features // 64 >= 4 * split]
    shapes = itertools.product(range(ALIGNMENT, most + 1, ALIGNMENT), splits)
    tiles_t = -(-tokens // (consumers * rows))

    def cost(shape: tuple[int, int]) -> float:
        """Microseconds, by what memory and the second-level cache can deliver to a multiprocessor at a time."""
        block_n, split_k = shape
        tiles = tiles_t * cluster * -(-out_features // (block_n * cluster)) * split_k
        waves = -(-tiles // PROGRAMS)
        depth = -(-in_features // 64 // split_k) * 64 * 2 * waves
        from_memory = parts * block_n * depth / 23.5e3
        from_cache = (parts * block_n + min(tokens, consumers * rows) / cluster) * depth / 40e3
        partial_sums = 0 if split_k == 1 else 1 + split_k * tokens * out_features * 8 / 4e6
        return max(from_memory, from_cache) + partial_sums + 0.3 * waves

    block_n, split_k = min(shapes, key=cost)
    shape = {"block_n": block_n, "consumers": consumers, "rows": rows, "split_k": split_k, "cluster": cluster}
    deepest = 2
    for stages in range(3, 1 + max(3, math.ceil(in_features / 64 / split_k))):
        config = MosaicConfig(**shape, stages=stages)
        if stages > 12 or max(config.shared_memory(gated=gated, out_bytes=n) for n in (2, 4)) > SHARED_MEMORY:
            break
        deepest = stages
    return MosaicConfig(**shape, stages=deepest)
