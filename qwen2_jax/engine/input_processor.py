"""From what a caller asks to scheduler requests: prompts become token ids, parameters are checked against the model."""

import itertools
import numbers
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen2_jax.config import ModelConfig, ResolvedConfig
from qwen2_jax.engine.logit_bias import LogitBias, ThinkingTokens
from qwen2_jax.engine.request import Request
from qwen2_jax.errors import AdapterError, RequestError, nearest
from qwen2_jax.lora.entry import AdapterEntry
from qwen2_jax.request_checks import check_instance, check_integer, check_list
from qwen2_jax.text.tokenizer import Tokenizer
from qwen2_jax.types import SamplingParams

Prompt = str | Sequence[int] | dict[str, Any]
"""A text, its token ids, or vLLM's `{"prompt": ...}` or `{"prompt_token_ids": [...]}`."""

_PROMPT_KEYS = ("prompt", "prompt_token_ids")
_THINK_START, _THINK_END = "<think>", "</think>"


@dataclass(frozen=True, kw_only=True)
class ProcessedInput:
    """One caller's request: the sequences it became, one for each of its `n` outputs, and where it came from."""

    request_id: str
    prompt: str | None
    sequences: tuple[Request, ...]
    params: SamplingParams | None
    """None for an embedding and a classification."""
    score: np.ndarray | None = None
    """The head of a classification, [num_labels, D] in float32."""


class InputProcessor:
    """Makes requests for one model. Safe to use from any thread."""

    def __init__(
        self, model: ModelConfig, config: ResolvedConfig, tokenizer: Tokenizer | None, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._model, self._config, self._tokenizer = model, config, tokenizer
        self._eos_token_ids = eos_token_ids
        self._seeds = random.Random(config.config.seed)
        self._arrivals = itertools.count()

    def generation(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: AdapterEntry | None = None,
    ) -> ProcessedInput:
        """Return a generation request. Raises `RequestError` for a prompt or parameters that cannot be served."""
        if self._model.is_embedding_model:
            raise RequestError(f"{self._model.architecture} gives embeddings and cannot generate; use embed")
        self._check_priority(priority)
        text, token_ids = self._tokenize(prompt)
        self._check_prompt(token_ids, self._config.max_model_len - 1)
        params.verify(vocab_size=self._model.vocab_size, max_logprobs=self._config.max_logprobs)
        if self._tokenizer is None and params.detokenize:
            raise RequestError("there is no tokenizer (skip_tokenizer_init=True); use SamplingParams(detokenize=False)")
        sequences: list[Request] = []
        bias = self._logit_bias(params) if _changes_logits(params) else None
        for index in range(params.n):
            name = request_id if params.n == 1 else f"{index}_{request_id}"
            leader = sequences[0] if sequences else None
            own_bias = bias if bias is None or leader is None else bias.fork()
            sequences.append(self._sequence(name, token_ids, params, index, leader, priority, adapter, own_bias))
        return ProcessedInput(request_id=request_id, prompt=text, sequences=tuple(sequences), params=params)

    def embedding(
        self, request_id: str, prompt: Prompt, *, priority: int = 0, adapter: AdapterEntry | None = None
    ) -> ProcessedInput:
        """Return an embedding request. Raises `RequestError` for a prompt that cannot be served."""
        if not self._model.is_embedding_model:
            raise RequestError(f"{self._model.architecture} generates text; use LLM(..., runner='pooling') to embed")
        self._check_priority(priority)
        return self._pooling(request_id, prompt, priority, adapter, use_prefix_cache=False)

    def classification(
        self, request_id: str, prompt: Prompt, *, priority: int = 0, adapter: AdapterEntry | None = None
    ) -> ProcessedInput:
        """Return a classification request; `adapter` has the head.

        Raises `RequestError` for a prompt that cannot be served or has no adapter, `AdapterError` where it has no head.
        """
        model, needs = self._model.architecture, "modules_to_save=['score'], task_type='SEQ_CLS'"
        if self._model.is_embedding_model:
            raise RequestError(f"{model} gives embeddings; classify with a language model and adapters ({needs})")
        if adapter is None:
            raise RequestError(
                f"a prompt without an adapter cannot be classified: {model} is a causal language model with no "
                f"classification head; pass the LoRARequest of an adapter that has one ({needs})"
            )
        if adapter.score is None:
            raise AdapterError(
                f"adapter {adapter.request.lora_name!r} has no classification head, and neither has {model}, a causal "
                f"language model; use an adapter that has one ({needs})"
            )
        self._check_priority(priority)
        return self._pooling(request_id, prompt, priority, adapter, use_prefix_cache=True, score=adapter.score)

    def _pooling(
        self,
        request_id: str,
        prompt: Prompt,
        priority: int,
        adapter: AdapterEntry | None,
        *,
        use_prefix_cache: bool,
        score: np.ndarray | None = None,
    ) -> ProcessedInput:
        text, token_ids = self._tokenize(prompt)
        self._check_prompt(token_ids, self._config.max_model_len)
        request = Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling_params=None,
            max_model_len=self._config.max_model_len,
            priority=priority,
            arrival=next(self._arrivals),
            adapter=adapter,
            cache_salt=None if adapter is None else adapter.digest,
            use_prefix_cache=use_prefix_cache,
            whole_prompt=not self._model.is_causal,
        )
        return ProcessedInput(request_id=request_id, prompt=text, sequences=(request,), params=None, score=score)

    def _sequence(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        index: int,
        leader: Request | None,
        priority: int,
        adapter: AdapterEntry | None,
        bias: LogitBias | None,
    ) -> Request:
        seed = self._seeds.getrandbits(64) if params.seed is None else (params.seed + index) & (2**64 - 1)
        return Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling_params=params,
            max_model_len=self._config.max_model_len,
            eos_token_ids=() if params.ignore_eos else self._eos_token_ids,
            priority=priority,
            arrival=next(self._arrivals),
            adapter=adapter,
            cache_salt=None if adapter is None else adapter.digest,
            fork_of=leader if params.reads_prefix_cache else None,
            use_prefix_cache=params.reads_prefix_cache,
            synchronous=bias is not None and bias.is_synchronous,
            seed=seed,
            logit_bias=bias if bias is not None and bias.is_needed else None,
        )

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Return the text, if there is one, and the token ids; a dict that has both is taken at its word."""
        parts: dict[str, Any] = prompt if isinstance(prompt, dict) else {}
        if not isinstance(prompt, dict):
            parts["prompt" if isinstance(prompt, str) else "prompt_token_ids"] = prompt
        for key in parts:
            if key not in _PROMPT_KEYS:
                raise RequestError(f"unknown key {key!r} in a prompt{nearest(str(key), _PROMPT_KEYS)}")
        text, token_ids = (parts.get(key) for key in _PROMPT_KEYS)
        if text is not None:
            check_instance("prompt", text, str, "a string")
        if token_ids is not None:
            tokens = list(check_list("prompt_token_ids", token_ids))
            return text, tokens if {*map(type, tokens)} == {int} else [_token_id(token) for token in tokens]
        if text is None:
            raise RequestError(f"the prompt {prompt!r} is empty; it needs 'prompt' or 'prompt_token_ids'")
        if self._tokenizer is None:
            raise RequestError("there is no tokenizer (skip_tokenizer_init=True); pass prompt_token_ids")
        return text, self._tokenizer.encode(text)

    def _check_priority(self, priority: int) -> None:
        check_integer("priority", priority, -(2**63), 2**63 - 1)
        policy = self._config.config.scheduling_policy
        if priority and policy != "priority":
            raise RequestError(
                f"priority={priority} has no effect under scheduling_policy={policy!r}; leave it out, or start with "
                "scheduling_policy='priority'"
            )

    def _check_prompt(self, token_ids: list[int], limit: int) -> None:
        if not 1 <= len(token_ids) <= limit:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; with max_model_len={self._config.max_model_len} "
                f"it may have 1 to {limit}"
            )
        for token in (min(token_ids), max(token_ids)):
            if not 0 <= token < self._model.vocab_size:
                raise RequestError(f"{token} is not a token id: they go from 0 to {self._model.vocab_size - 1}")

    def _logit_bias(self, params: SamplingParams) -> LogitBias:
        stop_token_ids = (*params.stop_token_ids, *(() if params.ignore_eos else self._eos_token_ids))
        return LogitBias(
            self._model.vocab_size,
            logit_bias=dict(params.logit_bias or {}),
            allowed_token_ids=params.allowed_token_ids,
            bad_words=self._bad_words(params.bad_words),
            min_tokens=params.min_tokens,
            stop_token_ids=stop_token_ids,
            thinking=self._thinking(params.thinking_token_budget),
        )

    def _bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """Return each word's tokens at the start of a text and, where its first token differs, after a space."""
        if not words:
            return []
        if self._tokenizer is None:
            raise RequestError(f"bad_words={list(words)!r} needs a tokenizer, and skip_tokenizer_init=True")
        sequences = []
        for word in words:
            bare = self._tokenizer.encode(word.lstrip(), add_special_tokens=False)
            spaced = self._tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
            if not bare or max(bare + spaced) >= self._model.vocab_size:
                raise RequestError(f"bad_words contains {word!r}, which has no tokens in the model's vocabulary")
            sequences.append(bare)
            if spaced[0] != bare[0] and len(spaced) == len(bare):
                sequences.append(spaced)
        return sequences

    def _thinking(self, budget: int | None) -> ThinkingTokens | None:
        if budget is None:
            return None
        start = end = None
        if self._tokenizer is not None:
            start, end = self._tokenizer.convert_tokens_to_ids([_THINK_START, _THINK_END])
        if start is None or end is None or max(start, end) >= self._model.vocab_size:
            raise RequestError(
                f"thinking_token_budget={budget} needs a tokenizer with the tokens {_THINK_START} and {_THINK_END}"
            )
        return ThinkingTokens(start=start, end=end, budget=budget)


def _token_id(token: Any) -> int:
    """Return a token id as an int; an integer of numpy's is one, too."""
    if type(token) is int:
        return token
    if isinstance(token, bool) or not isinstance(token, numbers.Integral):
        raise RequestError(f"{token!r} is not a token id; use integers")
    return int(token)


def _changes_logits(params: SamplingParams) -> bool:
    return bool(
        params.logit_bias
        or params.allowed_token_ids
        or params.bad_words
        or params.min_tokens
        or params.thinking_token_budget is not None
    )
