"""Lowering workers as their pool sees them; the processes here are small programs that speak a worker's protocol."""

import logging
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwen2_jax.engine import build, lowering_pool
from qwen2_jax.engine.lowering_pool import LoweringPool, choose_workers
from qwen2_jax.engine.program_specs import ProgramKey, families

GIB = 1 << 30
KEYS: list[ProgramKey] = [
    (name, bucket) for bucket in (4, 2, 1) for name in ("prefill", "decode", "decode_greedy_lora")
]

# Writes down in the folder that it gets as facts who was told to lower what, then does what ANSWER says for each key.
PROGRAM = """
import os, pickle, sys, time
replies = sys.stdout.buffer

class Options(pickle.Unpickler):
    def find_class(self, *name):
        return lambda *_: None  # this program does without JAX

Options(sys.stdin.buffer).load()
while True:
    try:
        folder, mesh, keys = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    for key in keys:
        with open(f"{folder}/{key[0]}-{key[1]}", "a") as file:
            print(os.getpid(), file=file)
        error = None
        ANSWER
        data = None if error else f"{mesh} {key}".encode()
        pickle.dump((key, data, error), replies)
        replies.flush()
"""


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes workers of `PROGRAM` with the given answer."""

    def use(code: str) -> None:
        monkeypatch.setattr(lowering_pool, "_PROGRAM", ("-S", "-c", PROGRAM.replace("ANSWER", code)))

    return use


def lower(pool: LoweringPool, folder: Path, keys: list[ProgramKey] = KEYS) -> dict[ProgramKey, bytes | None]:
    """Have programs lowered; each must come once."""
    facts: Any = str(folder)
    mesh: Any = "mesh"
    programs = list(pool.lower(facts, mesh, keys))
    assert sorted(key for key, _ in programs) == sorted(keys)
    assert all(data in (None, f"mesh {key}".encode()) for key, data in programs)
    return dict(programs)


def missing(programs: dict[ProgramKey, bytes | None]) -> list[ProgramKey]:
    return [key for key, data in programs.items() if data is None]


def lowered_by(folder: Path) -> dict[str, list[str]]:
    """Return the processes that were told to lower each program."""
    return {path.name: path.read_text().split() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "platform, cores, host, count",
    [("gpu", 16, 100, 8), ("gpu", 128, 100, 12), ("gpu", 16, 3.5, 3), ("gpu", 2, 100, 0), ("cpu", 64, 100, 0)],
)
def test_workers_fit_the_machine(platform: str, cores: int, host: float, count: int) -> None:
    assert count == choose_workers(platform=platform, cores=cores, host_bytes=int(host * GIB))


@pytest.mark.parametrize("count, platform, expected", [(None, "cpu", 0), (0, "gpu", 0), (2, "cpu", 2)])
def test_an_engine_starts_as_many_as_it_is_told(answer: Any, count: int | None, platform: str, expected: int) -> None:
    answer("pass")
    with build._lowering_pool(count, platform, at_once=True) as pool:
        assert (0 if pool is None else len(pool._workers)) == expected


def test_programs_that_share_kernels_are_a_family() -> None:
    keys = [("prefill", 8), ("set_x", 0), ("decode", 8), ("decode_lora", 8), ("decode_greedy_lora_vectors", 8)]
    assert families([*keys, ("decode", 4)]) == [
        [("decode", 8), ("decode_lora", 8), ("decode_greedy_lora_vectors", 8)],
        [("prefill", 8)],
        [("set_x", 0)],
        [("decode", 4)],
    ]


def test_each_program_is_lowered_once_and_families_by_one_process(answer: Any, tmp_path: Path) -> None:
    answer("time.sleep(0.05)")
    with LoweringPool(2) as pool:
        assert missing(lower(pool, tmp_path)) == []
    by = lowered_by(tmp_path)
    assert len(by) == len(KEYS) and all(len(processes) == 1 for processes in by.values())
    assert len({process for [process] in by.values()}) == 2
    assert all(by[f"decode-{bucket}"] == by[f"decode_greedy_lora-{bucket}"] for bucket in (4, 2, 1))


def test_a_pool_lowers_a_second_time(answer: Any, tmp_path: Path) -> None:
    answer("pass")
    with LoweringPool(2) as pool:
        for _ in range(2):
            assert missing(lower(pool, tmp_path)) == []
    assert all(len(processes) == 2 for processes in lowered_by(tmp_path).values())


def test_workers_may_wait_until_there_is_work(answer: Any, tmp_path: Path) -> None:
    answer("pass")
    with LoweringPool(2, at_once=False) as pool:
        assert pool._workers == [] and missing(lower(pool, tmp_path)) == []
        assert len(pool._workers) == 2


def test_few_programs_are_not_worth_a_message(answer: Any, tmp_path: Path) -> None:
    answer("pass")
    with LoweringPool(1) as pool:
        assert missing(lower(pool, tmp_path, KEYS[:3])) == KEYS[:3]
    assert lowered_by(tmp_path) == {}


def test_what_a_worker_cannot_lower_is_reported(answer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answer("error = 'ValueError: no such tile' if key == ('decode', 2) else None")
    with caplog.at_level(logging.WARNING), LoweringPool(2) as pool:
        assert missing(lower(pool, tmp_path)) == [("decode", 2)]
    (message,) = caplog.messages
    assert "could not lower ('decode', 2); this process will: ValueError: no such tile" in message


@pytest.mark.parametrize("count", [1, 3])
def test_a_worker_that_dies_leaves_its_programs_to_this_process(
    answer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    answer("os._exit(3) if key == ('decode', 2) else time.sleep(0.05)")
    with caplog.at_level(logging.WARNING), LoweringPool(count) as pool:
        left = missing(lower(pool, tmp_path))
    assert ("decode", 2) in left
    assert set(left) == {("decode", 2), ("decode_greedy_lora", 2)} or count == 1
    (message,) = caplog.messages
    assert "has ended, status 3" in message


def test_a_worker_that_hangs_is_ended(
    answer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering_pool, "_LONGEST_SECONDS", 1.0)
    answer("if key[0] == 'decode': time.sleep(60)")
    start = time.monotonic()
    with LoweringPool(1) as pool:
        programs = lower(pool, tmp_path)
    assert time.monotonic() - start < 30
    assert {key for key, data in programs.items() if data is None} >= {key for key in KEYS if key[0] == "decode"}
    first, second = caplog.messages
    assert first == "lowering worker 0 has given no program for 1 seconds and is ended"
    assert second == "lowering worker 0 has ended, status -9; this process lowers its programs"


def test_workers_that_never_start_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering_pool, "_PROGRAM", ("-S", "-c", "raise SystemExit(7)"))
    with caplog.at_level(logging.WARNING), LoweringPool(2) as pool:
        assert sorted(missing(lower(pool, tmp_path))) == sorted(KEYS)
    assert len(caplog.messages) == 2 and all("status 7" in message for message in caplog.messages)


def test_leaving_a_pool_ends_workers_at_once(answer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answer("None if key == ('decode', 4) else time.sleep(100)")
    start = time.monotonic()
    facts: Any = str(tmp_path)
    mesh: Any = None
    with pytest.raises(KeyboardInterrupt), LoweringPool(2) as pool:
        for _ in pool.lower(facts, mesh, KEYS):
            raise KeyboardInterrupt
    assert time.monotonic() - start < 20
    assert [worker._process.returncode for worker in pool._workers] == [-9, -9]
    assert not any(thread.is_alive() for thread in pool._threads)
    assert caplog.messages == []


def test_the_end_of_stdin_ends_a_worker() -> None:
    command = [sys.executable, *lowering_pool._PROGRAM]
    environment = lowering_pool._environment()
    result = subprocess.run(command, input=pickle.dumps({}), capture_output=True, env=environment, timeout=120)
    assert result.returncode == 0 and result.stdout == b""
