"""Prompts in every form, refusals that name the value and the limits, and what each sequence of a request gets."""

from typing import Any

import numpy as np
import pytest

from qwen2_jax.errors import AdapterError, RequestError
from qwen2_jax.types import SamplingParams
from tests.engine.processing import EOS, VOCAB_SIZE, generation, ids, make_processor
from tests.engine.scheduling import make_entry

EMBEDDINGS: dict[str, Any] = {"architectures": ["Qwen2Model"]}


@pytest.mark.parametrize(
    "prompt, text, token_ids",
    [
        ("hi x", "hi x", ids("hi x")),
        ([5, 6, 7], None, [5, 6, 7]),
        ((5, 6), None, [5, 6]),
        (np.asarray([5, 6], np.int64), None, [5, 6]),
        ({"prompt": "hi"}, "hi", ids("hi")),
        ({"prompt_token_ids": [5, 6]}, None, [5, 6]),
        ({"prompt_token_ids": [5, 6], "prompt": "as it was"}, "as it was", [5, 6]),
        ("<|im_end|>", "<|im_end|>", [EOS]),
    ],
)
def test_prompts(prompt: Any, text: str | None, token_ids: list[int]) -> None:
    processed = generation(prompt)
    assert processed.prompt == text
    (request,) = processed.sequences
    assert request.prompt_token_ids == token_ids
    assert all(type(token) is int for token in request.prompt_token_ids)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", r"the prompt has 0 tokens; with max_model_len=64 it may have 1 to 63"),
        ([], r"the prompt has 0 tokens"),
        ([1] * 64, r"the prompt has 64 tokens; with max_model_len=64 it may have 1 to 63"),
        ([5, VOCAB_SIZE], rf"{VOCAB_SIZE} is not a token id: they go from 0 to {VOCAB_SIZE - 1}"),
        ([5, -1], r"-1 is not a token id"),
        ([5, True], r"True is not a token id"),
        ([5, 6.0], r"6.0 is not a token id"),
        ([5, "6"], r"'6' is not a token id"),
        ("hi<late>", rf"{VOCAB_SIZE} is not a token id"),
        ({"prompt_tokens_ids": [1]}, r"unknown key 'prompt_tokens_ids' in a prompt; did you mean 'prompt_token_ids'\?"),
        ({}, r"the prompt {} is empty; it needs 'prompt' or 'prompt_token_ids'"),
        ({"prompt": 7}, r"prompt=7 is not allowed; use a string"),
        ({"prompt_token_ids": "abc"}, r"prompt_token_ids='abc' is not allowed; use a list"),
        (b"abc", r"prompt_token_ids=b'abc' is not allowed; use a list"),
        (7, r"prompt_token_ids=7 is not allowed; use a list"),
        (None, r"the prompt None is empty"),
        ("\ud800", r"not valid Unicode"),
    ],
)
def test_prompts_that_are_refused(prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        generation(prompt)


def test_the_longest_prompt_leaves_room_for_a_token() -> None:
    assert len(generation([1] * 63).sequences[0].prompt_token_ids) == 63
    processor = make_processor(engine={"max_model_len": 8})
    with pytest.raises(RequestError, match="the prompt has 8 tokens; with max_model_len=8 it may have 1 to 7"):
        generation([1] * 8, processor)


def test_without_a_tokenizer() -> None:
    processor = make_processor(with_tokenizer=False)
    assert generation([5], processor, detokenize=False).prompt is None
    with pytest.raises(RequestError, match=r"no tokenizer .*; pass prompt_token_ids"):
        generation("hi", processor, detokenize=False)
    with pytest.raises(RequestError, match=r"no tokenizer .*; use SamplingParams\(detokenize=False\)"):
        generation([5], processor)
    with pytest.raises(RequestError, match=r"bad_words=\['x'\] needs a tokenizer"):
        generation([5], processor, detokenize=False, bad_words=["x"])
    with pytest.raises(RequestError, match="thinking_token_budget=4 needs a tokenizer with the tokens <think>"):
        generation([5], processor, detokenize=False, thinking_token_budget=4)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"stop_token_ids": [VOCAB_SIZE]}, rf"token id in stop_token_ids={VOCAB_SIZE} is out of range"),
        ({"logit_bias": {900: 1.0}}, r"token id in logit_bias=900"),
        ({"logprobs": 21}, r"logprobs=21 asks for more log-probabilities than allowed; use at most 20"),
        ({"prompt_logprobs": -1}, r"prompt_logprobs=-1 asks for more"),
    ],
)
def test_parameters_that_the_model_cannot_serve(params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        generation(**params)


def test_all_logprobs_where_the_engine_allows_them() -> None:
    processor = make_processor(engine={"max_logprobs": -1})
    assert generation(processor=processor, logprobs=-1).params == SamplingParams(logprobs=-1)


def test_n_children_share_the_first_ones_prompt() -> None:
    processed = generation(n=3, seed=10)
    first, *others = processed.sequences
    assert [request.request_id for request in processed.sequences] == ["0_r", "1_r", "2_r"]
    assert [request.seed for request in processed.sequences] == [10, 11, 12]
    assert first.fork_of is None and all(request.fork_of is first for request in others)
    arrivals = [request.arrival for request in processed.sequences]
    assert arrivals == sorted(set(arrivals))
    assert generation().sequences[0].request_id == "r"


def test_children_that_compute_their_whole_prompt_do_not_wait_for_the_first() -> None:
    options: list[dict[str, Any]] = [{"prompt_logprobs": 1}, {"skip_reading_prefix_cache": True}]
    for params in options:
        processed = generation(n=2, **params)
        assert [request.fork_of for request in processed.sequences] == [None, None]
        assert not any(request.use_prefix_cache for request in processed.sequences)
    assert generation().sequences[0].use_prefix_cache


def test_seeds() -> None:
    assert generation(seed=-5).sequences[0].seed == 2**64 - 5
    first, second = make_processor(), make_processor()
    drawn = [generation(processor=first, n=2).sequences for _ in range(3)]
    again = [generation(processor=second, n=2).sequences for _ in range(3)]
    seeds = [request.seed for requests in drawn for request in requests]
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**64 for seed in seeds)
    assert seeds == [request.seed for requests in again for request in requests]
    other = make_processor(engine={"seed": 1})
    assert generation(processor=other).sequences[0].seed not in seeds


def test_ends_priorities_and_limits() -> None:
    processor = make_processor(eos=(EOS, 7), engine={"scheduling_policy": "priority"})
    (request,) = processor.generation("r", "hi", SamplingParams(), priority=-3).sequences
    assert (request.eos_token_ids, request.priority, request.max_model_len) == ((EOS, 7), -3, 64)
    assert generation(processor=processor, ignore_eos=True).sequences[0].eos_token_ids == ()
    with pytest.raises(RequestError, match="priority='high' is not allowed; use an integer"):
        processor.generation("r", "hi", SamplingParams(), priority="high")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError, match="priority=1 has no effect under scheduling_policy='fcfs'"):
        make_processor().generation("r", "hi", SamplingParams(), priority=1)


def test_embeddings() -> None:
    processor = make_processor(model=EMBEDDINGS, engine={"scheduling_policy": "priority"})
    processed = processor.embedding("e", [1] * 64, priority=2)
    (request,) = processed.sequences
    assert processed.params is None and request.is_pooling
    assert (request.priority, request.use_prefix_cache, request.whole_prompt) == (2, False, False)
    (both_ways,) = make_processor(model=EMBEDDINGS | {"is_causal": False}).embedding("e", "hi").sequences
    assert both_ways.whole_prompt
    with pytest.raises(RequestError, match="the prompt has 65 tokens; with max_model_len=64 it may have 1 to 64"):
        processor.embedding("e", [1] * 65)


def test_classifications() -> None:
    entry = make_entry("topics", score=np.zeros((3, 64), np.float32))
    processor = make_processor(engine={"scheduling_policy": "priority"})
    processed = processor.classification("c", [1] * 64, priority=2, adapter=entry)
    (request,) = processed.sequences
    assert processed.params is None and request.is_pooling and processed.score is entry.score
    assert (request.priority, request.use_prefix_cache, request.whole_prompt) == (2, True, False)
    assert (request.adapter, request.cache_salt) == (entry, entry.digest)
    with pytest.raises(RequestError, match="the prompt has 65 tokens"):
        processor.classification("c", [1] * 65, adapter=entry)


def test_what_has_no_head_does_not_classify() -> None:
    with pytest.raises(RequestError, match=r"without an adapter cannot be classified: .* a causal language model with"):
        make_processor().classification("c", "hi")
    with pytest.raises(AdapterError, match="adapter 'plain' has no classification head, and neither has Qwen2ForC"):
        make_processor().classification("c", "hi", adapter=make_entry("plain"))
    entry = make_entry("topics", score=np.zeros((3, 64), np.float32))
    with pytest.raises(RequestError, match="Qwen2Model gives embeddings; classify with a language model"):
        make_processor(model=EMBEDDINGS).classification("c", "hi", adapter=entry)
    (request,) = make_processor(model=EMBEDDINGS).embedding("e", "hi", adapter=entry).sequences
    assert request.adapter is entry


def test_a_model_does_what_it_is_made_for() -> None:
    with pytest.raises(RequestError, match="Qwen2Model gives embeddings and cannot generate; use embed"):
        generation(processor=make_processor(model=EMBEDDINGS))
    with pytest.raises(RequestError, match="Qwen2ForCausalLM generates text; use LLM"):
        make_processor().embedding("e", "hi")
