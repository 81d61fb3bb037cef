"""The conditions on token ids that end a request. Stop strings need text and are not looked at here."""

from collections.abc import Sequence
from typing import NamedTuple

from qwen2_jax.engine.request import FinishReason, Request


class Stop(NamedTuple):
    """Why a request ends: OpenAI's finish reason, and the stop token or cause if there is one."""

    finish_reason: FinishReason
    stop_reason: int | str | None


def check_token_stop(request: Request) -> Stop | None:
    """Return how `request`, which has just got a token, ends with it, or None if it goes on.

    The order is vLLM's: end token, stop token, length, repetition. Before `min_tokens` only the length counts.
    """
    params, outputs = request.sampling_params, request.output_token_ids
    if params is None or not outputs:
        return None
    token, past_min_tokens = outputs[-1], len(outputs) >= params.min_tokens
    if past_min_tokens and not params.ignore_eos and token in request.eos_token_ids:
        return Stop("stop", None)
    if past_min_tokens and params.stop_token_ids and token in params.stop_token_ids:
        return Stop("stop", token)
    if request.num_tokens >= request.max_total_tokens:
        return Stop("length", None)
    detection = params.repetition_detection
    if past_min_tokens and detection is not None:
        smallest = max(detection.min_pattern_size, 1)
        # Longer patterns do not fit: a limit of millions must not be counted up to at each token.
        largest = min(detection.max_pattern_size, len(outputs) // max(detection.min_count, 1))
        if any(ends_in_repetition(outputs, n, detection.min_count) for n in range(smallest, largest + 1)):
            return Stop("repetition", "repetition_detected")
    return None


def count_passing(request: Request, tokens: Sequence[int]) -> int:
    """Return how many of the next `tokens`, the first ones, end nothing; `check_token_stop` tells of the others."""
    params = request.sampling_params
    if params is None or params.repetition_detection is not None:
        return 0
    count = max(min(len(tokens), request.max_total_tokens - request.num_tokens - 1), 0)
    ends = () if params.ignore_eos else request.eos_token_ids
    for ending in (*ends, *(params.stop_token_ids or ())):
        if ending in tokens[:count]:
            count = tokens.index(ending)
    return count


def ends_in_repetition(tokens: Sequence[int], pattern_size: int, count: int) -> bool:
    """Whether `tokens` ends in some pattern of `pattern_size` tokens repeated `count` times without a gap."""
    length = len(tokens)
    if count < 2 or length < pattern_size * count:
        return False
    return all(
        tokens[i] == tokens[i - pattern_size] for i in range(length - 1, length - pattern_size * (count - 1) - 1, -1)
    )
