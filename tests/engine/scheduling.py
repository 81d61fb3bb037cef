"""Short words for the scheduler's tests: a small scheduler, small requests, adapters, and one call after another."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_jax.engine.request import Request
from qwen2_jax.engine.schedule import AdapterGate, SchedulerConfig, SchedulerOutput
from qwen2_jax.engine.scheduler import Scheduler
from qwen2_jax.lora.entry import AdapterEntry, Admission
from qwen2_jax.lora.sources import FolderSource
from qwen2_jax.models.adapters import PageUse, TokenGroup
from qwen2_jax.types import LoRARequest, SamplingParams

EOS = 0


class Gate:
    """Room for so many adapters; those in `loading` are on their way, and those in `failed` cannot come."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.loading: set[AdapterEntry] = set()
        self.failed: set[AdapterEntry] = set()
        self.uses: Counter[AdapterEntry] = Counter()
        self.asked: list[AdapterEntry] = []
        """Since the last pass has begun."""
        self.waited_for: list[AdapterEntry] = []
        """Those that were released and are still wanted."""

    def begin_pass(self) -> None:
        self.asked.clear()

    def acquire(self, entry: AdapterEntry) -> Admission:
        self.asked.append(entry)
        if entry in self.failed:
            return Admission.FAILED
        if entry in self.loading:
            return Admission.LOADING
        if not self.uses[entry] and len(+self.uses) >= self.room:
            return Admission.FULL
        self.uses[entry] += 1
        return Admission.READY

    def release(self, entry: AdapterEntry, *, is_wanted: bool = False) -> None:
        self.waited_for += [entry] * is_wanted
        self.uses[entry] -= 1
        assert self.uses[entry] >= 0


def make_entry(name: str, *pages: int, vector: int = -1, score: np.ndarray | None = None) -> AdapterEntry:
    """An adapter in these pages of the devices and this row of vectors; without either it is not there."""
    request, uses = LoRARequest(name, 1, name), tuple(PageUse(page=page, modules=5) for page in pages)
    facts = {"digest": name, "needs": {}, "nbytes": 0, "applied": Counter(), "score": score}
    entry = AdapterEntry(request=request, source=FolderSource(Path(name)), **facts)
    entry.group = TokenGroup(pages=uses, vector=vector) if pages or vector >= 0 else None
    return entry


def make_scheduler(num_blocks: int = 100, gate: AdapterGate | None = None, **changes: Any) -> Scheduler:
    options: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "block_size": 4,
    } | changes
    return Scheduler(SchedulerConfig(**options), num_blocks, gate)


def make_request(name: str, prompt: int | list[int], max_tokens: int | None = 8, **options: Any) -> Request:
    """A request named `name` whose prompt is given, or has that many tokens that no other request shares."""
    defaults: dict[str, Any] = {
        "max_model_len": 64,
        "eos_token_ids": (EOS,),
        "sampling_params": SamplingParams(max_tokens=max_tokens),
    }
    tokens = [ord(name)] * prompt if isinstance(prompt, int) else prompt
    return Request(request_id=name, prompt_token_ids=tokens, **(defaults | options))


def add(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.add(request)


def launch(scheduler: Scheduler) -> SchedulerOutput:
    output = scheduler.schedule()
    assert output is not None
    scheduler.check_integrity()
    return output


def read(scheduler: Scheduler, output: SchedulerOutput, token: int = 5) -> list[Request]:
    changed = scheduler.update(output, [[token] * row.num_steps if row.samples else [] for row in output.rows])
    scheduler.check_integrity()
    return changed


def step(scheduler: Scheduler, token: int = 5) -> SchedulerOutput:
    output = launch(scheduler)
    read(scheduler, output, token)
    return output


def shape(output: SchedulerOutput) -> list[tuple[str, int, int, bool]]:
    return [(row.request.request_id, row.start, row.num_tokens, row.samples) for row in output.rows]
