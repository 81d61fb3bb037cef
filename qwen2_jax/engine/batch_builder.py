"""From a scheduled call to one packed vector: padding to the bucket, tables, slots and sampling parameters.

It keeps, on the host, one row per running request with what does not change from call to call, so that building a call
is a handful of numpy gathers.
"""

import numpy as np

from qwen2_jax.config import ResolvedConfig
from qwen2_jax.engine.request import Request
from qwen2_jax.engine.schedule import ScheduledRow, SchedulerOutput
from qwen2_jax.engine.step_inputs import (
    SAMPLING_FLOATS,
    SAMPLING_INTS,
    Layout,
    allocate,
    decode_layout,
    prefill_layout,
)

NOWHERE = 2**30
"""A position past every row's end: what is written there is dropped."""

PER_TOKEN = ("input_ids", "position_ids", "token_rows", "slot_mapping")
_PER_CALL = ("row_indices", "sample_positions", "output_indices")


class BatchBuilder:
    """Builds the inputs of decode calls and prefill steps."""

    def __init__(self, config: ResolvedConfig) -> None:
        self._config = config
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
            "top_k": max(params.top_k, 0),
            "has_logit_bias": 0,
            "num_logprobs": -1 if params.num_logprobs is None else 1,
            "temperature": 0.0 if params.is_greedy else params.temperature,
            "top_p": params.top_p,
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

    def decode(self, output: SchedulerOutput) -> tuple[int, np.ndarray, bool]:
        """Return the bucket, R, the packed inputs of a call of decode rows, and whether every row is plainly greedy."""
        bucket = _bucket(self._config.decode_buckets, len(output.rows))
        packed, views = self._allocate(decode_layout(bucket, self._config.blocks_per_sequence), output.rows)
        views["position_ids"][:] = -1
        for index, row in enumerate(output.rows):
            views["position_ids"][index] = row.start
            views["input_ids"][index] = _known_token(row.request, row.start)
        return bucket, packed, _all_greedy(views)

    def prefill(self, output: SchedulerOutput) -> tuple[int, np.ndarray]:
        """Return the bucket, T, and the packed inputs of a step with prefills."""
        bucket = _bucket(self._config.prefill_buckets, sum(row.num_tokens for row in output.rows))
        rows = self._config.prefill_rows(bucket)
        packed, views = self._allocate(prefill_layout(bucket, rows, self._config.blocks_per_sequence), output.rows)
        views["slot_mapping"][:] = -1
        views["token_rows"][:] = self._config.max_num_seqs
        start = 0
        for index, row in enumerate(output.rows):
            end = start + row.num_tokens
            self._fill_tokens({name: views[name][start:end] for name in PER_TOKEN}, row)
            views["context_lens"][index] = row.start + row.num_tokens
            views["lm_head_indices"][index] = end - 1
            views["query_start_loc"][index + 1 :] = end
            start = end
        return bucket, packed

    def _fill_tokens(self, part: dict[str, np.ndarray], row: ScheduledRow) -> None:
        request, stop = row.request, row.start + row.num_tokens
        known = min(stop, request.num_tokens)
        part["input_ids"][:] = -1
        part["input_ids"][: known - row.start] = request.tokens(row.start, known)
        positions = np.arange(row.start, stop, dtype=np.int32)
        block_size = self._config.block_size
        part["position_ids"][:] = positions
        part["token_rows"][:] = request.row_index
        part["slot_mapping"][:] = (
            self._tables[request.row_index][positions // block_size] * block_size + positions % block_size
        )

    def _allocate(self, layout: Layout, rows: tuple[ScheduledRow, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the packed vector and its views, with the tables and the sampling parameters filled in."""
        packed, views = allocate(layout)
        indices = views["row_indices"]
        indices[:] = self._config.max_num_seqs
        views["sample_positions"][:] = NOWHERE
        for index, row in enumerate(rows):
            request = row.request
            assert request.row_index is not None
            indices[index] = request.row_index
            self._extend_table(request, request.row_index)
            if row.samples:
                position = row.start + row.num_tokens
                views["sample_positions"][index] = position
                views["output_indices"][index] = position - request.num_prompt_tokens
        views["block_tables"][:] = self._tables[indices]
        for name, values in self._sampling.items():
            views[name][:] = values[indices]
        return packed, views

    def _extend_table(self, request: Request, row: int) -> None:
        """Add the blocks that the request has got since the last call. Those it has given back are never read again."""
        known, blocks = self._table_lens[row], request.block_ids
        if len(blocks) > known:
            self._tables[row, known : len(blocks)] = blocks[known:]
            self._table_lens[row] = len(blocks)


def _all_greedy(views: dict[str, np.ndarray]) -> bool:
    """Return whether each row wants its likeliest token by its raw logits, and no log-probabilities."""
    sums = ("temperature", "has_logit_bias", "presence_penalty", "frequency_penalty")
    wants_nothing = not any(views[name].any() for name in sums) and (views["num_logprobs"] < 0).all()
    return bool(wants_nothing and (views["repetition_penalty"] == 1).all())


def _known_token(request: Request, position: int) -> int:
    """Return the token at `position`, or -1 while the call that samples it has not been read."""
    return request.tokens(position, position + 1)[0] if position < request.num_tokens else -1


def _bucket(buckets: tuple[int, ...], size: int) -> int:
    return next(bucket for bucket in buckets if bucket >= size)
