"""A merge is an adapter like any other to the manager: made once, read again, dropped, and refused by name."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora import merge, sources, staging
from qwen2_jax.lora.entry import AdapterEntry, Admission
from qwen2_jax.lora.merge import merge_adapters
from qwen2_jax.types import LoRARequest, MergedLoRARequest, MergeOptions
from tests.lora.adapters import ADAPTERS
from tests.lora.test_manager import LIMIT_S, Adapters


class Merges:
    """Counts the merges, each of which waits until it may go on."""

    def __init__(self) -> None:
        self.count, self.started, self.may_end = 0, Event(), Event()
        self.may_end.set()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        self.started.set()
        assert self.may_end.wait(LIMIT_S)
        return merge_adapters(*arguments, **options)


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> Merges:
    counted = Merges()
    monkeypatch.setattr(sources, "merge_adapters", counted)
    return counted


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Adapters]]:
    """Makes managers of adapters "a" and "b" of rank 2, whose merge has rank 4."""
    made: list[Adapters] = []

    def of(**sizes: int) -> Adapters:
        made.append(Adapters(tmp_path, **sizes))
        for name in "ab":
            made[-1].write(name)
        return made[-1]

    yield of
    for each in made:
        each.manager.close()


@pytest.fixture
def adapters(make: Callable[..., Adapters]) -> Adapters:
    return make()


def request(adapters: Adapters, *weights: float, name: str = "ab", **options: Any) -> MergedLoRARequest:
    """Return a request for "a" and "b", whose own ids are the merge's."""
    each = [LoRARequest(folder, 50, str(adapters.folder / folder)) for folder in "ab"]
    return MergedLoRARequest(name, 50, each, weights or (0.7, 0.3), MergeOptions(**options))


def first_factors(entry: AdapterEntry) -> np.ndarray:
    assert entry.host is not None
    return entry.host.pages[0].factors["qkv"].b.copy()


def test_a_merge_is_made_once(adapters: Adapters, merges: Merges) -> None:
    entry = adapters.manager.find(request(adapters))
    assert adapters.manager.find(request(adapters)) is entry
    assert adapters.manager.find(request(adapters, name="ab")) is entry and merges.count == 1
    adapters.use(entry, adapters.find("a"), entry)
    adapters.check()
    assert adapters.resident() == {"ab", "a"}
    assert entry.applied == {"q_proj": 1, "down_proj": 1} and entry.request == request(adapters)


@pytest.mark.parametrize(
    "other",
    [
        {"weights": (0.3, 0.7)},
        {"rank": 3},
        {"method": "ties", "density": 0.5},
        {"method": "dare_linear", "density": 0.5},
    ],
)
def test_other_weights_or_options_are_another(adapters: Adapters, merges: Merges, other: dict[str, Any]) -> None:
    entry, weights = adapters.manager.find(request(adapters)), other.pop("weights", ())
    another = adapters.manager.find(request(adapters, *weights, **other))
    assert another is not entry and another.digest != entry.digest and merges.count == 2
    assert adapters.manager.unload("ab") and adapters.manager.entries() == []


def test_a_changed_source_is_merged_anew(adapters: Adapters, merges: Merges) -> None:
    old = adapters.manager.find(request(adapters))
    adapters.write("b", content="changed")
    new = adapters.manager.find(request(adapters))
    assert new is not old and new.digest != old.digest and merges.count == 2
    adapters.use(old, new)
    adapters.check()


def test_what_has_left_host_memory_is_merged_again(make: Callable[..., Adapters], merges: Merges) -> None:
    adapters = make(max_on_host=1)
    entry = adapters.manager.find(request(adapters))
    before = first_factors(entry)
    adapters.find("a")
    assert entry.host is None
    adapters.use(entry)
    assert merges.count == 2
    np.testing.assert_array_equal(first_factors(entry), before)
    adapters.check()


def test_closing_does_not_wait_for_a_merge(make: Callable[..., Adapters], monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = make(max_on_host=1)
    entry, _ = adapters.manager.find(request(adapters)), adapters.find("a")
    is_merging, merge_module = Event(), merge._merge_module
    modules: list[Any] = []

    def merge_slowly(module: Any, *rest: Any) -> Any:
        modules.append(module)
        is_merging.set()
        assert adapters.manager._is_closed.wait(LIMIT_S)
        return merge_module(module, *rest)

    monkeypatch.setattr(merge, "_merge_module", merge_slowly)
    assert adapters.manager.acquire(entry) is Admission.LOADING and is_merging.wait(LIMIT_S)
    copy = entry.staged
    adapters.manager.close()
    assert copy is not None and len(modules) == 1
    with pytest.raises(AdapterError, match="adapter 'ab': the engine has been shut down"):
        copy.result()


def test_a_source_that_changes_before_it_is_merged_again_fails(make: Callable[..., Adapters]) -> None:
    adapters = make(max_on_host=1)
    entry, _ = adapters.manager.find(request(adapters)), adapters.find("a")
    adapters.write("b", content="changed")
    assert adapters.acquire(entry) is Admission.FAILED
    message = f"adapter 'ab': the merge of {adapters.folder / 'a'} and {adapters.folder / 'b'} has changed since"
    assert entry.error is not None and message in str(entry.error)
    adapters.use(adapters.manager.find(request(adapters)))


def test_a_load_that_nobody_waits_for_any_more_leaves_the_merge_in_host_memory(
    adapters: Adapters, merges: Merges, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request has ended before its adapter was there; another's copy makes the manager let go of this one's."""
    monkeypatch.setattr(staging, "UNWANTED_SECONDS", 0.0)
    entry = adapters.manager.find(request(adapters))
    adapters.banks.may_copy.clear()
    assert adapters.manager.acquire(entry) is Admission.LOADING and entry.staged is not None
    adapters.banks.may_copy.set()
    entry.staged.result(LIMIT_S)
    adapters.use(adapters.find("a"))
    assert entry.staged is None and not entry.is_resident
    adapters.use(adapters.manager.find(request(adapters)))
    assert merges.count == 1
    adapters.check()


def test_an_unloaded_merge_does_not_come_back_to_host_memory(make: Callable[..., Adapters], merges: Merges) -> None:
    """It is forgotten while a thread makes it again."""
    adapters = make(max_on_host=1)
    entry, _ = adapters.manager.find(request(adapters)), adapters.find("a")
    merges.started.clear()
    merges.may_end.clear()
    assert adapters.manager.acquire(entry) is Admission.LOADING and merges.started.wait(LIMIT_S)
    assert adapters.manager.unload("ab")
    merges.may_end.set()
    assert entry.staged is not None
    entry.staged.result(LIMIT_S)
    assert entry.host is None and adapters.find("a").host is not None


def test_a_rank_that_is_too_high_says_what_would_do(adapters: Adapters, merges: Merges) -> None:
    adapters.write("a", rank=20)
    adapters.write("b", rank=13)
    message = (
        r"'ab' has rank 33 .*max_lora_rank=32 allows no more, start with max_lora_rank=33, or merge with "
        r"MergeOptions\(rank=32\), which cuts it"
    )
    with pytest.raises(AdapterError, match=message):
        adapters.manager.find(request(adapters))
    assert merges.count == 0
    adapters.use(adapters.manager.find(request(adapters, rank=32)))


def test_what_cannot_be_merged_is_refused(adapters: Adapters) -> None:
    dora = LoRARequest("dora", 1, str(ADAPTERS / "untied" / "dora"))
    with pytest.raises(AdapterError, match="adapter 2 of 2 has a DoRA magnitude for down_proj of layer 0"):
        adapters.manager.find(MergedLoRARequest("mix", 2, [adapters.request("a"), dora], [1, 1]))
    assert adapters.manager.entries() == []
    adapters.use(adapters.manager.find(request(adapters)))


def test_two_threads_make_one_merge_and_others_go_on(adapters: Adapters, merges: Merges) -> None:
    merges.may_end.clear()
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(adapters.manager.find, request(adapters)) for _ in range(2)]
        assert merges.started.wait(LIMIT_S)
        adapters.use(adapters.find("a"))  # neither the manager's lock nor the devices wait for the merge
        assert not any(each.done() for each in found)
        merges.may_end.set()
        assert found[0].result(LIMIT_S) is found[1].result(LIMIT_S)
    assert merges.count == 1


def test_a_merge_that_fails_leaves_nothing_locked(adapters: Adapters) -> None:
    (adapters.folder / "b" / "adapter_config.json").rename(adapters.folder / "config")
    for _ in range(2):
        with pytest.raises(AdapterError, match="b has no adapter_config"):
            adapters.manager.find(request(adapters))
    (adapters.folder / "config").rename(adapters.folder / "b" / "adapter_config.json")
    adapters.use(adapters.manager.find(request(adapters)))


def test_subfolders_of_a_folder_are_adapters_of_their_own(adapters: Adapters) -> None:
    whole = str(adapters.folder)
    both = [adapters.manager.find(LoRARequest(name, ord(name), whole, subfolder=name)) for name in "ab"]
    adapters.ids = {name: ord(name) for name in "ab"}
    assert both[0] is not both[1] and both == [adapters.find(name, adapters.folder / name) for name in "ab"]
