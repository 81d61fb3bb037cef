"""Requests and results as callers see them, with vLLM's names and shapes. No jax here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, overload

from qwen2_jax.lora_requests import AdapterRequest, LoRARequest, MergedLoRARequest, MergeOptions
from qwen2_jax.sampling_params import RepetitionDetectionParams, RequestOutputKind, SamplingParams

__all__ = [
    "AdapterRequest",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "FinishReason",
    "FlatLogprobs",
    "LoRARequest",
    "Logprob",
    "Logprobs",
    "LogprobsOnePosition",
    "MergeOptions",
    "MergedLoRARequest",
    "RepetitionDetectionParams",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
]

FinishReason = Literal["stop", "length", "abort", "repetition"]
"""Why an output ended: a stop condition, a length limit, the caller's abort, or a detected repetition."""


class Logprob(NamedTuple):
    """The log-probability of one token at one position, from the raw logits."""

    logprob: float
    """Natural logarithm."""
    rank: int | None = None
    """1 for the likeliest token of the vocabulary."""
    decoded_token: str | None = None
    """The token's text; None if the request does not detokenize."""


LogprobsOnePosition = dict[int, Logprob]
"""Token id to its log-probability at one position, the position's own token first."""


@dataclass(slots=True)
class FlatLogprobs(Sequence[LogprobsOnePosition | None]):
    """Log-probabilities of many positions in five flat lists, readable as a list with one dict per position.

    Far fewer objects than a list of dicts, so that long outputs do not burden the garbage collector. Position i's
    entries are the slice `start_indices[i]:end_indices[i]` of the other lists; a position without entries (a prompt's
    first token) reads as None.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def append(self, position: Mapping[int, Logprob] | None) -> None:
        """Add one position; None adds one without entries."""
        self.start_indices.append(len(self.token_ids))
        for token_id, entry in (position or {}).items():
            self.token_ids.append(token_id)
            self.logprobs.append(entry.logprob)
            self.ranks.append(entry.rank)
            self.decoded_tokens.append(entry.decoded_token)
        self.end_indices.append(len(self.token_ids))

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self.start_indices)

    @overload
    def __getitem__(self, index: int) -> LogprobsOnePosition | None: ...
    @overload
    def __getitem__(self, index: slice) -> "FlatLogprobs": ...
    def __getitem__(self, index: int | slice) -> "LogprobsOnePosition | FlatLogprobs | None":
        """Return one position's dict, or the positions of a slice."""
        if isinstance(index, slice):
            part = FlatLogprobs()
            for i in range(*index.indices(len(self))):
                part.append(self._position(i))
            return part
        return self._position(index)

    def __iter__(self) -> Iterator[LogprobsOnePosition | None]:
        """Iterate over the positions."""
        return (self._position(i) for i in range(len(self)))

    def _position(self, index: int) -> LogprobsOnePosition | None:
        entries = range(self.start_indices[index], self.end_indices[index])
        if not entries:
            return None
        return {self.token_ids[i]: Logprob(self.logprobs[i], self.ranks[i], self.decoded_tokens[i]) for i in entries}


Logprobs = Sequence[LogprobsOnePosition | None]
"""One entry per position: a list of dicts, or `FlatLogprobs`. Only a prompt's first position is None."""


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One of a request's `n` outputs."""

    index: int
    """0 to n-1."""
    text: str
    token_ids: Sequence[int]
    """The sampled tokens, an end-of-sequence or stop token included."""
    cumulative_logprob: float | None = None
    """Sum of the sampled tokens' log-probabilities, if `logprobs` was asked for."""
    logprobs: Logprobs | None = None
    """One entry per token of `token_ids`."""
    finish_reason: FinishReason | None = None
    """None while it goes on."""
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it; None for end-of-sequence and every other end."""

    @property
    def finished(self) -> bool:
        """Whether this output is complete."""
        return self.finish_reason is not None


@dataclass(kw_only=True, slots=True)
class RequestMetrics:
    """When a request reached each stage; seconds of a monotonic clock, None if it has not."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival until first scheduled."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival until the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """What a generation request has produced."""

    request_id: str
    prompt: str | None
    """None if the prompt came as token ids."""
    prompt_token_ids: Sequence[int]
    prompt_logprobs: Logprobs | None = None
    """One entry per prompt token; the first is None because nothing comes before it."""
    outputs: Sequence[CompletionOutput]
    finished: bool
    lora_request: AdapterRequest | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache already had."""
    metrics: RequestMetrics | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingOutput:
    """A text's vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """The vector's length."""
        return len(self.embedding)


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequestOutput:
    """What an embedding request has produced."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: Sequence[int]
    finished: bool


@dataclass(frozen=True, kw_only=True)
class ClassificationOutput:
    """What a classification head says of a text: a number for each of its labels, which are known by their index."""

    logits: list[float]
    """The head times the last token's final hidden state; the value itself where there is one label."""
    probs: list[float]
    """The softmax of the logits."""

    @property
    def num_labels(self) -> int:
        """The number of labels that the head has."""
        return len(self.logits)


@dataclass(frozen=True, kw_only=True)
class ClassificationRequestOutput:
    """What a classification request has produced."""

    request_id: str
    outputs: ClassificationOutput
    prompt_token_ids: Sequence[int]
    finished: bool
    lora_request: AdapterRequest | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache already had."""
