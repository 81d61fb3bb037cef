"""What a request adds to its logits: bias, allowed tokens, bad words, minimum length, a spent thinking budget.

All of it becomes one vector of the vocabulary's size that the sampler adds to the row's logits; minus infinity forbids
a token. The vector is made on the host and goes to the device only when it changes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen2_jax.engine.request import Request
from qwen2_jax.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class ThinkingTokens:
    """The tokens that open and close a model's thinking, and how many tokens may lie between them."""

    start: int
    end: int
    budget: int


class LogitBias:
    """One request's bias over its life."""

    def __init__(
        self,
        vocab_size: int,
        *,
        logit_bias: dict[int, float],
        allowed_token_ids: Sequence[int] | None,
        bad_words: Sequence[Sequence[int]],
        min_tokens: int,
        stop_token_ids: Sequence[int],
        thinking: ThinkingTokens | None,
    ) -> None:
        """`bad_words` are token sequences; `stop_token_ids` are forbidden until there are `min_tokens` outputs.

        Raises `RequestError` when no token is left to sample.
        """
        self._bad_words = [tuple(word) for word in bad_words if len(word) > 1]
        # An end token of the tokenizer's may lie beyond the model's vocabulary: it is never sampled.
        endings = frozenset(token for token in stop_token_ids if token < vocab_size)
        self._stop_token_ids = endings if min_tokens else frozenset()
        self._min_tokens = min_tokens
        self._thinking = thinking
        fixed = np.zeros(vocab_size, np.float32)
        if allowed_token_ids is not None:
            fixed[:] = -np.inf
            fixed[list(allowed_token_ids)] = 0
        for token, bias in logit_bias.items():
            fixed[token] += bias
        fixed[[word[0] for word in bad_words if len(word) == 1]] = -np.inf
        forbidden = np.isneginf(fixed)
        forbidden[list(self._stop_token_ids)] = True
        if forbidden.all():
            raise RequestError(
                f"no token is left to sample: allowed_token_ids={allowed_token_ids!r} are bad words, "
                f"or end tokens, which min_tokens={min_tokens} forbids; allow more"
            )
        self._fixed = fixed
        self._is_fixed_empty = not fixed.any()
        self._num_allowed = int(np.count_nonzero(~np.isneginf(fixed)))
        self._sent: frozenset[int] | int | None = None
        self._num_seen = 0
        self._thought: int | None = None
        """Tokens since the last that opens thinking, if that is open."""

    def fork(self) -> "LogitBias":
        """Return the same for another output of the prompt; what does not change is shared."""
        return copy.copy(self)

    @property
    def is_synchronous(self) -> bool:
        """Whether the next step's bias depends on the last token."""
        return bool(self._bad_words) or self._thinking is not None

    @property
    def is_needed(self) -> bool:
        """Whether this bias can ever differ from zero."""
        return not self._is_fixed_empty or self.is_synchronous or bool(self._stop_token_ids)

    def reset(self) -> None:
        """Forget what is on the device: the request has got another row."""
        self._sent = None

    def update(self, request: Request, num_outputs: int) -> tuple[bool, np.ndarray | None]:
        """Return whether the bias counts for the token after `num_outputs`, and the vector to send if it changed."""
        forced = self._forced(request)
        forbidden = frozenset() if forced is not None else self._forbidden(request.output_token_ids, num_outputs)
        if forced is None and not forbidden and self._is_fixed_empty:
            return False, None
        state = forbidden if forced is None else forced
        if state == self._sent:
            return True, None
        self._sent = state
        if forced is not None:
            vector = np.full_like(self._fixed, -np.inf)
            vector[forced] = 0
        else:
            vector = self._fixed.copy()
            vector[list(forbidden)] = -np.inf
        return True, vector

    def _forbidden(self, outputs: Sequence[int], num_outputs: int) -> frozenset[int]:
        endings = {
            word[-1]
            for word in self._bad_words
            if len(outputs) >= len(word) - 1 and tuple(outputs[len(outputs) - len(word) + 1 :]) == word[:-1]
        }
        stops = self._stop_token_ids if num_outputs < self._min_tokens else frozenset()
        # Where bad words leave nothing to sample, they give way: what is not allowed must not be sampled either.
        forbidden = stops | endings
        if len(forbidden) >= self._num_allowed and np.isneginf(np.delete(self._fixed, list(forbidden))).all():
            return stops
        return forbidden

    def _forced(self, request: Request) -> int | None:
        """Return the closing token if the thinking that is open has spent its budget."""
        if self._thinking is None:
            return None
        for token in request.tokens(self._num_seen, request.num_tokens):
            if token == self._thinking.start:
                self._thought = 0
            elif token == self._thinking.end:
                self._thought = None
            elif self._thought is not None:
                self._thought += 1
        self._num_seen = request.num_tokens
        spent = self._thought is not None and self._thought >= self._thinking.budget
        return self._thinking.end if spent else None
