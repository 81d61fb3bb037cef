"""Sampling parameters: vLLM's defaults and ranges; what makes no sense is refused with its name and value."""

import copy
import math
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.errors import RequestError
from qwen2_jax.types import RepetitionDetectionParams, RequestOutputKind, SamplingParams


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.detokenize, params.skip_special_tokens, params.spaces_between_special_tokens) == (True, True, True)
    assert (params.ignore_eos, params.include_stop_str_in_output, params.flat_logprobs) == (False, False, False)
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    assert params.logprobs is params.prompt_logprobs is params.logit_bias is params.allowed_token_ids is None


def test_lists_become_tuples_without_repetitions() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b", "a"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[3, 1, 3]).stop_token_ids == (3, 1)
    assert SamplingParams(bad_words=["x"]).bad_words == ("x",)
    given_as_none: dict[str, Any] = {"stop": None, "stop_token_ids": None, "bad_words": None}
    params = SamplingParams(**given_as_none)
    assert (params.stop, params.stop_token_ids, params.bad_words) == ((), (), ())


def test_greedy_switches_the_filters_off() -> None:
    params = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1)
    assert params.is_greedy
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)
    assert SamplingParams(temperature=1e-6).is_greedy
    assert not SamplingParams(temperature=0.01).is_greedy


def test_minus_one_means_none_where_vllm_says_so() -> None:
    params = SamplingParams(seed=-1, thinking_token_budget=-1, top_k=-1, logprobs=-1)
    assert (params.seed, params.thinking_token_budget, params.top_k, params.logprobs) == (None, None, -1, -1)


def test_logit_bias_has_integer_keys_and_is_clamped() -> None:
    assert SamplingParams(logit_bias={3: 500, 4: -500.5, 5: 1}).logit_bias == {3: 100.0, 4: -100.0, 5: 1.0}
    from_json: Any = {"42": -7}
    assert SamplingParams(logit_bias=from_json).logit_bias == {42: -7.0}


def test_number_of_logprobs() -> None:
    assert SamplingParams().num_logprobs is None
    assert SamplingParams(logprobs=0).num_logprobs == 0
    assert SamplingParams(logprob_token_ids=[5, 6]).num_logprobs == 2
    assert SamplingParams(logprob_token_ids=[5, 6], logprobs=2).num_logprobs == 2


def test_prompt_logprobs_need_the_whole_prompt_computed() -> None:
    assert SamplingParams().reads_prefix_cache
    assert not SamplingParams(prompt_logprobs=0).reads_prefix_cache
    assert not SamplingParams(skip_reading_prefix_cache=True).reads_prefix_cache
    assert SamplingParams().replace(prompt_logprobs=1).reads_prefix_cache is False


def test_replace_checks_anew_and_leaves_the_original_alone() -> None:
    params = SamplingParams(stop="x", max_tokens=5)
    assert params.replace(max_tokens=7) == SamplingParams(stop="x", max_tokens=7)
    assert params.max_tokens == 5
    with pytest.raises(RequestError, match="max_tokens=0"):
        params.replace(max_tokens=0)
    with pytest.raises(AttributeError):
        setattr(params, "max_tokens", 3)  # noqa: B010 - pyright knows that plain assignment fails


def test_copies_are_equal() -> None:
    params = SamplingParams(stop="x", logit_bias={1: 2.0}, repetition_detection=RepetitionDetectionParams())
    assert copy.copy(params) == copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params


def test_generation_config_gives_defaults() -> None:
    config = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "max_new_tokens": 99}
    params = SamplingParams.from_defaults({**config, "do_sample": True, "eos_token_id": [1], "min_p": None})
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.7, 0.8, 20, 1.05)
    assert params.max_tokens == 99
    assert SamplingParams.from_defaults(config, temperature=0.2, max_tokens=None).temperature == 0.2
    assert SamplingParams.from_defaults(config, max_tokens=None).max_tokens is None
    assert SamplingParams.from_defaults({}) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "hint"),
    [("temprature", "; did you mean 'temperature'?"), ("best_of", ""), ("stop_tokens", "; did you mean 'stop_token_")],
)
def test_unknown_names_are_errors_that_name_the_nearest(name: str, hint: str) -> None:
    unknown: dict[str, Any] = {name: 1}
    with pytest.raises(RequestError) as info:
        SamplingParams(**unknown)
    assert f"unknown sampling parameter {name!r}{hint}" in str(info.value)


BAD = [
    ({"n": 0}, r"n=0 is out of range; use an integer in \[1, 16384\]"),
    ({"n": 20000}, "n=20000"),
    ({"n": 2.0}, "n=2.0 is not allowed"),
    ({"n": True}, "n=True is not allowed"),
    ({"temperature": -0.1}, r"temperature=-0.1 is out of range; use a finite number in \[0, 2\]"),
    ({"temperature": 2.1}, "temperature=2.1"),
    ({"temperature": math.nan}, "temperature=nan"),
    ({"temperature": math.inf}, "temperature=inf"),
    ({"temperature": "0.5"}, "temperature='0.5'"),
    ({"temperature": None}, "temperature=None"),
    ({"temperature": True}, "temperature=True"),
    ({"top_p": 0}, r"top_p=0 is out of range; use a finite number in \(0, 1\]"),
    ({"top_p": 1.01}, "top_p=1.01"),
    ({"top_k": -2}, "top_k=-2 is out of range; use an integer of at least -1"),
    ({"top_k": 1.5}, "top_k=1.5"),
    ({"min_p": -0.1}, "min_p=-0.1"),
    ({"min_p": 1.1}, "min_p=1.1"),
    ({"presence_penalty": 2.1}, "presence_penalty=2.1"),
    ({"frequency_penalty": -2.1}, "frequency_penalty=-2.1"),
    ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ({"repetition_penalty": math.inf}, "repetition_penalty=inf"),
    ({"repetition_penalty": 1e300}, "repetition_penalty=1e.300 is out of range"),
    ({"repetition_penalty": 1e-60}, "repetition_penalty=1e-60 is out of range"),
    ({"temperature": 10**400}, "temperature=1000"),
    ({"stop": [["a"]]}, "stop=.* is not allowed; use a list of strings or numbers"),
    ({"seed": 1.0}, "seed=1.0"),
    ({"seed": 2**63}, f"seed={2**63}"),
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"max_tokens": "5"}, "max_tokens='5'"),
    ({"min_tokens": -1}, "min_tokens=-1"),
    ({"min_tokens": None}, "min_tokens=None"),
    ({"min_tokens": 17}, "min_tokens=17 exceeds max_tokens=16"),
    ({"logprobs": -2}, "logprobs=-2"),
    ({"logprobs": True}, "logprobs=True"),
    ({"prompt_logprobs": 1.0}, "prompt_logprobs=1.0"),
    ({"stop": ["a", ""]}, "stop contains ''"),
    ({"stop": [3]}, "stop contains 3"),
    ({"stop": 3}, "stop=3 is not allowed; use a list"),
    ({"stop": ["a"], "detokenize": False}, "use detokenize=True, or stop_token_ids"),
    ({"bad_words": "word"}, "bad_words='word' is not allowed; use a list"),
    ({"bad_words": [""]}, "bad_words contains ''"),
    ({"stop_token_ids": [-1]}, "token id in stop_token_ids=-1"),
    ({"stop_token_ids": [True]}, "token id in stop_token_ids=True"),
    ({"stop_token_ids": ["1"]}, "token id in stop_token_ids='1'"),
    ({"stop_token_ids": 5}, "stop_token_ids=5 is not allowed; use a list"),
    ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
    ({"allowed_token_ids": [-3]}, "token id in allowed_token_ids=-3"),
    ({"logprob_token_ids": []}, "number of logprob_token_ids=0"),
    ({"logprob_token_ids": list(range(129))}, "number of logprob_token_ids=129"),
    ({"logprob_token_ids": [1, 2], "logprobs": 5}, "logprobs=5 contradicts the 2 logprob_token_ids"),
    ({"logit_bias": [1]}, r"logit_bias=\[1\] is not allowed"),
    ({"logit_bias": {"x": 1}}, "token id in logit_bias='x'"),
    ({"logit_bias": {-1: 1}}, "token id in logit_bias=-1"),
    ({"logit_bias": {1: math.nan}}, r"logit_bias\[1\]=nan"),
    ({"logit_bias": {1: "2"}}, r"logit_bias\[1\]='2'"),
    ({"ignore_eos": 1}, "ignore_eos=1 is not allowed; use True or False"),
    ({"detokenize": None}, "detokenize=None"),
    ({"output_kind": 1}, "output_kind=1 is not allowed; use a member of RequestOutputKind"),
    ({"structured_outputs": {"json": {}}}, "structured_outputs is not supported"),
    ({"extra_args": {"a": 1}}, r"extra_args=\{'a': 1\}"),
    ({"thinking_token_budget": -2}, "thinking_token_budget=-2"),
    ({"thinking_token_budget": 1.0}, "thinking_token_budget=1.0"),
    ({"repetition_detection": {"min_count": 2}}, "use RepetitionDetectionParams"),
    ({"skip_reading_prefix_cache": 1}, "skip_reading_prefix_cache=1"),
    ({"skip_reading_prefix_cache": False, "prompt_logprobs": 1}, "needs the whole prompt computed"),
    ({"n": 2, "temperature": 0}, "n=2 greedy outputs would all be equal"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_values_are_errors_that_name_them(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)


JUNK = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=3)
)


@settings(max_examples=300)
@given(values=st.dictionaries(st.sampled_from(sorted(SamplingParams.__dataclass_fields__)), JUNK, max_size=4))
def test_junk_gives_valid_parameters_or_our_error(values: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**values)
    except RequestError:
        return
    assert params.replace() == params
    assert 0 <= params.temperature <= 2
    assert 0 < params.top_p <= 1
    assert params.max_tokens is None or params.max_tokens >= max(1, params.min_tokens)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_pattern_size": -1}, "max_pattern_size=-1"),
        ({"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}, r"min_pattern_size=3 .*\[0, 2\]"),
        ({"max_pattern_size": 2, "min_count": 1}, "min_count=1"),
        ({"max_pattern_size": True, "min_count": 2}, "max_pattern_size=True"),
    ],
)
def test_bad_repetition_detection(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        RepetitionDetectionParams(**values)
    assert RepetitionDetectionParams().max_pattern_size == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stop_token_ids": [100]}, r"token id in stop_token_ids=100 is out of range; use an integer in \[0, 99\]"),
        ({"allowed_token_ids": [3, 100]}, "token id in allowed_token_ids=100"),
        ({"logprob_token_ids": [1000]}, "token id in logprob_token_ids=1000"),
        ({"logit_bias": {100: 1.0}}, "token id in logit_bias=100"),
        ({"logprobs": 21}, "logprobs=21 asks for more log-probabilities than allowed; use at most 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1"),
    ],
)
def test_verify_against_a_model(values: dict[str, Any], message: str) -> None:
    params = SamplingParams(**values)
    with pytest.raises(RequestError, match=message):
        params.verify(vocab_size=100, max_logprobs=20)


def test_verify_accepts_what_fits() -> None:
    SamplingParams(stop_token_ids=[99], logit_bias={0: 1.0}, logprobs=-1, prompt_logprobs=100).verify(vocab_size=100)
    SamplingParams(logprobs=20).verify(vocab_size=100, max_logprobs=20)
    with pytest.raises(RequestError, match="prompt_logprobs=100"):
        SamplingParams(prompt_logprobs=100).verify(vocab_size=99)
