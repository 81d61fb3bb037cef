"""The measurements of adapters, of an engine that only says how long things take, and the adapters that they write."""

import argparse
import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen2_jax import LoRARequest
from qwen2_jax.config import ModelConfig
from qwen2_jax.lora.reader import read_adapter
from scripts import adapter_curve, adapter_loading, adapters_workload, gpu_check, workload

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
STEP, RESIDENT, COPY, READ = 0.002, 0.002, 0.01, 0.02


class FakeEngine:
    """Answers after a set time, longer for an adapter that is not on the device or not known; has room for `room`."""

    def __init__(self, room: int = 10, room_on_host: int = 100) -> None:
        self.room, self.room_on_host = room, room_on_host
        self.known: set[str] = set()
        self.resident: list[str] = []
        self.pinned: set[str] = set()
        self.waited, self.num_loads, self.num_evictions = 0.0, 0, 0
        self.lock = threading.Lock()

    def lora_stats(self) -> Any:
        counts = {"num_loads": self.num_loads, "num_evictions": self.num_evictions}
        counts |= {"num_on_host": min(len(self.known), self.room_on_host), "num_resident": len(self.resident)}
        return SimpleNamespace(wait_seconds=self.waited, **counts)

    def list_loras(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.known]

    def load_lora(self, request: LoRARequest, *, pin: bool = False) -> None:
        with self.lock:
            name = request.lora_name
            if name not in self.known:
                time.sleep(READ)
                self.known.add(name)
            if name not in self.resident:
                time.sleep(COPY)
                self.waited += COPY
                self.num_loads += 1
                if len(self.resident) == self.room:
                    self.resident.remove(next(other for other in self.resident if other not in self.pinned))
                    self.num_evictions += 1
                self.resident.append(name)
            if pin:
                self.pinned.add(name)

    def unload_lora(self, name: str) -> None:
        self.known.remove(name)
        if name in self.resident:
            self.resident.remove(name)

    def generate(self, prompts: list[Any], params: Any, *, lora_request: list[Any], use_tqdm: bool) -> None:
        assert len(prompts) == len(lora_request) and not use_tqdm and params.ignore_eos
        for request in lora_request:
            if request is not None:
                self.load_lora(request)
        time.sleep(RESIDENT + (params.max_tokens - 1) * STEP)

    async def stream(self, prompt: Any, params: Any, *, lora_request: LoRARequest) -> AsyncGenerator[Any, None]:
        for _ in range(params.max_tokens // 2):
            await asyncio.sleep(2 * STEP)
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=(1, 2))])


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[LoRARequest]:
    monkeypatch.setitem(workload.GEOMETRIES, "tiny", TINY)
    return adapters_workload.write_separate_adapters(tmp_path, workload, "tiny", 14)


def test_separate_adapters_differ_and_are_read(requests: list[LoRARequest]) -> None:
    base = ModelConfig.from_hf(workload.FAMILY | TINY | {"max_window_layers": 2})
    digests = {read_adapter(Path(request.lora_path), base).digest for request in requests[:3]}
    assert len(digests) == 3 and len({request.lora_int_id for request in requests}) == len(requests)


def test_linked_adapters_share_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workload.GEOMETRIES, "tiny", TINY)
    requests = adapters_workload.write_linked_adapters(tmp_path, workload, "tiny", 3)
    base = ModelConfig.from_hf(workload.FAMILY | TINY | {"max_window_layers": 2})
    assert len({read_adapter(Path(request.lora_path), base).digest for request in requests}) == 3
    files = {(Path(request.lora_path) / adapters_workload.WEIGHTS).resolve() for request in requests}
    assert len(files) == 1


def test_loading_is_what_a_new_adapter_costs_more(requests: list[LoRARequest]) -> None:
    engine: Any = FakeEngine()
    row = adapter_loading.measure_first_token(engine, requests[:3], from_disk=False)
    assert (row["kind"], row["files"], row["adapters"]) == ("first token", "in memory", 3)
    assert row["wait_ms"] == pytest.approx(1e3 * COPY)
    assert row["loading_ms"] == pytest.approx(1e3 * (READ + COPY), rel=0.4)
    assert row["find_ms"] == pytest.approx(row["loading_ms"] - row["wait_ms"], abs=0.5)
    assert row["new_ms"] > row["resident_ms"] and row["loading_max_ms"] >= row["loading_ms"]


def test_all_of_loading_is_measured(requests: list[LoRARequest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_loading, "drop_from_page_cache", lambda path: 0.5)
    engine: Any = FakeEngine()
    arguments = argparse.Namespace(adapters=2, rows=9, new_tokens=60)
    rows = adapter_loading.measure(engine, requests, arguments)
    assert [row.get("in_page_cache") for row in rows[:2]] == [None, 0.5]
    decode = rows[2:]
    assert [row["source"] for row in decode] == ["none", "files", "files", "host memory", "host memory", "none"]
    assert all(row["step_ms"] == pytest.approx(1e3 * STEP, rel=0.5) and row["rows"] == 9 for row in decode)
    assert [row["loads_per_s"] > 0 for row in decode] == [False, True, True, True, True, False]
    assert decode[1]["loads_per_s"] < decode[2]["loads_per_s"] < decode[4]["loads_per_s"]
    assert engine.num_evictions > 0
    alone = (decode[0]["step_ms"] + decode[-1]["step_ms"]) / 2
    assert decode[2]["step_ratio"] == pytest.approx(decode[2]["step_ms"] / alone, abs=1e-3)


@pytest.mark.parametrize(
    ("rooms", "message"),
    [
        ((14, 100), r"all 14 adapters are on the device, .* start the engine with max_loras=13 or less"),
        ((10, 12), r"12 of 14 adapters are in host memory, .* start the engine with max_cpu_loras=14"),
    ],
)
def test_a_measurement_in_which_nothing_streams_fails(
    rooms: tuple[int, int], message: str, requests: list[LoRARequest]
) -> None:
    engine: Any = FakeEngine(*rooms)
    for request in requests[:8]:
        engine.load_lora(request, pin=True)
    with pytest.raises(RuntimeError, match=message):
        adapter_loading.measure_decode(engine, requests[:8], requests[8:], 9, 60, "host memory", None)


def test_a_measurement_that_ends_before_an_adapter_comes_fails(
    requests: list[LoRARequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_loading, "time_steps", lambda *arguments: [STEP])
    engine: Any = FakeEngine()
    with pytest.raises(RuntimeError, match=r"no adapter came from files within .* of 60 tokens; use more --new-tokens"):
        adapter_loading.measure_decode(engine, requests[:8], requests[8:], 9, 60, "files", None)


def test_the_page_cache_is_dropped_where_files_are_on_a_disk(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(300_000))
    assert 0 <= adapter_loading.drop_from_page_cache(path) <= 1


def test_a_failing_stream_ends_the_measurement(requests: list[LoRARequest]) -> None:
    engine: Any = FakeEngine()
    engine.load_lora = lambda request, pin=False: 1 / 0
    with pytest.raises(ZeroDivisionError), adapter_loading.Stream(engine, requests, rate=None, from_files=False):
        pass


def test_curves_count_the_loads_of_their_own_run(requests: list[LoRARequest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_curve, "REQUESTS", 4)
    monkeypatch.setattr(adapter_curve, "STEPS", 2)
    engine: Any = FakeEngine()
    found = [adapter_curve.measure_registered(engine, requests, 1, turn) for turn in adapter_curve.TURNS]
    assert [(row["distinct"], row["loads"]) for row in found] == [(1, 1), (1, 0)]
    row = adapter_curve.measure_batch(engine, requests, 3, 6)
    assert (row["kind"], row["adapters"]) == ("batch", 3) and row["step_ms"] == pytest.approx(1e3 * STEP, rel=0.3)


def test_what_was_measured_before_the_parts_end_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"engine": "qwen2_jax", "geometry": "7b", "adapters": 32, "startup_s": 60.0},
        {"adapters_used": 0, "decode_batch": 32, "step_ms": 5.0, "decode_tok_s": 6400.0},
        {"adapters_used": 8, "decode_batch": 32, "step_ms": 6.0, "decode_tok_s": 5333.3},
    ]
    lines = "\n".join(map(json.dumps, rows))
    script = tmp_path / "workload.py"
    script.write_text(f"import time\nprint({lines!r}, flush=True)\ntime.sleep(60)\n")
    [failure] = gpu_check.check_adapters("7b", script, tmp_path, 2)
    assert failure.startswith("adapters_7b: stopped, its time was over")
    assert json.loads((tmp_path / "adapters_7b.json").read_text())["rows"] == rows
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["decode", "step,", "batch", "32,", "8", "adapters", "(ms)", "6.00", "10.91", "5.07", "6.50", "yes"] in shown
