"""Sums of low-rank products as one product, and a matrix as the nearest product of a given rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen2_jax.lora.adapter import LowRank
from qwen2_jax.lora.merge_methods import generator

# Up to this many rows or columns LAPACK's whole SVD takes a tenth of a second or less.
_WHOLE_SVD = 256
# Of the randomised SVD (Halko, Martinsson and Tropp, arXiv:0909.4061): columns beyond those asked for, and iterations.
_OVERSAMPLING = 16
_POWER_ITERATIONS = 3


@dataclass(frozen=True, kw_only=True)
class Factors:
    """`b @ a` in place of a matrix M.

    `a` is `[r, in]`, `b` is `[out, r]`, both float32; `error` is `||M - b @ a|| / ||M||` in the Frobenius norm.
    """

    a: np.ndarray
    b: np.ndarray
    error: float


def delta_of(update: LowRank) -> np.ndarray:
    """Return `scaling * b @ a` `[out, in]` in float32."""
    return (update.b.astype(np.float32) * np.float32(update.scaling)) @ update.a.astype(np.float32)


def concatenated(updates: Sequence[LowRank], weights: Sequence[float]) -> Factors:
    """Return the weighted sum of the products exactly, with the sum of the ranks: rows of A and columns of B in turn.

    Weights and scalings are folded into B.
    """
    a = np.concatenate([update.a.astype(np.float32) for update in updates])
    folded = [
        update.b.astype(np.float32) * np.float32(weight * update.scaling)
        for update, weight in zip(updates, weights, strict=True)
    ]
    return Factors(a=a, b=np.concatenate(folded, axis=1), error=0.0)


def truncated(factors: Factors, rank: int) -> Factors:
    """Return the best factors of at most `rank` for an exact product, which is never multiplied out.

    Its singular values are those of the small matrix between the orthogonal parts of B and A.
    """
    if factors.a.shape[0] <= rank:
        return factors
    b, b_rest = np.linalg.qr(factors.b)
    a, a_rest = np.linalg.qr(factors.a.T)
    left, values, right = np.linalg.svd(b_rest @ a_rest.T)
    root = np.sqrt(values[:rank])
    lost, whole = np.linalg.norm(values[rank:]), np.linalg.norm(values)
    return Factors(
        a=root[:, None] * right[:rank] @ a.T, b=b @ (left[:, :rank] * root), error=float(lost / whole) if whole else 0.0
    )


def factorised(delta: np.ndarray, rank: int) -> Factors:
    """Return factors of at most `rank` for `delta` `[out, in]`: its leading singular vectors.

    They are exact for small matrices and, for those with more than 256 rows and columns, from a randomised SVD with
    fixed random numbers, whose error is within 1% of the least.
    """
    rank = min(rank, *delta.shape)
    if min(delta.shape) <= max(_WHOLE_SVD, rank + _OVERSAMPLING):
        left, values, right = np.linalg.svd(delta, full_matrices=False)
    else:
        left, values, right = _leading_svd(delta, rank + _OVERSAMPLING)
    root = np.sqrt(values[:rank])
    a, b = root[:, None] * right[:rank], left[:, :rank] * root
    whole = np.linalg.norm(delta)
    return Factors(a=a, b=b, error=float(np.linalg.norm(delta - b @ a) / whole) if whole else 0.0)


def _leading_svd(delta: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return nearly the `count` leading singular vectors `[out, count]` and `[count, in]`, and values between them."""
    start = generator(0, "sketch").standard_normal((delta.shape[1], count), dtype=np.float32)
    columns, _ = np.linalg.qr(delta @ start)
    for _ in range(_POWER_ITERATIONS):
        rows, _ = np.linalg.qr(delta.T @ columns)
        columns, _ = np.linalg.qr(delta @ rows)
    rows, rest = np.linalg.qr(delta.T @ columns)
    left, values, right = np.linalg.svd(rest.T)
    return columns @ left, values, right @ rows.T
