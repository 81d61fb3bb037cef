"""From a scheduled call to one packed vector: padding to the bucket, tables, slots and sampling parameters.

It keeps, on the host, one row per running request with what does not change from call to call, so that building a call
is a handful of numpy gathers.
"""

from collections.abc import Sequence

import numpy as np

from qwen2_jax.config import ResolvedConfig
from qwen2_jax.engine.adapter_tables import changes_vocab, fill_step, fill_vocab, uses_adapters
from qwen2_jax.engine.program_specs import step_lora
from qwen2_jax.engine.request import Request
from qwen2_jax.engine.schedule import ScheduledRow, SchedulerOutput
from qwen2_jax.engine.step_inputs import (
    SAMPLING_FLOATS,
    SAMPLING_INTS,
    Layout,
    StepLoRA,
    allocate,
    decode_layout,
    prefill_layout,
    prompt_logprobs_layout,
    sample_layout,
)
from qwen2_jax.lora.sizes import LoRASizes

_CHANGE_LOGITS = ("temperature", "has_logit_bias", "presence_penalty", "frequency_penalty")
_PER_CALL = ("row_indices", "sample_positions", "last_positions", "output_indices")

_ALL_TOKENS = np.iinfo(np.int32).max
"""More than any vocabulary has."""
_SMALLEST = float(np.finfo(np.float32).tiny)
"""Of what is above 0 and stays so in float32."""


class BatchBuilder:
    """Builds the inputs of decode calls, prefill steps and the sampling behind these."""

    def __init__(self, config: ResolvedConfig, lora: LoRASizes | None = None) -> None:
        self._config, self._lora = config, lora
        rows = config.max_num_seqs + 1
        self._tables = np.zeros((rows, config.blocks_per_sequence), np.int32)
        self._table_lens = [0] * rows
        self._sampling = {name: np.zeros(rows, np.int32) for name in SAMPLING_INTS if name not in _PER_CALL}
        self._sampling |= {name: np.zeros(rows, np.float32) for name in SAMPLING_FLOATS}
        self._sampling["repetition_penalty"][:] = 1
        self._sampling["top_p"][:] = 1
        self._sampling["num_logprobs"][:] = -1

    def admit(self, request: Request, seed: int) -> None:
        """Take over the row of device state that `request` has just got; `seed` is its own or one drawn for it."""
        row, params = request.row_index, request.sampling_params
        assert row is not None
        self._table_lens[row] = 0
        if params is None:
            return
        values = {
            "prompt_lens": request.num_prompt_tokens,
            "seeds_low": np.uint32(seed & 0xFFFFFFFF).view(np.int32),
            "seeds_high": np.uint32(seed >> 32 & 0xFFFFFFFF).view(np.int32),
            "top_k": min(max(params.top_k, 0), _ALL_TOKENS),
            "has_logit_bias": 0,
            "num_logprobs": -1 if params.num_logprobs is None else 1,
            "temperature": 0.0 if params.is_greedy else params.temperature,
            "top_p": max(params.top_p, _SMALLEST),
            "min_p": params.min_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "repetition_penalty": params.repetition_penalty,
        }
        for name, value in values.items():
            self._sampling[name][row] = value

    def set_logit_bias(self, row: int, present: bool) -> None:
        """Say whether the sampler adds row `row` of the state's logit bias."""
        self._sampling["has_logit_bias"][row] = present

    def is_greedy(self, output: SchedulerOutput) -> bool:
        """Return whether each row that samples wants its likeliest token by its raw logits, no log-probabilities."""
        rows = _row_indices([row for row in output.rows if row.samples])
        of = {name: values[rows] for name, values in self._sampling.items()}
        unchanged = not any(of[name].any() for name in _CHANGE_LOGITS) and (of["repetition_penalty"] == 1).all()
        return bool(unchanged and (of["num_logprobs"] < 0).all())

    def decode(self, output: SchedulerOutput) -> tuple[int, np.ndarray]:
        """Return the bucket, R, and the packed inputs of a call of decode rows."""
        bucket = _bucket(self._config.decode_buckets, len(output.rows))
        lora = self._step_lora(output, bucket, bucket)
        packed, views = self._allocate(decode_layout(bucket, self._config.blocks_per_sequence, lora))
        if lora is not None:
            fill_step(views, output, lora)
        views["num_steps"][0] = output.num_steps
        self._fill_tables(views, output)
        self._fill_sampling(views, output)
        count = len(output.rows)
        views["position_ids"][:count] = [row.start for row in output.rows]
        views["input_ids"][:count] = [token for row in output.rows for token in _known_tokens(row)]
        return bucket, packed

    def prefill(self, output: SchedulerOutput) -> tuple[int, np.ndarray]:
        """Return the bucket, T, and the packed inputs of a step with prefills."""
        bucket = _bucket(self._config.prefill_buckets, sum(row.num_tokens for row in output.rows))
        rows = self._config.prefill_rows(bucket)
        lora = self._step_lora(output, bucket, rows)
        packed, views = self._allocate(prefill_layout(bucket, rows, self._config.blocks_per_sequence, lora))
        if lora is not None:
            fill_step(views, output, lora)
        self._fill_tables(views, output)
        self._fill_tokens(views, output)
        return bucket, packed

    def sample(self, output: SchedulerOutput) -> tuple[int, np.ndarray]:
        """Return the bucket, R, and the packed inputs of sampling behind a step with prefills."""
        bucket = _bucket(self._config.sample_buckets, len(output.rows))
        lora = self._head_lora(output, bucket)
        packed, views = self._allocate(sample_layout(bucket, lora))
        self._fill_sampling(views, output)
        if lora is not None:
            fill_vocab(views, [row.request.adapter for row in output.rows], [1] * len(output.rows), lora)
        views["lm_head_indices"][: len(output.rows)] = _last_tokens(output)
        return bucket, packed

    def last_hidden(self, output: SchedulerOutput) -> np.ndarray:
        """Return each row's last token on T, as many as there are rows at most."""
        packed = np.zeros(self._config.max_num_seqs, np.int32)
        packed[: len(output.rows)] = _last_tokens(output)
        return packed

    def prompt_logprobs(self, output: SchedulerOutput, size: int) -> list[np.ndarray]:
        """Return packed inputs for each chunk of `size` of the step's tokens, as far as rows ask for a report.

        Each is the chunk's first token on T and, for each of its tokens, the prompt token that follows (0: none).
        """
        ends = np.cumsum([row.num_tokens for row in output.rows])
        end = max((int(end) for row, end in zip(output.rows, ends, strict=True) if _wants_report(row)), default=0)
        targets = np.zeros(-(-end // size) * size, np.int32)
        for row, stop in zip(output.rows, ends, strict=True):
            start = stop - row.num_tokens
            if start < end:
                following = row.request.prompt_token_ids[row.start + 1 : row.start + 1 + row.num_tokens]
                following = following[: len(targets) - start]
                targets[start : start + len(following)] = following
        counts, lora = [row.num_tokens for row in output.rows], self._head_lora(output, size)
        adapters = np.repeat(np.array([row.request.adapter for row in output.rows], object), counts)
        chunks = []
        for start in range(0, end, size):
            packed, views = self._allocate(prompt_logprobs_layout(size, lora))
            views["start"][0], views["targets"][:] = start, targets[start : start + size]
            if lora is not None:
                chosen = list(adapters[start : start + size])
                fill_vocab(views, chosen, [1] * len(chosen), lora)
            chunks.append(packed)
        return chunks

    def _allocate(self, layout: Layout) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return allocate(layout, self._config.max_num_seqs)

    def _step_lora(self, output: SchedulerOutput, tokens: int, rows: int) -> StepLoRA | None:
        """Return what a step takes of adapters; None for one without any."""
        return step_lora(self._lora, tokens, rows) if self._lora is not None and uses_adapters(output) else None

    def _head_lora(self, output: SchedulerOutput, rows: int) -> StepLoRA | None:
        """Return what a program of the head takes of adapters; None where none changes the head."""
        return step_lora(self._lora, rows, rows) if self._lora is not None and changes_vocab(output) else None

    def _fill_tokens(self, views: dict[str, np.ndarray], output: SchedulerOutput) -> None:
        """Lay out the rows' tokens on T, one row behind another."""
        starts, counts, rows = _row_facts(output)
        ends = np.cumsum(counts)
        total, block_size = ends[-1], self._config.block_size
        views["context_lens"][: len(starts)] = starts + counts
        views["query_start_loc"][1 : len(starts) + 1] = ends
        views["query_start_loc"][len(starts) + 1 :] = total
        positions = np.arange(total) + np.repeat(starts - ends + counts, counts)
        token_rows = np.repeat(rows, counts)
        views["input_ids"][:total] = [token for row in output.rows for token in _known_tokens(row)]
        views["position_ids"][:total] = positions
        views["token_rows"][:total] = token_rows
        views["slot_mapping"][:total] = (
            self._tables[token_rows, positions // block_size] * block_size + positions % block_size
        )

    def _fill_tables(self, views: dict[str, np.ndarray], output: SchedulerOutput) -> None:
        """Bring the tables up to date and gather those of the call's rows; padding has a spare row's."""
        for row in output.rows:
            assert row.request.row_index is not None
            self._extend_table(row.request, row.request.row_index)
        views["row_indices"][: len(output.rows)] = _row_indices(output.rows)
        views["block_tables"][:] = self._tables[views["row_indices"]]

    def _fill_sampling(self, views: dict[str, np.ndarray], output: SchedulerOutput) -> None:
        views["row_indices"][: len(output.rows)] = _row_indices(output.rows)
        rows = [(row.start + row.num_tokens, row.num_steps, row.request.num_prompt_tokens) for row in output.rows]
        positions, steps, prompts = np.array(rows, np.int32).T
        samples = np.flatnonzero([row.samples for row in output.rows])
        views["sample_positions"][samples] = positions[samples]
        views["last_positions"][samples] = (positions + steps - 1)[samples]
        views["output_indices"][samples] = (positions - prompts)[samples]
        for name, values in self._sampling.items():
            views[name][:] = values[views["row_indices"]]

    def _extend_table(self, request: Request, row: int) -> None:
        """Add the blocks that the request has got since the last call. Those it has given back are never read again."""
        known, blocks = self._table_lens[row], request.block_ids
        if len(blocks) > known:
            self._tables[row, known : len(blocks)] = blocks[known:]
            self._table_lens[row] = len(blocks)


def _wants_report(row: ScheduledRow) -> bool:
    """Return whether the row has prompt tokens whose log-probabilities are asked for."""
    params = row.request.sampling_params
    return params is not None and params.prompt_logprobs is not None and row.start < row.request.num_prompt_tokens - 1


def _row_indices(rows: Sequence[ScheduledRow]) -> np.ndarray:
    return np.asarray([row.request.row_index for row in rows], np.int32)


def _last_tokens(output: SchedulerOutput) -> np.ndarray:
    return np.cumsum([row.num_tokens for row in output.rows]) - 1


def _known_tokens(row: ScheduledRow) -> list[int]:
    """Return the row's tokens, -1 for one that a call which has not been read samples."""
    stop, known = row.start + row.num_tokens, row.request.num_tokens
    return row.request.tokens(row.start, min(stop, known)) + [-1] * max(stop - max(known, row.start), 0)


def _row_facts(output: SchedulerOutput) -> tuple[np.ndarray, ...]:
    """Return where each row's tokens start, how many it has, and its index in the per-request state."""
    facts = [(row.start, row.num_tokens, row.request.row_index) for row in output.rows]
    return tuple(np.array(facts, np.int64).T)


def _bucket(buckets: tuple[int, ...], size: int) -> int:
    return next(bucket for bucket in buckets if bucket >= size)
