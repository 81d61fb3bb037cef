"""Streams, threads and event loops that share an engine, and how its end reaches those who wait."""

import asyncio
import gc
import itertools
import queue
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qwen2_jax.engine.async_engine import EngineDeadError
from qwen2_jax.engine.schedule import SchedulerOutput
from qwen2_jax.engine.step_results import Launched
from qwen2_jax.errors import RequestError
from qwen2_jax.llm import LLM
from qwen2_jax.types import RequestOutput, RequestOutputKind, SamplingParams
from tests.integration.golden import GOLDEN, check_idle, greedy, load, tokens_of

pytestmark = pytest.mark.slow

LIMIT_S = 60
PARAMS = SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True)


async def collect(llm: LLM, prompt: str, params: SamplingParams) -> list[RequestOutput]:
    async with asyncio.timeout(LIMIT_S):
        return [output async for output in llm.stream(prompt, params)]


def test_stream_grows_and_finishes(llm: LLM) -> None:
    (whole,) = llm.generate("hi there", PARAMS, use_tqdm=False)
    outputs = asyncio.run(collect(llm, "hi there", PARAMS))
    assert len(outputs) > 1
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    texts = [output.outputs[0].text for output in outputs]
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths == sorted(lengths)
    assert texts[-1] == whole.outputs[0].text and lengths[-1] == 24


def test_deltas_add_up(llm: LLM) -> None:
    (whole,) = llm.generate("hi there", PARAMS.replace(logprobs=1), use_tqdm=False)
    params = PARAMS.replace(output_kind=RequestOutputKind.DELTA, logprobs=1)
    deltas = [output.outputs[0] for output in asyncio.run(collect(llm, "hi there", params))]
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
    assert [token for delta in deltas for token in delta.token_ids] == whole.outputs[0].token_ids
    assert sum(len(delta.logprobs or ()) for delta in deltas) == 24


def test_streams_share_the_engine(llm: LLM) -> None:
    params = [PARAMS.replace(seed=seed) for seed in range(6)]

    async def run() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(collect(llm, "hi there", each) for each in params))

    streamed = [outputs[-1] for outputs in asyncio.run(run())]
    expected = llm.generate(["hi there"] * 6, params, use_tqdm=False)
    assert tokens_of(streamed) == tokens_of(expected)


def test_leaving_a_stream_aborts_it(llm: LLM) -> None:
    async def run() -> None:
        stream = llm.stream("hi there", PARAMS.replace(max_tokens=200))
        async for output in stream:
            assert not output.finished
            break
        await stream.aclose()

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    check_idle(llm)


def test_cancelling_a_stream_aborts_it(llm: LLM) -> None:
    async def run() -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in llm.stream("hi there", PARAMS.replace(max_tokens=200)):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    check_idle(llm)


def test_generate_under_a_running_loop(llm: LLM) -> None:
    async def run() -> list[RequestOutput]:
        return llm.generate("hi", greedy(4), use_tqdm=False)

    (output,) = asyncio.run(run())
    assert len(output.outputs[0].token_ids) == 4


def test_generate_from_several_threads(llm: LLM) -> None:
    prompts = [np.random.default_rng(seed).integers(384, size=30).tolist() for seed in range(8)]
    expected = tokens_of(llm.generate(prompts, greedy(12), use_tqdm=False))

    def run(prompt: list[int]) -> list[list[list[int]]]:
        return tokens_of(llm.generate(prompt, greedy(12), use_tqdm=False))

    with ThreadPoolExecutor(max_workers=8) as threads:
        found = [tokens for (tokens,) in threads.map(run, prompts, timeout=LIMIT_S)]
    assert found == expected
    check_idle(llm)


@pytest.mark.parametrize("error", [RuntimeError("Event loop is closed"), ValueError("a listener's own")])
def test_a_listener_that_fails_holds_up_nobody(llm: LLM, error: Exception) -> None:
    engine = llm._engine
    inputs, answers = engine.engine.inputs, queue.SimpleQueue()

    def gone(_: object) -> None:
        raise error

    lost = inputs.generation(engine.new_request_id(), "hi", PARAMS)
    heard = inputs.generation(engine.new_request_id(), "hi", PARAMS.replace(output_kind=RequestOutputKind.FINAL_ONLY))
    engine.submit([(lost, gone), (heard, answers.put)])
    assert answers.get(timeout=LIMIT_S).finished
    check_idle(llm)


@pytest.mark.parametrize("first, second", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_an_id_in_use_is_refused_and_its_request_goes_on(llm: LLM, first: int, second: int) -> None:
    inputs, answers, refused = llm._engine.engine.inputs, queue.SimpleQueue(), queue.SimpleQueue()
    params = SamplingParams(max_tokens=30, seed=1, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
    one, other = (inputs.generation("same", "hi", params.replace(n=n)) for n in (first, second))
    llm._engine.submit([(one, answers.put), (other, refused.put)])
    assert isinstance(refused.get(timeout=LIMIT_S), RequestError)
    assert len(answers.get(timeout=LIMIT_S).outputs) == first
    check_idle(llm)


def test_log_probabilities_wait_for_their_prompt(llm: LLM) -> None:
    """A chunk of a prompt whose answer has them runs beside greedy rows that have none."""
    params = [greedy(12), greedy(4, logprobs=1)]
    outputs = llm.generate([[1, 2, 3], [5] * 60], params, use_tqdm=False)
    alone = llm.generate([[5] * 60], params[1], use_tqdm=False)
    assert outputs[0].outputs[0].logprobs is None and outputs[1].outputs[0].token_ids == alone[0].outputs[0].token_ids
    assert outputs[1].outputs[0].logprobs is not None and len(outputs[1].outputs[0].logprobs) == 4


def test_more_than_any_vocabulary_is_all_of_it(llm: LLM) -> None:
    params = SamplingParams(seed=3, max_tokens=6, ignore_eos=True)
    several = [params, params.replace(top_k=2**40), params.replace(top_k=2**31), params.replace(top_p=1e-60)]
    *same, likeliest = tokens_of(llm.generate(["hi"] * 4, several, use_tqdm=False))
    assert same[0] == same[1] == same[2]
    assert [likeliest] == tokens_of(llm.generate("hi", greedy(6), use_tqdm=False))


@pytest.mark.parametrize("ending", ["threading.Thread(target=run, daemon=True).start()", "interrupt()"])
def test_the_process_ends_well_while_requests_run(ending: str) -> None:
    code = f"""
import _thread, threading, time
from qwen2_jax import LLM, SamplingParams
llm = LLM({str(GOLDEN / "tied")!r}, dtype="float32", skip_tokenizer_init=True, use_tqdm_on_load=False, max_model_len=64,
          max_num_seqs=4, max_num_batched_tokens=64, kv_cache_memory_bytes=1 << 24)
params = SamplingParams(max_tokens=40, ignore_eos=True, detokenize=False)
def run():
    llm.generate([[1, 2, 3]] * 400, params, use_tqdm=False)
def interrupt():
    threading.Timer(0.3, _thread.interrupt_main).start()
    run()
{ending}
time.sleep(0.3)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    # An interrupt that nobody catches ends a process by the signal itself.
    assert ended.returncode in ((0,) if "daemon" in ending else (1, 130, -signal.SIGINT)), ended.stderr[-2000:]
    assert "FATAL" not in ended.stderr and "terminate called" not in ended.stderr


def test_shutdown_fails_those_who_wait(tokenizer_folder: Path) -> None:
    llm = load("tied", tokenizer=tokenizer_folder)
    launched, release = threading.Event(), threading.Event()
    block_launches(llm, launched, release)
    with ThreadPoolExecutor(max_workers=2) as threads:
        waiting = threads.submit(llm.generate, ["hi"] * 6, greedy(100), use_tqdm=False)
        assert launched.wait(LIMIT_S)
        stopping = threads.submit(llm.shutdown)
        release.set()
        with pytest.raises(EngineDeadError, match="stopped before this request"):
            waiting.result(LIMIT_S)
        stopping.result(LIMIT_S)
    with pytest.raises(EngineDeadError, match="does not run any more"):
        llm.generate("hi", greedy(1), use_tqdm=False)
    with pytest.raises(EngineDeadError):
        llm.reset_prefix_cache()
    llm.shutdown()


def test_a_start_is_kept_from_garbage_collection(tokenizer_folder: Path) -> None:
    gc.unfreeze()
    llm = load("tied", tokenizer=tokenizer_folder)
    assert gc.get_freeze_count() > 10_000
    llm.shutdown()
    assert gc.get_freeze_count() == 0


def test_a_failing_step_reaches_everyone(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load("tied", tokenizer=tokenizer_folder)

    def fail(output: SchedulerOutput) -> Launched:
        raise ZeroDivisionError("a step failed")

    monkeypatch.setattr(llm._engine.engine.runner, "launch", fail)
    with ThreadPoolExecutor(max_workers=3) as threads:
        futures = [threads.submit(llm.generate, "hi", greedy(5), use_tqdm=False) for _ in range(3)]
        errors = [future.exception(LIMIT_S) for future in futures]
    assert all(isinstance(error, EngineDeadError) for error in errors)
    assert all(error is not None and isinstance(error.__cause__, ZeroDivisionError) for error in errors)
    with pytest.raises(EngineDeadError):
        asyncio.run(collect(llm, "hi", PARAMS))
    llm.shutdown()


def block_launches(llm: LLM, launched: threading.Event, release: threading.Event) -> None:
    """Have each call to the device wait for `release`, after setting `launched`."""
    runner = llm._engine.engine.runner
    launch = runner.launch

    def wait(output: SchedulerOutput) -> Launched:
        launched.set()
        release.wait(LIMIT_S)
        return launch(output)

    runner.launch = wait
