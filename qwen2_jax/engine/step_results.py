"""What a launched call gives: read once, from copies to the host that started with the launch."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from qwen2_jax.engine.schedule import ScheduledRow, SchedulerOutput
from qwen2_jax.types import Logprob, LogprobsOnePosition

_LOGPROB_FIELDS = ("logprobs", "ranks", "top_logprobs", "top_ids", "chosen_logprobs", "chosen_ranks")


class RowResult(NamedTuple):
    """One row's share of a call."""

    token_ids: list[int]
    logprobs: list[LogprobsOnePosition] | None = None
    """One per token, if the request asks for them."""
    prompt_logprobs: list[LogprobsOnePosition] | None = None
    """Of the prompt tokens that follow the row's tokens, if the request asks for them."""
    pooled: np.ndarray | None = None
    """What the prompt has become, if the row completes one that is only computed: an embedding, or a hidden state."""


class Launched:
    """A call under way: its samples, [steps, R, ...] each, prompt log-probabilities by chunk of tokens.

    `pooled` has a row for each of the call's, of which those count that complete a prompt that is only computed.
    """

    def __init__(
        self,
        output: SchedulerOutput,
        samples: Mapping[str, jax.Array] | None = None,
        *,
        prompt_logprobs: Sequence[Mapping[str, jax.Array]] = (),
        pooled: jax.Array | None = None,
    ) -> None:
        self.output = output
        wants = any(row.samples and _num_logprobs(row) is not None for row in output.rows)
        names = ("token_ids", *(_LOGPROB_FIELDS if wants else ()))
        self._samples = {} if samples is None else {name: samples[name] for name in names}
        self._prompt_logprobs = prompt_logprobs
        self._pooled = pooled
        for array in jax.tree.leaves((self._samples, self._prompt_logprobs, self._pooled)):
            array.copy_to_host_async()

    def read(self) -> list[RowResult]:
        """Wait for the call and return its results, one per row."""
        samples = {name: np.asarray(array) for name, array in self._samples.items()}
        prompt = _gather(self._prompt_logprobs)
        pooled = None if self._pooled is None else np.asarray(self._pooled)
        results, start = [], 0
        token_ids = samples["token_ids"].T.tolist() if samples else []
        for index, row in enumerate(self.output.rows):
            steps = row.num_steps if row.samples else 0
            results.append(
                RowResult(
                    token_ids=token_ids[index][:steps] if steps else [],
                    logprobs=_logprobs(samples, row, index, steps),
                    prompt_logprobs=_prompt_logprobs(prompt, row, start),
                    pooled=pooled[index] if pooled is not None and row.completes_pooling else None,
                )
            )
            start += row.num_tokens
        return results


def _gather(parts: Sequence[Mapping[str, jax.Array]]) -> dict[str, np.ndarray]:
    """Return the arrays of all parts on the host, joined by name."""
    names = parts[0] if parts else ()
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in names}


def _num_logprobs(row: ScheduledRow) -> int | None:
    params = row.request.sampling_params
    return None if params is None else params.num_logprobs


def _logprobs(
    samples: Mapping[str, np.ndarray], row: ScheduledRow, index: int, steps: int
) -> list[LogprobsOnePosition] | None:
    params = row.request.sampling_params
    if params is None or params.num_logprobs is None or not steps:
        return None
    of_row = {name: array[:steps, index] for name, array in samples.items()}
    if params.logprob_token_ids is None:
        return _positions(of_row, of_row["token_ids"].tolist(), *_top(of_row, params.num_logprobs))
    count = len(params.logprob_token_ids)
    chosen = (of_row[name][:, :count].tolist() for name in ("chosen_logprobs", "chosen_ranks"))
    return _positions(of_row, of_row["token_ids"].tolist(), [params.logprob_token_ids] * steps, *chosen)


def _prompt_logprobs(
    report: Mapping[str, np.ndarray], row: ScheduledRow, start: int
) -> list[LogprobsOnePosition] | None:
    """Return the entries for the prompt tokens after each of the row's tokens, which lie at `start` on T."""
    request, params = row.request, row.request.sampling_params
    if params is None or params.prompt_logprobs is None:
        return None
    count = min(row.num_tokens, request.num_prompt_tokens - 1 - row.start)
    if count <= 0:
        return []
    tokens = request.prompt_token_ids[row.start + 1 : row.start + 1 + count]
    of_row = {name: array[start : start + count] for name, array in report.items()}
    return _positions(of_row, tokens, *_top(of_row, params.prompt_logprobs))


def _top(of_row: Mapping[str, np.ndarray], count: int) -> tuple[list[list[int]], list[list[float]], list[range]]:
    """Return each position's `count` likeliest tokens with log-probabilities and ranks; -1 asks for all there are."""
    tokens, logprobs = (of_row[name][:, : None if count == -1 else count] for name in ("top_ids", "top_logprobs"))
    return tokens.tolist(), logprobs.tolist(), [range(1, tokens.shape[1] + 1)] * len(tokens)


def _positions(
    of_row: Mapping[str, np.ndarray],
    tokens: Sequence[int],
    other_tokens: Sequence[Sequence[int]],
    other_logprobs: Sequence[Sequence[float]],
    other_ranks: Sequence[Sequence[int]],
) -> list[LogprobsOnePosition]:
    """Return each position's own token with its `logprobs` and `ranks`, and the others behind it."""
    positions = []
    own = zip(tokens, of_row["logprobs"].tolist(), of_row["ranks"].tolist(), strict=True)
    others = zip(other_tokens, other_logprobs, other_ranks, strict=True)
    for (token, logprob, rank), of_others in zip(own, others, strict=True):
        position = {token: Logprob(logprob, rank)}
        for other, other_logprob, other_rank in zip(*of_others, strict=True):
            if other != token:
                position[other] = Logprob(other_logprob, other_rank)
        positions.append(position)
    return positions
