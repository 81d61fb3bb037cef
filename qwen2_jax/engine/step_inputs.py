"""A step's inputs as one int32 vector: one copy to the device instead of one per array.

The host packs named arrays with `pack`, and the compiled step takes them apart with `unpack`; both follow the same
layout, which depends only on the bucket. float32 fields travel as their bits. Every array starts at a multiple of 256
bytes: XLA may hand a kernel a pointer into the vector instead of a copy, and Mosaic takes no other.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qwen2_jax.models.adapters import TableSizes

Shape = tuple[int, ...]
_ALIGNMENT = 64


@dataclass(frozen=True)
class Field:
    """One array of a layout: its shape, and whether its values are float32 (int32 otherwise)."""

    shape: Shape
    is_float: bool = False


@dataclass(frozen=True)
class StepLoRA:
    """The static sizes of what a step takes of adapters."""

    tables: TableSizes
    vocab: TableSizes | None = None
    """Of what changes embeddings and head; None without room for that."""
    has_vectors: bool = True
    """Whether adapters may have biases or magnitudes in the layers."""


Layout = dict[str, Field]


NOWHERE = 2**30
"""A position past every row's end: what is written there is dropped."""

_STATE_ROWS = ("row_indices", "token_rows")
_PADDING = {
    "num_steps": 1,
    "slot_mapping": -1,
    "sample_positions": NOWHERE,
    "last_positions": -1,
    "top_p": 1,
    "repetition_penalty": 1,
    "num_logprobs": -1,
    "scale_rows": -1,
    "full_embed_rows": -1,
    "full_head_rows": -1,
    "vector_rows": -1,
}
"""Values of padding that are not 0."""

SAMPLING_INTS = (
    "row_indices",  # the row of per-request state; max_num_seqs (a spare row) for padding
    "sample_positions",  # where in its sequence the sampled token goes; NOWHERE if the row does not sample
    "last_positions",  # where the last token goes that the row samples in this call; -1 for padding
    "output_indices",  # how many tokens the request has sampled before this one
    "prompt_lens",
    "seeds_low",
    "seeds_high",
    "top_k",  # 0 keeps all
    "has_logit_bias",
    "num_logprobs",  # -1: none wanted
)
SAMPLING_FLOATS = (
    "temperature",  # 0: greedy
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


VOCAB = "vocab_"
"""The beginning of the names of those for embeddings and head."""


def sampling_layout(rows: int) -> Layout:
    """What the sampler needs of each of R rows."""
    ints = {name: Field((rows,)) for name in SAMPLING_INTS}
    return ints | {name: Field((rows,), is_float=True) for name in SAMPLING_FLOATS}


def decode_layout(rows: int, blocks: int, lora: StepLoRA | None = None) -> Layout:
    """A call of decode steps: R rows with tables of M blocks, as they are at the first step, and their adapters."""
    adapters = {} if lora is None else lora_layout(rows, lora)
    return {
        "num_steps": Field((1,)),
        "input_ids": Field((rows,)),  # -1: the token is in the per-request state, sampled by the call before
        "position_ids": Field((rows,)),
        "block_tables": Field((rows, blocks)),
        **sampling_layout(rows),
        **adapters,
    }


def prefill_layout(tokens: int, rows: int, blocks: int, lora: StepLoRA | None = None) -> Layout:
    """A step with prefills, of T tokens in R rows with tables of M blocks, and their adapters."""
    adapters = {} if lora is None else lora_layout(tokens, lora)
    return {
        "input_ids": Field((tokens,)),  # -1: the token is in the per-request state, sampled by the call before
        "position_ids": Field((tokens,)),
        "token_rows": Field((tokens,)),  # the row of per-request state that each token belongs to
        "slot_mapping": Field((tokens,)),
        "query_start_loc": Field((rows + 1,)),
        "context_lens": Field((rows,)),
        "row_indices": Field((rows,)),  # the row of per-request state; max_num_seqs (a spare row) for padding
        "block_tables": Field((rows, blocks)),
        **adapters,
    }


def sample_layout(rows: int, lora: StepLoRA | None = None) -> Layout:
    """Sampling for R rows of the prefill step before, with adapters that change the head."""
    adapters = {} if lora is None else vocab_layout(rows, lora)
    return {"lm_head_indices": Field((rows,)), **sampling_layout(rows), **adapters}


def prompt_logprobs_layout(tokens: int, lora: StepLoRA | None = None) -> Layout:
    """Log-probabilities of T tokens that follow those from `start` on of the prefill step before."""
    adapters = {} if lora is None else vocab_layout(tokens, lora)
    return {"start": Field((1,)), "targets": Field((tokens,)), **adapters}


def lora_layout(tokens: int, lora: StepLoRA) -> Layout:
    """The adapters of a step of T tokens: what they add in the layers, and in the embeddings and the head."""
    layers = tables_layout(tokens, lora.tables) | {"scale_rows": Field((tokens,))}
    return layers | vocab_layout(tokens, lora)


def vocab_layout(tokens: int, lora: StepLoRA) -> Layout:
    """What the adapters of T tokens change in the embeddings and the head: `models.vocab_adapters.VocabTables`."""
    if lora.vocab is None:
        return {}
    tables = {VOCAB + name: field for name, field in tables_layout(tokens, lora.vocab).items()}
    return tables | {
        "token_pages": Field((tokens, lora.vocab.max_pages)),
        "full_embed_rows": Field((tokens,)),
        "vector_rows": Field((tokens,)),
        "full_head_rows": Field((tokens,)),
    }


def tables_layout(tokens: int, sizes: TableSizes) -> Layout:
    """The tables of T tokens: `models.adapters.LoRABatch`."""
    segments, items = (sizes.max_segments,), (sizes.max_items,)
    windows = {}
    if sizes.window is not None:
        count = -(-tokens // sizes.window)
        windows = {"token_places": Field((count * sizes.window,)), "window_entries": Field((count + 1,))}
        windows |= {name: Field((sizes.max_entries,)) for name in ("entry_items", "entry_tokens")}
    return {
        "token_order": Field((tokens,)),
        "segment_starts": Field((sizes.max_segments + 1,)),
        "segment_items": Field((sizes.max_segments + 1,)),
        "segment_vectors": Field(segments),
        "segment_pages": Field(segments),
        "segment_modules": Field(segments),
        "item_starts": Field(items),
        "item_counts": Field(items),
        "item_rows": Field(items),
        "item_pages": Field(items),
        "item_segments": Field(items),
        "item_modules": Field(items),
        "item_weights": Field(items, is_float=True),
        "num_segments": Field((1,)),
        "num_items": Field((1,)),
        **windows,
    }


def packed_size(layout: Layout) -> int:
    """Return the length of a packed vector in int32 words."""
    return sum(_padded(field) for field in layout.values())


def _padded(field: Field) -> int:
    """Return the words that a field takes, so that the next one is aligned."""
    return -(-math.prod(field.shape) // _ALIGNMENT) * _ALIGNMENT


def allocate(layout: Layout, spare_row: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return a vector of padding and, by name, views into it of the right shapes and dtypes; filling them packs it.

    What a program computes from padding alone, nobody reads. `spare_row` is the row of per-request state for it.
    """
    packed = np.zeros(packed_size(layout), np.int32)
    views, start = {}, 0
    for name, field in layout.items():
        end = start + math.prod(field.shape)
        part = packed[start:end]
        views[name] = (part.view(np.float32) if field.is_float else part).reshape(field.shape)
        if name in _PADDING:
            views[name][...] = _PADDING[name]
        elif name in _STATE_ROWS:
            views[name][...] = spare_row
        start += _padded(field)
    return packed, views


def unpack(packed: Array, layout: Layout) -> dict[str, Array]:
    """Return the arrays of a packed vector by name, inside a compiled step."""
    arrays, start = {}, 0
    for name, field in layout.items():
        end = start + math.prod(field.shape)
        part = packed[start:end].reshape(field.shape)
        arrays[name] = jax.lax.bitcast_convert_type(part, jnp.float32) if field.is_float else part
        start += _padded(field)
    return arrays
