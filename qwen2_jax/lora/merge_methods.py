"""How the updates of one module become one: the formulas of PEFT's `utils/merge_utils.py`, on whole matrices.

A delta is what one adapter adds to one weight, `scaling * b @ a` `[out, in]` in float32. The formulas are about deltas,
never about A and B apart, which a product does not allow (docs/merging.md).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np

from qwen2_jax.errors import AdapterError

Method = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
MajoritySign = Literal["total", "frequency"]
Delta = Callable[[], np.ndarray]
"""Makes a delta anew at each call, so that memory holds one of them however many adapters there are."""

_ELECTING: tuple[Method, ...] = ("ties", "dare_ties")
_DRAWING: tuple[Method, ...] = ("dare_linear", "dare_ties")


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How adapters are merged; what the method has no use for is refused, so that no option is ignored.

    Raises `AdapterError`, which names the field, its value and what is allowed.
    """

    method: Method = "linear"
    """`linear`: the weighted sum. `magnitude_prune`: that of each delta's largest entries. `dare_linear`: that of
    random entries, scaled up by `1 / density`. `ties` and `dare_ties`: of what either of these leaves, each entry takes
    the sign that prevails, and the mean of the weighted entries with that sign."""
    density: float | None = None
    """The share of a delta's entries that is kept, in (0, 1]; needed by all methods but `linear`."""
    majority_sign_method: MajoritySign | None = None
    """Which sign prevails in `ties` and `dare_ties`: the sum's (`total`, also for None) or the more frequent."""
    seed: int | None = None
    """What `dare_linear` and `dare_ties` draw from; None is 0."""
    rank: int | None = None
    """The most that a module of the result may have; None is the sum of the merged ranks."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise AdapterError(f"method={self.method!r} is unknown; use one of {', '.join(get_args(Method))}")
        self._check_density()
        if self.majority_sign_method not in (None, *get_args(MajoritySign)):
            raise AdapterError(
                f"majority_sign_method={self.majority_sign_method!r} is unknown; use 'total' or 'frequency'"
            )
        if self.majority_sign_method is not None and self.method not in _ELECTING:
            raise self._useless("majority_sign_method", _ELECTING)
        if self.seed is not None and self.method not in _DRAWING:
            raise self._useless("seed", _DRAWING)
        if self.seed is not None and not _is_int(self.seed):
            raise AdapterError(f"seed={self.seed!r} is not an integer")
        if self.rank is not None and (not _is_int(self.rank) or self.rank < 1):
            raise AdapterError(f"rank={self.rank!r} is not a positive integer; leave it out for the sum of the ranks")

    def _check_density(self) -> None:
        pruning = tuple(method for method in get_args(Method) if method != "linear")
        if self.method == "linear":
            if self.density is not None:
                raise self._useless("density", pruning)
        elif self.density is None:
            raise AdapterError(
                f"method={self.method!r} needs density, the share of entries to keep: in (0, 1], say 0.5"
            )
        elif isinstance(self.density, bool) or not isinstance(self.density, int | float) or not 0 < self.density <= 1:
            raise AdapterError(f"density={self.density!r} is not in (0, 1]; it is the share of entries to keep")

    def _useless(self, field: str, methods: tuple[Method, ...]) -> AdapterError:
        return AdapterError(
            f"{field}={getattr(self, field)!r} has no effect with method={self.method!r}; leave it out, or use "
            f"{' or '.join(methods)}"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def combine(
    options: MergeOptions, deltas: Sequence[Delta], weights: Sequence[float], keys: Sequence[str]
) -> np.ndarray:
    """Return the merge of `deltas`, arrays of one shape, in float32.

    `keys` names each delta (its adapter and module): what DARE draws for it follows from its key and the seed alone,
    whatever is merged before it.
    """
    sparse = [partial(_sparse, options, delta, key) for delta, key in zip(deltas, keys, strict=True)]
    if options.method in _ELECTING:
        return _elected(sparse, weights, options.majority_sign_method or "total")
    return _weighted_sum(sparse, weights)


def _sparse(options: MergeOptions, delta: Delta, key: str) -> np.ndarray:
    if options.density is None or options.density == 1:
        return delta()
    if options.method in _DRAWING:
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
