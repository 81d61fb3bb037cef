"""Sequence classifiers: adapters with heads of their own on a language model, against PEFT and beside generation."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qwen2_jax.errors import AdapterError, RequestError
from qwen2_jax.llm import LLM
from qwen2_jax.types import ClassificationRequestOutput, LoRARequest, MergedLoRARequest
from tests.integration.golden import check_idle, greedy, load, tokens_of
from tests.integration.test_adapters import Work, adapter, check, golden, run
from tests.lora.adapters import ADAPTERS, read_tensors

pytestmark = pytest.mark.slow

NAMES = ("classifier_3", "classifier_5")
SCORE = "base_model.model.score.weight"
Row = tuple[str, int]
"""A golden classifier and one of its two prompts, of 9 and 40 tokens."""
ROWS = [(name, index) for name in NAMES for index in range(2)]


@pytest.fixture(scope="module", params=["untied", "tied"])
def base(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(base: str) -> Iterator[LLM]:
    """Four rows, prompts in chunks of 32 tokens."""
    engine = load(base, enable_lora=True, max_loras=2, max_lora_rank=16)
    yield engine
    check_idle(engine)
    assert engine.num_compilations == 0
    engine.shutdown()


def classifier(base: str, name: str) -> LoRARequest:
    return LoRARequest(name, 101 + NAMES.index(name), str(ADAPTERS / base / name))


def peft(base: str, row: Row) -> tuple[list[int], np.ndarray]:
    """Return a row's prompt and its logits [num_labels]."""
    name, index = row
    with np.load(ADAPTERS / base / name / "logits.npz") as arrays:
        return arrays[f"prompt_token_ids_{index}"].tolist(), arrays[f"logits_{index}"]


def classify(llm: LLM, base: str, rows: list[Row]) -> list[ClassificationRequestOutput]:
    """Classify all rows in one call and compare each with PEFT."""
    prompts = [peft(base, row)[0] for row in rows]
    requests = [classifier(base, name) for name, _ in rows]
    outputs = llm.classify(prompts, lora_request=requests, use_tqdm=False)
    for row, prompt, request, output in zip(rows, prompts, requests, outputs, strict=True):
        expected = peft(base, row)[1]
        np.testing.assert_allclose(output.outputs.logits, expected, atol=1e-4)
        probs = np.exp(expected.astype(np.float64)) / np.exp(expected.astype(np.float64)).sum()
        np.testing.assert_allclose(output.outputs.probs, probs, atol=1e-4)
        assert output.outputs.num_labels == len(expected) and output.finished
        assert list(output.prompt_token_ids) == prompt and output.lora_request == request
    return outputs


def test_classifiers_agree_with_peft_alone_and_in_any_mix(llm: LLM, base: str) -> None:
    """Prompts that are computed in two chunks, and prompts of which a part is cached."""
    llm.reset_prefix_cache()
    for row in ROWS:
        (output,) = classify(llm, base, [row])
        assert output.num_cached_tokens == 0
    mixed = [ROWS[index % 4] for index in np.random.default_rng(0).permutation(12)]
    cached = {output.num_cached_tokens for output in classify(llm, base, mixed)}
    assert cached == {0, 32}


def test_an_adapter_without_its_head_has_other_logits(llm: LLM, base: str, tmp_path: Path) -> None:
    """The head alone is an adapter too, and gives what the base's own last hidden state gives."""
    prompt, expected = peft(base, ROWS[1])
    tensors = read_tensors(ADAPTERS / base / NAMES[0])
    zero = {name: np.zeros_like(array) if "lora_B" in name else array for name, array in tensors.items()}
    found = []
    for number, content in enumerate(({SCORE: tensors[SCORE]}, zero), 201):
        folder = tmp_path / str(number)
        shutil.copytree(ADAPTERS / base / NAMES[0], folder)
        save_file(content, folder / "adapter_model.safetensors")
        request = LoRARequest(str(number), number, str(folder))
        assert llm.load_lora(request).applied["score"] == 1
        (output,) = llm.classify(prompt, lora_request=request, use_tqdm=False)
        found.append(np.array(output.outputs.logits))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    assert np.abs(found[0] - expected).max() > 0.05


def test_classifying_beside_generating(llm: LLM, base: str) -> None:
    """Steps hold rows of both kinds; neither sees the other."""
    work: Work = [(adapter(base, "qv"), golden(base, "qv", index)) for index in (0, 1) * 3]
    with ThreadPoolExecutor(1) as threads:
        generated = threads.submit(run, llm, work, prompt_logprobs=None)
        while not generated.done():
            classify(llm, base, ROWS)
    for output, (_, text) in zip(generated.result(), work, strict=True):
        check(output, text)


def test_a_classifier_generates_with_the_models_own_head(llm: LLM, base: str, tmp_path: Path) -> None:
    folder, tensors = tmp_path / "trunk", read_tensors(ADAPTERS / base / NAMES[0])
    shutil.copytree(ADAPTERS / base / NAMES[0], folder)
    save_file({name: array for name, array in tensors.items() if name != SCORE}, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    trunk = LoRARequest("trunk", 301, str(folder))
    prompt, _ = peft(base, ROWS[0])
    requests = [classifier(base, NAMES[0]), trunk, None]
    whole, without, plain = tokens_of(llm.generate([prompt] * 3, greedy(12), lora_request=requests, use_tqdm=False))
    assert whole == without != plain


def test_what_has_no_head_is_refused_and_nothing_runs(llm: LLM, base: str) -> None:
    prompt, _ = peft(base, ROWS[0])
    topics, plain = classifier(base, NAMES[0]), adapter(base, "qv")
    with pytest.raises(RequestError, match="a prompt without an adapter cannot be classified"):
        llm.classify([prompt, prompt], lora_request=[topics, None], use_tqdm=False)
    with pytest.raises(AdapterError, match="adapter 'qv' has no classification head"):
        llm.classify([prompt, prompt], lora_request=[topics, plain], use_tqdm=False)
    with pytest.raises(AdapterError, match=r"adapter 1 of 2 has a classification head \(score\)"):
        llm.classify(prompt, lora_request=MergedLoRARequest("both", 401, [topics, plain], [1, 1]), use_tqdm=False)
    classify(llm, base, ROWS)
