"""What goes wrong beside an adapter's content: memory, file systems, impatient clients, and many who want the same."""

import gc
import shutil
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora import sources
from qwen2_jax.lora.entry import AdapterEntry, Admission
from qwen2_jax.lora.staging import MAX_STAGED
from tests.lora.test_manager import LIMIT_S, Adapters, adapters, make, settled

__all__ = ["adapters", "make"]  # fixtures
READY, LOADING, FULL, FAILED = Admission.READY, Admission.LOADING, Admission.FULL, Admission.FAILED


def test_a_device_without_memory_fails_one_adapter_alone(adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = adapters.new("a"), adapters.new("b")
    with monkeypatch.context() as patch:
        patch.setattr(adapters.banks, "place_page", lambda page: (_ for _ in ()).throw(MemoryError("out of memory")))
        assert adapters.acquire(a) is FAILED
    assert a.error is not None and isinstance(a.error.__cause__, MemoryError)
    assert "'a' did not come to the devices (MemoryError: out of memory); send the request again" in str(a.error)
    adapters.use(b, adapters.find("a"))
    adapters.check()


def test_what_a_file_system_says_is_an_error_of_the_adapter(
    make: Callable[..., Adapters], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = make(max_on_host=1)
    a, b = adapters.new("a"), adapters.new("b")

    def stale(*_: Any) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(sources, "read_adapter", stale)
    assert adapters.acquire(a) is FAILED and adapters.acquire(b) is READY
    assert "'a': " in str(a.error) and "cannot be read" in str(a.error) and "Stale file handle" in str(a.error)
    adapters.write("c")
    with pytest.raises(AdapterError, match=r"'c': .* cannot be read: .*Stale file handle"):
        adapters.find("c")


def test_files_that_change_while_they_are_read_are_read_again(
    adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, changes = sources.read_adapter, iter(["first", "second", None])

    def changing(path: Path, base: Any) -> Any:
        found = read(path, base)
        if content := next(changes):
            adapters.write("a", content=content)
        return found

    adapters.write("a")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_adapter", changing)
        found = adapters.find("a")
    assert found is adapters.find("a") and found is adapters.new("a", content="second")
    changes = iter("abc")
    monkeypatch.setattr(sources, "read_adapter", changing)
    adapters.write("b")
    with pytest.raises(AdapterError, match=r"'a': .* changes while it is read; send the request again"):
        adapters.new("a", content="other")


def test_who_asks_first_comes_first(make: Callable[..., Adapters]) -> None:
    """Copies are made in the order of the queue, however many ask behind."""
    adapters = make(num_pages=8)
    first, *others = [adapters.new(name) for name in "abcdefghijklm"]
    adapters.ask(*others[:MAX_STAGED])
    for _ in range(3):
        for entry in (first, *others[:MAX_STAGED]):
            if entry.staged is not None:
                entry.staged.result(LIMIT_S)
        adapters.ask(first, *others)
    assert first.is_resident
    adapters.check()


def test_copies_that_nobody_wants_hold_up_nobody(adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests may be aborted while their adapters are on the way."""
    monkeypatch.setattr("qwen2_jax.lora.staging.UNWANTED_SECONDS", 0.0)
    adapters.banks.may_copy.clear()
    entries = [adapters.new(name) for name in "abcdef"]
    assert [adapters.manager.acquire(entry) for entry in entries] == [LOADING] * 6
    assert sum(entry.staged is not None for entry in entries) == MAX_STAGED
    adapters.banks.may_copy.set()
    adapters.use(adapters.new("g"))
    adapters.check()


def test_slow_steps_lose_no_copies(make: Callable[..., Adapters], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two passes more time may go by than a copy waits for someone who wants it."""
    monkeypatch.setattr("qwen2_jax.lora.staging.UNWANTED_SECONDS", 0.0)
    adapters = make(num_pages=8)
    adapters.use(*(adapters.new(name) for name in "abcdefgh"))
    assert len(adapters.resident()) == 8


def test_adapters_that_find_no_room_hold_up_none_that_does(make: Callable[..., Adapters]) -> None:
    adapters = make(num_pages=3)
    used, small = adapters.new("used", rank=32), adapters.new("small")
    large = [adapters.new(name, rank=32) for name in "abcde"]
    assert adapters.acquire(used) is READY
    for _ in range(2):
        adapters.ask(*large)
    for entry in large:
        if entry.staged is not None:
            entry.staged.result(LIMIT_S)
    assert settled(lambda: adapters.ask(*large, small), adapters.manager) is READY
    assert all(entry.pins == 0 and not entry.is_resident for entry in large)
    adapters.manager.release(used)
    assert adapters.acquire(large[0]) is READY
    adapters.check()


def test_loading_ahead_does_not_wait_behind_a_queue(make: Callable[..., Adapters]) -> None:
    adapters = make(num_pages=30)
    wanted, *others = [adapters.new(name) for name in "abcdefghijklm"]

    def step() -> Admission:
        adapters.ask(*[entry for entry in others if not entry.is_resident] or others[:1])
        return adapters.manager.load(wanted, pin=False)

    assert settled(step, adapters.manager) is READY
    adapters.manager.unload("a")
    with pytest.raises(AdapterError, match="'a' was unloaded while it was on its way; load it again"):
        adapters.manager.load(wanted, pin=True)


def test_only_those_leave_who_have_what_is_short(make: Callable[..., Adapters], tmp_path: Path) -> None:
    adapters = make(num_pages=5, num_vectors=1)
    plain = [adapters.new(name) for name in "abcd"]
    first, second = (_with_vectors(adapters, name) for name in ("v", "w"))
    adapters.use(first, *plain, second)
    assert not first.is_resident and all(entry.is_resident for entry in (*plain, second))
    assert adapters.manager.stats().num_evictions == 1
    adapters.check()


def _with_vectors(adapters: Adapters, name: str) -> AdapterEntry:
    entry = adapters.new(name)
    object.__setattr__(entry, "needs", {"pages": 1, "vectors": 1})
    return entry


def test_host_memory_keeps_what_is_used(make: Callable[..., Adapters]) -> None:
    adapters = make(max_on_host=2)
    a, b = adapters.new("a"), adapters.new("b")
    assert adapters.find("a") is a
    c = adapters.new("c")
    assert a.host is not None and b.host is None and c.host is not None
    adapters.use(a)
    adapters.new("d")
    assert a.host is not None and c.host is None


def test_many_find_at_once_in_little_host_memory(make: Callable[..., Adapters]) -> None:
    """Copies leave host memory for others' while they are taken in."""
    adapters = make(max_on_host=1)
    requests, found = [adapters.request(name, adapters.write(name)) for name in "abcd"], list[AdapterEntry]()
    with ThreadPoolExecutor(8) as threads:
        for number in range(5):
            for name in "abcd":
                adapters.write(name)
            found = list(threads.map(adapters.manager.find, requests * 4))
            assert {entry.request.lora_name for entry in found} == set("abcd"), number
    assert adapters.manager.stats().num_on_host == 1 and adapters.manager.stats().num_registered == 4
    adapters.use(*found[:4])
    adapters.check()


def test_host_memory_is_bounded_by_bytes(adapters: Adapters, tmp_path: Path) -> None:
    size = adapters.new("a").host.nbytes  # pyright: ignore[reportOptionalMemberAccess]
    limited = Adapters(tmp_path, max_host_bytes=int(2.5 * size))
    entries = [limited.new(name) for name in "abc"]
    assert [entry.host is not None for entry in entries] == [False, True, True]
    tiny = Adapters(tmp_path, max_host_bytes=1)
    assert tiny.new("a").host is not None and tiny.manager.stats().num_on_host == 1
    for each in (limited, tiny):
        each.manager.close()


def test_what_nobody_waits_for_any_more_is_forgotten(adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2_jax.lora.staging.UNWANTED_SECONDS", 0.0)
    entry, gone = adapters.new("a"), threading.Event()
    adapters.banks.may_copy.clear()
    assert adapters.ask(entry) is LOADING
    adapters.banks.may_copy.set()
    assert entry.staged is not None
    entry.staged.result(LIMIT_S)
    adapters.manager.unload("a")
    weakref.finalize(entry, gone.set)
    for _ in range(2):
        adapters.manager.begin_pass()
    del entry
    gc.collect()
    assert gone.is_set()


def test_an_unloaded_adapter_stays_while_its_request_waits(adapters: Adapters) -> None:
    """For a row, or for blocks: it was copied for nothing otherwise."""
    entry = adapters.new("a")
    assert adapters.acquire(entry) is READY
    adapters.manager.unload("a")
    for _ in range(5):
        adapters.manager.release(entry, is_wanted=True)
        assert adapters.acquire(entry) is READY
    assert adapters.manager.stats().num_loads == 1
    adapters.manager.release(entry)
    assert not entry.is_resident
    adapters.check()


def test_an_id_is_taken_wherever_it_was_asked_for(adapters: Adapters) -> None:
    adapters.new("a")
    adapters.ids["b"] = adapters.ids["a"]
    shutil.copytree(adapters.folder / "a", adapters.folder / "b")
    with pytest.raises(AdapterError, match="lora_int_id=1 is the adapter 'a''s; give 'b' another"):
        adapters.find("b")
