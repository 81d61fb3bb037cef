"""How the updates of one module become one: the formulas of PEFT's `utils/merge_utils.py`, on whole matrices.

A delta is what one adapter adds to one weight, `scaling * b @ a` `[out, in]` in float32. The formulas are about deltas,
never about A and B apart, which a product does not allow (docs/merging.md).
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from qwen2_jax.lora_requests import DRAWING, ELECTING, MajoritySign, MergeOptions

Delta = Callable[[], np.ndarray]
"""Makes a delta anew at each call, so that memory holds one of them however many adapters there are."""


def combine(
    options: MergeOptions, deltas: Sequence[Delta], weights: Sequence[float], keys: Sequence[str]
) -> np.ndarray:
    """Return the merge of `deltas`, arrays of one shape, in float32.

    `keys` names each delta (its adapter and module): what DARE draws for it follows from its key and the seed alone,
    whatever is merged before it.
    """
    sparse = [partial(_sparse, options, delta, key) for delta, key in zip(deltas, keys, strict=True)]
    if options.method in ELECTING:
        return _elected(sparse, weights, options.majority_sign_method or "total")
    return _weighted_sum(sparse, weights)


def _sparse(options: MergeOptions, delta: Delta, key: str) -> np.ndarray:
    if options.density is None or options.density == 1:
        return delta()
    if options.method in DRAWING:
        return drop_at_random(delta(), options.density, generator(options.seed or 0, key))
    return keep_largest(delta(), options.density)


def generator(seed: int, key: str) -> np.random.Generator:
    """Return a generator whose numbers follow from `seed` and `key`."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()))


def keep_largest(delta: np.ndarray, density: float) -> np.ndarray:
    """Return `delta` with all but its `int(density * size)` largest entries zero; the first of equal ones stay."""
    magnitudes = np.abs(delta).ravel()
    count = int(density * magnitudes.size)
    if count == 0:
        return np.zeros_like(delta)
    smallest = np.partition(magnitudes, -count)[-count]
    kept = magnitudes > smallest
    kept[np.flatnonzero(magnitudes == smallest)[: count - np.count_nonzero(kept)]] = True
    return delta * kept.reshape(delta.shape)


def drop_at_random(delta: np.ndarray, density: float, rng: np.random.Generator) -> np.ndarray:
    """Return `delta` with each entry zero with probability `1 - density`, the others divided by `density`.

    The division keeps the expectation (DARE, arXiv:2311.03099).
    """
    kept = rng.random(delta.shape, dtype=np.float32) < density
    return delta * kept / np.float32(density)


def _weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> np.ndarray:
    total = np.float32(weights[0]) * deltas[0]()
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total += np.float32(weight) * delta()
    return total


def _elected(deltas: Sequence[Delta], weights: Sequence[float], majority: MajoritySign) -> np.ndarray:
    """Return the mean of the weighted entries whose sign prevails (TIES, arXiv:2306.01708).

    The election is before the weights, as in PEFT: a negative weight does not turn an adapter's vote.
    """
    votes = sum((delta() if majority == "total" else np.sign(delta()) for delta in deltas), np.float32(0))
    positive = votes >= 0
    total = np.zeros(positive.shape, np.float32)
    count = np.zeros(positive.shape, np.float32)
    for make, weight in zip(deltas, weights, strict=True):
        delta = make()
        agrees = np.where(positive, delta > 0, delta < 0)
        total += np.float32(weight) * delta * agrees
        count += agrees
    return total / np.maximum(count, 1)
