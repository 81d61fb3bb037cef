"""The engine against what Hugging Face computes, in float32: log-probabilities, greedy text, embeddings."""

from pathlib import Path

import numpy as np
import pytest

from qwen2_jax.llm import LLM
from qwen2_jax.types import SamplingParams

GOLDEN = Path(__file__).parent.parent / "golden"
TEXT_CASES = sorted(path.parent.name for path in GOLDEN.glob("*/model.safetensors") if "embed" not in path.parent.name)
EMBEDDING_CASES = sorted(path.parent.name for path in GOLDEN.glob("embed*/model.safetensors"))


def load(case: str, **options: object) -> LLM:
    """Load a golden checkpoint in float32 with few, small programs."""
    defaults = {"dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 64, "use_tqdm_on_load": False}
    return LLM(GOLDEN / case, skip_tokenizer_init=True, **(defaults | options))


def golden(case: str) -> dict[str, np.ndarray]:
    """Return a case's arrays."""
    with np.load(GOLDEN / case / "golden.npz") as arrays:
        return dict(arrays)


def check_text(llm: LLM, arrays: dict[str, np.ndarray]) -> None:
    """Compare log-probabilities of prompts and outputs, and the greedy continuations, all prompts in one batch."""
    count = sum(name.startswith("prompt_token_ids") for name in arrays)
    prompts = [arrays[f"prompt_token_ids_{i}"].tolist() for i in range(count)]
    expected = [arrays[f"output_token_ids_{i}"].tolist() for i in range(count)]
    params = [
        SamplingParams(
            temperature=0, max_tokens=len(tokens), ignore_eos=True, logprobs=0, prompt_logprobs=8, detokenize=False
        )
        for tokens in expected
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for i, output in enumerate(outputs):
        assert list(output.outputs[0].token_ids) == expected[i]
        check_prompt_logprobs(output, arrays, i)
        logprobs = [position[token].logprob for token, position in zip(expected[i], output.outputs[0].logprobs, strict=True)]
        np.testing.assert_allclose(logprobs, arrays[f"output_logprobs_{i}"], atol=1e-4)


def check_prompt_logprobs(output, arrays: dict[str, np.ndarray], i: int) -> None:
    """Compare each prompt token's log-probability and the eight likeliest ones' at each position."""
    assert output.prompt_logprobs[0] is None
    positions = output.prompt_logprobs[1:]
    tokens = output.prompt_token_ids[1:]
    found = [position[token].logprob for token, position in zip(tokens, positions, strict=True)]
    np.testing.assert_allclose(found, arrays[f"prompt_logprobs_{i}"], atol=1e-4)
    for position, ids, logprobs in zip(
        positions, arrays[f"top_token_ids_{i}"], arrays[f"top_logprobs_{i}"], strict=False
    ):
        by_rank = {entry.rank: entry.logprob for entry in position.values()}
        np.testing.assert_allclose([by_rank[rank] for rank in range(1, 9)], logprobs, atol=1e-4)
        clear = np.diff(logprobs, append=-np.inf) < -1e-3
        assert all(position[int(token)].rank == rank for rank, token in enumerate(ids[:1], 1) if clear[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", TEXT_CASES)
def test_text_agrees_with_hugging_face(case: str) -> None:
    llm = load(case)
    check_text(llm, golden(case))
    assert llm.num_compilations == 0
    llm.shutdown()
