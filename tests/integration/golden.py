"""The golden data, and small engines in float32 to compare with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen2_jax.llm import LLM
from qwen2_jax.types import RequestOutput, SamplingParams

GOLDEN = Path(__file__).parent.parent / "golden"
EMBEDDING_CASES = sorted(path.parent.name for path in GOLDEN.glob("embed*/model.safetensors"))
TEXT_CASES = sorted(path.parent.name for path in GOLDEN.glob("*/model.safetensors") if "embed" not in path.parent.name)

# One prefill bucket and few rows: compiling takes nearly all the time of these tests.
_SMALL = {"dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 32, "use_tqdm_on_load": False}


@dataclass(frozen=True, kw_only=True)
class GoldenText:
    """A prompt of P tokens, its greedy continuation of O tokens, and log-probabilities, as Hugging Face has them."""

    prompt: list[int]
    output: list[int]
    prompt_logprobs: np.ndarray
    """[P-1]"""
    output_logprobs: np.ndarray
    """[O]"""
    top_token_ids: np.ndarray
    """[P, 8]"""
    top_logprobs: np.ndarray
    """[P, 8]"""
    last_logprobs: np.ndarray | None
    """[V], after the prompt; None for SmolLM2."""


def load(case: str, **options: Any) -> LLM:
    """Return a small engine for a golden checkpoint; without `tokenizer` it takes and gives token ids only."""
    defaults: dict[str, Any] = {"skip_tokenizer_init": "tokenizer" not in options, **_SMALL}
    return LLM(GOLDEN / case, **(defaults | options))


def read_arrays(case: str) -> dict[str, np.ndarray]:
    """Return a case's arrays by name."""
    with np.load(GOLDEN / case / "golden.npz") as arrays:
        return dict(arrays)


def read_texts(case: str) -> list[GoldenText]:
    """Return a text case's prompts and what belongs to them."""
    arrays = read_arrays(case)
    return [
        GoldenText(
            prompt=arrays[f"prompt_token_ids_{i}"].tolist(),
            output=arrays[f"output_token_ids_{i}"].tolist(),
            prompt_logprobs=arrays[f"prompt_logprobs_{i}"],
            output_logprobs=arrays[f"output_logprobs_{i}"],
            top_token_ids=arrays[f"top_token_ids_{i}"],
            top_logprobs=arrays[f"top_logprobs_{i}"],
            last_logprobs=arrays.get(f"last_logprobs_{i}"),
        )
        for i in range(4)
    ]


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    """Return parameters for a greedy continuation of exactly `max_tokens` tokens, without text."""
    return SamplingParams(
        **({"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": False} | options)
    )


def tokens_of(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    """Return the tokens of each request's outputs."""
    return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]


def check_idle(llm: LLM) -> None:
    """Assert that nothing is left of earlier requests: no block is held, none is lost."""
    scheduler = llm._engine.call(lambda engine: engine.scheduler)
    scheduler.check_integrity()
    assert not scheduler.has_unfinished
    assert scheduler.blocks.pool.num_free == scheduler.blocks.pool.num_usable
