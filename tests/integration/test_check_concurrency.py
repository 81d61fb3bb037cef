"""The comparison of concurrently scheduled programs with serial ones: what it runs, and that it sees one wrong bit."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax import LLM, LoRARequest
from scripts import check_concurrency
from tests.lora.adapters import ADAPTERS, GOLDEN


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    engine = LLM(
        GOLDEN / "untied",
        dtype="float32",
        skip_tokenizer_init=True,
        enable_lora=True,
        max_loras=4,
        max_lora_rank=16,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=128,
        max_decode_steps=4,
        kv_cache_memory_bytes=16 << 20,
        use_tqdm_on_load=False,
    )
    yield engine
    engine.shutdown()


def test_calls_of_both_builds_are_compared(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_concurrency, "PROMPT", 8)
    monkeypatch.setattr(check_concurrency, "NEW_TOKENS", 9)
    monkeypatch.setattr(
        check_concurrency,
        "draw_prompts",
        lambda rng, count, length: [{"prompt_token_ids": rng.integers(0, 100, length).tolist()} for _ in range(count)],
    )
    twins = llm._engine.call(lambda engine: check_concurrency.Twins(engine.runner))
    requests = [
        LoRARequest(name, index + 1, str(ADAPTERS / "untied" / name)) for index, name in enumerate(("qv", "k_up"))
    ]
    row = check_concurrency.check(llm, twins, requests, rows=3, adapters=2)
    assert row["calls"] >= 2 and row["different"] == row["different_serial"] == 0
    with pytest.raises(RuntimeError, match="ran in no program that is scheduled concurrently"):
        check_concurrency.check(llm, twins, [None], rows=2, adapters=1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_])
def test_one_wrong_bit_is_seen(dtype: jnp.dtype) -> None:
    one = {"a": jnp.zeros((3, 5), dtype), "b": jnp.arange(4)}
    other = {
        "a": one["a"].at[1, 2].set(np.array(-0.0 if jnp.issubdtype(dtype, jnp.floating) else 1, dtype)),
        "b": one["b"],
    }
    assert int(check_concurrency.count_different(one, one)) == 0
    assert int(check_concurrency.count_different(one, other)) == 1
