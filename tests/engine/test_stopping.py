"""Which token ends a request, and which condition wins."""

import random
from dataclasses import replace

import pytest

from qwen2_jax.engine.request import Request
from qwen2_jax.engine.stopping import Stop, check_token_stop, count_passing, ends_in_repetition
from qwen2_jax.types import RepetitionDetectionParams, SamplingParams

EOS = 2
STOP = Stop("stop", None)
LENGTH = Stop("length", None)


def make_request(outputs: list[int], params: SamplingParams | None, max_model_len: int = 100) -> Request:
    request = Request(
        request_id="r",
        prompt_token_ids=[5, 6, 7],
        sampling_params=params,
        max_model_len=max_model_len,
        eos_token_ids=(EOS, 3),
    )
    request.output_token_ids = outputs
    return request


def stop_of(outputs: list[int], params: SamplingParams | None, *, max_model_len: int = 100) -> Stop | None:
    return check_token_stop(make_request(outputs, params, max_model_len))


@pytest.mark.parametrize("seed", range(200))
def test_passing_tokens_end_nothing(seed: int) -> None:
    rng = random.Random(seed)
    params = SamplingParams(
        max_tokens=rng.randrange(1, 14),
        min_tokens=rng.choice([0, 1]),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=rng.choice([[], [7], [8, 9]]),
        repetition_detection=rng.choice([None, None, RepetitionDetectionParams(max_pattern_size=2, min_count=2)]),
    )
    request = make_request([10] * rng.randrange(0, params.max_tokens or 1), params, rng.randrange(5, 20))
    tokens = [rng.randrange(2, 40) for _ in range(rng.randrange(0, 9))]
    passing = count_passing(request, tokens)
    ends = []
    for token in tokens[:passing]:
        request.output_token_ids.append(token)
        ends.append(check_token_stop(request))
    assert not any(ends)
    if params.repetition_detection is None and passing < len(tokens):  # and no token is left that would pass
        request.output_token_ids.append(tokens[passing])
        assert check_token_stop(request) is not None or len(request.output_token_ids) < params.min_tokens


def test_end_tokens_stop_without_a_reason() -> None:
    assert stop_of([9], SamplingParams()) is None
    assert stop_of([9, EOS], SamplingParams()) == STOP
    assert stop_of([9, 3], SamplingParams()) == STOP
    assert stop_of([EOS, 9], SamplingParams()) is None


def test_stop_token_ids_are_named_and_come_after_the_end_token() -> None:
    assert stop_of([9, 8], SamplingParams(stop_token_ids=[7, 8])) == Stop("stop", 8)
    assert stop_of([EOS], SamplingParams(stop_token_ids=[EOS])) == STOP
    assert stop_of([EOS], SamplingParams(stop_token_ids=[EOS], ignore_eos=True)) == Stop("stop", EOS)


def test_ignore_eos_goes_on() -> None:
    assert stop_of([EOS], SamplingParams(ignore_eos=True)) is None


@pytest.mark.parametrize("outputs, expected", [([EOS], None), ([9, EOS], None), ([9, 9, EOS], STOP)])
def test_before_min_tokens_nothing_stops(outputs: list[int], expected: Stop | None) -> None:
    assert stop_of(outputs, SamplingParams(min_tokens=3)) == expected
    stop_token = SamplingParams(min_tokens=3, stop_token_ids=[EOS], ignore_eos=True)
    assert stop_of(outputs, stop_token) == (expected and Stop("stop", EOS))


def test_length_is_max_tokens_or_the_context() -> None:
    assert stop_of([9, 9], SamplingParams(max_tokens=3)) is None
    assert stop_of([9, 9, 9], SamplingParams(max_tokens=3)) == LENGTH
    assert stop_of([9, 9], SamplingParams(max_tokens=None), max_model_len=5) == LENGTH
    assert stop_of([9, 9], SamplingParams(max_tokens=50, min_tokens=40), max_model_len=5) == LENGTH
    assert stop_of([9, 9, EOS], SamplingParams(max_tokens=3)) == STOP


def test_repetition_ends_a_request_after_the_other_conditions() -> None:
    twice = RepetitionDetectionParams(max_pattern_size=2, min_pattern_size=2, min_count=3)
    params = SamplingParams(repetition_detection=twice, max_tokens=50)
    assert stop_of([1, 8, 9, 8, 9, 8], params) is None
    assert stop_of([1, 8, 9, 8, 9, 8, 9], params) == Stop("repetition", "repetition_detected")
    assert stop_of([1, 8, 9, 8, 9, 8, 9], replace(params, min_tokens=8)) is None
    assert stop_of([1, 8, 9, 8, 9, 8, 9], replace(params, max_tokens=7)) == LENGTH


def test_a_limit_of_millions_takes_no_time() -> None:
    patterns = RepetitionDetectionParams(max_pattern_size=10**12, min_count=2)
    assert stop_of([1, 8, 9], SamplingParams(repetition_detection=patterns)) is None
    assert stop_of([1, 8, 9, 8, 9], SamplingParams(repetition_detection=patterns)) is not None


def test_smallest_pattern_counts_as_one_and_zero_switches_off() -> None:
    single = RepetitionDetectionParams(max_pattern_size=3, min_count=4)
    assert stop_of([1, 8, 8, 8, 8], SamplingParams(repetition_detection=single)) is not None
    assert stop_of([1, 8, 8, 8], SamplingParams(repetition_detection=single)) is None
    assert stop_of([8] * 9, SamplingParams(repetition_detection=RepetitionDetectionParams())) is None


@pytest.mark.parametrize(
    "tokens, pattern_size, count, expected",
    [
        ([1, 1], 1, 2, True),
        ([1, 2], 1, 2, False),
        ([1, 2, 1, 2], 2, 2, True),
        ([2, 1, 2, 1, 2], 2, 3, False),
        ([0, 1, 2, 3, 1, 2, 3], 3, 2, True),
        ([1, 2, 3, 9, 2, 3], 3, 2, False),
        ([1, 2, 1, 2, 7], 2, 2, False),
    ],
)
def test_repetition(tokens: list[int], pattern_size: int, count: int, expected: bool) -> None:
    assert ends_in_repetition(tokens, pattern_size, count) == expected


def test_an_embedding_never_stops_on_a_token() -> None:
    assert stop_of([], None) is None
