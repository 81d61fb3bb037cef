"""Adapters against what PEFT computes, and against models with their updates merged, however requests are mixed."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qwen2_jax.engine import program_specs
from qwen2_jax.engine.compilation import CompilationCounter
from qwen2_jax.llm import LLM
from qwen2_jax.types import LoRARequest, RequestOutput, SamplingParams
from tests.engine.processing import adapter_tensors
from tests.integration.golden import GOLDEN, GoldenText, check_idle, greedy, load, read_texts, tokens_of
from tests.integration.test_golden import chosen
from tests.lora.adapters import ADAPTERS, CASES, base_config, read_tensors

pytestmark = pytest.mark.slow

BASES = ("untied", "tied")
# Room for two adapters of rank 64, or for eight of the most usual rank here; one with matrices of its own.
ROOM = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 64, "max_vocab_loras": 1, "max_full_vocab": 1}
Work = list[tuple[LoRARequest | None, GoldenText]]


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(base: str) -> Iterator[LLM]:
    """Four rows, prompts in chunks of 32 tokens; other tests leave their prefixes in the cache."""
    engine = load(base, **ROOM)
    yield engine
    check_idle(engine)
    assert engine.num_compilations == 0
    engine.shutdown()


def names_of(base: str) -> list[str]:
    return [case.split("/")[1] for case in CASES if case.startswith(f"{base}/")]


def adapter(base: str, name: str) -> LoRARequest:
    return LoRARequest(name, 1 + names_of(base).index(name), str(ADAPTERS / base / name))


def golden(base: str, name: str, index: int) -> GoldenText:
    """Return prompt `index`, of 9 or 40 tokens, and what PEFT computes for it."""
    with np.load(ADAPTERS / base / name / "golden.npz") as arrays:
        found = {key.removesuffix(f"_{index}"): arrays[key] for key in arrays if key.endswith(f"_{index}")}
    return GoldenText(
        prompt=found["prompt_token_ids"].tolist(),
        output=found["output_token_ids"].tolist(),
        prompt_logprobs=found["prompt_logprobs"],
        output_logprobs=found["output_logprobs"],
        top_token_ids=np.empty(0),
        top_logprobs=np.empty(0),
        last_logprobs=None,
    )


def run(llm: LLM, work: Work, *, prompt_logprobs: int | None = 0) -> list[RequestOutput]:
    params = [greedy(len(text.output), logprobs=0, prompt_logprobs=prompt_logprobs) for _, text in work]
    requests = [request for request, _ in work]
    return llm.generate([text.prompt for _, text in work], params, lora_request=requests, use_tqdm=False)


def check(output: RequestOutput, text: GoldenText) -> None:
    completion = output.outputs[0]
    assert completion.token_ids == text.output
    assert completion.logprobs is not None
    np.testing.assert_allclose(chosen(completion.logprobs, text.output), text.output_logprobs, atol=1e-4)
    if output.prompt_logprobs is not None:
        found = chosen(output.prompt_logprobs[1:], text.prompt[1:])
        np.testing.assert_allclose(found, text.prompt_logprobs, atol=1e-4)


def test_every_adapter_agrees_with_peft_in_one_batch(llm: LLM, base: str) -> None:
    """Each comes twice among requests without one, and has had to leave in between."""
    before = llm.lora_stats()
    loads, evictions = before.num_loads, before.num_evictions
    work: Work = [(adapter(base, name), golden(base, name, index)) for name in names_of(base) for index in range(2)]
    work += [(None, text) for text in read_texts(base)[:2] * 3]
    work = [work[index] for index in np.random.default_rng(0).permutation(len(work))]
    for output, (_, text) in zip(run(llm, work), work, strict=True):
        check(output, text)
    stats = llm.lora_stats()
    assert stats.num_loads - loads > len(names_of(base)) and stats.num_evictions - evictions > 10
    assert stats.num_failures == 0 and all(known.requests == 0 for known in llm.list_loras())
    adapters = llm._engine.call(lambda engine: engine.adapters)
    assert adapters is not None
    adapters.check_integrity()


def test_a_row_is_the_same_alone_and_in_the_mix(llm: LLM, base: str) -> None:
    names = ("dora", "rank_40", "lora_bias", "lm_head", None, "qv")
    requests = [None if name is None else adapter(base, name) for name in names]
    params = [sampling(seed=seed) for seed in range(len(names))]
    prompts = [golden(base, "qv", index % 2).prompt for index in range(len(names))]
    mixed = tokens_of(llm.generate(prompts, params, lora_request=requests, use_tqdm=False))
    assert len({str(tokens) for tokens in mixed}) == len(names)
    for prompt, each, request, expected in zip(prompts, params, requests, mixed, strict=True):
        alone = llm.generate(prompt, each.replace(skip_reading_prefix_cache=True), lora_request=request, use_tqdm=False)
        assert tokens_of(alone) == [expected]


def test_vectors_have_a_program_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the other program does not know them; both must be right, and each run where it is."""
    monkeypatch.setattr(program_specs, "has_faster_program", lambda lora, _: lora.tables.window is not None)
    llm = load("untied", **ROOM, max_num_batched_tokens=512, max_num_seqs=16)
    runner = llm._engine.engine.runner
    ran: list[str] = []
    run_program = runner._run

    def record(name: str, bucket: int, *arguments: Any) -> Any:
        if bucket == 512:  # the only one with more than 256 tokens
            ran.append(name)
        return run_program(name, bucket, *arguments)

    monkeypatch.setattr(runner, "_run", record)
    plain = max(read_texts("untied"), key=lambda text: len(text.prompt))
    for names, expected in ((["qv"], "prefill_lora"), (["qv", "dora"], "prefill_lora_vectors")):
        requests = [adapter("untied", name) for name in names]
        for request in requests:
            llm.load_lora(request)
        work: Work = [(request, golden("untied", request.lora_name, 1)) for request in requests]
        work = [*work, (None, plain)] * 5
        ran.clear()
        for output, (_, text) in zip(run(llm, work), work, strict=True):
            check(output, text)
        assert set(ran) == {expected}
    check_idle(llm)
    llm.shutdown()


def test_prefixes_are_shared_by_requests_with_the_same_adapter_only(llm: LLM, base: str) -> None:
    llm.reset_prefix_cache()
    first, second, plain = adapter(base, "qv"), adapter(base, "dora"), None
    text = golden(base, "qv", 1)
    cached = []
    for request in (first, first, second, plain, second, plain, first):
        (output,) = run(llm, [(request, text)], prompt_logprobs=None)
        cached.append(output.num_cached_tokens)
        if request is first:
            check(output, text)
    assert cached == [0, 32, 0, 0, 32, 32, 32]


def test_samples_of_one_prompt_have_its_adapter(llm: LLM, base: str) -> None:
    prompt, request = golden(base, "qv", 1).prompt, adapter(base, "rslora")
    (output,) = llm.generate(prompt, sampling(seed=5).replace(n=2), lora_request=request, use_tqdm=False)
    alone = [llm.generate(prompt, sampling(seed=5 + i), lora_request=request, use_tqdm=False)[0] for i in range(2)]
    assert tokens_of([output])[0] == [tokens[0] for tokens in tokens_of(alone)]
    (other,) = llm.generate(prompt, sampling(seed=5).replace(n=2), use_tqdm=False)
    assert tokens_of([output]) != tokens_of([other])


def test_nothing_is_compiled_when_adapters_come_and_go(llm: LLM, base: str) -> None:
    text = golden(base, "dora", 0)
    loaded = llm.load_lora(adapter(base, "dora"), pin=True)
    assert (loaded.name, loaded.resident, loaded.pinned, loaded.requests) == ("dora", True, True, 0)
    assert loaded.applied == {name: 3 for name in loaded.applied} and loaded.nbytes > 0
    for name in ("rank_40", "bias_all", "save_both", "embed_tokens"):
        llm.load_lora(adapter(base, name))
    check(run(llm, [(adapter(base, "dora"), text)])[0], text)
    llm.unload_lora("dora")
    assert "dora" not in {known.name for known in llm.list_loras()}
    check(run(llm, [(adapter(base, "dora"), text)])[0], text)
    assert llm.num_compilations == 0


def test_reading_an_adapter_compiles_nothing(llm: LLM, base: str) -> None:
    """Not in the caller's thread either, which reads the model's rows for replaced tokens."""
    counter = CompilationCounter()
    for name in ("tokens_embed", "tokens_both", "save_both", "dora", "bias_all"):
        if name in {known.name for known in llm.list_loras()}:
            llm.unload_lora(name)
        with counter.watch():
            llm._adapters.find(adapter(base, name), 1)
    counter.close()
    assert counter.count == 0


def sampling(*, seed: int) -> SamplingParams:
    return SamplingParams(temperature=0.9, seed=seed, max_tokens=12, ignore_eos=True, detokenize=False)


def make_pair(folder: Path, case: str, *, rank: int, seed: int) -> tuple[LoRARequest, Path]:
    """Write a random adapter for a golden checkpoint, and that checkpoint with the adapter's update in its weights."""
    tensors = adapter_tensors(base_config(case), seed=seed, rank=rank)
    written = folder / "adapter"
    written.mkdir()
    save_file(tensors, written / "adapter_model.safetensors")
    (written / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank // 2}))
    merged = Path(shutil.copytree(GOLDEN / case, folder / "merged"))
    weights = {name: array.astype(np.float32) for name, array in read_tensors(GOLDEN / case).items()}
    for name in weights:
        path = f"base_model.model.model.{name.removeprefix('model.').removesuffix('.weight')}"
        if f"{path}.lora_A.weight" in tensors:
            weights[name] += 0.5 * tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
    save_file(weights, merged / "model.safetensors")
    return LoRARequest("random", 1, str(written)), merged


def test_windows_and_preemption_agree_with_merged_weights(tmp_path: Path) -> None:
    """A sliding window in half of the layers, several decode steps in a call, and cache for little more than a row."""
    request, merged = make_pair(tmp_path, "window_partial", rank=20, seed=1)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(384, size=size).tolist() for size in (12, 9, 3, 11, 7, 60, 12, 5, 8, 10)]
    requests = [None if index in (1, 4) else request for index in range(len(prompts))]
    params = [greedy(35), *(sampling(seed=seed).replace(max_tokens=35) for seed in range(1, len(prompts)))]
    options = {"max_decode_steps": 4, "max_model_len": 96, "num_gpu_blocks_override": 8, "max_loras": 1}
    llm, plain = load("window_partial", enable_lora=True, **options), load(str(merged), max_num_seqs=1)
    found = tokens_of(llm.generate(prompts, params, lora_request=requests, use_tqdm=False))
    assert llm._engine.engine.scheduler.num_preemptions > 0
    assert found[1] != tokens_of(llm.generate(prompts[1], params[1], lora_request=request, use_tqdm=False))[0]
    adapted = [index for index, each in enumerate(requests) if each is not None]
    expected = plain.generate([prompts[i] for i in adapted], [params[i] for i in adapted], use_tqdm=False)
    assert [found[index] for index in adapted] == tokens_of(expected)
    check_idle(llm)
    assert llm.num_compilations == 0
    llm.shutdown()
    plain.shutdown()


def test_embeddings_agree_with_merged_weights(tmp_path: Path) -> None:
    request, merged = make_pair(tmp_path, "embed_causal", rank=6, seed=3)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(256, size=size).tolist() for size in (5, 40, 90)]
    llm, plain = load("embed_causal", enable_lora=True, max_loras=1), load(str(merged), max_num_seqs=1)
    own, adapted, mixed = (vectors(llm, prompts, each) for each in (None, request, [request, None, request]))
    np.testing.assert_allclose(adapted, vectors(plain, prompts), atol=1e-5)
    np.testing.assert_allclose(mixed, [adapted[0], own[1], adapted[2]], atol=1e-5)
    assert np.abs(own - adapted).max() > 0.01
    assert llm.num_compilations == 0
    llm.shutdown()
    plain.shutdown()


def vectors(
    llm: LLM, prompts: list[list[int]], request: LoRARequest | Sequence[LoRARequest | None] | None = None
) -> np.ndarray:
    return np.array([each.outputs.embedding for each in llm.embed(prompts, lora_request=request, use_tqdm=False)])
