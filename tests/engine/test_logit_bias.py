"""What a request adds to its logits: from its parameters to vectors, which are sent only when they change."""

from typing import Any

import numpy as np
import pytest

from qwen2_jax.engine.logit_bias import LogitBias
from qwen2_jax.engine.request import Request
from qwen2_jax.errors import RequestError
from tests.engine.processing import EOS, THINK, THINK_END, VOCAB_SIZE, generation, ids, make_processor, token_id

INF = float("inf")


def make_request(prompt: Any = "hi", eos: tuple[int, ...] = (EOS,), **params: Any) -> Request:
    (request,) = generation(prompt, make_processor(eos=eos), **params).sequences
    return request


def bias_of(request: Request) -> LogitBias:
    assert request.logit_bias is not None
    return request.logit_bias


def update(request: Request, *outputs: int) -> tuple[bool, dict[int, float] | None]:
    """The bias after these outputs: whether it counts, and the entries of a vector that is sent, other than 0."""
    request.output_token_ids[:] = outputs
    present, vector = bias_of(request).update(request, len(outputs))
    if vector is None:
        return present, None
    assert vector.shape == (VOCAB_SIZE,) and vector.dtype == np.float32
    return present, {int(token): float(vector[token]) for token in np.flatnonzero(vector)}


def forbidden(*tokens: int) -> dict[int, float]:
    return dict.fromkeys(tokens, -INF)


def only(*tokens: int) -> dict[int, float]:
    return {token: -INF for token in range(VOCAB_SIZE) if token not in tokens}


@pytest.mark.parametrize("params", [{}, {"logit_bias": {}}, {"logit_bias": {3: 0.0}}, {"stop_token_ids": [3]}])
def test_most_requests_have_none(params: dict[str, Any]) -> None:
    request = make_request(**params)
    assert request.logit_bias is None and not request.synchronous


def test_bias_is_sent_once() -> None:
    request = make_request(logit_bias={3: 1.5, 7: -100})
    assert update(request) == (True, {3: 1.5, 7: -100})
    assert update(request, 5) == (True, None)
    assert not request.synchronous
    bias_of(request).reset()
    assert update(request, 5, 6) == (True, {3: 1.5, 7: -100})


def test_allowed_tokens_keep_their_bias() -> None:
    request = make_request(allowed_token_ids=[3, 4], logit_bias={4: 2.0, 5: 50.0})
    assert update(request) == (True, only(3, 4) | {4: 2.0})


def test_ends_are_forbidden_until_there_are_enough_tokens() -> None:
    request = make_request(min_tokens=2, stop_token_ids=[8], eos=(EOS, 9))
    assert update(request) == (True, forbidden(EOS, 8, 9))
    assert update(request, 1) == (True, None)
    assert update(request, 1, 2) == (False, None)
    assert update(request, 1, 2, 3) == (False, None)
    assert not request.synchronous
    assert update(make_request(min_tokens=2, ignore_eos=True, stop_token_ids=[8])) == (True, forbidden(8))
    assert make_request(min_tokens=2, ignore_eos=True).logit_bias is None


def test_what_lasts_stays_when_the_ends_are_free_again() -> None:
    request = make_request(min_tokens=1, logit_bias={5: 3.0})
    assert update(request) == (True, forbidden(EOS) | {5: 3.0})
    assert update(request, 1) == (True, {5: 3.0})
    assert update(request, 1, 1) == (True, None)


def test_ends_beyond_the_vocabulary_are_no_matter() -> None:
    assert update(make_request(min_tokens=2, eos=(EOS, VOCAB_SIZE + 3))) == (True, forbidden(EOS))


def test_a_bad_word_of_one_token_is_always_forbidden() -> None:
    request = make_request(bad_words=["hi", "x"])
    assert update(request) == (True, forbidden(token_id("hi"), token_id("x"), token_id(" x")))
    assert not request.synchronous


def test_the_last_token_of_a_bad_word_is_forbidden_where_it_completes_it() -> None:
    request = make_request(bad_words=["hi!"])
    hi, mark = ids("hi!")
    assert request.synchronous
    assert update(request) == (False, None)
    assert update(request, hi) == (True, forbidden(mark))
    assert update(request, hi, 5) == (False, None)
    assert update(request, hi, 5, hi) == (True, None), "the vector of two steps ago is still there"
    assert update(request, hi, 5, hi, hi) == (True, None)


def test_bad_words_look_at_outputs_alone_and_at_all_their_tokens() -> None:
    request = make_request("abc", bad_words=["abcd", "cq"])
    *_, c, d = ids("abcd")
    (q,) = ids("q")
    assert update(request) == (False, None)
    assert update(request, c) == (True, forbidden(q))
    assert update(request, *ids("abc")) == (True, forbidden(d, q))


def test_bad_words_as_they_are_written_within_a_text() -> None:
    """A word after a space has another first token, and is forbidden too if it has as many tokens."""
    request = make_request(bad_words=["yz"])
    y, z = ids("yz")
    assert ids(" yz") == [token_id(" yz")], "one token where the bare word has two"
    assert update(request, token_id(" y")) == (False, None)
    assert update(request, y) == (True, forbidden(z))
    spaced = make_request(bad_words=["  x"])
    assert update(spaced) == (True, forbidden(token_id("x"), token_id(" x")))


@pytest.mark.parametrize("word", [" ", "\n", "<late>", "hi<late>"])
def test_a_bad_word_without_tokens_is_refused(word: str) -> None:
    with pytest.raises(RequestError, match=r"bad_words contains .*, which has no tokens in the model's vocabulary"):
        make_request(bad_words=["hi", word])


@pytest.mark.parametrize(
    "params",
    [
        {"allowed_token_ids": [token_id("x")], "bad_words": ["x"]},
        {"allowed_token_ids": [EOS], "min_tokens": 1},
        {"allowed_token_ids": [EOS, 8, token_id("x")], "stop_token_ids": [8], "bad_words": ["x"], "min_tokens": 1},
    ],
)
def test_parameters_that_leave_no_token_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"no token is left to sample: allowed_token_ids=\(.*; allow more"):
        make_request(**params)


def test_a_spent_budget_ends_the_thinking() -> None:
    request = make_request(thinking_token_budget=2)
    assert request.synchronous
    assert update(make_request(thinking_token_budget=2), 5, 5, 5) == (False, None)
    assert update(request, THINK) == (False, None)
    assert update(request, THINK, 5) == (False, None)
    assert update(request, THINK, 5, 5) == (True, only(THINK_END))
    assert update(request, THINK, 5, 5, 5) == (True, None)
    assert update(request, THINK, 5, 5, 5, THINK_END) == (False, None)
    assert update(request, THINK, 5, 5, 5, THINK_END, 5, 5, 5) == (False, None)
    assert update(request, THINK, 5, 5, 5, THINK_END, 5, 5, 5, THINK, 5) == (False, None)
    assert update(request, THINK, 5, 5, 5, THINK_END, 5, 5, 5, THINK, 5, 5) == (True, None)


def test_thinking_that_the_prompt_opens_counts() -> None:
    request = make_request([5, THINK, 6], thinking_token_budget=2)
    assert update(request) == (False, None)
    assert update(request, 7) == (True, only(THINK_END))
    assert update(make_request([5, THINK], thinking_token_budget=0)) == (True, only(THINK_END))
    assert update(make_request([THINK, 5, 5, THINK_END], thinking_token_budget=0)) == (False, None)


def test_the_forced_end_wins_over_everything_else() -> None:
    request = make_request([THINK], thinking_token_budget=1, allowed_token_ids=[3, 4], min_tokens=3, bad_words=["hi!"])
    assert update(request) == (True, only(3, 4))
    assert update(request, 3) == (True, only(THINK_END))
    assert update(request, 3, THINK_END) == (True, only(3, 4))


def test_bad_words_give_way_where_nothing_else_is_left() -> None:
    """What is not allowed must not be sampled, whatever the words."""
    words = [(3, 3), (3, 4), (4, 3)]
    facts: dict[str, Any] = {"logit_bias": {}, "min_tokens": 0, "stop_token_ids": (), "thinking": None}
    bias, request = LogitBias(VOCAB_SIZE, allowed_token_ids=[3, 4], bad_words=words, **facts), make_request()
    for outputs, allowed in (([], {3, 4}), ([4], {4}), ([4, 3], {3, 4})):
        request.output_token_ids = outputs
        is_present, vector = bias.update(request, len(outputs))
        assert is_present and vector is not None and set(np.flatnonzero(vector == 0)) == allowed


def test_outputs_of_a_prompt_share_what_does_not_change() -> None:
    first, second = (
        bias_of(request) for request in generation(n=2, seed=1, allowed_token_ids=[3, 4], min_tokens=2).sequences
    )
    assert first is not second and first._fixed is second._fixed
    assert first.update(make_request(), 0)[1] is not None and second.update(make_request(), 0)[1] is not None


def test_an_end_of_thinking_needs_its_tokens() -> None:
    with pytest.raises(RequestError, match="thinking_token_budget=3 needs a tokenizer with the tokens <think> and"):
        generation(processor=make_processor(model={"vocab_size": THINK_END}), thinking_token_budget=3)
