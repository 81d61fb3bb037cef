"""What an entry keeps of its adapter: places on the devices, a copy in host memory, and the way back to its files."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen2_jax.lora.entry import Admission
from tests.lora.test_manager import Adapters


@pytest.fixture
def adapters(tmp_path: Path) -> Iterator[Adapters]:
    """Room for one copy in host memory."""
    made = Adapters(tmp_path, max_on_host=1)
    yield made
    made.manager.close()


def test_what_has_left_host_memory_is_read_again(adapters: Adapters) -> None:
    a, b = adapters.new("a"), adapters.new("b")
    assert a.host is None and b.host is not None
    adapters.use(a)
    assert a.host is not None and b.host is None and adapters.manager.stats().num_on_host == 1
    adapters.check()


@pytest.mark.parametrize(
    "fault, message", [("gone", "is not a folder"), ("changed", "a has changed since the request")]
)
def test_files_that_are_not_what_they_were(tmp_path: Path, fault: str, message: str) -> None:
    adapters = Adapters(tmp_path, max_on_host=1)
    a = adapters.new("a")
    b = adapters.new("b")
    if fault == "gone":
        shutil.rmtree(tmp_path / "a")
    else:
        adapters.write("a", content="changed")
    assert adapters.acquire(a) is Admission.FAILED
    assert a.error is not None and message in str(a.error)
    assert adapters.acquire(a) is Admission.FAILED and adapters.manager.stats().num_failures == 1
    adapters.use(b)
    adapters.write("a")
    adapters.use(adapters.find("a"))
    adapters.check()


def test_the_files_may_have_moved(adapters: Adapters) -> None:
    a, _ = adapters.new("a"), adapters.new("b")
    moved = Path(shutil.move(adapters.folder / "a", adapters.folder / "moved"))
    assert adapters.find("a", moved) is a
    adapters.new("c")
    adapters.use(a)


def test_an_entry_knows_its_places_while_it_has_them(adapters: Adapters) -> None:
    entry = adapters.new("a", rank=17)
    assert entry.needs == {"pages": 2, "vectors": 0}
    assert not entry.is_resident and entry.place("pages") == -1
    assert adapters.acquire(entry) is Admission.READY
    assert entry.is_resident and sorted(entry.places["pages"]) == [0, 1] and entry.place("vectors") == -1
    adapters.manager.release(entry)
    adapters.use(adapters.new("b"))
    assert not entry.is_resident and entry.places == {}
