"""The engine: schedule a call, launch it, and take in the results of the one before."""

import gc
import logging
import time
from collections import deque

import numpy as np

from qwen2_jax.engine.input_processor import InputProcessor, ProcessedInput
from qwen2_jax.engine.model_runner import ModelRunner
from qwen2_jax.engine.output_processor import GroupOutput
from qwen2_jax.engine.request import Request
from qwen2_jax.engine.schedule import SchedulerOutput
from qwen2_jax.engine.scheduler import Scheduler
from qwen2_jax.engine.step_results import Launched, RowResult
from qwen2_jax.errors import AdapterError, RequestError
from qwen2_jax.lora.manager import AdapterManager
from qwen2_jax.text.tokenizer import Tokenizer
from qwen2_jax.types import ClassificationRequestOutput, EmbeddingRequestOutput, RequestOutput

logger = logging.getLogger(__name__)

Output = RequestOutput | EmbeddingRequestOutput | ClassificationRequestOutput

RUN_AHEAD = 1
"""Calls that are launched before the oldest one's results are read."""
_ADAPTER_WAIT_SECONDS = 0.02
"""How long a step waits for an adapter where there is nothing else to do."""


class Engine:
    """Serves requests step by step. One thread at a time may use it; `inputs` may be used from any."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        inputs: InputProcessor,
        tokenizer: Tokenizer | None,
        adapters: AdapterManager | None = None,
    ) -> None:
        self.runner, self.scheduler, self.inputs, self.adapters = runner, scheduler, inputs, adapters
        self._tokenizer = tokenizer
        self._groups: dict[str, GroupOutput] = {}
        self._group_of: dict[Request, tuple[GroupOutput, int]] = {}
        self._in_flight: deque[Launched] = deque()
        self._failures: list[tuple[str, AdapterError]] = []

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._groups) or bool(self._in_flight)

    def add(self, source: ProcessedInput) -> None:
        """Queue a request; raises `RequestError`, and nothing happens, for one that can never run or an id in use."""
        if source.request_id in self._groups:
            raise RequestError(f"request_id {source.request_id!r} belongs to an unfinished request; use another")
        for request in source.sequences:
            self.scheduler.check(request)
        group = GroupOutput.start(source, self._tokenizer)
        for index, request in enumerate(source.sequences):
            self.scheduler.add(request)
            self._group_of[request] = (group, index)
        self._groups[source.request_id] = group

    def abort(self, request_id: str) -> Output | None:
        """End a request early and return its last output; None if there is no unfinished one of that id."""
        group = self._groups.get(request_id)
        if group is None:
            return None
        for request in group.source.sequences:
            self.scheduler.abort(request.request_id)
        for sequence in group.sequences:
            sequence.finish("abort", None)
        return self._render(group)

    def step(self) -> list[Output]:
        """Launch the next call if there is one, and return what the oldest call under way has changed."""
        planned = self.scheduler.schedule()
        self._fail_adapters()
        if planned is not None:
            self._in_flight.append(self.runner.launch(planned))
            self._note_scheduled(planned)
        if not self._in_flight or (planned is not None and len(self._in_flight) <= RUN_AHEAD):
            if not self._in_flight and self._groups and self.adapters is not None:
                self.adapters.wait(_ADAPTER_WAIT_SECONDS)
            return []
        launched = self._in_flight.popleft()
        return self._postprocess(launched.output, launched.read())

    def _postprocess(self, output: SchedulerOutput, results: list[RowResult]) -> list[Output]:
        for row, result in zip(output.rows, results, strict=True):
            if result.prompt_logprobs and row.request in self._group_of:
                self._group_of[row.request][0].add_prompt_logprobs(row.start + 1, result.prompt_logprobs)
        changed = set(self.scheduler.update(output, [result.token_ids for result in results]))
        groups: dict[str, GroupOutput] = {}
        for row, result in zip(output.rows, results, strict=True):
            if row.request in changed:
                group = self._take(row.request, result)
                groups[group.source.request_id] = group
        return [rendered for group in groups.values() if (rendered := self._render(group)) is not None]

    def take_failures(self) -> list[tuple[str, AdapterError]]:
        """Return the requests that ended with an error since the last call, by id."""
        failures, self._failures = self._failures, []
        return failures

    def close(self) -> None:
        """Let go of the device's memory, and of what a start keeps from garbage collection."""
        if self.adapters is not None:
            self.adapters.close()
        self.runner.close()
        gc.unfreeze()

    def _fail_adapters(self) -> None:
        """End the groups of requests whose adapter cannot be loaded."""
        for request in self.scheduler.take_failed():
            group = self._group_of.pop(request, None)
            if group is None or self._groups.pop(group[0].source.request_id, None) is None:
                continue
            for other in group[0].source.sequences:
                self.scheduler.abort(other.request_id)
                self._group_of.pop(other, None)
            assert request.adapter is not None and request.adapter.error is not None
            self._failures.append((group[0].source.request_id, request.adapter.error))

    def _take(self, request: Request, result: RowResult) -> GroupOutput:
        group, index = self._group_of[request]
        if result.pooled is not None:
            group.pooled = np.asarray(result.pooled, np.float32)
        else:
            if group.metrics.first_token_time is None and request.output_token_ids:
                group.metrics.first_token_time = time.monotonic()
            if group.sequences[index].take(result):
                self.scheduler.finish(request, "stop", group.sequences[index].stop_reason)
        return group

    def _render(self, group: GroupOutput) -> Output | None:
        if group.is_finished:
            self._groups.pop(group.source.request_id, None)
            for request in group.source.sequences:
                self._group_of.pop(request, None)
        return group.render()

    def _note_scheduled(self, output: SchedulerOutput) -> None:
        now = time.monotonic()
        for request in output.admitted:
            metrics = self._group_of[request][0].metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = now
