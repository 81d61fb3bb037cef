"""How the Triton kernels of `linear` cut a projection into programs."""

from dataclasses import dataclass

GEMV_MAX_TOKENS = 1
"""Tokens up to which the multiply-reduce kernel is the default; it holds one token a program."""

GEMV_PREFETCH_BYTES = 4 << 20
"""What the multiply-reduce kernel asks for by default: what an H100 reads while one launch ends and one begins."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles and launch options of one projection. `block_t=1` means the multiply-reduce kernel, more the dot kernel."""

    block_n: int
    """Output features a program computes; a gated projection reads as many rows of the gate and of the up kernel."""
    block_k: int
    """Input features in a tile."""
    block_t: int = 1
    """Tokens in a tile."""
    slices_k: int = 1
    """Tiles of K that a program multiplies side by side, each on warps of its own; added up behind the loop."""
    split_k: int = 1
    """Programs that share an output tile; XLA adds their float32 partial sums in a fixed order."""
    num_warps: int = 4
    num_stages: int = 4
    """Tiles in flight through shared memory; 1 in the multiply-reduce kernel means straight to registers."""
    fuse_norm: bool = True
    """Normalise inside the kernel instead of in an XLA fusion before it."""
    bypass_l1: bool = False
    """Keep the kernel's tiles out of the first-level cache, where the token is; for the multiply-reduce kernel."""
    prefetch_bytes: int = 0
    """How much of `linear`'s `prefetch` to ask for, all programs together; its own size at most."""

    def __post_init__(self) -> None:
        powers = ("block_n", "block_k", "block_t", "slices_k", "num_warps")
        wrong = {name: getattr(self, name) for name in powers if getattr(self, name).bit_count() != 1}
        if wrong:
            raise ValueError(f"linear: powers of two are needed, not {wrong}")
        least = {"split_k": 1, "num_stages": 1, "prefetch_bytes": 0}
        low = {name: getattr(self, name) for name, least in least.items() if getattr(self, name) < least}
        if low:
            raise ValueError(f"linear: out of range: {low}")
        if self.block_t == 1 and (self.split_k, self.slices_k) != (1, 1):
            raise ValueError("linear: split_k and slices_k belong to the dot kernel, with block_t > 1")
        if self.block_t > 1 and self.bypass_l1:
            raise ValueError("linear: bypass_l1 belongs to the multiply-reduce kernel, with block_t = 1")


def default_config(tokens: int, out_features: int, in_features: int, *, gated: bool) -> Config:
    """Return tiles that suit an H100 for `tokens` [T], a kernel of [`out_features`, `in_features`], gated or not."""
    if tokens <= GEMV_MAX_TOKENS:
        return _gemv_config(out_features, in_features)
    block_t = min(max(16, 1 << (tokens - 1).bit_length()), 256)
    if block_t <= 32 and out_features < 16384 and not gated:
        return Config(block_n=16, block_k=128, block_t=block_t, slices_k=4, num_warps=4, num_stages=3)
    if block_t <= 32:
        return Config(block_n=64, block_k=64, block_t=block_t, num_warps=4, num_stages=5)
    block_n = 64 if gated or block_t < 128 else 128
    tiles = -(-out_features // block_n)
    split_k = 1 if gated else _split(in_features // 64, 1 + 131 // tiles)
    warps = 8 if block_t == 256 else 4
    return Config(
        block_n=block_n, block_k=64, block_t=block_t, split_k=split_k, num_warps=warps, num_stages=4, fuse_norm=False
    )


def tuning_key(tokens: int, out_features: int, in_features: int, *, gated: bool) -> str:
    """Return what tuned tiles are stored under; numbers of tokens share them up to the next power of two."""
    return f"t{1 << (tokens - 1).bit_length()}_n{out_features}_k{in_features}{'_gated' if gated else ''}"


def _gemv_config(out_features: int, in_features: int) -> Config:
    if out_features >= 65536:
        return Config(block_n=8, block_k=512, num_warps=4, num_stages=1)
    if in_features > 3 * out_features:
        return Config(block_n=4, block_k=512, num_warps=4, num_stages=4, prefetch_bytes=GEMV_PREFETCH_BYTES)
    return Config(block_n=2, block_k=1024, num_warps=4, num_stages=1, prefetch_bytes=GEMV_PREFETCH_BYTES)


def _split(tiles_k: int, wanted: int) -> int:
    """Return the smallest divisor of `tiles_k` that is at least `wanted`, or 1 where there is none up to 16."""
    return next((parts for parts in range(wanted, 17) if tiles_k % parts == 0), 1)
