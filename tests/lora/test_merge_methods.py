"""The formulas on whole matrices, against plain ones in float64; what is drawn at random; options that are refused."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.merge_methods import combine, drop_at_random, generator, keep_largest
from qwen2_jax.types import MergeOptions

WEIGHTS = (0.7, -0.5, 1.2)
KEYS = ("first", "second", "third")


def deltas(shape: tuple[int, ...] = (30, 40)) -> list[np.ndarray]:
    """Return three deltas; entries of two of them are often of different signs."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for _ in WEIGHTS]


def merged(options: MergeOptions, arrays: list[np.ndarray], weights: tuple[float, ...] = WEIGHTS) -> np.ndarray:
    return combine(options, [partial(np.array, array) for array in arrays], weights, KEYS[: len(arrays)])


def largest(array: np.ndarray, count: int) -> np.ndarray:
    """Return the array with all but its `count` largest entries zero, by sorting."""
    kept = np.zeros(array.size)
    kept[np.argsort(-np.abs(array.astype(np.float64)), axis=None)[:count]] = 1
    return array.astype(np.float64) * kept.reshape(array.shape)


def elected(arrays: list[np.ndarray], majority: str) -> np.ndarray:
    """Return TIES' mean, entry by entry."""
    out = np.zeros(arrays[0].shape)
    for place in np.ndindex(out.shape):
        entries = [float(array[place]) for array in arrays]
        vote = sum(entries) if majority == "total" else sum(np.sign(entries))
        sign = 1 if vote >= 0 else -1
        agreeing = [weight * entry for weight, entry in zip(WEIGHTS, entries, strict=True) if np.sign(entry) == sign]
        out[place] = sum(agreeing) / max(len(agreeing), 1)
    return out


def weighted_sum(arrays: list[np.ndarray]) -> np.ndarray:
    return sum((w * array.astype(np.float64) for w, array in zip(WEIGHTS, arrays, strict=True)), np.zeros(()))


@pytest.mark.parametrize("density", [0.25, 1.0])
def test_magnitude_prune_sums_the_largest_entries(density: float) -> None:
    expected = weighted_sum([largest(delta, int(density * delta.size)) for delta in deltas()])
    found = merged(MergeOptions(method="magnitude_prune", density=density), deltas())
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_ties_is_the_mean_of_what_has_the_prevailing_sign(majority: Any) -> None:
    pruned = [largest(delta, int(0.6 * delta.size)) for delta in deltas()]
    found = merged(MergeOptions(method="ties", density=0.6, majority_sign_method=majority), deltas())
    np.testing.assert_allclose(found, elected(pruned, majority), atol=1e-6)


def test_the_two_majorities_differ_and_total_is_the_default() -> None:
    total, frequency, default = (
        merged(MergeOptions(method="ties", density=0.6, majority_sign_method=majority), deltas())
        for majority in ("total", "frequency", None)
    )
    assert not np.allclose(total, frequency)
    np.testing.assert_array_equal(total, default)


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_dare_ties_elects_among_what_was_drawn(majority: Any) -> None:
    drawn = [drop_at_random(d, 0.5, generator(3, key)) for d, key in zip(deltas(), KEYS, strict=True)]
    found = merged(MergeOptions(method="dare_ties", density=0.5, majority_sign_method=majority, seed=3), deltas())
    np.testing.assert_allclose(found, elected(drawn, majority), atol=1e-6)


def test_dare_keeps_the_share_and_divides_by_it() -> None:
    ones = np.ones((400, 500), np.float32)
    found = merged(MergeOptions(method="dare_linear", density=0.2), [ones], (1.0,))
    assert set(np.unique(found)) == {0.0, 5.0}
    assert np.count_nonzero(found) / found.size == pytest.approx(0.2, abs=0.005)


def test_dare_is_linear_in_the_mean() -> None:
    seeds, density = 200, 0.5
    options = [MergeOptions(method="dare_linear", density=density, seed=seed) for seed in range(seeds)]
    found = np.mean([merged(option, deltas()) for option in options], axis=0)
    expected, variance = weighted_sum(deltas()), (1 - density) / density / seeds
    energy = np.sum([np.square(weight * delta) for weight, delta in zip(WEIGHTS, deltas(), strict=True)])
    assert ((found - expected) ** 2).sum() == pytest.approx(variance * energy, rel=0.2)


def test_what_is_drawn_follows_from_seed_and_key_alone() -> None:
    first, again, other_key = (drop_at_random(deltas()[0], 0.5, generator(1, key)) for key in ("a", "a", "b"))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other_key)
    assert not np.array_equal(first, drop_at_random(deltas()[0], 0.5, generator(2, "a")))


def test_of_equal_entries_the_first_are_kept() -> None:
    array = np.array([[1, -1, 2], [1, 1, -1]], np.float32)
    np.testing.assert_array_equal(keep_largest(array, 0.5), [[1, -1, 2], [0, 0, 0]])
    assert not keep_largest(array, 0.1).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "tie"}, "method='tie' is unknown; use one of linear, ties, dare_linear, dare_ties"),
        ({"method": "ties"}, "method='ties' needs density"),
        ({"method": "ties", "density": 0.0}, r"density=0.0 is not in \(0, 1\]"),
        ({"method": "dare_ties", "density": 1.5}, r"density=1.5 is not in \(0, 1\]"),
        ({"method": "ties", "density": float("nan")}, r"density=nan is not in \(0, 1\]"),
        ({"method": "ties", "density": "0.5"}, r"density='0.5' is not in \(0, 1\]"),
        ({"density": 0.5}, "density=0.5 has no effect with method='linear'; leave it out, or use ties or"),
        ({"method": "ties", "density": 0.5, "majority_sign_method": "most"}, "majority_sign_method='most' is unknown"),
        ({"majority_sign_method": "total"}, "has no effect with method='linear'; leave it out, or use ties or dare_ti"),
        ({"method": "ties", "density": 0.5, "seed": 1}, "seed=1 has no effect with method='ties'"),
        ({"method": "dare_ties", "density": 0.5, "seed": 0.5}, "seed=0.5 is not an integer"),
        ({"rank": 0}, "rank=0 is not a positive integer"),
        ({"rank": 4.0}, "rank=4.0 is not a positive integer"),
    ],
)
def test_options_that_are_wrong_or_without_effect_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        MergeOptions(**fields)
