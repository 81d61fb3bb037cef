"""Running every program on padding alone, as a start on a GPU does, changes nothing that a request can see."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.integration.golden import greedy, load, read_texts, tokens_of
from tests.integration.test_tensor_parallel import write_adapter

PROMPT: Any = {"prompt_token_ids": [5, 6, 7, 8]}
pytestmark = pytest.mark.slow
ADAPTERS: dict[str, Any] = {
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 16,
    "max_vocab_loras": 1,
    "max_full_vocab": 1,
}


def test_warm_up_changes_nothing(tmp_path: Path) -> None:
    llm = load("heads_7_1", max_num_seqs=2, max_decode_steps=2, **ADAPTERS)
    runner = llm._engine.engine.runner
    assert {name for name, _ in runner.programs} >= {
        "prefill",
        "prefill_lora",
        "decode_greedy",
        "decode_lora",
        "sample",
    }
    text, requests = read_texts("heads_7_1")[0], [None, write_adapter(tmp_path, 1, "bias")]

    def generate() -> list[list[list[int]]]:
        return tokens_of(llm.generate([text.prompt] * 2, greedy(8), lora_request=requests, use_tqdm=False))

    before = generate()
    pools = [np.asarray(pool)[1:] for pool in jax.tree.leaves(runner._kv_cache)]
    llm._engine.call(lambda engine: engine.runner.warm_up())
    for pool, known in zip(jax.tree.leaves(runner._kv_cache), pools, strict=True):
        np.testing.assert_array_equal(np.asarray(pool)[1:], known)
    assert generate() == before and llm.num_compilations == 0
    llm.shutdown()


def test_warm_up_of_an_embeddings_model() -> None:
    llm = load("tied", max_num_seqs=2, runner="pooling")
    before = llm.embed([PROMPT], use_tqdm=False)[0].outputs.embedding
    llm._engine.call(lambda engine: engine.runner.warm_up())
    assert llm.embed([PROMPT], use_tqdm=False)[0].outputs.embedding == before
    llm.shutdown()
