"""Decides what each call computes. It knows token counts and blocks, nothing of arrays.

`schedule` and `update` are called in the same order, but `schedule` may run ahead: calls are executed on the device in
the order in which they are scheduled, so that a block may be freed, or shared, while a call that uses it is under way.
"""

from dataclasses import dataclass, field

from qwen2_jax.engine.adapter_admission import AdapterAdmission
from qwen2_jax.engine.block_manager import BlockManager
from qwen2_jax.engine.request import FinishReason, Request, RequestStatus
from qwen2_jax.engine.request_queues import RequestQueues
from qwen2_jax.engine.schedule import AdapterGate, ScheduledRow, SchedulerConfig, SchedulerOutput
from qwen2_jax.engine.stopping import check_token_stop, count_passing
from qwen2_jax.errors import CapacityError, RequestError
from qwen2_jax.lora.entry import Admission


@dataclass(kw_only=True, slots=True)
class _Plan:
    """A call being put together; nothing of it has happened to the requests but their blocks."""

    budget: int
    rows: dict[Request, ScheduledRow] = field(default_factory=dict)
    admitted: list[Request] = field(default_factory=list)
    short_of_blocks: bool = False
    single_step: bool = False


class Scheduler:
    """Continuous batching with chunked prefill, prefix sharing, and preemption by recomputation.

    Under memory pressure the last row in order (youngest, or of lowest priority) gives up its blocks and is computed
    again later; the first one always goes on, since the pool holds at least one sequence of `max_model_len`.
    """

    def __init__(self, config: SchedulerConfig, num_blocks: int, adapters: AdapterGate | None = None) -> None:
        """Schedule over `num_blocks` blocks, block 0 (unused) included; `CapacityError` if one sequence cannot fit.

        A request whose adapter is not on the device waits, and the others go on.
        """
        self.config = config
        self.blocks = BlockManager(
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_step_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
            release_window=config.release_window,
        )
        needed = self.blocks.peak_blocks(config.max_model_len)
        if needed > self.blocks.pool.num_usable:
            raise CapacityError(
                f"one sequence of max_model_len={config.max_model_len} tokens needs {needed} cache blocks of "
                f"{config.block_size} tokens, and there are {self.blocks.pool.num_usable}; "
                "give the cache more memory or lower max_model_len"
            )
        self.num_preemptions = 0
        self._adapters = AdapterAdmission(adapters)
        self._failed: list[Request] = []
        self._queues = RequestQueues(max_num_seqs=config.max_num_seqs, by_priority=config.policy == "priority")

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is waiting or running."""
        return len(self._queues) > 0

    @property
    def num_running(self) -> int:
        """Requests that hold a row and blocks."""
        return len(self._queues.running)

    @property
    def num_waiting(self) -> int:
        """Requests that have not started, or were preempted."""
        return len(self._queues.waiting)

    @property
    def kv_cache_usage(self) -> float:
        """The share of blocks that running requests hold, 0 to 1."""
        return 1.0 - self.blocks.pool.num_free / self.blocks.pool.num_usable

    def add(self, request: Request) -> None:
        """Queue a new request that `check` lets pass."""
        self.check(request)
        self._queues.add(request)

    def check(self, request: Request) -> None:
        """Raise `RequestError` if the id of a new request is taken or its prompt can never run."""
        if self._queues.get(request.request_id) is not None:
            raise RequestError(f"request_id {request.request_id!r} belongs to an unfinished request; use another")
        prompt_len, limit = request.num_prompt_tokens, self.config.max_model_len - (not request.is_pooling)
        if request.whole_prompt:
            limit = min(limit, self.config.max_num_batched_tokens)
        if not 1 <= prompt_len <= limit:
            raise RequestError(f"the prompt has {prompt_len} tokens; this request may have 1 to {limit}")

    def abort(self, request_id: str) -> Request | None:
        """End an unfinished request early and return it; None if there is none of that id."""
        if (request := self._queues.get(request_id)) is not None:
            self.finish(request, "abort")
        return request

    def take_failed(self) -> list[Request]:
        """Return the requests that ended since the last call because their adapter cannot be loaded."""
        failed, self._failed = self._failed, []
        return failed

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a request and free what it holds, at once: calls under way are done before any that reuse it."""
        if request.is_finished:
            return
        self.blocks.free(request)
        if request.status is RequestStatus.RUNNING:
            self._adapters.release(request)
        self._queues.remove(request)
        request.finish_reason, request.stop_reason = reason, stop_reason

    def schedule(self) -> SchedulerOutput | None:
        """Return the next call, or None if nothing can run before `update` has been given an earlier one's results."""
        plan = _Plan(budget=self.config.max_num_batched_tokens)
        self._plan_running(plan)
        if not plan.short_of_blocks:
            self._plan_waiting(plan)
        return self._commit(plan) if plan.rows else None

    def update(self, output: SchedulerOutput, sampled: list[list[int]]) -> list[Request]:
        """Take in a call's results, in the order of the calls; return the requests that got tokens or finished.

        `sampled[i]` holds the tokens of row i's steps, or nothing if the row does not sample. What lies behind a stop,
        or belongs to a request that has finished meanwhile, is dropped.
        """
        changed = []
        for row, tokens in zip(output.rows, sampled, strict=True):
            if len(tokens) != row.num_steps * row.samples:
                raise ValueError(f"request {row.request.request_id!r}: {len(tokens)} sampled tokens do not fit its row")
            if not row.request.is_finished and self._update_row(row, tokens):
                changed.append(row.request)
        return changed

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing happens, while requests that hold such blocks run."""
        if not self._queues.running:
            self.blocks.prefix_cache.reset()
        return not self._queues.running

    def check_integrity(self) -> None:
        """Raise `AssertionError` if a block, a row or a request is lost or in two places."""
        self.blocks.check_integrity(self._queues.running)
        self._queues.check_integrity()

    def _num_pending(self, request: Request) -> int:
        """Tokens of a running request that could be computed now."""
        if request.synchronous and request.num_in_flight:
            return 0
        num_tokens = request.num_tokens_with_in_flight
        if num_tokens >= request.max_total_tokens and not request.is_pooling:
            return 0
        return num_tokens - request.num_computed_tokens

    def _plan_running(self, plan: _Plan) -> None:
        decodes, prefills = [], []
        for request in self._queues.running:
            num_pending = self._num_pending(request)
            if num_pending:
                (decodes if num_pending == 1 else prefills).append((request, num_pending))
        if self.config.max_num_mixed_tokens is not None and any(request.is_streamed for request, _ in decodes):
            plan.budget = min(plan.budget, self.config.max_num_mixed_tokens)
        for request, num_pending in decodes + prefills:
            num_tokens = min(num_pending, plan.budget)
            if request.status is not RequestStatus.RUNNING or not num_tokens:
                continue
            if self._reserve(plan, request, request.num_computed_tokens + num_tokens):
                self._plan_row(plan, request, num_tokens)

    def _reserve(self, plan: _Plan, request: Request, total: int) -> bool:
        """Get the blocks for `total` tokens, preempting the rows behind `request` if need be; False: it must wait."""
        if total <= len(request.block_ids) * self.config.block_size:
            return True
        while not self.blocks.grow([request], [total]):
            plan.short_of_blocks = True
            victim = self._queues.running[-1]
            if victim is request:
                return False
            self._preempt(plan, victim)
        return True

    def _preempt(self, plan: _Plan, request: Request) -> None:
        plan.rows.pop(request, None)
        self.blocks.free(request)
        self._adapters.release(request, is_wanted=True)
        self._queues.preempt(request)
        request.num_preemptions += 1
        self.num_preemptions += 1

    def _plan_waiting(self, plan: _Plan) -> None:
        waiting, index = self._queues.waiting, 0
        self._adapters.begin()
        while index < len(waiting) and plan.budget and self._queues.has_free_row:
            request = waiting[index]
            if self._waits_for_leader(request):
                # The leader's last prompt token may come now: more steps would only keep its forks waiting.
                plan.single_step |= request.fork_of in plan.rows
                index += 1
                continue
            admission = self._adapters.acquire(request)
            if admission is Admission.FAILED:
                self.finish(request, "abort")
                self._failed.append(request)
            elif admission is not Admission.READY:
                index += 1
            if admission is not Admission.READY:
                continue
            num_tokens = 0 if request.num_in_flight else self._take_blocks(plan, request)
            if not num_tokens:
                self._adapters.release(request, is_wanted=True)
                break
            self._adapters.note_start(request)
            self._queues.start(index)
            request.fork_of = None
            plan.admitted.append(request)
            self._plan_row(plan, request, num_tokens)

    def _waits_for_leader(self, request: Request) -> bool:
        leader = request.fork_of
        if leader is None or leader.num_preemptions:
            return False
        return not leader.is_finished and leader.num_computed_tokens < leader.num_prompt_tokens

    def _take_blocks(self, plan: _Plan, request: Request) -> int:
        """Get a waiting request the blocks for its first chunk; return the chunk's tokens, or 0 if it must wait."""
        shared = self.blocks.shared_blocks(request)
        start = len(shared) * self.config.block_size
        num_tokens = min(request.num_tokens - start, plan.budget)
        in_one_piece = request.whole_prompt or not self.config.enable_chunked_prefill
        if in_one_piece and start + num_tokens < request.num_tokens:
            return 0
        # Each running row may soon need a block: taking the last ones would only preempt the newcomer again.
        spare = self.num_running
        return num_tokens if self.blocks.admit(request, shared, start + num_tokens, spare=spare) else 0

    def _plan_row(self, plan: _Plan, request: Request, num_tokens: int) -> None:
        start = request.num_computed_tokens
        samples = not request.is_pooling and start + num_tokens == request.num_tokens_with_in_flight
        plan.rows[request] = ScheduledRow(request, start, num_tokens, samples, request.num_preemptions)
        plan.budget -= num_tokens

    def _commit(self, plan: _Plan) -> SchedulerOutput:
        decodes = [row for row in plan.rows.values() if row.is_decode]
        rows = decodes + [row for row in plan.rows.values() if not row.is_decode]
        is_decode = len(decodes) == len(rows)
        if is_decode and not plan.single_step:
            rows = self._take_steps(rows)
        for row in rows:
            row.request.num_computed_tokens += row.num_tokens + row.num_steps - 1
            row.request.num_tokens_with_in_flight += row.num_steps * row.samples
        num_steps = max(row.num_steps for row in rows)
        return SchedulerOutput(
            rows=tuple(rows), num_steps=num_steps, is_decode=is_decode, admitted=tuple(plan.admitted)
        )

    def _take_steps(self, rows: list[ScheduledRow]) -> list[ScheduledRow]:
        """Give each decode row as many steps as it may take and get the blocks for them.

        A row near its end does not hold the others up: it rests until the call is over.
        """
        if self.config.max_decode_steps == 1 or any(request.synchronous for request in self._queues.running):
            return rows
        requests, limit = [row.request for row in rows], self.config.max_decode_steps
        allowed = [_allowance(request) for request in requests]
        while True:
            steps = [min(limit, allowance) for allowance in allowed]
            if limit == 1 or self.blocks.grow(requests, [row.start + n for row, n in zip(rows, steps, strict=True)]):
                return [row._replace(num_steps=n) for row, n in zip(rows, steps, strict=True)]
            limit //= 2

    def _update_row(self, row: ScheduledRow, tokens: list[int]) -> bool:
        """Apply one row's results and return whether its request changed for the outside."""
        request, stop = row.request, None
        passing = count_passing(request, tokens)
        request.output_token_ids += tokens[:passing]
        for token in tokens[passing:]:
            request.output_token_ids.append(token)
            if (stop := check_token_stop(request)) is not None:
                break
        num_done = row.start + row.num_tokens + max(len(tokens) - 1, 0)
        if row.num_preemptions == request.num_preemptions:
            self.blocks.confirm(request, min(num_done, request.num_tokens))
        if stop is not None:
            self.finish(request, *stop)
        elif request.is_pooling and num_done == request.num_tokens:
            self.finish(request, "stop")
        return bool(tokens) or request.is_finished


def _allowance(request: Request) -> int:
    """Steps that a decode row may take in one call: up to its length limit, and not across its `min_tokens`."""
    left = request.max_total_tokens - request.num_tokens_with_in_flight
    assert request.sampling_params is not None
    before_min = request.sampling_params.min_tokens + request.num_prompt_tokens - request.num_tokens_with_in_flight
    return min(left, before_min) if before_min > 0 else left
