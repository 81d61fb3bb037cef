"""After start-up nothing is compiled, whatever requests ask for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.engine.compilation import CompilationCounter
from qwen2_jax.llm import LLM
from qwen2_jax.types import RepetitionDetectionParams, RequestOutput, SamplingParams
from tests.integration.golden import check_idle

pytestmark = pytest.mark.slow

VOCAB_SIZE = 384
COUNT = 200

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0},
    {"presence_penalty": 0.5},
    {"frequency_penalty": -0.5},
    {"repetition_penalty": 1.3},
    {"logit_bias": {5: 10.0, 6: -100.0}},
    {"allowed_token_ids": [10, 20, 30]},
    {"bad_words": ["a", "hi x", "yz"]},
    {"min_tokens": 3, "stop_token_ids": list(range(100))},
    {"stop": ["a", "bc"], "include_stop_str_in_output": True},
    {"stop": ["z"], "min_tokens": 2},
    {"logprobs": 0},
    {"logprobs": 20, "flat_logprobs": True},
    {"logprob_token_ids": [1, 2, 3]},
    {"prompt_logprobs": 5},
    {"prompt_logprobs": 0, "logprobs": 3, "temperature": 0},
    {"n": 3},
    {"n": 2, "logprobs": 1, "presence_penalty": 1.0},
    {"ignore_eos": True},
    {"detokenize": False},
    {"skip_special_tokens": False},
    {"thinking_token_budget": 2},
    {"repetition_detection": RepetitionDetectionParams(max_pattern_size=2, min_count=2), "temperature": 0},
    {"skip_reading_prefix_cache": True},
)


def test_mixed_requests_compile_nothing(llm: LLM) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(VOCAB_SIZE, size=rng.integers(1, 200)).tolist() for _ in range(COUNT)]
    params = [random_params(rng, KINDS[i % len(KINDS)]) for i in range(COUNT)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert llm.num_compilations == 0
    for prompt, each, output in zip(prompts, params, outputs, strict=True):
        check(prompt, each, output)
    check_idle(llm)


def test_the_counter_sees_compilations_of_the_watching_thread_only() -> None:
    counter = CompilationCounter()
    jax.jit(lambda x: x + 1)(jnp.arange(3))
    assert counter.count == 0
    with counter.watch():
        jax.jit(lambda x: x + 2)(jnp.arange(3))
    assert counter.count > 0
    counter.close()


def random_params(rng: np.random.Generator, kind: dict[str, Any]) -> SamplingParams:
    """Return parameters of a kind, with the usual ones drawn at random."""
    usual = {
        "temperature": float(rng.choice([0.3, 1.0, 1.7])),
        "top_p": float(rng.choice([1.0, 0.8])),
        "top_k": int(rng.choice([0, 1, 40, VOCAB_SIZE + 1])),
        "min_p": float(rng.choice([0.0, 0.1])),
        "max_tokens": int(rng.integers(3, 20)),
        "seed": None if rng.integers(2) else int(rng.integers(1 << 40)),
    }
    return SamplingParams(**(usual | kind))


def check(prompt: list[int], params: SamplingParams, output: RequestOutput) -> None:
    """Assert that a request has ended as it should and has all that it asked for."""
    assert output.finished and len(output.outputs) == params.n
    if params.prompt_logprobs is not None:
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
    for completion in output.outputs:
        length = len(completion.token_ids)
        assert completion.finish_reason in ("stop", "length", "repetition")
        assert max(params.min_tokens, 1) <= length <= (params.max_tokens or 0)
        assert completion.finish_reason != "length" or length in (params.max_tokens, 256 - len(prompt))
        assert params.allowed_token_ids is None or set(completion.token_ids) <= set(params.allowed_token_ids)
        if params.num_logprobs is not None:
            assert completion.logprobs is not None and len(completion.logprobs) == length
