"""Whole engines whose programs other processes lower."""

import dataclasses
import logging
import pickle
from pathlib import Path
from typing import Any

import jax
import pytest

from qwen2_jax.engine import model_runner
from qwen2_jax.engine.compilation import ProgramSpec
from qwen2_jax.engine.lowering_pool import _Worker
from qwen2_jax.engine.model_loader import abstract_model
from qwen2_jax.engine.model_runner import ModelRunner
from qwen2_jax.engine.program_facts import ProgramFacts, make_programs
from qwen2_jax.engine.program_specs import abstract
from qwen2_jax.llm import LLM
from tests.integration.golden import greedy, load, read_texts, tokens_of
from tests.integration.test_tensor_parallel import write_adapter

pytestmark = pytest.mark.slow


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[ProgramSpec]:
    """The programs that come from workers."""
    specs: list[ProgramSpec] = []
    import_program = model_runner.import_program

    def import_and_count(data: bytes, spec: ProgramSpec) -> ProgramSpec:
        specs.append(spec)
        return import_program(data, spec)

    monkeypatch.setattr(model_runner, "import_program", import_and_count)
    return specs


def check_tokens(llm: LLM, case: str) -> None:
    texts = read_texts(case)
    outputs = llm.generate([text.prompt for text in texts], greedy(len(texts[0].output)), use_tqdm=False)
    assert tokens_of(outputs) == [[text.output] for text in texts]
    assert llm.num_compilations == 0


def test_workers_lower_all(imported: list[ProgramSpec]) -> None:
    llm = load("tied", max_num_seqs=1, lowering_workers=2)
    assert len(imported) == len(llm._engine.engine.runner.programs)
    check_tokens(llm, "tied")
    llm.shutdown()


def test_workers_lower_for_adapters_on_two_devices(tmp_path: Path, imported: list[ProgramSpec]) -> None:
    options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16, "max_vocab_loras": 1, "max_full_vocab": 1}
    llm = load("heads_7_1", max_num_seqs=1, tensor_parallel_size=2, lowering_workers=2, **options)
    assert len(imported) == len(llm._engine.engine.runner.programs)
    check_facts(llm._engine.engine.runner)
    check_tokens(llm, "heads_7_1")
    text = read_texts("heads_7_1")[0]
    adapter = write_adapter(tmp_path, 1, "bias")
    (output,) = llm.generate([text.prompt], greedy(8), lora_request=adapter, use_tqdm=False)
    assert output.outputs[0].token_ids != text.output[:8]
    assert llm.num_compilations == 0
    llm.shutdown()


def check_facts(runner: ModelRunner) -> None:
    """What a worker makes of the facts is what the engine has on its devices."""
    model, config = runner._model, runner._config
    assert runner._adapters is not None
    facts = ProgramFacts(
        model=model.config, dtype=model.dtype, config=config, num_blocks=runner.num_blocks, lora=runner._lora
    )
    received = pickle.loads(pickle.dumps(facts))
    assert received == facts and repr(received) == repr(facts)
    graphdef, params = abstract_model(received.model, model.mesh, received.dtype)
    assert graphdef == model.graphdef
    programs = make_programs(received.model, received.config, received.dtype, graphdef)
    table = received.table(model.mesh, programs, params)
    arrays = model.params, runner._kv_cache, runner._state, runner._adapters.banks
    assert (table.params, table.kv_cache, table.state, table.banks) == jax.tree.map(abstract, arrays)
    assert repr(dataclasses.replace(facts, num_blocks=7)) != repr(facts)


def test_an_engine_starts_without_a_worker_that_was_killed(
    imported: list[ProgramSpec], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    receive = _Worker._receive

    def receive_and_kill(worker: _Worker) -> Any:
        reply = receive(worker)
        worker._process.kill()
        return reply

    monkeypatch.setattr(_Worker, "_receive", receive_and_kill)
    with caplog.at_level(logging.WARNING):
        llm = load("tied", max_num_seqs=1, lowering_workers=1)
    assert "lowering worker 0 has ended, status -9" in caplog.text
    assert 0 < len(imported) < len(llm._engine.engine.runner.programs)
    check_tokens(llm, "tied")
    llm.shutdown()
