"""Whole steps of Qwen2.5-0.5B's geometry lower for an H100 on a machine without one, through the kernels."""

import re
from collections import Counter
from typing import Any

import jax
import jax_triton
import pytest
from qwen2_kernels.specs import QWEN2_5

from qwen2_jax.config import ModelConfig
from qwen2_jax.engine.lowered_programs import import_program
from qwen2_jax.engine.lowering_worker import LoweringWorker, abstract_programs
from qwen2_jax.engine.program_specs import ProgramKey
from qwen2_jax.lora.sizes import LoRASizes
from tests.integration.cuda_lowering import MESH, lower_step, step_facts

SIZES = QWEN2_5["0.5b"]
MODEL = ModelConfig.from_hf(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_size": SIZES.hidden_size,
        "intermediate_size": SIZES.intermediate_size,
        "num_hidden_layers": 2,
        "num_attention_heads": SIZES.num_attention_heads,
        "num_key_value_heads": SIZES.num_key_value_heads,
        "vocab_size": SIZES.vocab_size,
        "tie_word_embeddings": True,
    }
)


LORA = LoRASizes(
    num_pages=8,
    num_vectors=8,
    max_pages=1,
    max_rank=16,
    max_on_host=8,
    num_vocab_pages=0,
    num_vocab_vectors=0,
    num_full_vocab=0,
)


@pytest.mark.parametrize(
    "name, size, has_mosaic", [("decode_greedy", 1, False), ("decode_greedy", 64, True), ("prefill", 512, True)]
)
def test_a_step_lowers_through_the_kernels(name: str, size: int, has_mosaic: bool) -> None:
    text = lower_step(MODEL, (name, size), max_model_len=2048).as_text()
    assert "triton_kernel_call_ffi" in text
    assert ("mosaic_gpu" in text) is has_mosaic


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each Triton kernel is launched in what is traced."""
    jax.clear_caches()  # another test may have traced the same layer
    launches: Counter[str] = Counter()
    call = jax_triton.triton_call

    def record(*arguments: Any, kernel: Any, **options: Any) -> Any:
        launches[kernel.fn.__name__] += 1
        return call(*arguments, kernel=kernel, **options)

    monkeypatch.setattr(jax_triton, "triton_call", record)
    return launches


@pytest.mark.parametrize(
    "name, size, gated",
    [
        ("decode_greedy_lora", 8, "gated_dot_kernel"),
        ("prefill_lora", 512, "window_ranks_kernel"),
        ("prefill_lora_vectors", 512, "gated_dot_kernel"),
    ],
)
def test_a_step_with_adapters_lowers_through_theirs(name: str, size: int, gated: str, launched: Counter[str]) -> None:
    lower_step(MODEL, (name, size), lora=LORA, max_model_len=2048)
    assert {"shrink_dot_kernel", "expand_dot_kernel", gated} <= set(launched)
    assert len(set(launched) & {"gated_dot_kernel", "window_ranks_kernel"}) == 1


def test_one_token_is_normalised_inside_its_projections(launched: Counter[str]) -> None:
    """Only the last norm, whose projection is the vocabulary's, is a launch of its own; layers are traced twice."""
    lower_step(MODEL, ("decode_greedy", 1), max_model_len=2048)
    assert launched == {
        "gemv_kernel": 2 * 4 + 1,
        "_write_kv_kernel": 2,
        "_decode_kernel": 2,
        "rms_norm_kernel": 1,
    }


def test_what_a_worker_lowers_is_the_step() -> None:
    """It has the step's kernels, as often and from the same modules, and donates what the step donates."""
    keys: list[ProgramKey] = [("decode_greedy", 8), ("decode_greedy_lora", 8), ("prefill_lora", 512)]
    facts = step_facts(MODEL, lora=LORA, max_model_len=2048)
    specs = abstract_programs(facts, MESH)
    for key, data, error in LoweringWorker().work(facts, MESH, keys):
        assert error is None and data is not None
        spec = import_program(data, specs[key])
        with jax.sharding.use_abstract_mesh(MESH):
            program = jax.jit(spec.function, donate_argnums=spec.donated).trace(*spec.arguments)
            text = program.lower(lowering_platforms=("cuda",)).as_text()
        own = lower_step(MODEL, key, lora=LORA, max_model_len=2048)
        assert jax.tree.structure(program.out_info) == jax.tree.structure(own.out_info)
        assert launches(text) == launches(own.as_text()) != Counter()
        assert donations(text) == donations(own.as_text()) > 0


def test_only_what_was_compared_bit_for_bit_runs_concurrently() -> None:
    """That is greedy calls of few rows with adapters; loops are in the graph where the host would wait for a count."""
    specs = abstract_programs(step_facts(MODEL, lora=LORA, max_model_len=2048, max_num_seqs=64), MESH)
    concurrent = {key for key, spec in specs.items() if spec.is_concurrent}
    assert {name for name, _ in concurrent} == {"decode_greedy_lora"}
    assert max(rows for _, rows in concurrent) == 32
    loops = {name for (name, _), spec in specs.items() if spec.has_loop_in_graph}
    assert loops == {"decode", "decode_lora"}
    assert all(spec.as_graph for spec in specs.values() if spec.is_concurrent or spec.has_loop_in_graph)


def test_a_worker_says_what_it_cannot_lower() -> None:
    facts = step_facts(MODEL, max_model_len=2048)
    unknown, known = LoweringWorker().work(facts, MESH, [("decode", 7), ("set_token_ids", 0)])
    assert unknown == (("decode", 7), None, "KeyError: ('decode', 7)")
    assert known[0] == ("set_token_ids", 0) and known[1] is not None and known[2] is None


def launches(text: str) -> Counter[str]:
    """Count the launches of each kernel in a lowered program, by what it is compiled from."""
    return Counter(re.findall(r'(?:kernel_hash|opaque) = "((?:[^"\\]|\\.)*)"', text))


def donations(text: str) -> int:
    return len(re.findall(r"tf\.aliasing_output|jax\.buffer_donor", text))
