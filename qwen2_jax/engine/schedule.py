"""What the scheduler is told once, and what it hands to the runner for each call."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from qwen2_jax.engine.request import Request
from qwen2_jax.errors import ConfigError
from qwen2_jax.lora.entry import AdapterEntry, Admission


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The limits of a call and the policy. `ConfigError` if they contradict each other."""

    max_num_seqs: int
    """Rows of a call, and rows of per-request state on the device."""
    max_num_batched_tokens: int
    """Query tokens of a call."""
    max_num_mixed_tokens: int | None = None
    """Query tokens of a call that decodes a row whose tokens are streamed, beside prompts; None: as many as others."""
    max_model_len: int
    """Prompt and output tokens of a request."""
    block_size: int
    """Tokens of a cache block."""
    max_decode_steps: int = 1
    """Steps of a call whose rows all decode."""
    enable_chunked_prefill: bool = True
    """Whether a prompt may be computed in several calls."""
    enable_prefix_caching: bool = True
    """Whether equal beginnings of sequences are computed once."""
    release_window: int | None = None
    """The widest sliding window in tokens if every layer has one: blocks outside it are freed. Else None."""
    policy: Literal["fcfs", "priority"] = "fcfs"
    """First come first served, or lower `Request.priority` first."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "max_decode_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is too small; use at least 1")
        if self.release_window is not None and self.release_window < 1:
            raise ConfigError(f"release_window={self.release_window} is too small; use at least 1, or None")
        if self.policy not in ("fcfs", "priority"):
            raise ConfigError(f"policy={self.policy!r} is unknown; use 'fcfs' or 'priority'")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}, "
                "so that some rows could never decode; raise the first or lower the second"
            )
        if self.max_num_mixed_tokens is not None and self.max_num_mixed_tokens <= self.max_num_seqs:
            raise ConfigError(
                f"max_num_mixed_tokens={self.max_num_mixed_tokens} is not above max_num_seqs={self.max_num_seqs}, so "
                "that prompts might never have room"
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_model_len={self.max_model_len}, "
                "so that a long prompt could never run in one piece; raise it, or use enable_chunked_prefill=True"
            )


class AdapterGate(Protocol):
    """Says which requests' adapters are on the device; `lora.manager.AdapterManager` is one."""

    def begin_pass(self) -> None:
        """Begin to ask for the adapters of waiting requests, in the order in which they come to the devices."""
        ...

    def acquire(self, entry: AdapterEntry) -> Admission:
        """Keep an adapter on the device for one request more, or see to it that it comes."""
        ...

    def release(self, entry: AdapterEntry, *, is_wanted: bool = False) -> None:
        """Let go of what `acquire` has kept; `is_wanted` says that the request still waits for it."""
        ...


class ScheduledRow(NamedTuple):
    """One request's part of a call: query tokens `start .. start + num_tokens - 1`."""

    request: Request
    start: int
    num_tokens: int
    samples: bool
    """The row ends at the last token there is, so that the next one is sampled."""
    num_preemptions: int
    """The request's count when scheduled: after a preemption, what this row computed is no longer there."""
    num_steps: int = 1
    """Steps of the call that the row takes part in; in the others it rests."""

    @property
    def is_decode(self) -> bool:
        """A single token that samples: all that a multi-step call may hold."""
        return self.samples and self.num_tokens == 1

    @property
    def completes_pooling(self) -> bool:
        """Whether the row ends a prompt that is only computed, so that its result is complete."""
        return self.request.is_pooling and self.start + self.num_tokens == self.request.num_prompt_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerOutput:
    """One call: the decode rows first, each row's blocks allocated for all its steps."""

    rows: tuple[ScheduledRow, ...]
    num_steps: int
    """Steps in this call, the most that any row takes part in; more than one only if `is_decode`."""
    is_decode: bool
    """All rows are decode rows. One may be new: a prompt of one token, or one of which all but one are cached."""
    admitted: tuple[Request, ...]
    """Requests that have got a row of device state with this call, to be filled before it runs."""
