"""From tokens to what a caller sees: text, stop strings, log-probabilities, and the three kinds of output."""

from typing import Any

import numpy as np
import pytest

from qwen2_jax.engine.output_processor import GroupOutput
from qwen2_jax.engine.request import RequestStatus
from qwen2_jax.engine.step_results import RowResult
from qwen2_jax.engine.stopping import check_token_stop
from qwen2_jax.types import (
    EmbeddingRequestOutput,
    FlatLogprobs,
    Logprob,
    RequestOutput,
    RequestOutputKind,
)
from tests.engine.processing import EOS, generation, ids, make_processor, token_id, tokenizer

DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
EURO = ids("€")  # three tokens, one character


def start(prompt: Any = "hi", *, max_tokens: int | None = 100, **params: Any) -> GroupOutput:
    return GroupOutput.start(generation(prompt, max_tokens=max_tokens, **params), tokenizer())


def give(group: GroupOutput, *tokens: int, index: int = 0, logprobs: list[dict[int, Logprob]] | None = None) -> bool:
    """Hand a call's tokens to a sequence, as the scheduler would; return whether a stop string has ended it."""
    sequence = group.sequences[index]
    for token in tokens:
        sequence.request.output_token_ids.append(token)
        stop = check_token_stop(sequence.request)
        if stop is not None:
            sequence.request.status = RequestStatus.FINISHED
            sequence.request.finish_reason, sequence.request.stop_reason = stop
            break
    return sequence.take(RowResult(token_ids=list(tokens), logprobs=logprobs))


def see(group: GroupOutput) -> RequestOutput:
    output = group.render()
    assert isinstance(output, RequestOutput)
    return output


def text_of(group: GroupOutput) -> str:
    return see(group).outputs[0].text


def end_of(group: GroupOutput) -> tuple[str, list[int], str | None, int | str | None]:
    output = see(group).outputs[0]
    return output.text, list(output.token_ids), output.finish_reason, output.stop_reason


def test_text_grows_and_ends_with_the_end_token() -> None:
    group = start()
    assert not give(group, *ids("hi"))
    assert text_of(group) == "hi"
    assert not see(group).finished
    assert not give(group, *ids(" x"), EOS)
    assert end_of(group) == ("hi x", [*ids("hi x"), EOS], "stop", None)
    assert see(group).finished


def test_what_a_request_came_from_is_in_every_output() -> None:
    output = see(start("hi"))
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "hi", ids("hi"))
    assert output.prompt_logprobs is None and output.num_cached_tokens == 0
    assert see(start([5, 6])).prompt is None


@pytest.mark.parametrize(
    "params, text",
    [
        ({}, "hi"),
        ({"include_stop_str_in_output": True}, "hi"),  # special tokens are left out of the text
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "hi<|im_end|>"),
        ({"skip_special_tokens": False}, "hi"),
    ],
)
def test_the_end_token_in_the_text(params: dict[str, Any], text: str) -> None:
    group = start(**params)
    give(group, *ids("hi"), EOS)
    assert end_of(group) == (text, [*ids("hi"), EOS], "stop", None)


@pytest.mark.parametrize("include, text", [(False, "hi"), (True, "hi x")])
def test_a_stop_token_in_the_text(include: bool, text: str) -> None:
    x = token_id(" x")
    group = start(stop_token_ids=[x], include_stop_str_in_output=include)
    give(group, *ids("hi"), x)
    assert end_of(group) == (text, [*ids("hi"), x], "stop", x)


def test_an_end_token_that_does_not_end_is_ordinary() -> None:
    group = start(ignore_eos=True, skip_special_tokens=False)
    give(group, EOS, *ids("hi"))
    assert text_of(group) == "<|im_end|>hi"


def test_length_ends_with_the_text_that_was_held_back() -> None:
    group = start(max_tokens=2, stop=["hi there"])
    give(group, *ids("hi"))
    assert text_of(group) == ""
    give(group, *ids("!"))
    assert end_of(group) == ("hi!", ids("hi!"), "length", None)
    half = start(max_tokens=2)
    give(half, *EURO[:2])
    assert end_of(half) == ("\ufffd", EURO[:2], "length", None)


def test_half_a_character_is_never_shown() -> None:
    group = start()
    for token, text in zip(EURO, ("", "", "€"), strict=True):
        give(group, token)
        assert text_of(group) == text


@pytest.mark.parametrize("include, text", [(False, "a"), (True, "aab!")])
@pytest.mark.parametrize("split", [[1, 1, 1], [3], [1, 2], [2, 1]])
def test_a_stop_string_across_tokens_and_calls(include: bool, text: str, split: list[int]) -> None:
    tokens = [*ids("a"), *ids("ab"), *ids("!")]
    group = start(stop=["zzz", "ab!"], include_stop_str_in_output=include)
    ended = []
    for size in split:
        ended.append(give(group, *tokens[:size]))
        tokens = tokens[size:]
    assert ended == [False] * (len(split) - 1) + [True]
    assert end_of(group) == (text, [*ids("a"), *ids("ab"), *ids("!")], "stop", "ab!")


def test_tokens_of_the_same_call_behind_a_stop_string_are_dropped() -> None:
    group = start(stop=["!"], logprobs=0)
    tokens = [*ids("hi"), *ids("!"), *ids("x"), EOS]
    logprobs = [{token: Logprob(-1.0, 1)} for token in tokens]
    assert give(group, *tokens, logprobs=logprobs)
    assert end_of(group) == ("hi", ids("hi!"), "stop", "!")
    output = see(group).outputs[0]
    assert output.cumulative_logprob == -2.0
    assert output.logprobs is not None and len(output.logprobs) == 2


def test_a_stop_string_does_not_count_before_min_tokens() -> None:
    group = start(stop=["x"], min_tokens=2)
    assert not give(group, *ids("x"), *ids("x"))
    assert give(group, *ids("x"))
    assert end_of(group) == ("xx", ids("x") * 3, "stop", "x")


def test_without_detokenization_there_is_no_text() -> None:
    group = start(detokenize=False, logprobs=0, prompt_logprobs=0)
    group.add_prompt_logprobs(1, [{7: Logprob(-1.0, 1)}])
    give(group, 104, EOS, logprobs=[{104: Logprob(-1.0, 1)}, {EOS: Logprob(-2.0, 1)}])
    assert end_of(group) == ("", [104, EOS], "stop", None)
    output = see(group)
    assert output.outputs[0].logprobs == [{104: Logprob(-1.0, 1)}, {EOS: Logprob(-2.0, 1)}]
    assert output.prompt_logprobs == [None, {7: Logprob(-1.0, 1)}]


def test_delta_gives_everything_once() -> None:
    group = start(output_kind=DELTA, stop=["!!"], logprobs=0, max_tokens=5)
    texts, tokens, logprobs, finishes = [], [], [], []
    for token in [*ids("hi!"), *ids(" x"), *ids("!x")]:
        give(group, token, logprobs=[{token: Logprob(-1.0, 1)}])
        (output,) = see(group).outputs
        texts.append(output.text)
        tokens.append(list(output.token_ids))
        assert output.logprobs is not None
        logprobs.append(len(output.logprobs))
        finishes.append(output.finish_reason)
        assert output.cumulative_logprob == -len(tokens)
    assert texts == ["hi", "", "! x", "", "!x"]
    assert tokens == [[token] for token in [*ids("hi!"), *ids(" x"), *ids("!x")]]
    assert logprobs == [1] * 5
    assert finishes == [None] * 4 + ["length"]


def test_delta_leaves_out_sequences_without_news() -> None:
    group = start(output_kind=DELTA, n=2)
    give(group, *ids("hi"), EOS, index=0)
    give(group, *ids("x"), index=1)
    assert [(output.index, output.text, output.finish_reason) for output in see(group).outputs] == [
        (0, "hi", "stop"),
        (1, "x", None),
    ]
    give(group, *ids("x"), EOS, index=1)
    output = see(group)
    assert [(output.index, output.text, output.finish_reason) for output in output.outputs] == [(1, "x", "stop")]
    assert output.finished


def test_cumulative_and_final_outputs_have_every_sequence() -> None:
    group = start(n=2)
    give(group, *ids("hi"), EOS, index=0)
    assert [output.text for output in see(group).outputs] == ["hi", ""]
    final = start(n=2, output_kind=FINAL_ONLY)
    give(final, *ids("hi"), EOS, index=0)
    assert final.render() is None
    give(final, *ids("x"), EOS, index=1)
    assert [(output.index, output.text) for output in see(final).outputs] == [(0, "hi"), (1, "x")]


def test_an_abort_ends_what_has_not_ended() -> None:
    group = start(n=2, stop=["xy"])
    give(group, *ids("hi"), EOS, index=0)
    give(group, *ids("x"), index=1)
    for sequence in group.sequences:
        sequence.finish("abort", None)
    assert [(output.text, output.finish_reason) for output in see(group).outputs] == [("hi", "stop"), ("x", "abort")]
    assert see(group).finished


def test_logprobs_come_with_their_tokens_text() -> None:
    hi, x = token_id("hi"), token_id(" x")
    group = start(logprobs=1)
    give(group, hi, logprobs=[{hi: Logprob(-0.5, 2), x: Logprob(-0.25, 1)}])
    output = see(group).outputs[0]
    assert output.logprobs == [{hi: Logprob(-0.5, 2, "hi"), x: Logprob(-0.25, 1, " x")}]
    assert output.cumulative_logprob == -0.5
    plain = start()
    give(plain, hi)
    assert (see(plain).outputs[0].logprobs, see(plain).outputs[0].cumulative_logprob) == (None, None)


def test_flat_logprobs() -> None:
    hi, x = token_id("hi"), token_id(" x")
    group = start(logprobs=1, prompt_logprobs=1, flat_logprobs=True)
    group.add_prompt_logprobs(1, [{x: Logprob(-3.0, 4)}])
    for token in (hi, x):
        give(group, token, logprobs=[{token: Logprob(-0.5, 1)}])
    output = see(group)
    logprobs, of_prompt = output.outputs[0].logprobs, output.prompt_logprobs
    assert isinstance(logprobs, FlatLogprobs) and isinstance(of_prompt, FlatLogprobs)
    assert list(logprobs) == [{hi: Logprob(-0.5, 1, "hi")}, {x: Logprob(-0.5, 1, " x")}]
    assert list(of_prompt) == [None, {x: Logprob(-3.0, 4, " x")}]


def test_prompt_logprobs_that_are_computed_again_are_kept_once() -> None:
    entries: list[dict[int, Logprob]] = [{token: Logprob(-float(token), 1)} for token in range(1, 7)]
    again: list[dict[int, Logprob]] = [{token: Logprob(-99.0, 1)} for token in range(1, 7)]
    group = start([0, 1, 2, 3, 4, 5, 6], prompt_logprobs=0, detokenize=False)
    group.add_prompt_logprobs(1, entries[:3])
    group.add_prompt_logprobs(1, again[:2])  # the sequence was preempted, or another one has the same prompt
    group.add_prompt_logprobs(3, [again[2], *entries[3:]])
    group.add_prompt_logprobs(1, again)
    assert see(group).prompt_logprobs == [None, *entries]


def test_delta_gives_prompt_logprobs_once() -> None:
    group = start(prompt_logprobs=0, output_kind=DELTA, detokenize=False)
    group.add_prompt_logprobs(1, [{7: Logprob(-1.0, 1)}])
    give(group, 5)
    assert see(group).prompt_logprobs == [None, {7: Logprob(-1.0, 1)}]
    give(group, 5)
    assert see(group).prompt_logprobs is None


def test_embeddings() -> None:
    source = make_processor(model={"architectures": ["Qwen2Model"]}).embedding("e", "hi")
    group = GroupOutput.start(source, tokenizer())
    assert not group.is_finished
    group.pooled = np.array([1, 2], np.float32)
    source.sequences[0].status = RequestStatus.FINISHED
    output = group.render()
    assert isinstance(output, EmbeddingRequestOutput)
    assert (output.request_id, output.outputs.embedding, output.finished) == ("e", [1.0, 2.0], True)
    assert output.prompt_token_ids == ids("hi")


def test_metrics_of_a_finished_request() -> None:
    group = start()
    first = see(group).metrics
    give(group, EOS)
    last = see(group).metrics
    assert first is not None and last is not None and first is not last
    assert first.finished_time is None
    assert last.finished_time is not None and last.finished_time >= last.arrival_time
