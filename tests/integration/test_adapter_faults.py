"""What is wrong with an adapter is said to those who asked for it, and nobody else notices."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qwen2_jax.errors import AdapterError, RequestError
from qwen2_jax.llm import LLM
from qwen2_jax.lora.entry import AdapterEntry
from qwen2_jax.lora.files import CONFIG, WEIGHTS
from qwen2_jax.types import LoRARequest, RequestOutput, SamplingParams
from tests.integration.golden import check_idle, greedy, load, tokens_of
from tests.integration.test_adapters import adapter, golden
from tests.lora.adapters import ADAPTERS, Q_PROJ, read_tensors, write_adapter, zeros

pytestmark = pytest.mark.slow

LIMIT_S = 60
BASE, ROOM = "untied", 10
KINDS = ("qv", "rslora", "regex", "k_up", "all_linear")
"""Golden adapters of one rank for all modules, so that ranks can change places."""


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Room for ten adapters of rank 16, on the device and in host memory."""
    engine = load(BASE, enable_lora=True, max_loras=ROOM, max_lora_rank=16, max_cpu_loras=ROOM)
    yield engine
    engine.shutdown()


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    """After each test nothing runs, nothing was compiled, and no adapter is known."""
    yield
    check_idle(llm)
    for name in {known.name for known in llm.list_loras()}:
        llm.unload_lora(name)
    manager = llm._engine.call(lambda engine: engine.adapters)
    assert manager is not None and manager.stats().num_resident == 0
    manager.check_integrity()
    assert llm.num_compilations == 0


def permuted(folder: Path, kind: str, seed: int) -> Path:
    """Write a golden adapter with its ranks in another order: another file of the same function."""
    path = Path(shutil.copytree(ADAPTERS / BASE / kind, folder))
    rng, tensors = np.random.default_rng(seed), read_tensors(path)
    for name in [name for name in tensors if "lora_A" in name]:
        order = rng.permutation(len(tensors[name]))
        other = name.replace("lora_A", "lora_B")
        tensors |= {name: tensors[name][order], other: np.ascontiguousarray(tensors[other][:, order])}
    save_file(tensors, path / WEIGHTS)
    return path


def make_requests(folder: Path, count: int) -> list[tuple[LoRARequest, str]]:
    """Return requests for `count` adapters, and the golden adapter that each computes as."""
    kinds = [KINDS[index % len(KINDS)] for index in range(count)]
    paths = [permuted(folder / f"{kind}-{seed}", kind, seed) for seed, kind in enumerate(kinds)]
    return [(LoRARequest(path.name, 100 + i, str(path)), kinds[i]) for i, path in enumerate(paths)]


def test_a_hundred_adapters_share_room_for_ten(llm: LLM, tmp_path: Path) -> None:
    """They leave the device and host memory, and are read from their files again."""
    requests = make_requests(tmp_path, 100)
    order = np.random.default_rng(0).permutation([*range(100), *range(100)])
    work = [(requests[index], golden(BASE, requests[index][1], position % 2)) for position, index in enumerate(order)]
    outputs = llm.generate(
        [text.prompt for _, text in work],
        greedy(6),
        lora_request=[request for (request, _), _ in work],
        use_tqdm=False,
    )
    assert tokens_of(outputs) == [[text.output[:6]] for _, text in work]
    stats = llm.lora_stats()
    assert stats.num_registered == 100 and stats.num_on_host <= ROOM and stats.num_resident <= ROOM
    assert stats.num_loads > 100 and stats.num_failures == 0


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (truncate, f"{WEIGHTS} is not a whole safetensors file"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}; is the download complete"),
        (lambda folder: (folder / CONFIG).unlink(), CONFIG),
        (lambda folder: (folder / CONFIG).write_text("{"), CONFIG),
        (lambda folder: write_adapter(folder, {f"{Q_PROJ}.lora_B.weight": zeros(63, 2)}), r"has shape \[63, 2\]"),
        (lambda folder: write_adapter(folder, r=17, lora_alpha=1), r"shape \[2, 64\] where \[17, 64\]"),
        (lambda folder: shutil.copytree(ADAPTERS / BASE / "rank_40", folder, dirs_exist_ok=True), "has rank 40"),
        (
            lambda folder: shutil.copytree(ADAPTERS / BASE / "embed_tokens", folder, dirs_exist_ok=True),
            "changes embed_tokens.*max_vocab_loras",
        ),
        (shutil.rmtree, "there is no adapter"),
    ],
    ids=["half", "no weights", "no config", "half a config", "shape", "rank", "too large", "vocabulary", "no folder"],
)
def test_an_adapter_that_cannot_be_served_stops_its_batch(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], Any], message: str
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    spoil(write_adapter(folder))
    with monkeypatch.context() as patch:
        patch.setattr(llm._engine.engine.runner, "launch", lambda _: pytest.fail("launched"))
        with pytest.raises(AdapterError, match=message):
            requests = [adapter(BASE, "qv"), None, LoRARequest("bad", 999, str(folder))]
            llm.generate([[1, 2]] * 3, greedy(4), lora_request=requests, use_tqdm=False)
    assert "bad" not in {known.name for known in llm.list_loras()}


@pytest.mark.parametrize("fault, message", [("gone", "is not a folder"), ("changed", "has changed since")])
def test_files_that_go_while_a_request_waits(llm: LLM, tmp_path: Path, fault: str, message: str) -> None:
    """Its copy in host memory has left, and so has it: the others of its stream and of its batch get their answers."""
    (lost, _), *others = make_requests(tmp_path, ROOM + 1)
    manager, inbox = llm._engine.engine.adapters, llm._engine._inbox
    assert manager is not None
    held, release = threading.Event(), threading.Event()

    async def run() -> list[list[int] | AdapterError]:
        loop = asyncio.get_running_loop()
        holding = loop.run_in_executor(None, llm._engine.call, lambda _: (held.set(), release.wait(LIMIT_S)))
        assert await asyncio.to_thread(held.wait, LIMIT_S)
        several = SamplingParams(seed=1, n=3, max_tokens=4, detokenize=False)
        work = ((lost, greedy(12)), (None, greedy(12)), (lost, several))
        streams = [asyncio.create_task(last_tokens(llm, request, params)) for request, params in work]
        await asyncio.to_thread(wait_until, lambda: inbox.qsize() == 3)
        for request, _ in others:
            await asyncio.to_thread(manager.find, request)
        streams.append(asyncio.create_task(last_tokens(llm, others[0][0], greedy(12))))
        await asyncio.to_thread(wait_until, lambda: inbox.qsize() == 4)
        if fault == "gone":
            shutil.rmtree(lost.lora_path)
        else:
            write_adapter(Path(lost.lora_path))
        release.set()
        await holding
        return await asyncio.gather(*streams)

    first, plain, second, other = asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    for failed in (first, second):
        assert isinstance(failed, AdapterError) and message in str(failed) and lost.lora_name in str(failed)
    assert plain == tokens_of(llm.generate([1, 2, 3], greedy(12), use_tqdm=False))[0][0]
    assert other == tokens_of(llm.generate([1, 2, 3], greedy(12), lora_request=others[0][0], use_tqdm=False))[0][0]


def test_a_slow_adapter_holds_up_no_other_stream(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait for it: they wait for one thread."""
    (slow, _), (known, _), (new, _) = make_requests(tmp_path, 3)
    manager, may_read = llm._engine.engine.adapters, threading.Event()
    assert manager is not None
    manager.find(known)
    find, asked = manager.find, []

    def finding(request: LoRARequest, **options: bool) -> AdapterEntry:
        if request == slow:
            asked.append(request)
            assert may_read.wait(LIMIT_S)
        return find(request, **options)

    monkeypatch.setattr(manager, "find", finding)

    async def run() -> list[list[int] | AdapterError]:
        waiting = [asyncio.create_task(last_tokens(llm, slow, greedy(3))) for _ in range(80)]
        await asyncio.gather(*(last_tokens(llm, request, greedy(3)) for request in (None, known, new)))
        assert not any(task.done() for task in waiting)
        waiting[0].cancel()
        may_read.set()
        return await asyncio.gather(*waiting[1:])

    found = asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    assert len(asked) == 1 and found[0] and all(tokens == found[0] for tokens in found)


def test_an_output_names_the_request_that_it_answers(llm: LLM, tmp_path: Path) -> None:
    (one, _), _ = make_requests(tmp_path, 2)
    other = LoRARequest("another name", 4242, one.lora_path)
    outputs = llm.generate([[1, 2, 3]] * 2, greedy(3), lora_request=[one, other], use_tqdm=False)
    assert [output.lora_request for output in outputs] == [one, other]
    llm.unload_lora("another name")
    assert one.lora_name in {known.name for known in llm.list_loras()}


async def last_tokens(llm: LLM, request: LoRARequest | None, params: SamplingParams) -> list[int] | AdapterError:
    """Return the tokens of a stream, or the error that it ends with."""
    outputs: list[RequestOutput] = []
    try:
        async for output in llm.stream({"prompt_token_ids": [1, 2, 3]}, params, lora_request=request):
            outputs.append(output)
    except AdapterError as error:
        return error
    return list(outputs[-1].outputs[0].token_ids)


def wait_until(condition: Callable[[], bool]) -> None:
    stop = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.005)


def test_a_changed_folder_answers_anew(llm: LLM, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ADAPTERS / BASE / "qv", tmp_path / "mine"))
    request = LoRARequest("mine", 500, str(folder))
    for kind in ("qv", "dora", "lora_bias"):
        shutil.copytree(ADAPTERS / BASE / kind, folder, dirs_exist_ok=True)
        text = golden(BASE, kind, 0)
        outputs = llm.generate(text.prompt, greedy(24), lora_request=request, use_tqdm=False)
        assert tokens_of(outputs) == [[text.output]]


def test_pinned_adapters_leave_room_or_an_error(llm: LLM, tmp_path: Path) -> None:
    requests = [request for request, _ in make_requests(tmp_path, ROOM + 1)]
    for request in requests[:ROOM]:
        llm.load_lora(request, pin=True)
    with pytest.raises(AdapterError, match="finds no room beside pinned adapters"):
        llm.generate([1], greedy(2), lora_request=requests[ROOM], use_tqdm=False)
    with pytest.raises(AdapterError, match="finds no room beside pinned adapters"):
        llm.load_lora(requests[ROOM])
    llm.unload_lora(requests[3].lora_name)
    assert llm.load_lora(requests[ROOM]).resident


@pytest.mark.parametrize(
    "requests, error, message",
    [
        ([None], RequestError, "lora_request has 1 entries for 2 prompts; pass one per prompt"),
        ([None] * 3, RequestError, "lora_request has 3 entries for 2 prompts"),
        ("qv", AdapterError, "lora_request='q' is not a LoRARequest"),
        ([None, {"lora_name": "qv"}], AdapterError, r"lora_request=\{'lora_name': 'qv'\} is not a LoRARequest"),
        (7, AdapterError, "lora_request=7 is not a LoRARequest"),
    ],
)
def test_requests_of_the_wrong_kind(llm: LLM, requests: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        llm.generate([[1], [2]], greedy(2), lora_request=requests, use_tqdm=False)


def test_names_that_nothing_has(llm: LLM) -> None:
    llm.load_lora(adapter(BASE, "rslora"))
    with pytest.raises(AdapterError, match="no adapter 'rslor' is loaded; did you mean 'rslora'"):
        llm.unload_lora("rslor")
