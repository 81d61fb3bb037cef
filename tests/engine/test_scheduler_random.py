"""Random traffic against a device that notices every wrong block: nothing is lost, late, early or shared wrongly.

The device keeps, instead of keys and values, which token of which position each cache slot holds; its model is a fixed
function of all tokens so far, so that what a request must produce is known without any scheduler.
"""

import random
from collections import Counter, deque
from typing import Any

import pytest

from qwen2_jax.engine.request import Request
from qwen2_jax.engine.schedule import ScheduledRow, SchedulerConfig, SchedulerOutput
from qwen2_jax.engine.scheduler import Scheduler
from qwen2_jax.errors import CapacityError
from qwen2_jax.types import RequestOutputKind, SamplingParams

VOCAB_SIZE = 30
EOS = 0
STEPS_PER_SEED = 1000


def next_token(tokens: list[int], salt: object) -> int:
    return random.Random(f"{tokens}{salt}").randrange(VOCAB_SIZE)


def expected_outputs(request: Request) -> tuple[list[int], str]:
    """What the request gives when it runs alone, and how it ends."""
    params, outputs = request.sampling_params, []
    if params is None:
        return outputs, "stop"
    while True:
        outputs.append(next_token(request.prompt_token_ids + outputs, request.cache_salt))
        is_end = outputs[-1] in params.stop_token_ids or (outputs[-1] == EOS and not params.ignore_eos)
        if is_end and len(outputs) >= params.min_tokens:
            return outputs, "stop"
        if len(outputs) == params.max_tokens or len(request.prompt_token_ids) + len(outputs) == request.max_model_len:
            return outputs, "length"


class FakeRunner:
    """Executes calls when they are launched, on memory of its own; their results are read later, in order."""

    def __init__(self, config: SchedulerConfig, num_blocks: int) -> None:
        self.config, self.num_blocks = config, num_blocks
        self.memory: dict[tuple[int, int], tuple[int, int, object]] = {}
        self.rows: dict[int | None, list[int]] = {}
        self.results: deque[tuple[SchedulerOutput, list[list[int]]]] = deque()

    def launch(self, output: SchedulerOutput) -> None:
        self.check_call(output)
        for request in output.admitted:
            self.rows[request.row_index] = request.tokens(0, request.num_tokens)
        sampled: list[list[int]] = [[] for _ in output.rows]
        for step in range(output.num_steps):
            active = [row for row in output.rows if step < row.num_steps]
            for row in active:
                self.check_reads(row, row.start + step, row.start + step)
            written = [slot for row in active for slot in self.write(row, step)]
            assert len(written) == len(set(written)), "two rows write one slot"
            for row, tokens in zip(output.rows, sampled, strict=True):
                if step >= row.num_steps:
                    continue
                self.check_reads(row, row.start + step, row.start + row.num_tokens + step)
                if row.samples:
                    tokens.append(self.sample(row, step))
        self.results.append((output, sampled))

    def check_call(self, output: SchedulerOutput) -> None:
        rows, config = output.rows, self.config
        assert 1 <= len(rows) <= config.max_num_seqs
        assert len({row.request.row_index for row in rows}) == len(rows)
        assert sum(row.num_tokens for row in rows) <= config.max_num_batched_tokens
        assert [row.is_decode for row in rows] == sorted((row.is_decode for row in rows), reverse=True)
        assert output.is_decode == all(row.is_decode for row in rows)
        assert 1 <= output.num_steps <= (config.max_decode_steps if output.is_decode else 1)
        assert set(output.admitted) <= {row.request for row in rows}
        assert output.num_steps == max(row.num_steps for row in rows)
        for row in rows:
            self.check_row(row, row.num_steps)

    def check_row(self, row: ScheduledRow, num_steps: int) -> None:
        request, end = row.request, row.start + row.num_tokens
        assert row.num_tokens >= 1
        assert num_steps == 1 or not request.synchronous
        if request.is_pooling and (request.whole_prompt or not self.config.enable_chunked_prefill):
            assert end == request.num_prompt_tokens
            assert row.start == 0 or request.use_prefix_cache
        elif not self.config.enable_chunked_prefill:
            assert row.samples
        if row.samples:
            assert end == request.num_tokens_with_in_flight - num_steps
            assert request.num_tokens_with_in_flight <= request.max_total_tokens
            assert not request.synchronous or request.num_in_flight == 1
            if request.sampling_params and num_steps > 1:
                before = end - request.num_prompt_tokens
                assert not before < request.sampling_params.min_tokens < before + num_steps

    def slot(self, request: Request, position: int) -> tuple[int, int]:
        block = request.block_ids[position // self.config.block_size]
        assert 1 <= block < self.num_blocks
        return block, position % self.config.block_size

    def check_reads(self, row: ScheduledRow, first_query: int, stop: int) -> None:
        """From what the query at `first_query` sees to `stop`, the row's blocks hold its own tokens."""
        tokens, window = self.rows[row.request.row_index], self.config.release_window
        for position in range(0 if window is None else max(first_query - window + 1, 0), stop):
            expected = (tokens[position], position, row.request.cache_salt)
            assert self.memory[self.slot(row.request, position)] == expected, (row.request.request_id, position)

    def write(self, row: ScheduledRow, step: int) -> list[tuple[int, int]]:
        tokens, slots = self.rows[row.request.row_index], []
        for position in range(row.start + step, row.start + row.num_tokens + step):
            slots.append(self.slot(row.request, position))
            self.memory[slots[-1]] = (tokens[position], position, row.request.cache_salt)
        return slots

    def sample(self, row: ScheduledRow, step: int) -> int:
        tokens = self.rows[row.request.row_index]
        assert len(tokens) == row.start + row.num_tokens + step
        tokens.append(next_token(tokens, row.request.cache_salt))
        return tokens[-1]


class Traffic:
    """Makes random requests, runs them up to one call ahead, and keeps account of what became of each."""

    def __init__(self, rng: random.Random, config: SchedulerConfig, num_blocks: int) -> None:
        self.rng, self.config = rng, config
        self.scheduler, self.runner = Scheduler(config, num_blocks), FakeRunner(config, num_blocks)
        self.prefixes = [[rng.randrange(VOCAB_SIZE) for _ in range(30)] for _ in range(3)]
        self.live: list[Request] = []
        self.ends: Counter[str] = Counter()
        self.reasons: Counter[str | None] = Counter()
        self.num_added = 0

    def add(self) -> None:
        """Add one request of any kind, with up to three forks."""
        rng, limit = self.rng, self.config.max_model_len
        prompt = rng.choice(self.prefixes)[: rng.randrange(30)]
        prompt = (prompt + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 8))])[: limit - 1]
        kind = rng.random()
        if kind < 0.2:
            whole = rng.random() < 0.5 and len(prompt) <= self.config.max_num_batched_tokens
            self.submit(prompt, None, whole_prompt=whole)
            return
        max_tokens = rng.choice([1, 3, 10, None, None])
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.choice([0, 0, min(max_tokens or 5, 5)]),
            ignore_eos=rng.random() < 0.3,
            stop_token_ids=[7] if rng.random() < 0.3 else [],
            output_kind=rng.choice([RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY]),
        )
        priority, salt = rng.randrange(3), rng.choice([None, "a"])
        leader = self.submit(prompt, params, priority=priority, cache_salt=salt, synchronous=rng.random() < 0.1)
        for _ in range(rng.choice([0, 0, 1, 3])):
            self.submit(prompt, params, priority=priority, cache_salt=salt, fork_of=leader)

    def submit(self, prompt: list[int], params: SamplingParams | None, **options: Any) -> Request:
        self.num_added += 1
        request = Request(
            request_id=str(self.num_added),
            prompt_token_ids=list(prompt),
            sampling_params=params,
            max_model_len=self.config.max_model_len,
            eos_token_ids=(EOS,),
            arrival=self.num_added,
            use_prefix_cache=self.rng.random() < 0.9 and not options.get("whole_prompt"),
            **options,
        )
        self.scheduler.add(request)
        self.live.append(request)
        return request

    def abort(self) -> None:
        victim = self.rng.choice(self.live)
        assert self.scheduler.abort(victim.request_id) is victim
        assert victim.finish_reason == "abort"
        expected, _ = expected_outputs(victim)
        assert victim.output_token_ids == expected[: len(victim.output_token_ids)]
        self.end(victim)

    def end(self, request: Request) -> None:
        self.live.remove(request)
        self.ends[request.request_id] += 1
        self.reasons[request.finish_reason] += 1

    def launch(self) -> bool:
        output = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if output is not None:
            self.runner.launch(output)
        return output is not None

    def read(self) -> None:
        output, sampled = self.runner.results.popleft()
        for request in self.scheduler.update(output, sampled):
            if request.is_finished:
                assert (request.output_token_ids, request.finish_reason) == expected_outputs(request)
                self.end(request)
        self.scheduler.check_integrity()

    def step(self, depth: int) -> None:
        """Launch a call if possible, and read results until at most `depth` calls are under way."""
        launched = self.launch()
        if not launched and self.scheduler.has_unfinished:
            assert self.runner.results, "nothing runs and nothing is under way"
        while len(self.runner.results) > (depth if launched else 0):
            self.read()


def random_config(rng: random.Random) -> SchedulerConfig:
    max_num_seqs, max_model_len = rng.choice([1, 4, 9, 9]), rng.choice([24, 60])
    chunked = rng.random() < 0.8
    return SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.choice([max_num_seqs + 1, 16, 40]) if chunked else max_model_len,
        max_model_len=max_model_len,
        block_size=rng.choice([1, 4, 7]),
        max_decode_steps=rng.choice([1, 2, 8]),
        max_num_mixed_tokens=rng.choice([None, max_num_seqs + 2]) if chunked else None,
        enable_chunked_prefill=chunked,
        enable_prefix_caching=rng.random() < 0.8,
        release_window=rng.choice([None, None, 1, 9]),
        policy=rng.choice(["fcfs", "priority"]),
    )


def smallest_pool(config: SchedulerConfig) -> int:
    """The fewest blocks that a scheduler of this configuration accepts."""
    for num_blocks in range(2, config.max_model_len + 2):
        try:
            Scheduler(config, num_blocks)
        except CapacityError:
            continue
        return num_blocks
    raise AssertionError("a block for each token is not enough")


@pytest.mark.parametrize("seed", range(16))
def test_random_traffic(seed: int) -> None:
    rng = random.Random(seed)
    config = random_config(rng)
    traffic = Traffic(rng, config, num_blocks=smallest_pool(config) + rng.choice([0, 0, 3, 40]))
    for _ in range(STEPS_PER_SEED):
        if len(traffic.live) < 25 and rng.random() < 0.4:
            traffic.add()
        if traffic.live and rng.random() < 0.03:
            traffic.abort()
        traffic.step(depth=rng.choice([0, 1, 1, 1]))
    while traffic.scheduler.has_unfinished or traffic.runner.results:
        traffic.step(depth=1)
    assert traffic.ends == Counter(str(i + 1) for i in range(traffic.num_added))
    assert traffic.scheduler.kv_cache_usage == 0
    assert traffic.scheduler.num_running == traffic.scheduler.num_waiting == 0
