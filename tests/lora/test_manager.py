"""Which adapters are known, in host memory and on the devices: who comes, who leaves, and what is refused."""

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.entry import AdapterEntry, Admission
from qwen2_jax.lora.manager import AdapterManager
from qwen2_jax.lora.pages import Page, Vectors
from qwen2_jax.lora.placing import Placer
from qwen2_jax.lora.sizes import LoRASizes
from qwen2_jax.types import LoRARequest
from tests.lora.adapters import base_config, small_tensors, write_adapter
from tests.lora.test_pages import make_layout

SIZES = LoRASizes(
    num_pages=2,
    num_vectors=1,
    max_pages=2,
    max_rank=32,
    max_on_host=100,
    num_vocab_pages=0,
    num_vocab_vectors=0,
    num_full_vocab=0,
)
READY, LOADING, FULL, FAILED = Admission.READY, Admission.LOADING, Admission.FULL, Admission.FAILED
LIMIT_S = 20


class Banks:
    """Remembers what is written, in place of the devices."""

    banks = ()

    def __init__(self) -> None:
        self.may_copy = threading.Event()
        self.may_copy.set()
        self.pages: dict[int, Page] = {}
        self.vectors: dict[int, Vectors] = {}

    def place_page(self, page: Page) -> Page:
        assert self.may_copy.wait(LIMIT_S)
        return page

    def place_vectors(self, vectors: Vectors) -> Vectors:
        return vectors

    def write_page(self, number: int, placed: Page) -> None:
        self.pages[number] = placed

    def write_vectors(self, pages: list[int], row: int, placed: Vectors) -> None:
        assert all(page in self.pages for page in pages)
        self.vectors[row] = placed


class Adapters:
    """A manager and the folders of its adapters, each of a content of its own."""

    def __init__(self, folder: Path, *, max_host_bytes: int | None = None, **sizes: int) -> None:
        self.folder, self.banks = folder, Banks()
        self.layout = make_layout(base_config(), 1)
        placer = Placer(self.layout, self.banks)  # pyright: ignore[reportArgumentType]
        limits = dataclasses.replace(SIZES, **sizes)
        self.manager = AdapterManager(base_config(), placer, limits, max_host_bytes=max_host_bytes)
        self.ids: dict[str, int] = {}

    def write(self, name: str, *, content: str | None = None, rank: int = 2) -> Path:
        """Write a folder whose values, `content`, are its own by default."""
        rng = np.random.default_rng(list((content or name).encode()))
        shapes = {key: array.shape for key, array in small_tensors().items()}
        shapes = {key: (rank, k) if "lora_A" in key else (n, rank) for key, (n, k) in shapes.items()}
        (self.folder / name).mkdir(exist_ok=True)
        values = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
        return write_adapter(self.folder / name, values, r=rank)

    def request(self, name: str, path: Path | None = None) -> LoRARequest:
        return LoRARequest(name, self.ids.setdefault(name, len(self.ids) + 1), str(path or self.folder / name))

    def find(self, name: str, path: Path | None = None) -> AdapterEntry:
        return self.manager.find(self.request(name, path))

    def new(self, name: str, **options: Any) -> AdapterEntry:
        self.write(name, **options)
        return self.find(name)

    def acquire(self, entry: AdapterEntry) -> Admission:
        """Wait until it is no longer loading."""
        return settled(lambda: self.ask(entry), self.manager)

    def ask(self, *entries: AdapterEntry) -> Admission:
        """Ask for each in a pass, in this order; return what the last one says."""
        self.manager.begin_pass()
        return [self.manager.acquire(entry) for entry in entries][-1]

    def use(self, *entries: AdapterEntry) -> None:
        """Let each be used once, one after the other."""
        for entry in entries:
            assert self.acquire(entry) is READY
            self.manager.release(entry)

    def resident(self) -> set[str]:
        return {entry.request.lora_name for entry in self.manager.entries() if entry.is_resident}

    def check(self) -> None:
        """No place is lost, and each adapter's places hold its own content."""
        self.manager.check_integrity()
        for entry in self.manager.entries():
            if entry.group is None or entry.host is None:
                continue
            for use, page in zip(entry.group.pages, entry.host.pages, strict=True):
                held = self.banks.pages[use.page]
                np.testing.assert_array_equal(held.factors["qkv"].b, page.factors["qkv"].b)
                assert use.modules == page.modules and use.weight == 1


def settled(step: Callable[[], Admission], manager: AdapterManager) -> Admission:
    stop = time.monotonic() + LIMIT_S
    while (outcome := step()) is LOADING:
        assert time.monotonic() < stop, "an adapter does not come"
        manager.wait(0.01)
    return outcome


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Adapters]]:
    """Makes managers with other sizes than `SIZES`."""
    made: list[Adapters] = []

    def of(**sizes: int) -> Adapters:
        made.append(Adapters(tmp_path, **sizes))
        return made[-1]

    yield of
    for each in made:
        each.manager.close()


@pytest.fixture
def adapters(make: Callable[..., Adapters]) -> Adapters:
    """Room for two pages on the devices."""
    return make()


def test_the_least_recently_used_leaves(adapters: Adapters) -> None:
    a, b, c = (adapters.new(name) for name in "abc")
    adapters.use(a, b, a, c)
    assert adapters.resident() == {"a", "c"}
    stats = adapters.manager.stats()
    assert (stats.num_registered, stats.num_resident, stats.num_on_host) == (3, 2, 3)
    assert (stats.num_loads, stats.num_evictions, stats.num_failures) == (3, 1, 0)
    assert stats.wait_seconds > 0
    adapters.check()


def test_an_adapter_in_use_stays(adapters: Adapters) -> None:
    a, b, c = (adapters.new(name) for name in "abc")
    adapters.use(b)
    assert adapters.acquire(a) is READY and adapters.acquire(b) is READY and adapters.acquire(b) is READY
    assert adapters.acquire(c) is FULL
    adapters.manager.release(b)
    assert adapters.acquire(c) is FULL
    adapters.manager.release(b)
    assert adapters.acquire(c) is READY
    assert adapters.resident() == {"a", "c"}
    adapters.check()


def test_a_large_adapter_takes_the_place_of_several(adapters: Adapters) -> None:
    a, b, large = adapters.new("a"), adapters.new("b"), adapters.new("large", rank=32)
    adapters.use(a, b, large)
    assert adapters.resident() == {"large"} and adapters.manager.stats().num_evictions == 2
    assert large.group is not None and len(large.group.pages) == 2
    adapters.check()


def test_a_pinned_adapter_stays_without_use(adapters: Adapters) -> None:
    a, b, c, large = (*(adapters.new(name) for name in "abc"), adapters.new("large", rank=17))
    assert settled(lambda: adapters.manager.load(a, pin=True), adapters.manager) is READY
    adapters.use(b, c, b)
    assert adapters.resident() == {"a", "b"} and a.pins == 0
    assert adapters.acquire(large) is FAILED
    assert large.error is not None and "'large' finds no room beside pinned adapters" in str(large.error)
    assert adapters.manager.unload("a")
    adapters.use(adapters.find("large"))
    assert adapters.resident() == {"large"}
    adapters.check()


def test_names_with_the_same_content_do_not_depend_on_one_another(adapters: Adapters) -> None:
    a, b = (adapters.new(name, content="same") for name in "ab")
    assert a is not b and a.digest == b.digest and adapters.find("a") is a
    assert [entry.request.lora_name for entry in (a, b)] == ["a", "b"]
    shutil.rmtree(adapters.folder / "b")
    assert adapters.manager.unload("b") and not adapters.manager.unload("b")
    assert adapters.find("a") is a
    adapters.use(a)


def test_files_written_twice_are_one_adapter(adapters: Adapters) -> None:
    first = adapters.new("a")
    adapters.write("a")
    assert adapters.find("a") is first and adapters.manager.stats().num_registered == 1


def test_a_changed_folder_is_another_adapter(adapters: Adapters) -> None:
    """Those who asked before get what they asked for."""
    old = adapters.new("a")
    assert adapters.find("a") is old
    adapters.write("a", content="changed")
    new = adapters.find("a")
    assert new is not old and new.digest != old.digest
    adapters.use(old, new)
    adapters.check()


def test_an_id_has_one_name(adapters: Adapters) -> None:
    a, b = adapters.write("a"), adapters.write("b")
    with pytest.raises(AdapterError, match="there is no adapter"):
        adapters.manager.find(LoRARequest("typo", 1, str(adapters.folder / "absent")))
    adapters.manager.find(LoRARequest("a", 1, str(a)))
    with pytest.raises(AdapterError, match="lora_int_id=1 is the adapter 'a''s; give 'b' another"):
        adapters.manager.find(LoRARequest("b", 1, str(b)))
    assert adapters.manager.unload("a")
    adapters.manager.find(LoRARequest("b", 1, str(b)))


def test_what_does_not_fit_is_refused(adapters: Adapters, make: Callable[..., Adapters]) -> None:
    with pytest.raises(AdapterError, match=r"'a' has rank 33.*max_lora_rank=32 allows no more.*max_lora_rank=33"):
        adapters.new("a", rank=33)
    small = make(num_pages=1)
    with pytest.raises(AdapterError, match="'b' takes 2 pages, and there are 1; start with a larger max_loras"):
        small.new("b", rank=17)
    assert adapters.manager.entries() == small.manager.entries() == []


def test_unloading(adapters: Adapters) -> None:
    a, b = adapters.new("a"), adapters.new("b")
    assert adapters.acquire(a) is READY
    adapters.use(b)
    assert adapters.manager.unload("a") and adapters.manager.unload("b")
    assert a.is_resident and not b.is_resident and adapters.manager.entries() == []
    again = adapters.find("a")
    assert again is not a
    adapters.manager.release(a)
    assert not a.is_resident
    adapters.use(again)
    adapters.check()
    assert not adapters.manager.unload("c")


def test_an_unknown_name_names_the_nearest(adapters: Adapters) -> None:
    adapters.new("pirate")
    assert str(adapters.manager.unknown("pirat")).startswith("no adapter 'pirat' is loaded; did you mean 'pirate'?")
    assert adapters.manager.unload("pirate")
    assert str(adapters.manager.unknown("pirat")) == "no adapter 'pirat' is loaded; loaded are none"


@pytest.mark.parametrize("seed", range(4))
def test_random_use_loses_nothing(make: Callable[..., Adapters], seed: int) -> None:
    adapters, rng = make(num_pages=4, max_on_host=3), np.random.default_rng(seed)
    for index, name in enumerate("abcdefgh"):
        adapters.write(name, rank=[2, 17, 16, 30][index % 4])
    known, in_use, actions = [], [], ["find", "acquire", "acquire", "release", "release", "unload"]
    for _ in range(150):
        action, name = rng.choice(actions), rng.choice(list("abcdefgh"))
        if action == "find":
            known.append(adapters.find(name))
        elif action == "acquire" and known:
            entry = known[rng.integers(len(known))]
            outcome = (adapters.ask if rng.random() < 0.3 else adapters.acquire)(entry)
            assert outcome is not FAILED
            in_use += [entry] * (outcome is READY)
        elif action == "release" and in_use:
            adapters.manager.release(in_use.pop(rng.integers(len(in_use))))
        elif action == "unload":
            adapters.manager.unload(name)
        adapters.manager.wait(0.0005)
        assert all(entry.is_resident and entry.pins == in_use.count(entry) for entry in in_use)
        adapters.check()
    for entry in in_use:
        adapters.manager.release(entry)
    adapters.use(adapters.find("b"), adapters.find("d"))
    adapters.check()
    assert adapters.manager.stats().num_loads > 10 and adapters.manager.stats().num_evictions > 0
