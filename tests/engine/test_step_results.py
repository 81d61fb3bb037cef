"""A call's arrays become each row's tokens and log-probabilities."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwen2_jax.engine.request import Request
from qwen2_jax.engine.schedule import ScheduledRow, SchedulerOutput
from qwen2_jax.engine.step_results import Launched, RowResult
from qwen2_jax.types import Logprob, SamplingParams


def make_row(
    start: int, num_tokens: int, samples: bool, prompt: int = 6, *, pools: bool = False, **params: Any
) -> ScheduledRow:
    request = Request(
        request_id="r",
        prompt_token_ids=list(range(10, 10 + prompt)),
        sampling_params=None if pools else SamplingParams(**params),
        max_model_len=50,
    )
    return ScheduledRow(request, start, num_tokens, samples, 0)


def output_of(*rows: ScheduledRow, num_steps: int = 1) -> SchedulerOutput:
    rows = tuple(row._replace(num_steps=num_steps) for row in rows)
    return SchedulerOutput(rows=rows, num_steps=num_steps, is_decode=num_steps > 1, admitted=())


def report(token_ids: list[list[int]], top_ids: tuple[int, ...] = (7, 8, 9)) -> dict[str, jnp.ndarray]:
    """Arrays by step and row; every log-probability is minus its token id, and the sampled ones have rank 50."""
    tokens = np.asarray(token_ids, np.int32)
    top = np.broadcast_to(np.asarray(top_ids, np.int32), (*tokens.shape, len(top_ids)))
    chosen = np.broadcast_to(np.asarray([30, 31], np.int32), (*tokens.shape, 2))
    arrays = {
        "token_ids": tokens,
        "logprobs": -tokens.astype(np.float32),
        "ranks": np.full(tokens.shape, 50, np.int32),
        "top_ids": top,
        "top_logprobs": -top.astype(np.float32),
        "chosen_logprobs": -chosen.astype(np.float32),
        "chosen_ranks": chosen + 100,
    }
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def sampled(token: int) -> dict[int, Logprob]:
    return {token: Logprob(-float(token), 50)}


def test_tokens_of_several_steps() -> None:
    rows = (make_row(5, 1, True), make_row(9, 1, True))
    results = Launched(output_of(*rows, num_steps=2), report([[1, 2, 0], [3, 4, 0]])).read()
    assert results == [RowResult(token_ids=[1, 3]), RowResult(token_ids=[2, 4])]


def test_a_row_that_rests_early_has_fewer_tokens() -> None:
    output = output_of(make_row(5, 1, True), make_row(9, 1, True), num_steps=2)
    rows = (output.rows[0]._replace(num_steps=1), output.rows[1])
    output = dataclasses.replace(output, rows=rows)
    results = Launched(output, report([[1, 2, 0], [3, 4, 0]])).read()
    assert results == [RowResult(token_ids=[1]), RowResult(token_ids=[2, 4])]


def test_a_chunk_in_the_middle_of_a_prompt_samples_nothing() -> None:
    rows = (make_row(0, 4, False, logprobs=1), make_row(5, 1, True))
    first, second = Launched(output_of(*rows), report([[1, 2]])).read()
    assert first == RowResult(token_ids=[])
    assert second.token_ids == [2]


def test_logprobs_name_the_sampled_token_first_and_no_token_twice() -> None:
    rows = (make_row(5, 1, True, logprobs=2), make_row(5, 1, True, logprobs=0), make_row(5, 1, True))
    outside, alone, without = Launched(output_of(*rows), report([[3, 4, 5]])).read()
    assert outside.logprobs is not None
    assert outside.logprobs == [sampled(3) | {7: Logprob(-7.0, 1), 8: Logprob(-8.0, 2)}]
    assert [list(position) for position in outside.logprobs] == [[3, 7, 8]]
    assert alone.logprobs == [sampled(4)]
    assert without.logprobs is None
    (among,) = Launched(output_of(rows[0]), report([[8]])).read()
    assert among.logprobs == [sampled(8) | {7: Logprob(-7.0, 1)}]


def test_all_logprobs() -> None:
    (result,) = Launched(output_of(make_row(5, 1, True, logprobs=-1)), report([[8]])).read()
    assert result.logprobs is not None
    assert sorted(result.logprobs[0]) == [7, 8, 9]


def test_chosen_tokens_come_instead_of_the_likeliest() -> None:
    row = make_row(5, 1, True, logprob_token_ids=[30, 31])
    (result,) = Launched(output_of(row, num_steps=2), report([[3], [31]])).read()
    assert result.logprobs == [
        sampled(3) | {30: Logprob(-30.0, 130), 31: Logprob(-31.0, 131)},
        sampled(31) | {30: Logprob(-30.0, 130)},
    ]


def test_prompt_logprobs_are_of_the_tokens_that_follow() -> None:
    """Entry i of the report is of the token after the step's i-th; a row's last prompt token has none after it."""
    rows = (make_row(8, 1, True), make_row(2, 2, False, prompt_logprobs=0), make_row(3, 3, True, prompt_logprobs=1))
    # The prompts are 10, 11, 12, ..., 15.
    both = report([[0, 13, 14, 14], [15, 0, 0, 0]])
    chunks = [
        {name: array[chunk] for name, array in both.items()} for chunk in range(2)
    ]  # the prompts are 10, 11, 12, ..., 15
    decode, chunk, last = Launched(output_of(*rows), report([[1, 0, 2]]), prompt_logprobs=chunks).read()
    assert decode.prompt_logprobs is None
    assert chunk.prompt_logprobs == [sampled(13), sampled(14)]
    assert last.prompt_logprobs == [sampled(14) | {7: Logprob(-7.0, 1)}, sampled(15) | {7: Logprob(-7.0, 1)}]


def test_an_output_has_no_prompt_logprobs_to_give() -> None:
    row = make_row(8, 1, True, prompt_logprobs=1)
    (result,) = Launched(output_of(row), report([[1]])).read()
    assert result.prompt_logprobs == []


def test_what_is_pooled() -> None:
    """Only of rows that complete their prompt, and nothing of rows that sample."""
    whole, last, first = (make_row(start, 6 - start, False, pools=True) for start in (0, 2, 0))
    rows = (whole, last, first._replace(num_tokens=2), make_row(0, 4, False))
    results = Launched(output_of(*rows), pooled=jnp.arange(8.0).reshape(4, 2)).read()
    assert [None if result.pooled is None else result.pooled.tolist() for result in results] == [
        [0, 1],
        [2, 3],
        None,
        None,
    ]
