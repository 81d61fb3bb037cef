"""Compile workers as their pool sees them; the processes here are small programs that speak a worker's protocol."""

import logging
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from qwen2_jax.engine import build, compile_pool
from qwen2_jax.engine.compile_pool import CompilePool, choose_workers
from qwen2_jax.engine.program_specs import ProgramKey, families
from qwen2_jax.errors import ConfigError

GIB = 1 << 30
KEYS: list[ProgramKey] = [
    (name, bucket) for bucket in (4, 2, 1) for name in ("prefill", "decode", "decode_greedy_lora")
]
FACTS: Any = None

# Writes down in the folder who was told to compile what, then does what ANSWER says for each key.
PROGRAM = """
import os, pickle, sys, time
replies = sys.stdout.buffer

class Options(pickle.Unpickler):
    def find_class(self, *name):
        return lambda *_: None  # this program does without JAX

Options(sys.stdin.buffer).load()
while True:
    try:
        _, directory, keys = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    for key in keys:
        with open(directory / f"{key[0]}-{key[1]}", "a") as file:
            print(os.getpid(), file=file)
        ANSWER
        pickle.dump((key, error), replies)
        replies.flush()
"""


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes workers of `PROGRAM` with the given answer."""

    def use(code: str) -> None:
        monkeypatch.setattr(compile_pool, "_PROGRAM", ("-S", "-c", PROGRAM.replace("ANSWER", code)))

    return use


def compiled_by(folder: Path) -> dict[str, list[str]]:
    """Return the processes that were told to compile each program."""
    return {path.name: path.read_text().split() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "platform, cores, host, device, count",
    [
        ("gpu", 16, 100, 7.9, 2),  # an H100 of which JAX has 90 %
        ("gpu", 16, 100, 40, 8),
        ("gpu", 16, 10, 40, 3),
        ("gpu", 16, 100, 4, 0),  # room for one, which would not be faster than this process
        ("gpu", 16, 100, 0, 0),
        ("gpu", 16, 100, None, 0),
        ("gpu", 4, 100, 40, 0),
        ("cpu", 64, 100, None, 0),
    ],
)
def test_workers_fit_the_machine(platform: str, cores: int, host: float, device: float | None, count: int) -> None:
    device_bytes = None if device is None else int(device * GIB)
    assert count == choose_workers(
        platform=platform, cores=cores, host_bytes=int(host * GIB), device_bytes=device_bytes
    )


def test_workers_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 72 * GIB})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    with pytest.raises(ConfigError, match=r"compile_workers=6 do not fit into the 8\.0 GiB.*use at most 2"):
        build._compile_pool(6)


def test_programs_that_share_kernels_are_a_family() -> None:
    keys = [("prefill", 8), ("set_x", 0), ("decode", 8), ("decode_lora", 8), ("decode_greedy_lora_vectors", 8)]
    assert families([*keys, ("decode", 4)]) == [
        [("decode", 8), ("decode_lora", 8), ("decode_greedy_lora_vectors", 8)],
        [("prefill", 8)],
        [("set_x", 0)],
        [("decode", 4)],
    ]


def test_each_program_is_compiled_once_and_families_by_one_process(answer: Any, tmp_path: Path) -> None:
    answer("error = time.sleep(0.05)")
    with CompilePool(2) as pool:
        assert sorted(pool.compile(FACTS, tmp_path, KEYS)) == sorted(KEYS)
    by = compiled_by(tmp_path)
    assert len(by) == len(KEYS) and all(len(processes) == 1 for processes in by.values())
    assert all(by[f"decode-{bucket}"] == by[f"decode_greedy_lora-{bucket}"] for bucket in (4, 2, 1))


def test_a_pool_compiles_a_second_time(answer: Any, tmp_path: Path) -> None:
    answer("error = None")
    with CompilePool(2) as pool:
        for _ in range(2):
            assert sorted(pool.compile(FACTS, tmp_path, KEYS)) == sorted(KEYS)
    assert all(len(processes) == 2 for processes in compiled_by(tmp_path).values())


def test_few_programs_are_not_worth_a_message(answer: Any, tmp_path: Path) -> None:
    answer("error = None")
    with CompilePool(1) as pool:
        assert list(pool.compile(FACTS, tmp_path, KEYS[:3])) == KEYS[:3]
    assert compiled_by(tmp_path) == {}


def test_what_a_worker_cannot_compile_is_reported(
    answer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answer("error = 'ValueError: no such tile' if key == ('decode', 2) else None")
    with caplog.at_level(logging.WARNING), CompilePool(2) as pool:
        ended = {
            key: [worker._process.poll() for worker in pool._workers] for key in pool.compile(FACTS, tmp_path, KEYS)
        }
    assert sorted(ended) == sorted(KEYS)
    # Nothing of a GPU is held any more by the time this process compiles what is left.
    assert ended["decode", 2] == [-9, -9]
    (message,) = caplog.messages
    assert "could not compile ('decode', 2) and is ended; this process will: ValueError: no such tile" in message


def test_another_worker_compiles_what_a_failed_one_had(answer: Any, tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    folder = tmp_path / "programs"
    folder.mkdir()
    # The process that makes this folder vanish has no memory; the other one has.
    answer(f"""
        try:
            os.rmdir({str(first)!r})
            error = 'RESOURCE_EXHAUSTED'
        except FileNotFoundError:
            error = time.sleep(0.02)""")
    with CompilePool(2) as pool:
        assert sorted(pool.compile(FACTS, folder, KEYS)) == sorted(KEYS)
    by = [set(processes) for processes in compiled_by(folder).values()]
    assert len(set[str]().union(*by)) == 2
    # The one that failed was told no more.
    counts = sorted(sum(process in processes for processes in by) for process in set[str]().union(*by))
    assert counts[0] < counts[1]


def test_a_pool_that_has_lost_its_workers_leaves_everything_to_this_process(answer: Any, tmp_path: Path) -> None:
    answer("error = 'RESOURCE_EXHAUSTED'")
    with CompilePool(2) as pool:
        for _ in range(2):
            assert sorted(pool.compile(FACTS, tmp_path, KEYS)) == sorted(KEYS)


@pytest.mark.parametrize("count", [1, 3])
def test_a_worker_that_dies_leaves_its_programs_to_this_process(
    answer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    answer("error = os._exit(3) if key == ('decode', 2) else time.sleep(0.05)")
    with caplog.at_level(logging.WARNING), CompilePool(count) as pool:
        assert sorted(pool.compile(FACTS, tmp_path, KEYS)) == sorted(KEYS)
    (message,) = caplog.messages
    assert "has ended, status 3" in message
    assert len(compiled_by(tmp_path)) < len(KEYS)


def test_workers_that_never_start_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_pool, "_PROGRAM", ("-S", "-c", "raise SystemExit(7)"))
    with caplog.at_level(logging.WARNING), CompilePool(2) as pool:
        assert sorted(pool.compile(FACTS, tmp_path, KEYS)) == sorted(KEYS)
    assert len(caplog.messages) == 2 and all("status 7" in message for message in caplog.messages)


def test_leaving_a_pool_ends_workers_at_once(answer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answer("error = None if key == ('decode', 4) else time.sleep(100)")
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), CompilePool(2) as pool:
        for _ in pool.compile(FACTS, tmp_path, KEYS):
            raise KeyboardInterrupt
    assert time.monotonic() - start < 20
    assert [worker._process.returncode for worker in pool._workers] == [-9, -9]
    assert not any(thread.is_alive() for thread in pool._threads) and not pool.scratch.exists()
    assert caplog.messages == []


def test_the_end_of_stdin_ends_a_worker() -> None:
    command = [sys.executable, *compile_pool._PROGRAM]
    environment = compile_pool._environment()
    result = subprocess.run(command, input=pickle.dumps({}), capture_output=True, env=environment, timeout=120)
    assert result.returncode == 0 and result.stdout == b""
