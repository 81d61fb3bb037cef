"""Requests and results as callers see them."""

from typing import Any

import pytest

from qwen2_jax.errors import AdapterError
from qwen2_jax.types import (
    CompletionOutput,
    EmbeddingOutput,
    FlatLogprobs,
    Logprob,
    LogprobsOnePosition,
    LoRARequest,
    RequestMetrics,
)

POSITIONS: list[LogprobsOnePosition | None] = [
    None,
    {5: Logprob(-0.5, 1, "a"), 7: Logprob(-2.0, 2, "b")},
    {9: Logprob(-0.1, 1, None)},
]


def flat() -> FlatLogprobs:
    """Return the positions in flat form."""
    logprobs = FlatLogprobs()
    for position in POSITIONS:
        logprobs.append(position)
    return logprobs


def test_flat_logprobs_read_like_a_list() -> None:
    logprobs = flat()
    assert len(logprobs) == 3
    assert list(logprobs) == POSITIONS
    assert [logprobs[i] for i in range(-3, 3)] == POSITIONS * 2
    assert list(reversed(logprobs)) == POSITIONS[::-1]
    with pytest.raises(IndexError):
        logprobs[3]


def test_slices_of_flat_logprobs_are_flat() -> None:
    part = flat()[1:]
    assert isinstance(part, FlatLogprobs)
    assert list(part) == POSITIONS[1:]
    assert part.token_ids == [5, 7, 9]
    assert list(flat()[::2]) == POSITIONS[::2]
    assert list(flat()[5:]) == []


def test_lora_requests_take_vllms_positional_arguments() -> None:
    request = LoRARequest("pirate", 1, "adapters/pirate")
    assert (request.lora_name, request.lora_int_id, request.lora_path) == ("pirate", 1, "adapters/pirate")
    assert request == LoRARequest(lora_name="pirate", lora_int_id=1, lora_path="adapters/pirate")
    assert hash(request) == hash(LoRARequest("pirate", 1, "adapters/pirate"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 1, "p"), "lora_name=''"),
        (("a", 0, "p"), "lora_int_id=0 is not allowed; use an integer of at least 1"),
        (("a", True, "p"), "lora_int_id=True"),
        (("a", "1", "p"), "lora_int_id='1'"),
        (("a", 1, ""), "lora_path=''"),
        (("a", 1, None), "lora_path=None"),
    ],
)
def test_bad_lora_requests(arguments: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        LoRARequest(*arguments)


def test_an_output_is_finished_when_it_has_a_reason() -> None:
    assert not CompletionOutput(index=0, text="a", token_ids=[1]).finished
    assert CompletionOutput(index=0, text="a", token_ids=[1], finish_reason="length").finished


def test_metrics_are_differences_of_times() -> None:
    metrics = RequestMetrics(arrival_time=10.0)
    assert metrics.time_in_queue is None
    assert metrics.time_to_first_token is None
    metrics.first_scheduled_time, metrics.first_token_time = 10.5, 12.0
    assert (metrics.time_in_queue, metrics.time_to_first_token) == (0.5, 2.0)


def test_an_embedding_knows_its_size() -> None:
    assert EmbeddingOutput(embedding=[0.1, 0.2]).hidden_size == 2
