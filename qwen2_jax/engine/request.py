"""One sequence in the engine: its tokens, how far they are computed, and what it holds on the device."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from qwen2_jax.cache.prefix_cache import BlockKey
from qwen2_jax.types import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from qwen2_jax.engine.logit_bias import LogitBias
    from qwen2_jax.lora.entry import AdapterEntry

FinishReason = Literal["stop", "length", "abort", "repetition"]


class RequestStatus(enum.Enum):
    """Where a request is in its life: WAITING -> RUNNING (-> PREEMPTED -> RUNNING)* -> FINISHED."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False, kw_only=True, slots=True)
class Request:
    """A sequence to generate (`sampling_params` given) or to embed or classify (None).

    Only the scheduler changes its state.

    The engine launches a step before it has read the previous one's tokens, so there are three counts of progress:
    `num_computed_tokens` (keys and values that launched steps write), `num_confirmed_tokens` (those of steps that have
    finished) and `num_in_flight` (tokens that launched steps sample and the host has not read).
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams | None
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    """The model's end tokens; not looked at if `sampling_params.ignore_eos`."""
    priority: int = 0
    """Lower runs first, under the "priority" policy."""
    arrival: float = 0
    """Orders requests of one priority: a time or a counter."""
    cache_salt: Hashable = None
    """Whatever besides the tokens changes keys and values; equal prefixes are shared only under equal salts."""
    fork_of: Request | None = None
    """The request of the same prompt whose blocks this one shares once they are computed."""
    use_prefix_cache: bool = True
    """False: every prompt token is computed, as a mean over all of them needs. Its blocks enter the prefix cache."""
    whole_prompt: bool = False
    """The prompt is computed in one piece and not cached: attention looks both ways."""
    synchronous: bool = False
    """The host must know the last token before the next step: never run ahead, one step per call."""
    seed: int = 0
    """Draws this request's random tokens; 64 bits."""
    logit_bias: LogitBias | None = None
    """What is added to its logits, if anything ever is."""
    adapter: AdapterEntry | None = None
    """The adapter that it runs with. Its content is part of the `cache_salt`."""

    status: RequestStatus = field(default=RequestStatus.WAITING, init=False)
    output_token_ids: list[int] = field(default_factory=list, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    stop_reason: int | str | None = field(default=None, init=False)
    num_computed_tokens: int = field(default=0, init=False)
    num_confirmed_tokens: int = field(default=0, init=False)
    num_tokens_with_in_flight: int = field(init=False)
    """Known tokens and those that launched steps sample."""
    num_cached_tokens: int = field(default=0, init=False)
    """Prompt tokens that were not computed, since another request had done it, at the first admission."""
    num_preemptions: int = field(default=0, init=False)
    row_index: int | None = field(default=None, init=False)
    """The row of per-request state on the device, held while running."""
    block_ids: list[int] = field(default_factory=list, init=False)
    block_keys: list[BlockKey] = field(default_factory=list, init=False)
    """Prefix cache keys of the full blocks, as far as they have been needed."""
    num_known_blocks: int = field(default=0, init=False)
    """Leading blocks that have been offered to the prefix cache."""
    num_released_blocks: int = field(default=0, init=False)
    """Leading blocks that were freed because no sliding window reaches them."""
    max_total_tokens: int = field(init=False)
    """Prompt and output tokens that this request may reach."""

    def __post_init__(self) -> None:
        prompt_len, params = len(self.prompt_token_ids), self.sampling_params
        self.num_tokens_with_in_flight = prompt_len
        self.max_total_tokens = prompt_len if params is None else self.max_model_len
        if params is not None and params.max_tokens is not None:
            self.max_total_tokens = min(prompt_len + params.max_tokens, self.max_model_len)

    @property
    def is_pooling(self) -> bool:
        """Whether the prompt is only computed and nothing is sampled."""
        return self.sampling_params is None

    @property
    def is_streamed(self) -> bool:
        """Whether somebody reads the tokens as they come."""
        params = self.sampling_params
        return params is not None and params.output_kind is not RequestOutputKind.FINAL_ONLY

    @property
    def is_finished(self) -> bool:
        """Whether the request has had its one terminal event."""
        return self.status is RequestStatus.FINISHED

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that the host knows: the prompt and the outputs that have been read."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_in_flight(self) -> int:
        """Tokens that launched steps sample and the host has not read."""
        return self.num_tokens_with_in_flight - len(self.prompt_token_ids) - len(self.output_token_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the known tokens at positions `start .. stop - 1`."""
        prompt_len = len(self.prompt_token_ids)
        if stop <= prompt_len:
            return self.prompt_token_ids[start:stop]
        return self.prompt_token_ids[start:] + self.output_token_ids[max(start - prompt_len, 0) : stop - prompt_len]
