"""The shapes that tests and benchmarks share: Qwen2.5's geometries, and small ragged batches."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A model's sizes, as its config.json names them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @property
    def group(self) -> int:
        """G: query heads that share one KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def num_parameters(self) -> int:
        """Weights in all, embeddings included; the query, key and value projections have biases."""
        heads = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        attention = heads * (self.hidden_size + 1) + self.num_attention_heads * self.head_dim * self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = (2 - self.tie_word_embeddings) * self.vocab_size * self.hidden_size
        return self.num_hidden_layers * (attention + mlp + 2 * self.hidden_size) + embeddings + self.hidden_size

    @property
    def projections(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the kernels that `linear` multiplies with, [out, in], gate and up stacked; the head is last."""
        heads, hidden = self.num_attention_heads * self.head_dim, self.hidden_size
        return {
            "qkv": (heads + 2 * self.num_key_value_heads * self.head_dim, hidden),
            "o": (hidden, heads),
            "gate_up": (2, self.intermediate_size, hidden),
            "down": (hidden, self.intermediate_size),
            "lm_head": (self.vocab_size, hidden),
        }


def _qwen2_5(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int, *, tied: bool
) -> Geometry:
    return Geometry(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


QWEN2_5: dict[str, Geometry] = {
    "0.5b": _qwen2_5(896, 4864, 24, 14, 2, 64, 151936, tied=True),
    "1.5b": _qwen2_5(1536, 8960, 28, 12, 2, 128, 151936, tied=True),
    "3b": _qwen2_5(2048, 11008, 36, 16, 2, 128, 151936, tied=True),
    "7b": _qwen2_5(3584, 18944, 28, 28, 4, 128, 152064, tied=False),
    "14b": _qwen2_5(5120, 13824, 48, 40, 8, 128, 152064, tied=False),
    "32b": _qwen2_5(5120, 27648, 64, 40, 8, 128, 152064, tied=False),
    "72b": _qwen2_5(8192, 29568, 80, 64, 8, 128, 152064, tied=False),
}
"""The text models of the Qwen2.5 family (their config.json on the Hugging Face hub)."""


Row = tuple[int, int]
"""A row's queries in a step, and the tokens of its context, of which they are the last."""


@dataclass(frozen=True, kw_only=True)
class RaggedSpec:
    """Sizes and options that attention is compiled for, and batches to run it on: their lengths are data."""

    name: str
    num_tokens: int
    """T; a batch with fewer queries is padded behind its last row."""
    num_rows: int
    """R; rows that a batch does not have are padding."""
    max_context: int
    """Tokens that a row's block table has room for."""
    batches: tuple[tuple[Row, ...], ...]
    is_decode: bool = False
    """Every row has one query: T = R, and `query_start_loc` is not given."""
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    block_size: int = 8
    window: int | None = None
    causal: bool = True


def _decodes(*context_lens: int) -> tuple[Row, ...]:
    return tuple((1, length) for length in context_lens)


def _prompts(*lens: int) -> tuple[Row, ...]:
    return tuple((length, length) for length in lens)


RAGGED_SPECS = (
    RaggedSpec(
        name="decode",
        num_tokens=6,
        num_rows=6,
        max_context=320,
        is_decode=True,
        batches=(_decodes(1), _decodes(7, 33, 1, 70, 16, 300), _decodes(9, 0, 40, 0, 0, 3), _decodes(0)),
    ),
    RaggedSpec(
        name="decode_window",
        num_tokens=4,
        num_rows=4,
        max_context=600,
        is_decode=True,
        window=12,
        batches=(_decodes(5, 300, 64, 12), _decodes(530, 257, 600, 599), _decodes(300, 0, 290)),
    ),
    RaggedSpec(  # Qwen2.5-0.5B's heads
        name="decode_14_2",
        num_tokens=3,
        num_rows=3,
        max_context=720,
        is_decode=True,
        group=7,
        head_dim=64,
        block_size=32,
        batches=(_decodes(700, 2, 513), _decodes(256, 255, 257)),
    ),
    RaggedSpec(
        name="decode_block_of_12",
        num_tokens=3,
        num_rows=3,
        max_context=300,
        is_decode=True,
        group=1,
        block_size=12,
        batches=(_decodes(300, 41, 95), _decodes(252, 240)),
    ),
    RaggedSpec(
        name="decode_block_of_320",
        num_tokens=2,
        num_rows=2,
        max_context=640,
        is_decode=True,
        block_size=320,
        batches=(_decodes(330, 5), _decodes(320, 640)),
    ),
    RaggedSpec(
        name="mixed_7_1",
        num_tokens=96,
        num_rows=6,
        max_context=320,
        kv_heads=1,
        group=7,
        batches=(
            _prompts(96),
            _prompts(5, 23, 1, 64),
            (*_prompts(0, 12, 0, 9), (1, 30)),
            ((7, 31), (16, 16), (30, 90), (2, 258)),
            ((1, 44), (1, 1), (1, 290), (19, 19), (6, 77)),
            _decodes(4, 300, 17),
            (),
        ),
    ),
    RaggedSpec(
        name="mixed_window",
        num_tokens=64,
        num_rows=4,
        max_context=480,
        window=20,
        batches=(_prompts(40, 17), ((30, 420), (9, 9), (2, 80)), ((1, 400), (1, 5), (33, 350)), ((1, 264), (20, 300))),
    ),
    RaggedSpec(
        name="long",
        num_tokens=600,
        num_rows=3,
        max_context=640,
        kv_heads=1,
        group=3,
        block_size=32,
        batches=(_prompts(530, 3), ((270, 600), (20, 290)), ((256, 256), (257, 500), (1, 512))),
    ),
    RaggedSpec(
        name="bidirectional",
        num_tokens=320,
        num_rows=3,
        max_context=320,
        causal=False,
        batches=(_prompts(11, 40, 2), _prompts(300, 1), ((10, 60), (1, 20))),
    ),
)
"""Every kind of step at small sizes: decodes, prompts, chunks and mixtures, around the edges of chunks and tiles."""


DECODE_TOKENS: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
"""Tokens of the decode steps whose projections and norms are timed."""

PREFILL_TOKENS: tuple[int, ...] = (2048, 8192)
"""Tokens of the steps with prefills whose projections and norms are timed."""

DECODE_BENCHES: tuple[tuple[int, int], ...] = ((1, 4096), (8, 1024), (32, 600), (32, 2048), (128, 1024), (256, 640))
"""Decode steps to time: rows, and the context of each."""

PREFILL_BENCHES: dict[str, tuple[Row, ...]] = {
    "1 x 8192": _prompts(8192),
    "16 x 2048": _prompts(*[2048] * 16),
    "4 x 2048": _prompts(*[2048] * 4),
    "16 x 512": _prompts(*[512] * 16),
    "4 x 256": _prompts(*[256] * 4),
    "2048 after 6144": ((2048, 8192),),
    "128 decodes, 1 x 2048": (*_decodes(*[640] * 128), *_prompts(2048)),
}
"""Steps with prefills to time."""


@dataclass(frozen=True, kw_only=True)
class LoRABench:
    """A step with adapters to time: its tokens are spread evenly over them."""

    tokens: int
    adapters: int
    rank: int = 16
    tile: int | None = None
    """The most tokens of a segment; None is what the tables have by default."""


LORA_BENCHES: tuple[LoRABench, ...] = (
    *(
        LoRABench(tokens=tokens, adapters=adapters)
        for tokens, adapters in ((1, 1), (8, 8), (32, 8), (32, 32), (128, 8), (128, 32), (8192, 1), (8192, 32))
    ),
    LoRABench(tokens=32, adapters=32, rank=64),
)
"""Decode steps and steps with prefills whose adapters are timed."""
