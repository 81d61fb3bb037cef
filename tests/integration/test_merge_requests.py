"""Requests for merged adapters: the same as the merge in a folder, and as the weighted sum in the model's weights."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qwen2_jax.errors import AdapterError
from qwen2_jax.llm import LLM
from qwen2_jax.lora.merge_folders import merge_folders
from qwen2_jax.types import AdapterRequest, LoRARequest, MergedLoRARequest, MergeOptions, RequestOutput
from tests.integration.golden import GOLDEN, check_idle, greedy, load
from tests.integration.test_adapters import adapter, make_pair
from tests.lora.adapters import ADAPTERS, read_tensors

pytestmark = pytest.mark.slow

BASE = "untied"
NAMES, WEIGHTS = ("qv", "rslora", "all_linear"), (0.7, -0.4, 1.2)
PROMPTS = [np.random.default_rng(7).integers(384, size=size).tolist() for size in (9, 40)]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    engine = load(BASE, enable_lora=True, max_loras=2, max_lora_rank=64)
    yield engine
    check_idle(engine)
    assert engine.num_compilations == 0
    engine.shutdown()


def mixture(*names: str, weights: tuple[float, ...], number: int = 100, **options: Any) -> MergedLoRARequest:
    adapters = [adapter(BASE, name) for name in names]
    return MergedLoRARequest(f"mixture {number}", number, adapters, weights, MergeOptions(**options))


def scores(outputs: list[RequestOutput]) -> list[np.ndarray]:
    """Return the prompts' log-probabilities, the first token's left out."""
    found = []
    for output in outputs:
        assert output.prompt_logprobs is not None
        pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        found.append(np.array([entry[token].logprob for entry, token in pairs if entry is not None]))
    return found


def run(llm: LLM, requests: AdapterRequest | list[AdapterRequest | None] | None) -> list[np.ndarray]:
    return scores(llm.generate(PROMPTS, greedy(2, prompt_logprobs=0), lora_request=requests, use_tqdm=False))


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for each, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(each, other, atol=1e-4)


def with_the_sum(folder: Path) -> Path:
    """Write the base with the weighted sum of the adapters' products in its weights, computed in float64."""
    scalings = {"qv": 16 / 8, "rslora": 16 / np.sqrt(8), "all_linear": 16 / 16}
    merged = Path(shutil.copytree(GOLDEN / BASE, folder))
    weights = {name: array.astype(np.float64) for name, array in read_tensors(GOLDEN / BASE).items()}
    for name, weight in zip(NAMES, WEIGHTS, strict=True):
        tensors = {key: array.astype(np.float64) for key, array in read_tensors(ADAPTERS / BASE / name).items()}
        for key in (key for key in tensors if key.endswith(".lora_A.weight")):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            update = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
            weights[f"{path}.weight"] += weight * scalings[name] * update
    save_file({name: array.astype(np.float32) for name, array in weights.items()}, merged / "model.safetensors")
    return merged


def test_a_linear_merge_is_the_weighted_sum(llm: LLM, tmp_path: Path) -> None:
    """In one batch with the base, and with one of the adapters alone."""
    request, alone = mixture(*NAMES, weights=WEIGHTS), adapter(BASE, "qv")
    plain = load(str(with_the_sum(tmp_path / "merged")), max_num_seqs=1)
    expected, base, single = run(plain, None), run(llm, None), run(llm, alone)
    plain.shutdown()
    assert_same(run(llm, request), expected)
    assert max(np.abs(one - other).max() for one, other in zip(expected, base, strict=True)) > 0.01
    assert_same(run(llm, [request, alone]), [expected[0], single[1]])
    assert_same(run(llm, [None, request]), [base[0], expected[1]])


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("qv", "lora_bias"), {}),
        (("qv", "rank_40"), {"rank": 12}),
        (("qv", "k_up"), {"method": "magnitude_prune", "density": 0.5}),
        (("qv", "lora_bias"), {"method": "ties", "density": 0.5, "majority_sign_method": "frequency"}),
        (("qv", "k_up"), {"method": "dare_linear", "density": 0.6, "seed": 3}),
        (("qv", "k_up"), {"method": "dare_ties", "density": 0.6, "rank": 20}),
    ],
)
def test_a_merge_is_the_one_in_a_folder(
    llm: LLM, names: tuple[str, ...], options: dict[str, Any], tmp_path: Path
) -> None:
    request = mixture(*names, weights=(0.7, 0.3), **options)
    adapters = [(str(ADAPTERS / BASE / name), weight) for name, weight in zip(names, (0.7, 0.3), strict=True)]
    merge_folders(GOLDEN / BASE, adapters, tmp_path / "merged", request.options)
    written = LoRARequest("written", 101, str(tmp_path / "merged"))
    assert_same(run(llm, request), run(llm, written))
    llm.unload_lora("written")


def test_a_merge_is_loaded_listed_streamed_and_unloaded(llm: LLM) -> None:
    request = mixture("qv", "qv", weights=(0.5, 0.5), number=102)
    loaded = llm.load_lora(request, pin=True)
    assert (loaded.name, loaded.resident, loaded.pinned) == ("mixture 102", True, True)
    path = ADAPTERS / BASE / "qv"
    assert loaded.path == f"the merge of {path} and {path}" and loaded.applied == {"q_proj": 3, "v_proj": 3}
    assert_same(run(llm, request), run(llm, adapter(BASE, "qv")))
    assert loaded.digest in {known.digest for known in llm.list_loras()}

    async def last() -> RequestOutput:
        return [each async for each in llm.stream(PROMPTS[0], greedy(4), lora_request=request)][-1]

    expected = llm.generate(PROMPTS[0], greedy(4), lora_request=adapter(BASE, "qv"), use_tqdm=False)[0]
    assert list(asyncio.run(last()).outputs[0].token_ids) == list(expected.outputs[0].token_ids)
    llm.unload_lora("mixture 102")
    assert "mixture 102" not in {known.name for known in llm.list_loras()}


def test_cached_prefixes_are_of_one_merge(llm: LLM) -> None:
    llm.reset_prefix_cache()
    first, second = (mixture("qv", "k_up", weights=weights) for weights in ((0.5, 0.5), (0.5, 0.6)))
    cached = []
    for request in (first, first, second, adapter(BASE, "qv"), second):
        (output,) = llm.generate(PROMPTS[1], greedy(2), lora_request=request, use_tqdm=False)
        cached.append(output.num_cached_tokens)
    assert cached == [0, 32, 0, 0, 32]


def test_what_cannot_be_merged_disturbs_nobody(llm: LLM) -> None:
    known = {each.digest for each in llm.list_loras()}
    with pytest.raises(AdapterError, match="adapter 2 of 2 has a DoRA magnitude"):
        run(llm, [adapter(BASE, "qv"), mixture("qv", "dora", weights=(1, 1))])
    with pytest.raises(AdapterError, match=r"rank 80 .*max_lora_rank=80, or merge with MergeOptions\(rank=64\)"):
        run(llm, mixture("rank_40", "rank_40", weights=(1, 1)))
    assert {each.digest for each in llm.list_loras()} - known <= {llm.load_lora(adapter(BASE, "qv")).digest}
    run(llm, adapter(BASE, "qv"))


def test_embeddings_of_a_merge(tmp_path: Path) -> None:
    (request, _), prompts = make_pair(tmp_path, "embed_causal", rank=6, seed=3), [[1, 2, 3], [4, 5, 6, 7, 8]]
    whole = MergedLoRARequest("whole", 2, [request, request], [0.75, 0.25])
    half = MergedLoRARequest("half", 3, [request, request], [0.25, 0.25])
    llm = load("embed_causal", enable_lora=True, max_loras=2)

    def vectors(*requests: AdapterRequest) -> np.ndarray:
        outputs = llm.embed(prompts, lora_request=requests, use_tqdm=False)
        return np.array([each.outputs.embedding for each in outputs])

    expected = vectors(request, request)
    np.testing.assert_allclose(vectors(whole, whole), expected, atol=1e-5)
    mixed = vectors(half, whole)
    np.testing.assert_allclose(mixed[1], expected[1], atol=1e-5)
    assert np.abs(mixed[0] - expected[0]).max() > 0.01
    llm.shutdown()
