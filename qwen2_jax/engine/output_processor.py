"""From sampled tokens to what a caller sees: text, stop strings, log-probabilities, one output per request."""

import time
from dataclasses import dataclass, field, replace

import numpy as np

from qwen2_jax.engine.input_processor import ProcessedInput
from qwen2_jax.engine.request import Request
from qwen2_jax.engine.step_results import RowResult
from qwen2_jax.text.detokenizer import IncrementalDetokenizer
from qwen2_jax.text.stop import StopChecker
from qwen2_jax.text.tokenizer import Tokenizer
from qwen2_jax.types import (
    ClassificationOutput,
    ClassificationRequestOutput,
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    FinishReason,
    FlatLogprobs,
    Logprob,
    Logprobs,
    LogprobsOnePosition,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)


class SequenceOutput:
    """One sequence's output so far."""

    def __init__(self, index: int, request: Request, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self.request, self._index, self._params = request, index, params
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._token_ids: list[int] = []
        self._text = ""
        self._logprobs: list[LogprobsOnePosition] = []
        self._cumulative_logprob = 0.0
        self._sent_tokens = self._sent_text = 0
        self._sent_finish = False
        self._tokenizer = tokenizer if params.detokenize else None
        self._detokenizer = self._stop = None
        if self._tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(self._tokenizer, skip_special_tokens=params.skip_special_tokens)
            self._stop = StopChecker(
                params.stop,
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )

    def take(self, result: RowResult) -> bool:
        """Take in the tokens that the request has got; return whether a stop string has ended it."""
        start = len(self._token_ids)
        new = self.request.output_token_ids[start:]
        if self._detokenizer is None and result.logprobs is None:
            self._token_ids += new
            new = []
        for offset, token in enumerate(new):
            self._token_ids.append(token)
            if result.logprobs is not None:
                self._add_logprobs(token, result.logprobs[offset])
            if self._add_text(token, is_last=start + offset + 1 == len(self.request.output_token_ids)):
                return True
        if self.request.is_finished:
            self.finish(self.request.finish_reason, self.request.stop_reason)
        return False

    def finish(self, reason: FinishReason | None, stop_reason: int | str | None) -> None:
        """End the output and show the text that was held back."""
        if self.finish_reason is not None:
            return
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self._detokenizer is not None and self._stop is not None:
            self._text += self._stop.feed(self._detokenizer.finish()) + self._stop.finish()

    @property
    def has_news(self) -> bool:
        """Whether anything has come since the last `render`: tokens, text, or the end."""
        sent = (self._sent_tokens, self._sent_text, self._sent_finish)
        return sent != (len(self._token_ids), len(self._text), self.finish_reason is not None)

    def render(self, delta: bool) -> CompletionOutput:
        """Return the output so far, or with `delta` what has come since the last call."""
        first, text_start = (self._sent_tokens, self._sent_text) if delta else (0, 0)
        self._sent_tokens, self._sent_text = len(self._token_ids), len(self._text)
        self._sent_finish = self.finish_reason is not None
        has_logprobs = self._params.num_logprobs is not None
        return CompletionOutput(
            index=self._index,
            text=self._text[text_start:],
            token_ids=self._token_ids[first:],
            cumulative_logprob=self._cumulative_logprob if has_logprobs else None,
            logprobs=_as_asked(self._logprobs[first:], self._params) if has_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _add_text(self, token: int, *, is_last: bool) -> bool:
        if self._detokenizer is None or self._stop is None:
            return False
        ended_by_token = is_last and self.request.finish_reason == "stop"
        hidden = ended_by_token and not self._params.include_stop_str_in_output
        self._text += self._stop.feed("" if hidden else self._detokenizer.feed([token]))
        if self._stop.matched is None:
            return False
        self.finish_reason, self.stop_reason = "stop", self._stop.matched
        return True

    def _add_logprobs(self, token: int, position: LogprobsOnePosition) -> None:
        self._cumulative_logprob += position[token].logprob
        self._logprobs.append(_with_text(position, self._tokenizer))


@dataclass(kw_only=True)
class GroupOutput:
    """A caller's request and its sequences' outputs."""

    source: ProcessedInput
    tokenizer: Tokenizer | None
    metrics: RequestMetrics
    sequences: list[SequenceOutput] = field(default_factory=list)
    prompt_logprobs: list[LogprobsOnePosition | None] = field(default_factory=lambda: [None])
    pooled: np.ndarray | None = None
    """An embedding [E], or the hidden state [D] that is classified; float32."""
    sent_prompt_logprobs: bool = False

    @classmethod
    def start(cls, source: ProcessedInput, tokenizer: Tokenizer | None) -> "GroupOutput":
        """Return the output of a request that has just arrived."""
        group = cls(source=source, tokenizer=None, metrics=RequestMetrics(arrival_time=time.monotonic()))
        if source.params is not None:
            group.tokenizer = tokenizer if source.params.detokenize else None
            group.sequences = [
                SequenceOutput(index, request, source.params, tokenizer)
                for index, request in enumerate(source.sequences)
            ]
        return group

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has ended."""
        if self.source.params is None:
            return self.source.sequences[0].is_finished
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def add_prompt_logprobs(self, start: int, positions: list[LogprobsOnePosition]) -> None:
        """Add entries for the prompt tokens from `start` on; those that a computation before gave are kept."""
        known = len(self.prompt_logprobs)
        for position in positions[max(known - start, 0) :]:
            self.prompt_logprobs.append(_with_text(position, self.tokenizer))

    def render(self) -> RequestOutput | EmbeddingRequestOutput | ClassificationRequestOutput | None:
        """Return what the caller is to see now; None where it wants only the end and that has not come."""
        source, params = self.source, self.source.params
        request, finished = source.sequences[0], self.is_finished
        if finished:
            self.metrics.finished_time = time.monotonic()
        if params is None:
            return self._render_pooled(finished)
        if params.output_kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        delta = params.output_kind is RequestOutputKind.DELTA
        wants_prompt = params.prompt_logprobs is not None and not (delta and self.sent_prompt_logprobs)
        self.sent_prompt_logprobs = True
        return RequestOutput(
            request_id=source.request_id,
            lora_request=None if request.adapter is None else request.adapter.request,
            prompt=source.prompt,
            prompt_token_ids=request.prompt_token_ids,
            prompt_logprobs=_as_asked(self.prompt_logprobs, params) if wants_prompt else None,
            outputs=[sequence.render(delta) for sequence in self.sequences if sequence.has_news or not delta],
            finished=finished,
            num_cached_tokens=request.num_cached_tokens,
            metrics=replace(self.metrics),
        )

    def _render_pooled(self, finished: bool) -> EmbeddingRequestOutput | ClassificationRequestOutput:
        source, pooled, request = self.source, self.pooled, self.source.sequences[0]
        if source.score is None:
            return EmbeddingRequestOutput(
                request_id=source.request_id,
                outputs=EmbeddingOutput(embedding=[] if pooled is None else pooled.tolist()),
                prompt_token_ids=request.prompt_token_ids,
                finished=finished,
            )
        return ClassificationRequestOutput(
            request_id=source.request_id,
            lora_request=None if request.adapter is None else request.adapter.request,
            outputs=ClassificationOutput(logits=[], probs=[]) if pooled is None else _classified(source.score, pooled),
            prompt_token_ids=request.prompt_token_ids,
            finished=finished,
            num_cached_tokens=request.num_cached_tokens,
        )


def _classified(score: np.ndarray, hidden: np.ndarray) -> ClassificationOutput:
    """Apply a head [num_labels, D] to a final hidden state [D], both float32."""
    logits = score @ hidden
    exponentials = np.exp(logits - logits.max())
    return ClassificationOutput(logits=logits.tolist(), probs=(exponentials / exponentials.sum()).tolist())


def _as_asked(positions: list, params: SamplingParams) -> Logprobs:
    if not params.flat_logprobs:
        return positions
    flat = FlatLogprobs()
    for position in positions:
        flat.append(position)
    return flat


def _with_text(position: LogprobsOnePosition, tokenizer: Tokenizer | None) -> LogprobsOnePosition:
    if tokenizer is None:
        return position
    return {token: Logprob(entry.logprob, entry.rank, tokenizer.token_text(token)) for token, entry in position.items()}
