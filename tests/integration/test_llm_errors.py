"""What cannot be served is refused before anything runs, by a message that says what to do."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen2_jax.errors import AdapterError, CapacityError, CheckpointError, ConfigError, RequestError
from qwen2_jax.llm import LLM
from qwen2_jax.types import LoRARequest, SamplingParams
from tests.integration.golden import GOLDEN, check_idle, greedy, load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def embedder(tokenizer_folder: Path) -> Iterator[LLM]:
    """A small embeddings model."""
    engine = load("embed_causal", tokenizer=tokenizer_folder)
    yield engine
    engine.shutdown()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seq": 4}, "max_num_seqs"),
        (
            {"enable_lora": True, "hf_overrides": {"hidden_act": "relu"}},
            "enable_lora=True with hidden_act='relu' is not served; adapters need one of silu",
        ),
        ({"quantization": "awq"}, "quantization='awq' is refused"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
        ({"dtype": "float8"}, "dtype='float8' is not one of 'auto'"),
        ({"max_model_len": 257}, "max_model_len=257 is longer than the model's context of 256"),
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens=3 is less than max_num_seqs=4"),
        ({"tensor_parallel_size": 5}, "tensor_parallel_size=5 needs that many devices; there are 4"),
        ({"generation_config": "none"}, "generation_config='none' is not 'auto'"),
    ],
)
def test_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("tied", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_memory_bytes": 4096}, r"needs 0\.\d+ GiB of cache, and there are 0\.000 GiB.*max_model_len"),
        ({"num_gpu_blocks_override": 16}, "needs 16 cache blocks of 16 tokens, and there are 15"),
    ],
)
def test_too_little_memory_for_one_sequence(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before the programs are compiled, which takes a minute on a GPU."""
    monkeypatch.setattr("qwen2_jax.engine.model_runner.compile_programs", lambda *_, **__: pytest.fail("compiled"))
    with pytest.raises(CapacityError, match=message):
        load("tied", **options)


def test_a_sliding_window_needs_cache_for_the_window_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Window 16, chunks of 32 tokens, blocks of 16: four blocks serve the full length of 256 tokens, not sixteen."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "qwen2_jax.engine.model_runner.count_blocks",
        lambda *_, **options: seen.append(options) or options["blocks_needed"],
    )
    with pytest.raises(CapacityError, match="needs 4 cache blocks of 16 tokens, and there are 3"):
        load("window_all")
    assert [options["blocks_needed"] for options in seen] == [4]


def test_the_hub_is_asked_for_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def resolve(model: str, **options: Any) -> Path:
        asked.append(options)
        return GOLDEN / model

    monkeypatch.setattr("qwen2_jax.llm.resolve", resolve)
    for options in ({"hf_token": False, "load_format": "dummy"}, {"hf_token": "secret"}):
        with pytest.raises(ConfigError, match="tensor_parallel_size=5"):
            load("tied", tensor_parallel_size=5, **options)
    assert [(options["token"], options["weights"]) for options in asked] == [(False, False), ("secret", True)]


def test_another_share_of_the_memory_is_not_ignored_silently(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    with pytest.raises(ConfigError), caplog.at_level(logging.WARNING):
        load("tied", gpu_memory_utilization=0.8, tensor_parallel_size=5)
    assert "gpu_memory_utilization=0.8 has no effect" in caplog.text


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "tied", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LLM(folder, skip_tokenizer_init=True, use_tqdm_on_load=False)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no weights that can be read"):
        LLM(folder, skip_tokenizer_init=True, use_tqdm_on_load=False)
    shutil.copy(GOLDEN / "tied" / "model.safetensors", weights)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LLM(folder, skip_tokenizer_init=True, use_tqdm_on_load=False)


def test_a_model_without_a_tokenizer_says_so() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        LLM(GOLDEN / "tied", use_tqdm_on_load=False)


def test_float16_is_served_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        llm = load("tied", dtype="float16", max_num_seqs=1)
    assert "float16 overflows in some Qwen2 models" in caplog.text
    (output,) = llm.generate([1, 2, 3], greedy(4), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
    llm.shutdown()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1] * 256, "the prompt has 256 tokens; with max_model_len=256 it may have 1 to 255"),
        ({"prompt_token_ids": []}, "the prompt has 0 tokens"),
        ([1, 384], "384 is not a token id: they go from 0 to 383"),
        ([-1], "-1 is not a token id"),
        ({"prompt_tokens": [1]}, "unknown key 'prompt_tokens' in a prompt.*prompt_token_ids"),
    ],
)
def test_a_bad_prompt_stops_its_whole_batch(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, prompt: Any, message: str
) -> None:
    launched = []
    monkeypatch.setattr(llm._engine.engine.runner, "launch", launched.append)
    with pytest.raises(RequestError, match=message):
        llm.generate([[1, 2], prompt], greedy(4), use_tqdm=False)
    check_idle(llm)
    assert launched == []


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([greedy(4)], "sampling_params has 1 entries for 2 prompts"),
        (greedy(4, logprobs=21), "logprobs=21 asks for more log-probabilities than allowed; use at most 20"),
        (greedy(4, stop_token_ids=[384]), "stop_token_ids"),
        (greedy(4, allowed_token_ids=[400]), "allowed_token_ids"),
    ],
)
def test_parameters_are_refused(llm: LLM, params: SamplingParams | list[SamplingParams], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(["a", "b"], params, use_tqdm=False)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, [None, None], 3])
def test_what_are_no_parameters_is_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(RequestError, match="sampling_params="):
        llm.generate(["a", "b"], params, use_tqdm=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"temprature": 0.1}, "has 'temprature'; did you mean 'temperature'"),
        ({"presence_penalty": 1.5}, "has 'presence_penalty'"),
        ({"temperature": 3}, "temperature=3 is out of range"),
        ({"eos_token_id": ["end"]}, r"eos_token_id=\['end'\] is not a token id or a list of token ids"),
    ],
)
def test_overrides_of_defaults_are_checked(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("tied", skip_tokenizer_init=True, override_generation_config=overrides)


def test_variables_of_a_template_are_no_arguments(llm: LLM) -> None:
    with pytest.raises(RequestError, match="chat_template_kwargs has 'tokenize', which chat does itself"):
        llm.chat([{"role": "user", "content": "hi"}], chat_template_kwargs={"tokenize": True}, use_tqdm=False)


def test_lists_must_fit_the_prompts(llm: LLM) -> None:
    with pytest.raises(RequestError, match="priority has 3 entries for 2 prompts"):
        llm.generate(["a", "b"], greedy(4), priority=[0, 1, 2], use_tqdm=False)
    assert llm.generate([], use_tqdm=False) == []


def test_adapters_need_enable_lora(llm: LLM) -> None:
    request, message = LoRARequest("x", 1, "folder"), "adapters are not served: start with enable_lora=True"
    with pytest.raises(AdapterError, match=message):
        llm.generate(["a", "b"], lora_request=[None, request], use_tqdm=False)
    with pytest.raises(AdapterError, match=message):
        llm.load_lora(request)
    with pytest.raises(AdapterError, match=message):
        llm.unload_lora("x")
    with pytest.raises(AdapterError, match=message):
        llm.list_loras()
    (output,) = llm.generate("a", greedy(2), lora_request=[None], use_tqdm=False)
    assert output.lora_request is None and output.finished


def test_models_refuse_what_they_are_not(llm: LLM, embedder: LLM) -> None:
    with pytest.raises(RequestError, match="cannot generate; use embed"):
        embedder.generate("a", greedy(4), use_tqdm=False)
    with pytest.raises(RequestError, match="runner='pooling'"):
        llm.embed("a", use_tqdm=False)
    with pytest.raises(ConfigError, match="runner='generate' needs a language model"):
        load("embed_causal", runner="generate")
    with pytest.raises(RequestError, match="256 is not a token id"):
        embedder.embed([1, 256], use_tqdm=False)


def test_text_needs_a_tokenizer(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    monkeypatch.setattr(llm, "_tokenizer", None)
    with pytest.raises(ConfigError, match="skip_tokenizer_init=True"):
        llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)
