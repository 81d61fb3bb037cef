"""How the Hopper kernel of `linear` cuts a projection into programs: see `mosaic`."""

import itertools
from dataclasses import dataclass
from typing import Any

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
FEW_TOKENS = 32
FEW_TOKENS_SHARED_MEMORY = 150 * 1024
"""What a program takes of it for so few tokens: more stages gain nothing, and adapters' kernels run beside it in the
rest."""
SHARES = ("tokens", "weights")
MANY_TOKENS = 256
"""Tokens from which on the tensor cores are the limit, not the kernel's bytes."""


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
    """Programs that copy what they share to all of them, each a part: 1, 2 or 4."""
    share: str = "tokens"
    """What a cluster's programs share: `"tokens"` where they are side by side on N, `"weights"` where on T."""
    group: int = 8
    """Tiles of tokens, or clusters' tiles, that are multiplied by one tile of the kernel after another."""
    piece_bytes: int = 128
    """What a token has at most in a piece of the result on its way through shared memory: 32, 64 or 128."""
    programs: int = PROGRAMS
    """Programs at most; each works off tiles until none is left."""

    def __post_init__(self) -> None:
        wrong = {}
        for name, step in (("block_n", ALIGNMENT), ("block_k", 64)):
            if getattr(self, name) < step or getattr(self, name) % step:
                wrong[name] = f"{getattr(self, name)} is not a multiple of {step}"
        for name, allowed in (
            ("consumers", (1, 2, 3)),
            ("rows", (64, 128)),
            ("cluster", (1, 2, 4)),
            ("share", SHARES),
            ("piece_bytes", (32, 64, 128)),
        ):
            if getattr(self, name) not in allowed:
                wrong[name] = f"{getattr(self, name)} is not one of {allowed}"
        least = {"split_k": 1, "stages": 2, "group": 1, "programs": self.cluster}
        for name, low in least.items():
            if getattr(self, name) < low:
                wrong[name] = f"{getattr(self, name)} is less than {low}"
        if self.share == "weights" and self.block_n % (ALIGNMENT * self.cluster):
            wrong["block_n"] = (
                f"{self.block_n} is not a multiple of {ALIGNMENT * self.cluster}, 8 a program that shares it"
            )
        if wrong:
            raise ValueError(f"linear: {', '.join(f'{name} {problem}' for name, problem in wrong.items())}")

    @property
    def token_tile(self) -> int:
        """Tokens of a tile."""
        return self.consumers * self.rows

    def accumulators(self, *, gated: bool) -> int:
        """Return the registers of a consumer's thread that hold sums."""
        return self.rows * self.block_n * (1 + gated) // 128

    def piece(self, out_bytes: int) -> int:
        """Return the output features of a piece of the result, of `out_bytes` an element."""
        most = self.piece_bytes // out_bytes
        return max(n for n in range(ALIGNMENT, most + 1, ALIGNMENT) if self.block_n % n == 0)

    def copied_tokens(self, tokens: int) -> int:
        """Return how many tokens of a tile are copied, of `tokens` [T]; the others' sums are not used."""
        step = ALIGNMENT * (self.cluster if self.share == "tokens" else 1)
        return min(self.token_tile, -(-tokens // step) * step)

    def token_rows(self, tokens: int) -> int:
        """Return the rows of shared memory for all stages' tokens, of `tokens` [T].

        They lie one behind another: a product that takes more than are copied reads the next stages' in their place.
        """
        return (self.stages - 1) * self.copied_tokens(tokens) + self.token_tile

    def shared_memory(self, tokens: int, *, gated: bool, out_bytes: int) -> int:
        """Return the bytes of shared memory that a program needs, where results have `out_bytes` an element."""
        weights = self.stages * self.block_n * (1 + gated)
        out = 2 * self.token_tile * self.piece(out_bytes) * out_bytes
        return (weights + self.token_rows(tokens)) * self.block_k * 2 + out + self.stages * 16 + 2048


def default_config(tokens: int, out_features: int, in_features: int, *, gated: bool) -> MosaicConfig:
    """Return what should suit an H100 for `tokens` [T] and a kernel [`out_features`, `in_features`], gated or not."""
    if tokens > MANY_TOKENS:
        return _config_of_many_tokens(tokens, out_features, gated=gated)
    parts, fits_tile = 1 + gated, tokens <= 2 * WARPGROUP_ROWS
    consumers = 1 if tokens <= (2 * WARPGROUP_ROWS if gated else WARPGROUP_ROWS) else 2
    # Gate and up pay for a second tile of tokens, whose weights come from the cache, with more stages in flight.
    is_halved = gated and not fits_tile
    rows = WARPGROUP_ROWS if is_halved or -(-tokens // consumers) <= WARPGROUP_ROWS else 2 * WARPGROUP_ROWS
    cluster = 1 if fits_tile or is_halved else 2
    block_k = 128 if fits_tile and in_features >= 512 else 64
    most = MAX_COLUMNS // 2 if is_halved else min(MAX_COLUMNS, MAX_ACCUMULATORS * 128 // rows // parts)
    splits = [split for split in range(1, 2 if gated else 17) if split == 1 or in_features // block_k >= 2 * split]
    shapes = itertools.product(range(ALIGNMENT, most + 1, ALIGNMENT), splits)
    tiles_t = -(-tokens // (consumers * rows))
    asked = 1 if tokens <= WARPGROUP_ROWS else 2  # neighbours ask for the same tokens at about the same time

    def cost(shape: tuple[int, int]) -> float:
        """Microseconds, by what memory and the second-level cache can deliver to a multiprocessor at a time."""
        block_n, split_k = shape
        tiles = tiles_t * cluster * -(-out_features // (block_n * cluster)) * split_k
        waves = -(-tiles // PROGRAMS)
        steps = -(-in_features // block_k // split_k)
        depth = steps * block_k * 2 * waves
        from_memory = parts * block_n * depth / 23.5e3
        from_cache = (parts * block_n + min(tokens, consumers * rows) / asked) * depth / 50e3
        first_tile = parts * block_n * block_k * 2 / 23.5e3
        partial_sums = 0 if split_k == 1 else 1 + split_k * tokens * out_features * 8 / 4e6
        return max(from_memory, from_cache) + first_tile + partial_sums + 0.6 * waves

    block_n, split_k = min(shapes, key=cost)
    steps = -(-in_features // block_k // split_k)
    shape = {"block_n": block_n, "consumers": consumers, "rows": rows, "block_k": block_k, "split_k": split_k}
    most_stages = max(2, min(12, steps))
    return deepest(tokens, **shape, cluster=cluster, most=most_stages, gated=gated)


def deepest(tokens: int, *, most: int, gated: bool, **shape: Any) -> MosaicConfig:
    """Return the config of `shape` with all the stages that shared memory has room for, `most` of them at most."""

    room = FEW_TOKENS_SHARED_MEMORY if tokens <= FEW_TOKENS else SHARED_MEMORY

    def fits(config: MosaicConfig) -> bool:
        return all(config.shared_memory(tokens, gated=gated, out_bytes=n) <= room for n in (2, 4))

    stages = range(2, most + 1)
    configs = [MosaicConfig(**shape, stages=count) for count in stages]
    # Two stages do not keep enough bytes on their way: then results leave in small pieces, for the sake of one more.
    configs = configs[:1] + [MosaicConfig(**shape, stages=3, piece_bytes=32)] * (most >= 3) + configs[1:]
    fitting = [config for config in configs if fits(config)]
    return fitting[-1] if fitting else configs[0]


def _config_of_many_tokens(tokens: int, out_features: int, *, gated: bool) -> MosaicConfig:
    """Return tiles of 128 tokens and 256 or so rows of the kernel, whichever leave the fewest programs without work."""
    cluster, token_tile = 2, 2 * WARPGROUP_ROWS

    def cost(block_n: int) -> tuple[int, int]:
        tiles = -(-tokens // (token_tile * cluster)) * -(-out_features // block_n)
        return -(-tiles // (PROGRAMS // cluster)) * block_n, abs(block_n - widest)

    widest = MAX_COLUMNS // (1 + gated)
    block_n = min((128, 144) if gated else (256, 192), key=cost)
    return MosaicConfig(
        block_n=block_n,
        consumers=2,
        cluster=cluster,
        share="weights",
        piece_bytes=128 if block_n % 64 == 0 else 32,
    )
