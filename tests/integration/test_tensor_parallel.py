"""Tensor parallelism: the golden tokens on two and four devices, and what the compiled programs exchange and copy."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from qwen2_jax.llm import LLM
from qwen2_jax.lora.files import CONFIG, WEIGHTS
from qwen2_jax.types import LoRARequest, RequestOutput
from tests.engine.processing import adapter_tensors
from tests.integration.golden import TEXT_CASES, greedy, load, read_texts, tokens_of
from tests.integration.test_golden import chosen
from tests.lora.adapters import base_config

pytestmark = pytest.mark.slow

EXTRAS: tuple[Literal["magnitude", "bias"] | None, ...] = (None, "magnitude", "bias")
"""What adapters have besides their factors."""


@pytest.mark.parametrize("case", TEXT_CASES)
@pytest.mark.parametrize("tp", [2, 4])
def test_devices_agree_with_hugging_face(case: str, tp: int) -> None:
    texts = read_texts(case)
    llm = load(case, tensor_parallel_size=tp, max_num_seqs=1)
    params = [greedy(len(text.output)) for text in texts]
    outputs = llm.generate([text.prompt for text in texts], params, use_tqdm=False)
    assert tokens_of(outputs) == [[text.output] for text in texts]
    assert llm.num_compilations == 0
    check_decode_program(llm, tp=tp)
    check_in_place(llm, program_text(llm, "prefill", 32))
    llm.shutdown()


@pytest.fixture(scope="module")
def several_steps() -> Iterator[LLM]:
    """One device, and four decode steps in a call."""
    llm = load("untied", max_decode_steps=4, max_num_seqs=1)
    yield llm
    llm.shutdown()


def test_one_device_decodes_in_place(several_steps: LLM) -> None:
    texts = read_texts("untied")
    outputs = several_steps.generate([text.prompt for text in texts], greedy(48), use_tqdm=False)
    assert tokens_of(outputs) == [[text.output] for text in texts]
    check_decode_program(several_steps, tp=1)
    check_decode_program(several_steps, tp=1, name="decode_greedy")
    check_in_place(several_steps, program_text(several_steps, "prefill", 32))


def test_adapters_are_the_same_on_two_devices(tmp_path: Path) -> None:
    """7 query heads over 1 KV head: it is copied, and one head is padding, where magnitudes and biases have nothing."""
    requests = [None, *(write_adapter(tmp_path, number, extra) for number, extra in enumerate(EXTRAS, 1))]
    one, two = (run_adapters(tp, requests) for tp in (1, 2))
    for single, split in zip(one, two, strict=True):
        assert single.outputs[0].token_ids == split.outputs[0].token_ids
        np.testing.assert_allclose(logprobs_of(single), logprobs_of(split), atol=1e-4)
    assert len({str(output.outputs[0].token_ids) for output in one}) == len(requests)


def write_adapter(folder: Path, number: int, extra: Literal["magnitude", "bias"] | None) -> LoRARequest:
    """Write a random adapter for `heads_7_1`, of one page or more."""
    path, rank = folder / str(number), 12 * number
    path.mkdir()
    save_file(adapter_tensors(base_config("heads_7_1"), seed=number, rank=rank, extra=extra), path / WEIGHTS)
    config = {"r": rank, "lora_alpha": rank / 2, "use_dora": extra == "magnitude", "lora_bias": extra == "bias"}
    (path / CONFIG).write_text(json.dumps(config | {"peft_type": "LORA"}))
    return LoRARequest(path.name, number, str(path))


def run_adapters(tp: int, requests: list[LoRARequest | None]) -> list[RequestOutput]:
    """Continue one prompt with each adapter, all in one batch."""
    llm = load("heads_7_1", tensor_parallel_size=tp, enable_lora=True, max_loras=3, max_lora_rank=48)
    prompts = [read_texts("heads_7_1")[1].prompt] * len(requests)
    outputs = llm.generate(prompts, greedy(16, logprobs=0), lora_request=requests, use_tqdm=False)
    assert llm.num_compilations == 0
    llm.shutdown()
    return outputs


def logprobs_of(output: RequestOutput) -> list[float]:
    completion = output.outputs[0]
    assert completion.logprobs is not None
    return chosen(completion.logprobs, list(completion.token_ids))


def check_decode_program(llm: LLM, *, tp: int, name: str = "decode") -> None:
    """Two sums over devices per layer and one for the embedding, logits gathered; nothing large is copied."""
    text = program_text(llm, name, 1)
    num_layers = llm.model_config.num_hidden_layers
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    collectives = re.findall(rf" = (.+?) ({kinds})(?:-start)?\(", text)
    expected = 2 * num_layers + 1 if tp > 1 else 0
    assert sum(name == "all-reduce" for _, name in collectives) == expected
    logits = f"f32[1,{-(-llm.model_config.vocab_size // tp) * tp}]"
    others = [shape.split("{")[0] for shape, name in collectives if name != "all-reduce"]
    assert others == ([logits] if tp > 1 else [])
    check_in_place(llm, text)
    for weight in jax.tree.leaves(llm._engine.engine.runner._model.params):
        if weight.ndim > 1:
            check_not_copied(weight.addressable_shards[0].data.shape, text)


def check_in_place(llm: LLM, text: str) -> None:
    """All pools and all state arrays are taken over, and nothing of a pool's shape is copied."""
    runner = llm._engine.engine.runner
    (aliases,) = re.findall(r"input_output_alias=\{(.*?)\}, entry_computation_layout", text)
    num_donated = 2 * llm.model_config.num_hidden_layers + len(runner._state)
    assert aliases.count("-alias") == num_donated
    pool = runner._kv_cache[0][0].addressable_shards[0].data.shape
    pool_shape = re.escape(f"f32[{','.join(map(str, pool))}]")
    assert re.search(pool_shape, text)
    check_not_copied(pool, text)


def check_not_copied(shape: tuple[int, ...], text: str) -> None:
    """No float32 array of this shape is copied."""
    pattern = re.escape(f"f32[{','.join(map(str, shape))}]")
    assert not re.findall(rf"= {pattern}\S* copy(?:-start)?\(", text), shape


def program_text(llm: LLM, name: str, bucket: int) -> str:
    """Return a program's optimised HLO."""
    text = llm._engine.engine.runner.programs[name, bucket].as_text()
    assert text is not None
    return text
