"""The scheduler's rules, one by one: order, budget, chunks, run-ahead, several steps, ends, refusals."""

from typing import Any

import pytest

from qwen2_jax.engine.request import RequestStatus
from qwen2_jax.errors import ConfigError, RequestError
from qwen2_jax.types import RequestOutputKind, SamplingParams
from tests.engine.scheduling import EOS, add, launch, make_request, make_scheduler, read, shape, step


def test_a_request_from_prompt_to_length() -> None:
    scheduler, request = make_scheduler(), make_request("a", 5, max_tokens=3)
    add(scheduler, request)
    assert (scheduler.has_unfinished, scheduler.num_waiting, request.status) == (True, 1, RequestStatus.WAITING)
    output = launch(scheduler)
    assert shape(output) == [("a", 0, 5, True)]
    assert (output.admitted, output.is_decode, output.num_steps) == ((request,), False, 1)
    assert (scheduler.num_running, scheduler.num_waiting, request.row_index) == (1, 0, 0)
    assert scheduler.kv_cache_usage == pytest.approx(2 / 99)
    assert read(scheduler, output) == [request]
    output = step(scheduler)
    assert shape(output) == [("a", 5, 1, True)]
    assert (output.admitted, output.is_decode) == ((), True)
    assert shape(step(scheduler)) == [("a", 6, 1, True)]
    assert (request.status, request.finish_reason, request.output_token_ids) == (
        RequestStatus.FINISHED,
        "length",
        [5, 5, 5],
    )
    assert (scheduler.has_unfinished, scheduler.kv_cache_usage, request.row_index) == (False, 0, None)
    assert scheduler.schedule() is None


def test_decodes_come_first_then_chunks_then_newcomers_within_the_budget() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 3), make_request("b", 20), make_request("c", 9))
    assert shape(step(scheduler)) == [("a", 0, 3, True), ("b", 0, 13, False)]
    assert shape(step(scheduler)) == [("a", 3, 1, True), ("b", 13, 7, True), ("c", 0, 8, False)]
    assert shape(step(scheduler)) == [("a", 4, 1, True), ("b", 20, 1, True), ("c", 8, 1, True)]


def test_without_chunks_a_prompt_waits_until_it_fits_whole() -> None:
    scheduler = make_scheduler(enable_chunked_prefill=False, max_model_len=16)
    add(scheduler, make_request("a", 9, 1), make_request("b", 8, 1), make_request("c", 2, 1))
    assert shape(step(scheduler)) == [("a", 0, 9, True)]
    assert shape(step(scheduler)) == [("b", 0, 8, True), ("c", 0, 2, True)]


def test_no_more_rows_than_max_num_seqs_and_a_freed_row_is_reused() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    requests = [make_request(name, 2) for name in "abc"]
    add(scheduler, *requests)
    assert len(step(scheduler).rows) == 2
    assert scheduler.abort("a") is requests[0]
    output = step(scheduler)
    assert (output.admitted, requests[2].row_index) == ((requests[2],), 0)


@pytest.mark.parametrize("policy, order", [("fcfs", ["a", "b", "c"]), ("priority", ["b", "c", "a"])])
def test_policy(policy: str, order: list[str]) -> None:
    scheduler = make_scheduler(policy=policy, max_num_seqs=1)
    for name, priority, arrival in (("c", 0, 3), ("a", 1, 1), ("b", 0, 2)):
        scheduler.add(make_request(name, 2, max_tokens=1, priority=priority, arrival=arrival))
    assert [step(scheduler).rows[0].request.request_id for _ in range(3)] == order


def test_running_ahead_counts_tokens_that_are_not_read() -> None:
    scheduler, request = make_scheduler(), make_request("a", 4, max_tokens=3)
    add(scheduler, request)
    outputs = [launch(scheduler) for _ in range(3)]
    assert [row.start for output in outputs for row in output.rows] == [0, 4, 5]
    assert (request.num_in_flight, request.num_tokens_with_in_flight, request.num_computed_tokens) == (3, 7, 6)
    assert (request.num_confirmed_tokens, scheduler.schedule()) == (0, None)
    for output in outputs:
        assert not request.is_finished
        read(scheduler, output)
    assert request.is_finished


def test_what_was_launched_behind_a_stop_is_dropped() -> None:
    scheduler, request = make_scheduler(), make_request("a", 4)
    add(scheduler, request)
    first, second = launch(scheduler), launch(scheduler)
    assert read(scheduler, first, EOS) == [request]
    assert (request.finish_reason, scheduler.kv_cache_usage) == ("stop", 0)
    assert read(scheduler, second) == []
    assert request.output_token_ids == [EOS]


def test_a_row_near_its_end_rests_while_the_others_go_on() -> None:
    scheduler = make_scheduler(max_decode_steps=8)
    short, long = make_request("a", 3, max_tokens=5), make_request("b", 3, max_tokens=None, max_model_len=10)
    add(scheduler, short, long)
    assert step(scheduler).num_steps == 1
    output = launch(scheduler)
    assert (output.num_steps, shape(output)) == (6, [("a", 3, 1, True), ("b", 3, 1, True)])
    assert [row.num_steps for row in output.rows] == [4, 6]
    assert set(read(scheduler, output)) == {short, long}
    assert (short.finish_reason, short.num_tokens) == ("length", 8)
    assert (long.finish_reason, long.num_tokens) == ("length", 10)


def test_a_stop_within_a_call_drops_the_rest_of_it() -> None:
    scheduler, request = make_scheduler(max_decode_steps=4, block_size=7), make_request("a", 3)
    add(scheduler, request)
    step(scheduler)
    output = launch(scheduler)
    assert scheduler.update(output, [[6, EOS, 7, 8]]) == [request]
    assert (request.output_token_ids, request.finish_reason) == ([5, 6, EOS], "stop")
    assert (request.num_confirmed_tokens, len(scheduler.blocks.prefix_cache)) == (0, 0)


def test_a_call_does_not_cross_min_tokens() -> None:
    scheduler = make_scheduler(max_decode_steps=8)
    add(scheduler, make_request("a", 3, sampling_params=SamplingParams(max_tokens=20, min_tokens=4)))
    assert [step(scheduler).num_steps for _ in range(4)] == [1, 3, 8, 8]


def test_a_newcomer_makes_the_call_a_single_step() -> None:
    scheduler = make_scheduler(max_decode_steps=4)
    add(scheduler, make_request("a", 3, max_tokens=30))
    assert [step(scheduler).num_steps for _ in range(2)] == [1, 4]
    add(scheduler, make_request("b", 3))
    output = step(scheduler)
    assert (output.num_steps, output.is_decode) == (1, False)


def test_a_prompt_beside_streamed_decodes_comes_in_smaller_chunks() -> None:
    scheduler = make_scheduler(max_num_mixed_tokens=6, max_decode_steps=8)
    first, second = make_request("a", 14, max_tokens=30), make_request("b", 13)
    add(scheduler, first)
    assert shape(step(scheduler)) == [("a", 0, 14, True)]
    add(scheduler, second)
    assert shape(step(scheduler)) == [("a", 14, 1, True), ("b", 0, 5, False)]
    assert shape(step(scheduler)) == [("a", 15, 1, True), ("b", 5, 5, False)]
    scheduler.finish(first, "abort")
    assert shape(step(scheduler)) == [("b", 10, 3, True)]


def test_a_prompt_comes_whole_beside_decodes_that_nobody_reads_yet() -> None:
    scheduler = make_scheduler(max_num_mixed_tokens=6)
    unread = SamplingParams(max_tokens=30, output_kind=RequestOutputKind.FINAL_ONLY)
    add(scheduler, make_request("a", 14, sampling_params=unread))
    step(scheduler)
    add(scheduler, make_request("b", 13))
    assert shape(step(scheduler)) == [("a", 14, 1, True), ("b", 0, 13, True)]
    add(scheduler, make_request("c", 13))
    assert shape(step(scheduler)) == [("a", 15, 1, True), ("b", 13, 1, True), ("c", 0, 4, False)]


def test_a_synchronous_request_never_runs_ahead() -> None:
    scheduler, request = make_scheduler(max_decode_steps=8), make_request("a", 3, synchronous=True)
    add(scheduler, request)
    output = launch(scheduler)
    assert scheduler.schedule() is None
    read(scheduler, output)
    add(scheduler, make_request("b", 3))
    launch(scheduler)
    output = launch(scheduler)
    assert (shape(output), output.num_steps) == ([("b", 3, 1, True)], 1)


def test_an_embedding_finishes_when_its_prompt_is_computed() -> None:
    scheduler, request = make_scheduler(), make_request("a", 20, sampling_params=None)
    add(scheduler, request)
    first, second = launch(scheduler), launch(scheduler)
    assert shape(first) + shape(second) == [("a", 0, 16, False), ("a", 16, 4, False)]
    assert scheduler.schedule() is None
    assert (read(scheduler, first), read(scheduler, second)) == ([], [request])
    assert (request.finish_reason, request.output_token_ids, scheduler.has_unfinished) == ("stop", [], False)


def test_a_whole_prompt_is_computed_in_one_piece_and_not_cached() -> None:
    scheduler = make_scheduler()
    embedding = make_request("b", list(range(1, 13)), sampling_params=None, whole_prompt=True)
    add(scheduler, make_request("a", 6, max_tokens=1), embedding)
    assert shape(step(scheduler)) == [("a", 0, 6, True)]
    assert shape(step(scheduler)) == [("b", 0, 12, False)]
    assert len(scheduler.blocks.prefix_cache) == 1
    with pytest.raises(RequestError, match="17 tokens; this request may have 1 to 16"):
        scheduler.add(make_request("c", 17, sampling_params=None, whole_prompt=True))


def test_abort_and_finish_free_at_once_and_only_once() -> None:
    scheduler, running, waiting = make_scheduler(max_num_seqs=1), make_request("a", 5), make_request("b", 5)
    add(scheduler, running, waiting)
    output = launch(scheduler)
    assert (scheduler.abort("b"), waiting.finish_reason) == (waiting, "abort")
    scheduler.finish(running, "stop", "\n\n")
    assert (running.finish_reason, running.stop_reason, scheduler.kv_cache_usage) == ("stop", "\n\n", 0)
    scheduler.finish(running, "abort")
    assert running.finish_reason == "stop"
    assert scheduler.abort("a") is None
    assert read(scheduler, output) == []


def test_requests_that_can_never_run_are_refused() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 63))
    for request, message in [
        (make_request("a", 3), "'a' belongs to an unfinished request"),
        (make_request("b", 64), "64 tokens; this request may have 1 to 63"),
        (make_request("c", 0), "0 tokens"),
        (make_request("d", 65, sampling_params=None), "1 to 64"),
    ]:
        with pytest.raises(RequestError, match=message):
            scheduler.add(request)
    assert scheduler.num_waiting == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0 is too small"),
        ({"release_window": 0}, "release_window=0 is too small"),
        ({"policy": "lifo"}, "policy='lifo' is unknown"),
        ({"max_num_seqs": 17}, "max_num_batched_tokens=16 is below max_num_seqs=17"),
        ({"enable_chunked_prefill": False}, "max_num_batched_tokens=16 is below max_model_len=64"),
    ],
)
def test_contradictory_limits_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_scheduler(**changes)


def test_results_that_do_not_fit_a_call_are_refused() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", 5))
    with pytest.raises(ValueError, match="0 sampled tokens do not fit"):
        scheduler.update(launch(scheduler), [[]])
