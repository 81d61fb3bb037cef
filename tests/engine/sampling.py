"""What the sampler takes, from a few words, and what vLLM's definitions say it gives, by sorting, in numpy."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from qwen2_jax.engine.sampler import sample
from qwen2_jax.engine.step_inputs import SAMPLING_FLOATS, SAMPLING_INTS

VOCAB = 40
MAX_LOGPROBS = 5
LENGTH = 24  # of the per-request token history

run = jax.jit(functools.partial(sample, max_logprobs=MAX_LOGPROBS))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row's parameters; the defaults ask for nothing but a random token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: np.ndarray | None = None
    prompt: Sequence[int] = ()
    outputs: Sequence[int] = ()
    seed: int = 0
    logprobs: bool = False
    chosen: Sequence[int] = ()


@dataclass(kw_only=True)
class Batch:
    """Rows as the device gets them; row i of the batch has its state in row `places[i]`."""

    rows: Sequence[Row]
    places: Sequence[int] = field(default_factory=list)

    def sample(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(array) for name, array in run(logits, *self.arrays()).items()}

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        places = list(self.places) or list(range(len(self.rows)))
        size = max(len(self.rows), *places) + 1
        arrays = {name: np.zeros(len(self.rows), np.int32) for name in SAMPLING_INTS}
        arrays |= {name: np.zeros(len(self.rows), np.float32) for name in SAMPLING_FLOATS}
        state = {
            "token_ids": np.full((size, LENGTH), 4, np.int32),  # what lies behind the history does not count
            "logit_bias": np.full((size, VOCAB), np.nan, np.float32),
            "logprob_token_ids": np.full((size, 3), -1, np.int32),
        }
        for index, (row, place) in enumerate(zip(self.rows, places, strict=True)):
            history = [*row.prompt, *row.outputs]
            state["token_ids"][place, : len(history)] = history
            state["logprob_token_ids"][place, : len(row.chosen)] = row.chosen
            if row.bias is not None:
                state["logit_bias"][place] = row.bias
            values = {
                "row_indices": place,
                "sample_positions": len(history),
                "last_positions": len(history),
                "output_indices": len(row.outputs),
                "prompt_lens": len(row.prompt),
                "seeds_low": np.uint32(row.seed & 0xFFFFFFFF).view(np.int32),
                "seeds_high": np.uint32(row.seed >> 32).view(np.int32),
                "has_logit_bias": row.bias is not None,
                "num_logprobs": 1 if row.logprobs else -1,
                "top_k": row.top_k,
            }
            for name, array in arrays.items():
                array[index] = values[name] if name in values else getattr(row, name)
        return arrays, state


def processed(logits: np.ndarray, row: Row) -> np.ndarray:
    """The logits [V] that greedy rows choose from: bias first, then vLLM's three penalties."""
    logits = logits.astype(np.float64) + (0 if row.bias is None else row.bias)
    for token in set(row.prompt) | set(row.outputs):
        factor = 1 / row.repetition_penalty if logits[token] > 0 else row.repetition_penalty
        logits[token] *= factor
    for token in row.outputs:
        logits[token] -= row.frequency_penalty
    for token in set(row.outputs):
        logits[token] -= row.presence_penalty
    return logits


def probabilities(logits: np.ndarray, row: Row) -> np.ndarray:
    """The distribution [V] that a random row's token has: temperature, min-p, top-k, top-p, softmax."""
    logits = processed(logits, row) / row.temperature
    weights = np.exp(logits - logits.max())
    weights[weights < row.min_p] = 0  # the likeliest token's weight is 1
    if row.top_k:
        weights[weights < np.sort(weights)[-row.top_k]] = 0
    if row.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        last = order[before < row.top_p * weights.sum()][-1]
        weights[weights < weights[last]] = 0
    return weights / weights.sum()


def draw_logits(rows: int, seed: int = 0) -> np.ndarray:
    return (2 * np.random.default_rng(seed).standard_normal((rows, VOCAB))).astype(np.float32)
