"""Requests wait for their adapters and not for others', and none waits for ever while others pass it."""

import pytest

from qwen2_jax.engine.adapter_admission import MAX_PASSED, AdapterAdmission
from qwen2_jax.engine.request import Request
from qwen2_jax.engine.scheduler import Scheduler
from qwen2_jax.lora.entry import AdapterEntry, Admission
from tests.engine.scheduling import Gate, add, launch, make_entry, make_request, make_scheduler, read, shape, step

A, B, C = (make_entry(name) for name in "ABC")


def started(names: str, *, gate: Gate | None, adapters: dict[str, AdapterEntry], **options: int) -> list[str]:
    """Return the names of the one-token prompts that the first call has."""
    scheduler = make_scheduler(gate=gate, **options)
    add(scheduler, *(make_request(name, 1, adapter=adapters.get(name)) for name in names))
    output = scheduler.schedule()
    return [] if output is None else [row.request.request_id for row in output.rows]


def add_crowd(scheduler: Scheduler, *waiting: Request) -> None:
    """Queue requests behind one with another adapter, and before twice as many of its as may pass them."""
    add(scheduler, make_request("0", 1, max_tokens=2, adapter=A), *waiting)  # the rows never end at once
    for index in range(2 * MAX_PASSED):
        add(scheduler, make_request(chr(1000 + index), 1, max_tokens=3, adapter=A))


def test_only_those_whose_adapter_is_there_start() -> None:
    gate = Gate(room=1)
    gate.loading.add(A)
    assert started("pqrs", gate=gate, adapters={"p": A, "q": B, "s": B}) == ["q", "r", "s"]
    assert gate.uses == {B: 2}
    assert started("pqrs", gate=Gate(room=1), adapters={"p": A, "q": B, "s": A}) == ["p", "r", "s"]
    assert started("pqrs", gate=None, adapters={}) == ["p", "q", "r", "s"]


def test_an_adapter_is_used_as_long_as_its_request_runs() -> None:
    gate = Gate(room=1)
    scheduler = make_scheduler(gate=gate)
    first, second = make_request("p", 3, max_tokens=2, adapter=A), make_request("q", 3, max_tokens=2, adapter=B)
    add(scheduler, first, second)
    assert shape(step(scheduler)) == [("p", 0, 3, True)] and +gate.uses == {A: 1}
    step(scheduler)
    assert first.is_finished and not +gate.uses
    assert shape(step(scheduler)) == [("q", 0, 3, True)]
    scheduler.abort("q")
    scheduler.abort("q")
    assert not +gate.uses


def test_a_preempted_request_gives_its_adapter_back_and_asks_again() -> None:
    gate = Gate(room=2)
    scheduler = make_scheduler(num_blocks=18, gate=gate)
    first, second = (make_request(name, 31, max_tokens=30, adapter=each) for name, each in (("p", A), ("q", B)))
    add(scheduler, first, second)
    while not second.num_preemptions:
        step(scheduler)
    assert +gate.uses == {A: 1}
    gate.loading.add(B)
    assert gate.waited_for == [B]
    while not first.is_finished:
        step(scheduler)
    assert scheduler.schedule() is None and scheduler.num_waiting == 1
    gate.loading.clear()
    assert shape(step(scheduler))[0][0] == "q" and +gate.uses == {B: 1}


def test_without_blocks_an_adapter_is_not_kept() -> None:
    gate = Gate(room=1)
    scheduler = make_scheduler(num_blocks=18, gate=gate)
    add(scheduler, make_request("p", 60), make_request("q", 16, adapter=A))
    for _ in range(4):
        step(scheduler)
    assert scheduler.num_waiting == 1 and not +gate.uses and set(gate.waited_for) == {A}


def test_a_request_whose_adapter_cannot_come_ends() -> None:
    gate = Gate(room=1)
    gate.failed.add(A)
    scheduler = make_scheduler(gate=gate)
    lost = [make_request(name, 3, adapter=A) for name in "pq"]
    add(scheduler, lost[0], make_request("r", 3, adapter=B), lost[1])
    assert shape(launch(scheduler)) == [("r", 0, 3, True)]
    assert scheduler.take_failed() == lost and scheduler.take_failed() == []
    assert all(request.is_finished for request in lost) and scheduler.num_waiting == 0


@pytest.mark.parametrize("loading", [False, True])
def test_nobody_is_passed_for_ever(loading: bool) -> None:
    """A stream of requests with one adapter would keep another's out; one on its way holds up nobody."""
    gate, crowded = Gate(room=1), make_entry("crowded")
    scheduler = make_scheduler(gate=gate, max_num_seqs=2)
    if loading:
        gate.loading.add(crowded)
    waiting = make_request("w", 1, max_tokens=1, adapter=crowded)
    add_crowd(scheduler, waiting)
    served = 0
    while not waiting.is_finished and (output := scheduler.schedule()) is not None:
        served += len(output.admitted)
        read(scheduler, output)
    assert waiting.is_finished is not loading
    assert served == (2 * MAX_PASSED + 1 if loading else MAX_PASSED + 2)
    assert crowded.num_passed == (0 if loading else MAX_PASSED)


def test_requests_without_adapters_pass_freely() -> None:
    gate, entry = Gate(room=0), make_entry("w")
    crowded = make_request("w", 1, adapter=entry)
    admission = AdapterAdmission(gate)
    admission.begin()
    assert admission.acquire(crowded) is Admission.FULL
    for _ in range(2 * MAX_PASSED):
        plain: Request = make_request("p", 1)
        assert admission.acquire(plain) is Admission.READY
        admission.note_start(plain)
    assert entry.num_passed == 0


def test_passes_are_counted_for_all_who_wait_for_an_adapter() -> None:
    """The first of them may give up: those behind have waited as long."""
    gate, crowded = Gate(room=1), make_entry("crowded")
    scheduler = make_scheduler(gate=gate, max_num_seqs=2)
    first, second = (make_request(name, 1, max_tokens=1, adapter=crowded) for name in "vw")
    add_crowd(scheduler, first, second)
    served = 0
    while not second.is_finished and (output := scheduler.schedule()) is not None:
        served += len(output.admitted)
        read(scheduler, output)
        if served > MAX_PASSED // 2 and not first.is_finished:
            scheduler.abort("v")
    assert second.is_finished and served == MAX_PASSED + 2


def test_an_adapter_that_is_not_there_is_looked_up_once_a_pass() -> None:
    gate = Gate(room=1)
    gate.loading.add(A)
    names = [chr(1000 + index) for index in range(20)]
    assert started("".join(names), gate=gate, adapters=dict.fromkeys(names[:19], A)) == names[19:]
    assert gate.asked == [A]
