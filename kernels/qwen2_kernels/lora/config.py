"""How the Triton kernels of `lora` cut a projection into programs."""

from dataclasses import dataclass

VECTOR, DOT = "vector", "dot"


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig:
    """Tiles of the first product, x a^T: `"vector"` multiplies token by token, `"dot"` whole segments."""

    kind: str
    block_k: int
    """Input features in a tile."""
    num_blocks: int = 1
    """Tiles that a program adds up, for `"dot"`; what several programs leave of one item is added up by expand."""
    all_slices: bool = False
    """A program has all modules of a page, so that x is read once, for `"dot"`; else one."""
    num_warps: int = 4
    num_stages: int = 1
    max_programs: int = 8192
    """Programs at most, which then take work in turns: those without any cost a launch's time all the same."""

    def __post_init__(self) -> None:
        _check(self, "block_k", "num_warps")
        if self.kind == VECTOR and (self.num_blocks, self.all_slices) != (1, False):
            raise ValueError("lora: num_blocks and all_slices belong to kind='dot'")


@dataclass(frozen=True, kw_only=True)
class ExpandConfig:
    """Tiles of the second product, with b, and of all that is added to it. For `kind`, see `ShrinkConfig`."""

    kind: str
    block_n: int
    """Output features in a tile, at most a head where the projection has heads."""
    num_tiles: int = 1
    """Tiles that a program goes through, for `"dot"`."""
    num_warps: int = 1
    num_stages: int = 1
    max_programs: int = 16384

    def __post_init__(self) -> None:
        _check(self, "block_n", "num_warps")
        if self.kind == VECTOR and self.num_tiles != 1:
            raise ValueError("lora: num_tiles belongs to kind='dot'")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles of both products."""

    shrink: ShrinkConfig
    expand: ExpandConfig


def _check(config: ShrinkConfig | ExpandConfig, *powers: str) -> None:
    if config.kind not in (VECTOR, DOT):
        raise ValueError(f"lora: kind is 'vector' or 'dot', not {config.kind!r}")
    numbers = {name: value for name, value in vars(config).items() if not isinstance(value, bool | str)}
    wrong = {name: value for name, value in numbers.items() if value < 1}
    wrong |= {name: numbers[name] for name in powers if numbers[name].bit_count() != 1}
    if wrong:
        raise ValueError(f"lora: sizes are at least 1, and powers of two for {', '.join(powers)}; not {wrong}")


def default_config(tokens: int, in_features: int, out_features: int, tile: int, *, is_gated: bool) -> Config:
    """Return tiles that suit an H100 for steps of `tokens` in segments of up to `tile`; gated: of out features each."""
    is_wide = in_features > 8192
    if tokens == 1:
        shrink = ShrinkConfig(kind=VECTOR, block_k=512 if is_wide else 256)
        return Config(shrink=shrink, expand=ExpandConfig(kind=VECTOR, block_n=128))
    if tile <= 16:
        # Up to 32 tokens the model's own products run beside these kernels, and small programs fill what they leave.
        blocks = 8 if is_wide and tokens > 32 else 4
        shrink = ShrinkConfig(kind=DOT, block_k=128, num_blocks=blocks, num_warps=2, num_stages=4)
        tiles = 4 if is_gated and tokens > 32 else 2
        return Config(
            shrink=shrink, expand=ExpandConfig(kind=DOT, block_n=128, num_tiles=tiles, num_warps=4, num_stages=3)
        )
    splits = 8 if is_wide else 4
    return Config(
        shrink=ShrinkConfig(
            kind=DOT,
            block_k=64,
            num_blocks=-(-in_features // (64 * splits)),
            all_slices=True,
            num_warps=4,
            num_stages=4,
        ),
        expand=ExpandConfig(kind=DOT, block_n=128, num_tiles=4, num_warps=4, num_stages=2),
    )
