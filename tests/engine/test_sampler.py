"""The sampler against vLLM's definitions in numpy: which token, how often, and with which log-probabilities."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from qwen2_jax.engine.sampler import empty_samples, sample
from tests.engine.sampling import MAX_LOGPROBS, VOCAB, Batch, Row, draw_logits, probabilities, processed

SAMPLES = 4000
BIAS = np.zeros(VOCAB, np.float32)
BIAS[:4], BIAS[10:] = (3, -2, 100, 1), -np.inf  # as `allowed_token_ids=range(10)` with a `logit_bias`
PROMPT, OUTPUTS = (1, 2, 3, 3, 8), (5, 6, 5, 5, 9)
PENALTIES = [
    pytest.param({"presence_penalty": 1.5}, id="presence"),
    pytest.param({"frequency_penalty": 0.7}, id="frequency"),
    pytest.param({"repetition_penalty": 1.8}, id="repetition"),
    pytest.param({"presence_penalty": -2, "frequency_penalty": -0.5, "repetition_penalty": 0.6}, id="rewards"),
    pytest.param({"bias": BIAS, "presence_penalty": 1, "repetition_penalty": 1.2}, id="bias"),
]
DISTRIBUTIONS = [
    pytest.param(Row(), id="plain"),
    pytest.param(Row(temperature=0.5), id="cold"),
    pytest.param(Row(temperature=2.0, top_k=7), id="top_k"),
    pytest.param(Row(top_p=0.6), id="top_p"),
    pytest.param(Row(min_p=0.1), id="min_p"),
    pytest.param(Row(temperature=1.5, top_k=12, top_p=0.8, min_p=0.02), id="all_filters"),
    pytest.param(Row(temperature=2.0, top_p=0.8, min_p=0.1), id="min_p_comes_first"),
    pytest.param(Row(bias=BIAS), id="bias"),
    pytest.param(Row(bias=np.where(BIAS < 0, BIAS, 0), top_k=5, prompt=PROMPT, outputs=OUTPUTS), id="allowed_top_k"),
    pytest.param(
        Row(
            prompt=PROMPT, outputs=OUTPUTS, presence_penalty=1, frequency_penalty=0.3, repetition_penalty=1.3, top_p=0.9
        ),
        id="penalties_top_p",
    ),
]


@pytest.mark.parametrize("options", PENALTIES)
def test_greedy_takes_the_likeliest_of_the_processed_logits(options: dict[str, Any]) -> None:
    logits = draw_logits(32)
    rows = [Row(temperature=0, prompt=PROMPT, outputs=OUTPUTS, **options)] * 32
    expected = [np.argmax(processed(*pair)) for pair in zip(logits, rows, strict=True)]
    assert Batch(rows=rows).sample(logits)["token_ids"].tolist() == expected
    assert expected != logits.argmax(axis=1).tolist(), "the options change nothing"


def test_prompt_tokens_count_for_repetition_alone() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 8], logits[0, 5] = 3, 2.9
    rows = [Row(temperature=0, prompt=(8,), presence_penalty=2, frequency_penalty=2)]
    assert Batch(rows=rows).sample(logits)["token_ids"] == [8]
    rows = [Row(temperature=0, prompt=(8,), repetition_penalty=1.2)]
    assert Batch(rows=rows).sample(logits)["token_ids"] == [5]


@pytest.mark.parametrize("row", DISTRIBUTIONS)
def test_samples_follow_the_distribution(row: Row) -> None:
    """Chi-square over seeds of one row's token; 4.5 standard deviations, and the seeds are fixed."""
    logits = draw_logits(1, seed=3)
    rows = [replace(row, seed=2**40 + seed) for seed in range(SAMPLES)]
    tokens = Batch(rows=rows, places=[0] * SAMPLES).sample(np.tile(logits, (SAMPLES, 1)))["token_ids"]
    expected = SAMPLES * probabilities(logits[0], row)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    common = expected > 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    degrees = max(common.sum() - 1, 1)
    assert statistic < degrees + 4.5 * np.sqrt(2 * degrees)
    assert counts[~common].sum() <= expected[~common].sum() + 4.5 * np.sqrt(expected[~common].sum() + 1)


def draws(seed: int, count: int = 20) -> list[int]:
    """The first tokens of one seed's output, all tokens being alike."""
    rows = [Row(seed=seed, prompt=(1,), outputs=(4,) * index) for index in range(count)]
    return Batch(rows=rows).sample(np.zeros((count, VOCAB), np.float32))["token_ids"].tolist()


def test_a_seed_reproduces_an_output_of_independent_tokens() -> None:
    assert draws(7) == draws(7)
    assert len(set(draws(7))) > 10


def test_every_half_of_the_seed_counts() -> None:
    seeds = (0, 1, 2**31, 2**32, 2**33, 2**63, 2**64 - 1)
    assert len({tuple(draws(seed)) for seed in seeds}) == len(seeds)


MIXED = [
    Row(temperature=0),
    Row(seed=1, top_p=0.7, logprobs=True),
    Row(seed=2, top_k=3, prompt=PROMPT, outputs=OUTPUTS, repetition_penalty=1.5),
    Row(temperature=0, bias=BIAS, logprobs=True),
    Row(seed=3, min_p=0.2, temperature=1.7),
    Row(temperature=0, prompt=PROMPT, outputs=OUTPUTS, frequency_penalty=1),
    Row(seed=4, bias=BIAS, presence_penalty=1, outputs=(0, 1)),
    Row(seed=5),
]


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    logits = draw_logits(len(MIXED), seed=5)
    alone = [Batch(rows=[row], places=[2]).sample(logits[i : i + 1]) for i, row in enumerate(MIXED)]
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(MIXED))
        places = np.random.default_rng(seed + 50).permutation(len(MIXED) + 3)[: len(MIXED)]
        together = Batch(rows=[MIXED[i] for i in order], places=places.tolist()).sample(logits[order])
        for position, i in enumerate(order):
            assert together["token_ids"][position] == alone[i]["token_ids"][0]
            if MIXED[i].logprobs:
                np.testing.assert_allclose(together["logprobs"][position], alone[i]["logprobs"][0], atol=1e-6)
                assert together["top_ids"][position].tolist() == alone[i]["top_ids"][0].tolist()


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = draw_logits(3, seed=8)
    raw = logits.astype(np.float64)
    raw -= np.log(np.exp(raw).sum(axis=1, keepdims=True))
    chosen = (17, 2, 30)
    row = Row(temperature=0.3, bias=BIAS, outputs=OUTPUTS, repetition_penalty=2, logprobs=True, chosen=chosen)
    out = Batch(rows=[row, Row(seed=1, logprobs=True), Row(temperature=0, logprobs=True)]).sample(logits)
    order = np.argsort(-raw, axis=1)
    ranks = np.argsort(order, axis=1) + 1
    tokens = out["token_ids"]
    assert tokens[2] == order[2, 0] and tokens[0] != order[0, 0]
    np.testing.assert_allclose(out["logprobs"], raw[range(3), tokens], atol=1e-5)
    assert out["ranks"].tolist() == ranks[range(3), tokens].tolist()
    assert out["top_ids"].tolist() == order[:, :MAX_LOGPROBS].tolist()
    np.testing.assert_allclose(out["top_logprobs"], np.take_along_axis(raw, order[:, :MAX_LOGPROBS], 1), atol=1e-5)
    np.testing.assert_allclose(out["chosen_logprobs"][0], raw[0, list(chosen)], atol=1e-5)
    assert out["chosen_ranks"][0].tolist() == ranks[0, list(chosen)].tolist()


def test_nobody_pays_for_logprobs_that_nobody_wants() -> None:
    logits = draw_logits(2)
    out = Batch(rows=[Row(temperature=0, chosen=(1,)), Row()]).sample(logits)
    assert not any(array.any() for name, array in out.items() if name != "token_ids")


@pytest.mark.parametrize("max_logprobs", [0, 1, VOCAB])
def test_outputs_have_the_shapes_of_empty_samples(max_logprobs: int) -> None:
    logits = draw_logits(2)
    rows, state = Batch(rows=[Row(logprobs=True, seed=seed) for seed in range(2)]).arrays()
    out = jax.jit(sample, static_argnums=3)(logits, rows, state, max_logprobs)
    empty = empty_samples(2, max_logprobs, state["logprob_token_ids"].shape[1])
    assert jax.tree.map(lambda a: (a.shape, a.dtype), out) == jax.tree.map(lambda a: (a.shape, a.dtype), empty)
    assert out["top_ids"].tolist() == np.argsort(-logits, axis=1)[:, :max_logprobs].tolist()
