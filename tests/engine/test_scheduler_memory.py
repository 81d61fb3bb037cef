"""What the scheduler does with blocks: pressure, preemption, shared prefixes, forks, sliding windows."""

from collections.abc import Callable
from typing import Any

import pytest

from qwen2_jax.cache.block_pool import NULL_BLOCK
from qwen2_jax.engine.request import Request, RequestStatus
from qwen2_jax.engine.scheduler import Scheduler
from qwen2_jax.errors import CapacityError
from tests.engine.scheduling import add, launch, make_request, make_scheduler, read, shape, step


def test_fewer_steps_rather_than_a_preemption() -> None:
    scheduler = make_scheduler(num_blocks=17, max_decode_steps=8)
    add(scheduler, make_request("a", 28, max_tokens=None), make_request("b", 20, max_tokens=None))
    assert [step(scheduler).num_steps for _ in range(6)] == [1, 1, 1, 4, 2, 1]
    assert (scheduler.num_preemptions, scheduler.kv_cache_usage) == (0, 1)
    step(scheduler)
    assert scheduler.num_preemptions == 1


def test_the_youngest_is_preempted_and_recomputed_from_all_its_tokens() -> None:
    scheduler = make_scheduler(num_blocks=17, enable_prefix_caching=False, max_num_batched_tokens=64)
    old, young = make_request("a", 30, max_tokens=34), make_request("b", 28, max_tokens=8)
    add(scheduler, old, young)
    output = step(scheduler)
    while not scheduler.num_preemptions:
        output = step(scheduler)
    assert [row.request for row in output.rows] == [old]
    assert (young.status, young.block_ids, young.row_index) == (RequestStatus.PREEMPTED, [], None)
    assert (young.num_computed_tokens, young.num_confirmed_tokens, young.num_preemptions) == (0, 0, 1)
    known = young.num_tokens
    while young.status is not RequestStatus.RUNNING:
        output = step(scheduler)
    assert ("b", 0, known, True) in shape(output)
    while scheduler.has_unfinished:
        step(scheduler)
    assert (len(old.output_token_ids), len(young.output_token_ids)) == (34, 8)


def test_lowest_priority_is_preempted_even_if_it_came_first() -> None:
    scheduler = make_scheduler(num_blocks=17, policy="priority", max_num_batched_tokens=64)
    low = make_request("a", 30, max_tokens=None, priority=5, arrival=0)
    high = make_request("b", 28, max_tokens=None, priority=1, arrival=1)
    add(scheduler, low, high)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert (low.status, high.status) == (RequestStatus.PREEMPTED, RequestStatus.RUNNING)


def test_a_preempted_request_waits_for_its_tokens_in_flight() -> None:
    scheduler = make_scheduler(num_blocks=17, max_num_batched_tokens=64)
    old, young = make_request("a", 32, max_tokens=9), make_request("b", 27, max_tokens=None)
    add(scheduler, old, young)
    outputs = [launch(scheduler) for _ in range(2)]
    while not scheduler.num_preemptions:
        outputs.append(launch(scheduler))
    assert young.num_in_flight > 0
    scheduler.abort("a")
    assert scheduler.schedule() is None
    for output in outputs:
        read(scheduler, output)
    assert (young.num_in_flight, young.num_confirmed_tokens) == (0, 0)
    assert launch(scheduler).admitted == (young,)


def test_one_sequence_must_fit_the_pool() -> None:
    with pytest.raises(
        CapacityError, match="max_model_len=64 tokens needs 16 cache blocks of 4 tokens, and there are 15"
    ):
        make_scheduler(num_blocks=16)
    make_scheduler(num_blocks=17)


@pytest.mark.parametrize("prompt_len, enters", [(48, True), (49, False)])
def test_a_prompt_enters_only_if_all_of_it_fits_and_the_others_keep_a_block(prompt_len: int, enters: bool) -> None:
    scheduler = make_scheduler(num_blocks=17)
    add(scheduler, make_request("a", 12), make_request("b", prompt_len), make_request("c", 1))
    assert shape(step(scheduler)) == [("a", 0, 12, True), ("b", 0, 4, False)][: 1 + enters]


def test_nobody_enters_while_a_running_row_waits_for_blocks() -> None:
    scheduler = make_scheduler(num_blocks=70, block_size=1)
    add(scheduler, make_request("a", 32))
    for _ in range(2):
        step(scheduler)
    add(scheduler, make_request("b", 35))
    for _ in range(2):
        assert len(step(scheduler).rows) == 2
    add(scheduler, make_request("c", 1))
    assert shape(step(scheduler)) == [("a", 34, 1, True)]
    assert (scheduler.blocks.pool.num_free, scheduler.num_preemptions) == (4, 0)


def test_a_chunk_of_higher_priority_takes_the_place_of_a_decode_in_the_same_call() -> None:
    scheduler = make_scheduler(num_blocks=66, block_size=1, policy="priority")
    low, high = make_request("a", 16, max_tokens=None, priority=1), make_request("b", 47, priority=0)
    add(scheduler, low)
    step(scheduler)
    add(scheduler, high)
    assert shape(step(scheduler)) == [("a", 16, 1, True), ("b", 0, 15, False)]
    for _ in range(2):
        assert len(step(scheduler).rows) == 2
    assert shape(step(scheduler)) == [("b", 45, 2, True)]
    assert low.status is RequestStatus.PREEMPTED


def test_a_preempted_request_finds_its_own_blocks_but_does_not_count_them_as_cached() -> None:
    scheduler = make_scheduler(num_blocks=17, max_num_batched_tokens=64)
    old, young = make_request("a", 30, max_tokens=6), make_request("b", 28, max_tokens=None)
    add(scheduler, old, young)
    output = step(scheduler)
    while young not in output.admitted or not young.num_preemptions:
        output = step(scheduler)
    assert output.rows[-1].request is young and output.rows[-1].start > 0
    assert young.num_cached_tokens == 0


def test_a_confirmed_prefix_is_shared() -> None:
    scheduler, prompt = make_scheduler(), list(range(1, 13))
    add(scheduler, make_request("a", prompt, max_tokens=20))
    first = launch(scheduler)
    add(scheduler, make_request("b", prompt), make_request("c", prompt[:9]), make_request("d", prompt, cache_salt="x"))
    read(scheduler, first)
    output = launch(scheduler)
    assert shape(output)[:3] == [("a", 12, 1, True), ("c", 8, 1, True), ("b", 8, 4, True)]
    assert shape(output)[3] == ("d", 0, 10, False)
    by_name = {row.request.request_id: row.request for row in output.rows}
    assert by_name["b"].block_ids[:2] == by_name["a"].block_ids[:2] == by_name["c"].block_ids[:2]
    assert (by_name["b"].num_cached_tokens, by_name["d"].num_cached_tokens) == (8, 0)
    cache = scheduler.blocks.prefix_cache
    assert (cache.queries, cache.hits) == (12 + 12 + 9 + 12, 16)


@pytest.mark.parametrize("changes", [{}, {"sampling_params": None}])
@pytest.mark.parametrize(("use_prefix_cache", "first"), [(True, (8, 4)), (False, (0, 12))])
def test_requests_that_compute_every_token(
    changes: dict[str, Any], use_prefix_cache: bool, first: tuple[int, int]
) -> None:
    scheduler, prompt = make_scheduler(), list(range(1, 13))
    add(scheduler, make_request("a", prompt, max_tokens=1))
    step(scheduler)
    add(scheduler, make_request("b", prompt, use_prefix_cache=use_prefix_cache, **changes))
    assert step(scheduler).rows[0][1:3] == first


def test_outputs_are_cached_too_and_the_cache_can_be_reset() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("a", [1, 2, 3], max_tokens=6))
    step(scheduler)
    assert not scheduler.reset_prefix_cache()
    while scheduler.has_unfinished:
        step(scheduler)
    add(scheduler, make_request("b", [1, 2, 3, 5, 5, 5, 5, 5, 9], max_tokens=1))
    assert step(scheduler).rows[0].start == 8
    assert scheduler.reset_prefix_cache()
    add(scheduler, make_request("c", [1, 2, 3, 5, 5, 5, 5, 5, 9], max_tokens=1))
    assert step(scheduler).rows[0].start == 0


def test_an_evicted_block_is_not_found() -> None:
    scheduler = make_scheduler(num_blocks=17)
    add(scheduler, make_request("a", list(range(1, 13)), max_tokens=1))
    step(scheduler)
    add(scheduler, make_request("b", 62, max_tokens=1))
    while scheduler.has_unfinished:
        step(scheduler)
    add(scheduler, make_request("c", list(range(1, 13)), max_tokens=1))
    assert step(scheduler).rows[0].start == 0


def test_forks_wait_for_their_leader_and_share_its_blocks() -> None:
    scheduler = make_scheduler(enable_prefix_caching=False, max_decode_steps=4)
    leader = make_request("a", 18, max_tokens=9)
    forks = [make_request(name, 18, max_tokens=9, fork_of=leader) for name in "bc"]
    add(scheduler, leader, *forks)
    outputs = [launch(scheduler) for _ in range(3)]
    assert shape(outputs[0]) + shape(outputs[1]) == [("a", 0, 16, False), ("a", 16, 2, True)]
    assert shape(outputs[2]) == [("a", 18, 1, True), ("b", 16, 2, True), ("c", 16, 2, True)]
    assert forks[0].block_ids[:4] == forks[1].block_ids[:4] == leader.block_ids[:4]
    assert len({fork.block_ids[4] for fork in (leader, *forks)}) == 3
    assert [(fork.num_cached_tokens, fork.fork_of) for fork in forks] == [(16, None)] * 2


def test_a_leader_of_one_token_takes_one_step_for_its_forks() -> None:
    scheduler, leader = make_scheduler(max_decode_steps=4), make_request("a", 1, max_tokens=9)
    add(scheduler, leader, make_request("b", 1, max_tokens=9, fork_of=leader))
    assert step(scheduler).num_steps == 1
    assert len(step(scheduler).rows) == 2


def preempt(scheduler: Scheduler, request: Request) -> None:
    while request.status is RequestStatus.RUNNING:
        step(scheduler)


def abort(scheduler: Scheduler, request: Request) -> None:
    scheduler.abort(request.request_id)


@pytest.mark.parametrize("lose, num_shared", [(abort, 0), (preempt, 24)])
def test_forks_go_on_without_their_leader(lose: Callable[[Scheduler, Request], None], num_shared: int) -> None:
    """A preempted leader is computed again before its fork, which then shares with it after all."""
    scheduler = make_scheduler(num_blocks=17, max_num_seqs=3, max_num_batched_tokens=4, enable_prefix_caching=False)
    old, leader = make_request("o", 30, max_tokens=None), make_request("a", 28, arrival=1)
    fork = make_request("b", 28, fork_of=leader, arrival=2)
    add(scheduler, old)
    for _ in range(8):
        step(scheduler)
    add(scheduler, leader, fork)
    step(scheduler)
    assert leader.status is RequestStatus.RUNNING
    lose(scheduler, leader)
    scheduler.finish(old, "abort")
    while fork.status is RequestStatus.WAITING:
        step(scheduler)
    assert (fork.num_cached_tokens, fork.num_preemptions) == (num_shared, 0)


def test_blocks_behind_the_window_are_freed_and_forks_then_compute_alone() -> None:
    scheduler = make_scheduler(num_blocks=11, release_window=6, enable_prefix_caching=False)
    leader = make_request("a", 30, max_tokens=20)
    add(scheduler, leader)
    step(scheduler)
    assert leader.block_ids[:3] == [NULL_BLOCK, NULL_BLOCK, leader.block_ids[2]] and leader.block_ids[2] != NULL_BLOCK
    step(scheduler)
    assert sum(block != NULL_BLOCK for block in leader.block_ids) == 2
    add(scheduler, make_request("b", 30, fork_of=leader))
    assert shape(step(scheduler))[1] == ("b", 0, 15, False)
