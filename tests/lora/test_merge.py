"""Merged adapters against PEFT's and against whole matrices; what cannot be merged."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora import merge_factors
from qwen2_jax.lora.adapter import Adapter, TokenRows
from qwen2_jax.lora.merge import merge_adapters, merged_rank, updates_of
from qwen2_jax.lora.merge_methods import combine
from qwen2_jax.lora.reader import read_adapter
from qwen2_jax.types import MergeOptions
from tests.lora.adapters import ADAPTERS, base_config
from tests.lora.merging import low_rank, make_adapter, product

Q, DOWN = (0, "q_proj"), (2, "down_proj")
PRUNE = MergeOptions(method="magnitude_prune", density=0.5)


def two_adapters() -> list[Adapter]:
    """Return adapters of different ranks that share `q_proj`; each has a module of its own."""
    return [make_adapter(1, {Q: 3, DOWN: 4}), make_adapter(2, {Q: 5, (1, "k_proj"): 2})]


@pytest.mark.parametrize("base", ["untied", "tied"])
@pytest.mark.parametrize(("case", "rank"), [("merged_cat", None), ("merged_svd", 8)])
def test_linear_is_what_peft_makes(base: str, case: str, rank: int | None) -> None:
    config = base_config(base)
    adapters = [read_adapter(ADAPTERS / base / name, config) for name in ("qv", "rslora")]
    merged = merge_adapters(adapters, [0.7, 0.5], MergeOptions(rank=rank)).adapter
    golden = read_adapter(ADAPTERS / base / case, config)
    assert merged.linear.keys() == golden.linear.keys()
    for module, update in golden.linear.items():
        assert merged.linear[module].rank == update.rank
        np.testing.assert_allclose(product(merged.linear[module]), product(update), atol=1e-5)


def test_linear_is_the_weighted_sum_with_the_sum_of_the_ranks() -> None:
    first, second = two_adapters()
    merged = merge_adapters([first, second], [0.7, -0.5])
    found = merged.adapter.linear
    assert {module: update.rank for module, update in found.items()} == {Q: 8, DOWN: 4, (1, "k_proj"): 2}
    assert set(merged.errors.values()) == {0.0}
    np.testing.assert_allclose(
        product(found[Q]), 0.7 * product(first.linear[Q]) - 0.5 * product(second.linear[Q]), atol=1e-5
    )
    np.testing.assert_allclose(product(found[DOWN]), 0.7 * product(first.linear[DOWN]), atol=1e-5)
    np.testing.assert_allclose(product(found[1, "k_proj"]), -0.5 * product(second.linear[1, "k_proj"]), atol=1e-5)


def test_linear_with_a_rank_is_the_nearest_product() -> None:
    first, second = two_adapters()
    merged = merge_adapters([first, second], [0.7, -0.5], MergeOptions(rank=4))
    whole = 0.7 * product(first.linear[Q]) - 0.5 * product(second.linear[Q])
    left, values, right = np.linalg.svd(whole)
    nearest = left[:, :4] * values[:4] @ right[:4]
    update = merged.adapter.linear[Q]
    assert update.rank == 4
    np.testing.assert_allclose(product(update), nearest, atol=1e-4)
    error = np.linalg.norm(whole - nearest) / np.linalg.norm(whole)
    assert merged.errors[Q] == pytest.approx(error, rel=1e-4) and merged.largest_error == merged.errors[Q] > 0.1
    assert merged.errors[DOWN] == 0


@pytest.mark.parametrize("rank", [None, 1, 6, 12, 90, 500])
@pytest.mark.parametrize(("method", "density"), [("linear", None), ("ties", 0.5)])
@pytest.mark.parametrize("ranks", [(3, 5), (40, 60)])
def test_the_rank_is_known_before_the_merge(
    method: Any, density: float | None, rank: int | None, ranks: tuple[int, int]
) -> None:
    """Also where the sum of the ranks is more than the 64 rows of a matrix."""
    options = MergeOptions(method=method, density=density, rank=rank)
    adapters = [make_adapter(seed, {Q: own}) for seed, own in enumerate(ranks)]
    merged = merge_adapters(adapters, [0.7, 0.5], options).adapter
    assert merged_rank(adapters, options) == merged.max_rank == merged.linear[Q].rank


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_other_methods_work_on_whole_products(method: Any) -> None:
    options = MergeOptions(method=method, density=0.5, rank=64)
    adapters = two_adapters()
    merged = merge_adapters(adapters, [0.7, 0.5], options)
    parts = [partial(np.asarray, product(adapter.linear[Q]).astype(np.float32)) for adapter in adapters]
    keys = [f"{adapter.digest}/q_proj of layer 0" for adapter in adapters]
    np.testing.assert_allclose(product(merged.adapter.linear[Q]), combine(options, parts, [0.7, 0.5], keys), atol=2e-5)
    assert merged.largest_error < 1e-5


def test_the_error_of_a_rank_is_reported() -> None:
    adapters = two_adapters()
    whole = product(
        merge_adapters(adapters, [1, 1], MergeOptions(method="ties", density=0.5, rank=64)).adapter.linear[Q]
    )
    merged = merge_adapters(adapters, [1, 1], MergeOptions(method="ties", density=0.5))
    assert {module: update.rank for module, update in merged.adapter.linear.items()} == {
        Q: 8,
        DOWN: 4,
        (1, "k_proj"): 2,
    }
    lost = np.linalg.norm(whole - product(merged.adapter.linear[Q])) / np.linalg.norm(whole)
    assert merged.errors[Q] == pytest.approx(lost, rel=1e-4)
    best = np.sqrt(np.square(np.linalg.svd(whole, compute_uv=False)[8:]).sum()) / np.linalg.norm(whole)
    assert lost == pytest.approx(best, rel=1e-4)


def test_the_randomised_factors_are_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_factors, "_WHOLE_SVD", 8)
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((200, 12)) @ rng.standard_normal((12, 300)) + rng.standard_normal((200, 300))
    factors = merge_factors.factorised(delta.astype(np.float32), 10)
    values = np.linalg.svd(delta, compute_uv=False)
    best = np.linalg.norm(values[10:]) / np.linalg.norm(values)
    assert (factors.b.shape, factors.a.shape) == ((200, 10), (10, 300))
    assert best <= factors.error + 1e-6 < 1.01 * best


def test_what_is_drawn_for_a_module_does_not_depend_on_the_others() -> None:
    options = MergeOptions(method="dare_linear", density=0.5, rank=64)
    adapters = two_adapters()
    alone = [make_adapter(1, {}, linear={Q: adapters[0].linear[Q]}), adapters[1]]
    both, one = (merge_adapters(some, [0.7, 0.5], options).adapter.linear[Q] for some in (adapters, alone))
    turned = merge_adapters(adapters[::-1], [0.5, 0.7], options).adapter.linear[Q]
    np.testing.assert_allclose(product(one), product(both), atol=1e-5)
    np.testing.assert_allclose(product(turned), product(both), atol=1e-5)


@pytest.mark.parametrize("options", [MergeOptions(), MergeOptions(rank=40), PRUNE])
def test_the_embedding_and_the_head_merge_as_projections_do(options: MergeOptions) -> None:
    rng = np.random.default_rng(0)
    ends = [{name: low_rank(rng, name, 3) for name in ("embed_tokens", "lm_head")} for _ in range(2)]
    adapters = [make_adapter(seed, {Q: 2}, **fields) for seed, fields in enumerate(ends)]
    merged = merge_adapters(adapters, [0.5, 2], options).adapter
    for name in ("embed_tokens", "lm_head"):
        expected = 0.5 * product(ends[0][name]) + 2 * product(ends[1][name])
        found = product(getattr(merged, name))
        assert found.shape == expected.shape
        assert np.allclose(found, expected, atol=1e-4) == (options.method == "linear")


def test_a_bias_of_b_is_merged_with_its_scaling() -> None:
    rng = np.random.default_rng(0)
    biases = [rng.standard_normal(64, dtype=np.float32) for _ in range(2)]
    adapters = [
        make_adapter(seed, {}, linear={Q: low_rank(rng, "q_proj", 2, bias=bias), DOWN: low_rank(rng, "down_proj", 2)})
        for seed, bias in enumerate(biases)
    ]
    merged = merge_adapters(adapters, [0.5, 2]).adapter.linear
    np.testing.assert_allclose(np.array(merged[Q].bias), 0.5 * 0.5 * biases[0] + 0.5 * 2 * biases[1], rtol=1e-5)
    assert merged[DOWN].bias is None
    pruned = merge_adapters(adapters, [0.5, 2], MergeOptions(method="magnitude_prune", density=1 / 64)).adapter
    assert 1 <= np.count_nonzero(np.array(pruned.linear[Q].bias)) <= 2


def test_biases_that_all_adapters_share_are_kept_where_that_is_exact() -> None:
    bias = np.arange(64, dtype=np.float32)
    adapters = [make_adapter(seed, {Q: 2}, biases={Q: bias.copy()}) for seed in range(2)]
    np.testing.assert_array_equal(merge_adapters(adapters, [0.3, 0.7]).adapter.biases[Q], bias)
    with pytest.raises(AdapterError, match="weights that sum to 1, not with method='linear' and the sum 1\\.2"):
        merge_adapters(adapters, [0.5, 0.7])
    with pytest.raises(AdapterError, match="not with method='magnitude_prune' and the sum 1"):
        merge_adapters(adapters, [0.3, 0.7], PRUNE)
    for other in (make_adapter(3, {Q: 2}), make_adapter(3, {Q: 2}, biases={Q: bias + 1})):
        with pytest.raises(AdapterError, match="replace the bias of q_proj of layer 0 by different values"):
            merge_adapters([other, adapters[0]], [0.3, 0.7])


def with_magnitude() -> Adapter:
    rng = np.random.default_rng(0)
    return make_adapter(3, {}, linear={Q: low_rank(rng, "q_proj", 2, magnitude=np.ones(64, np.float32))})


def with_rows() -> Adapter:
    rows = TokenRows(token_ids=np.array([1], np.int32), rows=np.zeros((1, 64), np.float32))
    return make_adapter(3, {Q: 2}, embed_token_rows=rows)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_magnitude, "adapter 2 of 2 has a DoRA magnitude for q_proj of layer 0, .* merge this adapter alone"),
        (with_rows, "adapter 2 of 2 has embed_token_rows, which replaces what the base has"),
        (lambda: make_adapter(3, {}, full_lm_head=np.zeros((384, 64))), "adapter 2 of 2 has full_lm_head"),
        (
            lambda: make_adapter(3, {Q: 2}, score=np.zeros((2, 64))),
            r"adapter 2 of 2 has a classification head \(score\), of which a merge has none",
        ),
        (
            lambda: make_adapter(3, {}, linear={Q: low_rank(np.random.default_rng(0), "k_proj", 2)}),
            r"the adapters' q_proj of layer 0 have sizes \[32, 64\] and \[64, 64\]; merge adapters for one base",
        ),
    ],
)
def test_what_is_no_sum_of_products_is_refused(make: Callable[[], Adapter], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        merge_adapters([make_adapter(1, {Q: 2}), make()], [1, 4])


@pytest.mark.parametrize("options", [MergeOptions(), MergeOptions(rank=1), PRUNE])
def test_a_merge_beyond_float32_is_refused(options: MergeOptions) -> None:
    huge = low_rank(np.random.default_rng(0), "q_proj", 2, b=np.full((64, 2), 3e38, np.float32))
    with pytest.raises(AdapterError, match="the merge of q_proj of layer 0 is beyond float32"):
        merge_adapters([make_adapter(1, {Q: 2}), make_adapter(2, {}, linear={Q: huge})], [1, 4], options)


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [
        (0, [], "0 adapters and 0 weights; give at least one"),
        (2, [1.0], "2 adapters and 1 weights"),
        (1, [float("nan")], "weight=nan is not a finite number"),
        (1, ["1"], "weight='1' is not a finite number"),
    ],
)
def test_weights_are_checked(count: int, weights: list[Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        merge_adapters(two_adapters()[:count], weights)


def test_the_digest_is_that_of_what_was_merged() -> None:
    adapters = two_adapters()
    variants = [
        (adapters, [0.7, 0.5], MergeOptions()),
        (adapters, [0.7, 0.6], MergeOptions()),
        (adapters[::-1], [0.7, 0.5], MergeOptions()),
        (adapters, [0.7, 0.5], MergeOptions(rank=4)),
        (adapters, [0.7, 0.5], PRUNE),
    ]
    digests = [merge_adapters(*variant).adapter.digest for variant in variants]
    assert len(set(digests)) == len(variants)
    assert merge_adapters(*variants[0]).adapter.digest == digests[0]


def test_the_documented_example_of_three_linears() -> None:
    """Two adapters that touch different inputs and outputs: only the sum of products keeps them apart."""
    a, b = np.eye(2)[:, None, :], np.eye(2)[:, :, None]
    weights = np.array([0.5, 0.5])
    update = low_rank(np.random.default_rng(0), "q_proj", 1)
    ours = merge_adapters(
        [
            make_adapter(i, {}, linear={Q: type(update)(a=a[i], b=b[i], scaling=1.0, bias=None, magnitude=None)})
            for i in range(2)
        ],
        list(weights),
    )
    found = {
        "sum of products": product(ours.adapter.linear[Q]),
        "PEFT `linear`": np.tensordot(np.sqrt(weights), b, 1) @ np.tensordot(np.sqrt(weights), a, 1),
        "LoRAX `linear`": np.tensordot(weights, b, 1) @ np.tensordot(weights, a, 1),
    }
    text = (Path(__file__).parents[2] / "docs" / "merging.md").read_text()
    for name, matrix in found.items():
        assert f"| {name} | `{np.round(matrix, 6).tolist()}` |" in text


def test_modules_come_in_the_order_of_the_layers() -> None:
    merged = merge_adapters(two_adapters(), [1, 1]).adapter
    assert list(updates_of(merged)) == [Q, (1, "k_proj"), DOWN]
