"""What a caller asks of the sampler, with vLLM's names, defaults and ranges (`vllm.SamplingParams`). No jax here."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from qwen2_jax.errors import RequestError, nearest
from qwen2_jax.request_checks import (
    check_distinct,
    check_instance,
    check_integer,
    check_list,
    check_logit_bias,
    check_number,
)

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this one mean greedy decoding, as in vLLM."""
MAX_N = 16384
"""The most outputs that one request may ask for."""
MAX_LOGPROB_TOKEN_IDS = 128
"""The most ids that `logprob_token_ids` may name."""
GENERATION_CONFIG_FIELDS = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}
"""The keys of Hugging Face's generation_config.json that set a default, and the fields they set."""

_LIST_FIELDS = ("stop", "stop_token_ids", "bad_words")
_TOKEN_ID_FIELDS = ("stop_token_ids", "allowed_token_ids", "logprob_token_ids")
_BOOL_FIELDS = (
    "include_stop_str_in_output",
    "ignore_eos",
    "flat_logprobs",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)


class RequestOutputKind(Enum):
    """What each streamed `RequestOutput` holds."""

    CUMULATIVE = 0
    """Everything generated so far."""
    DELTA = 1
    """Only what is new since the last output."""
    FINAL_ONLY = 2
    """Nothing until the request is finished, then everything."""


@dataclass(frozen=True, kw_only=True)
class RepetitionDetectionParams:
    """Ends a request whose last tokens are one pattern over and over; sizes are in tokens.

    A pattern of `min_pattern_size` (0 counts as 1) to `max_pattern_size` tokens that occurs `min_count` times in a row
    finishes the request with `finish_reason="repetition"`. `max_pattern_size=0` switches the check off.

    Raises:
        RequestError: a negative size, `min_pattern_size > max_pattern_size`, or `min_count < 2` while switched on.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        check_integer("max_pattern_size", self.max_pattern_size, 0)
        check_integer("min_pattern_size", self.min_pattern_size, 0, self.max_pattern_size)
        check_integer("min_count", self.min_count, 2 if self.max_pattern_size else 0)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue one prompt. Immutable and checked; `replace` makes a changed copy.

    `None` for `stop`, `stop_token_ids` or `bad_words` means none, and a single string for `stop` means that one; all
    three are kept as tuples without repetitions.

    Raises:
        RequestError: an unknown keyword (the message names the nearest field), a value of the wrong type or out of
            range, or values that contradict each other.
    """

    n: int = 1
    """Outputs per prompt; greedy decoding allows only one."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the output has; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the output; in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive (multiplies negative) logits of tokens in the prompt or the output; in [1e-6, 1e6], 1 is off."""
    temperature: float = 1.0
    """Divides the logits; in [0, 2], 0 (below 1e-5) is greedy."""
    top_p: float = 1.0
    """Keeps the smallest set of likeliest tokens that has this much probability; in (0, 1]."""
    top_k: int = 0
    """Keeps this many likeliest tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Keeps tokens with at least this share of the likeliest one's probability; in [0, 1]."""
    seed: int | None = None
    """Makes the samples reproducible, whatever else is in the batch; None or -1 draws a fresh seed."""
    stop: Sequence[str] = ()
    """Strings that end the output as soon as it contains one."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the output."""
    bad_words: Sequence[str] = ()
    """Words whose last token is forbidden wherever it would complete them."""
    include_stop_str_in_output: bool = False
    """Whether the text keeps the stop string that ended it."""
    ignore_eos: bool = False
    """Whether to go on after the model's end-of-sequence token."""
    max_tokens: int | None = 16
    """The most tokens to generate per output; None means up to the context's length."""
    min_tokens: int = 0
    """Tokens to generate before an end-of-sequence or stop token may be sampled."""
    logprobs: int | None = None
    """Report log-probabilities of this many likeliest tokens besides the sampled one's; -1 means all of them."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt after the first."""
    logprob_token_ids: Sequence[int] | None = None
    """Report log-probabilities of exactly these tokens besides the sampled one's."""
    flat_logprobs: bool = False
    """Whether log-probabilities come as `FlatLogprobs` instead of a list of dicts."""
    detokenize: bool = True
    """Whether to make text; False leaves it empty."""
    skip_special_tokens: bool = True
    """Whether the text leaves special tokens out."""
    spaces_between_special_tokens: bool = True
    """Whether spaces that the tokenizer puts between special tokens stay; byte-level ones, Qwen2's, put none."""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    """What each streamed output holds."""
    structured_outputs: None = None
    """Constrained decoding; not supported, so only None is accepted."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids; clamped to [-100, 100] as OpenAI does."""
    allowed_token_ids: Sequence[int] | None = None
    """The only tokens that may be sampled; None allows all."""
    extra_args: Mapping[str, Any] | None = None
    """Arguments for custom samplers; there are none, so only an empty mapping is accepted."""
    thinking_token_budget: int | None = None
    """The most tokens to spend on thinking, at least 0; None or -1 means no limit."""
    repetition_detection: RepetitionDetectionParams | None = None
    """Ends outputs that repeat themselves."""
    skip_reading_prefix_cache: bool | None = None
    """Whether to compute the whole prompt afresh; None does so only if `prompt_logprobs` needs it."""

    def __new__(cls, **given: object) -> Self:
        """Refuse unknown keywords with the package's own error before the generated `__init__` sees them."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise RequestError(f"unknown sampling parameter {name!r}{nearest(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._normalise()
        self._check_numbers()
        self._check_token_ids()
        self._check_types()
        self._check_contradictions()
        if self.is_greedy:
            self._set(top_p=1.0, top_k=0, min_p=0.0)

    @classmethod
    def from_defaults(cls, generation_config: Mapping[str, Any], /, **given: Any) -> Self:
        """Return parameters whose defaults are a model's generation_config.json, overridden by `given`.

        Only the keys of `GENERATION_CONFIG_FIELDS` are taken, as in vLLM; `do_sample` is not one of them.
        """
        defaults = {
            field: generation_config[key]
            for key, field in GENERATION_CONFIG_FIELDS.items()
            if generation_config.get(key) is not None
        }
        return cls(**{**defaults, **given})

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def num_logprobs(self) -> int | None:
        """Log-probabilities reported per token besides the sampled one's: a count, -1 for all, None for no report."""
        if self.logprobs is not None or self.logprob_token_ids is None:
            return self.logprobs
        return len(self.logprob_token_ids)

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether blocks that earlier requests computed may stand in for parts of the prompt."""
        return self.prompt_logprobs is None and not self.skip_reading_prefix_cache

    def replace(self, **changes: Any) -> Self:
        """Return a copy with these fields changed, checked anew."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return type(self)(**{**values, **changes})

    def verify(self, *, vocab_size: int, max_logprobs: int = -1) -> None:
        """Check against a model what cannot be checked without one.

        `max_logprobs` is how many log-probabilities a request may ask for per token; -1 means `vocab_size`. Raises
        `RequestError` for a token id outside the vocabulary, and for more log-probabilities than allowed.
        """
        for name in (*_TOKEN_ID_FIELDS, "logit_bias"):
            for token_id in getattr(self, name) or ():
                check_integer(f"token id in {name}", token_id, 0, vocab_size - 1)
        limit = vocab_size if max_logprobs == -1 else max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            if asked is not None and (vocab_size if asked == -1 else asked) > limit:
                raise RequestError(f"{name}={asked} asks for more log-probabilities than allowed; use at most {limit}")

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _normalise(self) -> None:
        self._set(stop=(self.stop,) if isinstance(self.stop, str) else self.stop)
        for name in _LIST_FIELDS:
            self._set(**{name: check_distinct(name, getattr(self, name))})
        for name in ("allowed_token_ids", "logprob_token_ids"):
            if (ids := getattr(self, name)) is not None:
                self._set(**{name: tuple(check_list(name, ids))})
        if self.logit_bias is not None:
            self._set(logit_bias=check_logit_bias(self.logit_bias))
        for name in ("seed", "thinking_token_budget"):
            if getattr(self, name) == -1:
                self._set(**{name: None})

    def _check_numbers(self) -> None:
        check_integer("n", self.n, 1, MAX_N)
        check_number("presence_penalty", self.presence_penalty, -2, 2)
        check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        check_number("repetition_penalty", self.repetition_penalty, 1e-6, 1e6)
        check_number("temperature", self.temperature, 0, 2)
        check_number("top_p", self.top_p, 0, 1, open_low=True)
        check_number("min_p", self.min_p, 0, 1)
        check_integer("top_k", self.top_k, -1)
        check_integer("min_tokens", self.min_tokens, 0)
        optional = {
            "seed": (-(2**63), 2**63 - 1),
            "max_tokens": (1, None),
            "logprobs": (-1, None),
            "prompt_logprobs": (-1, None),
            "thinking_token_budget": (0, None),
        }
        for name, (low, high) in optional.items():
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), low, high)

    def _check_token_ids(self) -> None:
        for name in _TOKEN_ID_FIELDS:
            for token_id in getattr(self, name) or ():
                check_integer(f"token id in {name}", token_id, 0)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty, so that nothing could be sampled; use None to allow all")
        if self.logprob_token_ids is None:
            return
        count = len(self.logprob_token_ids)
        check_integer("number of logprob_token_ids", count, 1, MAX_LOGPROB_TOKEN_IDS)
        if self.logprobs not in (None, count):
            raise RequestError(
                f"logprobs={self.logprobs} contradicts the {count} logprob_token_ids; leave logprobs out"
            )

    def _check_types(self) -> None:
        for name in ("stop", "bad_words"):
            for word in getattr(self, name):
                if not isinstance(word, str) or not word:
                    raise RequestError(f"{name} contains {word!r}; use strings that are not empty")
        for name in _BOOL_FIELDS:
            check_instance(name, getattr(self, name), bool, "True or False")
        if self.skip_reading_prefix_cache is not None:
            check_instance("skip_reading_prefix_cache", self.skip_reading_prefix_cache, bool, "True, False or None")
        check_instance("output_kind", self.output_kind, RequestOutputKind, "a member of RequestOutputKind")
        if self.repetition_detection is not None:
            allowed = "RepetitionDetectionParams(...) or None"
            check_instance("repetition_detection", self.repetition_detection, RepetitionDetectionParams, allowed)
        if self.structured_outputs is not None:
            raise RequestError("structured_outputs is not supported; leave it out and check the text afterwards")
        if self.extra_args:
            raise RequestError(f"extra_args={self.extra_args!r}: no custom sampler could take it; leave it out")

    def _check_contradictions(self) -> None:
        if self.n > 1 and self.is_greedy:
            raise RequestError(f"n={self.n} greedy outputs would all be equal; use n=1, or a temperature above 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}; use at most that")
        if self.stop and not self.detokenize:
            raise RequestError(f"stop={list(self.stop)!r} needs the text; use detokenize=True, or stop_token_ids")
        if self.prompt_logprobs is not None and self.skip_reading_prefix_cache is False:
            raise RequestError("prompt_logprobs needs the whole prompt computed; use skip_reading_prefix_cache=None")
