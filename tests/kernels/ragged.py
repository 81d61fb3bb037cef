"""Batches for `RaggedSpec`, poisoned with NaN wherever nothing may be read, and attention in numpy."""

from dataclasses import dataclass

import numpy as np
from qwen2_kernels.specs import RAGGED_SPECS, RaggedSpec, Row

CASES = [(spec, batch) for spec in RAGGED_SPECS for batch in spec.batches]
IDS = [f"{spec.name}-{index}" for spec in RAGGED_SPECS for index in range(len(spec.batches))]


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """A batch in float32: what the ops take, and each row's keys and values [S, K, H] as they follow one another."""

    spec: RaggedSpec
    rows: tuple[Row, ...]
    q: np.ndarray
    k_pool: np.ndarray
    v_pool: np.ndarray
    block_tables: np.ndarray
    context_lens: np.ndarray
    query_start_loc: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]

    def attention(self) -> np.ndarray:
        """softmax(q k^T / sqrt(H)) v, one query and one head at a time, in float64; zeros for padding."""
        out = np.zeros(self.q.shape)
        for row, (queries, length) in enumerate(self.rows):
            for index in range(queries if length else 0):
                token, position = self.query_start_loc[row] + index, length - queries + index
                first = 0 if self.spec.window is None else max(position - self.spec.window + 1, 0)
                seen = slice(first, position + 1 if self.spec.causal else length)
                keys, values = self.keys[row][seen].astype(np.float64), self.values[row][seen]
                for head, group in np.ndindex(out.shape[1:3]):
                    logits = keys[:, head] @ self.q[token, head, group] / np.sqrt(self.spec.head_dim)
                    weights = np.exp(logits - logits.max())
                    out[token, head, group] = weights @ values[:, head] / weights.sum()
        return out


def make_ragged(spec: RaggedSpec, rows: tuple[Row, ...], seed: int = 0) -> Ragged:
    """Draw a batch whose blocks lie in random order among unused ones.

    Padding queries, unused blocks, slots past a context, and what lies before every query's window are NaN; so is block
    0, which fills the tables where a row needs no block.
    """
    rng = np.random.default_rng(seed)
    size, width = spec.block_size, -(-spec.max_context // spec.block_size)
    pools = np.full((2, spec.num_rows * width + 2, size, spec.kv_heads, spec.head_dim), np.nan, np.float32)
    free = rng.permutation(np.arange(1, pools.shape[1])).tolist()
    tables = np.zeros((spec.num_rows, width), np.int32)
    tokens = [rng.standard_normal((2, length, spec.kv_heads, spec.head_dim), np.float32) for _, length in rows]
    for row, (queries, length) in enumerate(rows):
        oldest = 0 if spec.window is None else max(length - queries - spec.window + 1, 0)
        for index in range(oldest // size, -(-length // size)):
            tables[row, index] = free.pop()
        for position in range(oldest, length):
            pools[:, tables[row, position // size], position % size] = tokens[row][:, position]
    padded = [*rows, *((int(spec.is_decode), 0) for _ in range(spec.num_rows - len(rows)))]
    starts = np.cumsum([0, *(queries for queries, _ in padded)], dtype=np.int32)
    q = rng.standard_normal((spec.num_tokens, spec.kv_heads, spec.group, spec.head_dim), np.float32)
    for token in range(spec.num_tokens):
        if token >= starts[-1] or not padded[np.searchsorted(starts, token, side="right") - 1][1]:
            q[token] = np.nan
    return Ragged(
        spec=spec,
        rows=rows,
        q=q,
        k_pool=pools[0],
        v_pool=pools[1],
        block_tables=tables,
        context_lens=np.asarray([length for _, length in padded], np.int32),
        query_start_loc=starts,
        keys=[keys for keys, _ in tokens],
        values=[values for _, values in tokens],
    )


def random_rows(spec: RaggedSpec, seed: int) -> tuple[Row, ...]:
    """Draw rows that fit the spec: decodes, prompts and chunks in any mixture."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    left = spec.num_tokens
    for _ in range(rng.integers(1, spec.num_rows + 1)):
        length = int(rng.integers(0, spec.max_context + 1))
        single, several = min(1, length), int(rng.integers(0, min(length, left) + 1))
        queries = 1 if spec.is_decode else int(rng.choice([single, several]))
        if queries <= left:
            rows.append((queries, length))
            left -= queries
    return tuple(rows)
