"""How the engine computes a request never changes its tokens: batches, chunks, preemption, shared prefixes, steps."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_jax.engine.schedule import SchedulerOutput
from qwen2_jax.engine.step_results import Launched
from qwen2_jax.llm import LLM
from qwen2_jax.types import SamplingParams
from tests.integration.golden import check_idle, greedy, load, tokens_of

pytestmark = pytest.mark.slow

# The engines serve all examples of a module; drawing the same examples every time keeps CI's verdict steady.
EXAMPLES = settings(max_examples=8, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
MODELS = ("tied", "window_partial", "window_all")
VOCAB_SIZE = 384

Work = list[tuple[list[int], SamplingParams]]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    """Full attention, some layers with a sliding window, and all layers with one, whose blocks are released."""
    return request.param


@pytest.fixture(scope="module")
def chunked(model: str) -> Iterator[LLM]:
    """Prompts in chunks of 32 tokens, 4 rows, memory for all of them."""
    llm = load(model)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def whole(model: str) -> Iterator[LLM]:
    """Every prompt in one piece."""
    llm = load(model, max_num_batched_tokens=256, enable_chunked_prefill=False)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def tight(model: str) -> Iterator[LLM]:
    """Four decode steps in a call, and cache for one sequence or little more; a window makes its blocks few."""
    num_blocks = 5 if model == "window_all" else 8
    llm = load(model, max_decode_steps=4, max_model_len=96, num_gpu_blocks_override=num_blocks)
    yield llm
    llm.shutdown()


@EXAMPLES
@given(data=st.data())
def test_batched_is_alone(chunked: LLM, data: st.DataObject) -> None:
    work = data.draw(works(longest_prompt=120))
    assert together(chunked, work) == alone(chunked, work)


@EXAMPLES
@given(data=st.data())
def test_chunked_is_whole(chunked: LLM, whole: LLM, data: st.DataObject) -> None:
    work = data.draw(works(longest_prompt=200))
    assert together(chunked, work) == together(whole, work)


@EXAMPLES
@given(data=st.data())
def test_several_steps_are_one(chunked: LLM, tight: LLM, data: st.DataObject) -> None:
    work = data.draw(works(longest_prompt=40))
    assert alone(tight, work) == alone(chunked, work)


def test_preempted_is_uninterrupted(chunked: LLM, tight: LLM) -> None:
    work = make_work(seed=4, count=16, longest_prompt=12, shortest_output=30)
    before = tight._engine.engine.scheduler.num_preemptions
    assert together(tight, work) == alone(chunked, work)
    assert tight._engine.engine.scheduler.num_preemptions > before


@pytest.mark.parametrize("sampled", [False, True])
def test_prefix_hit_is_cold(chunked: LLM, sampled: bool) -> None:
    first, second, third = (prompt for prompt, _ in make_work(seed=5, count=3, longest_prompt=40))
    shared = (first * 80)[:80]
    params = sampling(seed=11) if sampled else greedy(20)
    work = [(shared, params), (shared + second, params), (shared[:37] + third, params)]
    cold = alone(chunked, work)
    chunked.reset_prefix_cache()
    for (prompt, _), expected in zip(work, cold, strict=True):
        chunked.generate(prompt, greedy(1), use_tqdm=False)
        (hit,) = chunked.generate(prompt, params, use_tqdm=False)
        assert hit.num_cached_tokens > 0
        assert tokens_of([hit]) == [expected]


def test_samples_are_their_seeds_and_share_blocks(chunked: LLM, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = np.random.default_rng(6).integers(VOCAB_SIZE, size=60).tolist()
    chunked.reset_prefix_cache()
    runner, pool, most = chunked._engine.engine.runner, chunked._engine.engine.scheduler.blocks.pool, []
    launch = runner.launch

    def watched(output: SchedulerOutput) -> Launched:
        most.append(max(pool.ref_count(block) for block in range(pool.num_blocks)))
        return launch(output)

    monkeypatch.setattr(runner, "launch", watched)
    (output,) = chunked.generate(prompt, sampling(seed=21).replace(n=3), use_tqdm=False)
    assert max(most) == 3 or model == "window_all"  # whose window leaves few blocks to share
    (samples,) = tokens_of([output])
    assert samples == [alone(chunked, [(prompt, sampling(seed=21 + i))])[0][0] for i in range(3)]
    assert len({tuple(sample) for sample in samples}) == 3


@pytest.fixture(autouse=True)
def nothing_is_left(chunked: LLM) -> Iterator[None]:
    """After each test all blocks are free, and nothing was compiled."""
    yield
    check_idle(chunked)
    assert chunked.num_compilations == 0


def sampling(*, seed: int, max_tokens: int = 20) -> SamplingParams:
    return SamplingParams(
        temperature=0.9, top_p=0.9, seed=seed, max_tokens=max_tokens, ignore_eos=True, detokenize=False
    )


@st.composite
def works(draw: st.DrawFn, *, longest_prompt: int) -> Work:
    """Draw up to eight requests, greedy or sampled; a failure shrinks to few and short ones."""
    request = st.tuples(
        st.integers(1, longest_prompt), st.integers(0, 2**16), st.integers(1, 35), st.none() | st.integers(0, 2**63 - 1)
    )
    work: Work = []
    for length, content, max_tokens, seed in draw(st.lists(request, min_size=1, max_size=8)):
        prompt = np.random.default_rng(content).integers(VOCAB_SIZE, size=length).tolist()
        params = greedy(max_tokens) if seed is None else sampling(seed=seed, max_tokens=max_tokens)
        work.append((prompt, params))
    return work


def make_work(*, seed: int, count: int, longest_prompt: int, shortest_output: int = 5) -> Work:
    """Return random prompts, greedy and sampled in turn."""
    rng = np.random.default_rng(seed)
    work = []
    for index in range(count):
        prompt = rng.integers(VOCAB_SIZE, size=rng.integers(1, longest_prompt + 1)).tolist()
        max_tokens = int(rng.integers(shortest_output, 36))
        params = sampling(seed=index, max_tokens=max_tokens) if index % 2 else greedy(max_tokens)
        work.append((prompt, params))
    return work


def together(llm: LLM, work: Work) -> list[list[list[int]]]:
    """Return the tokens of all requests, run at once."""
    return tokens_of(llm.generate([prompt for prompt, _ in work], [params for _, params in work], use_tqdm=False))


def alone(llm: LLM, work: Work) -> list[list[list[int]]]:
    """Return the tokens of all requests, run one after the other and without the prefix cache."""
    runs = [
        llm.generate(prompt, params.replace(skip_reading_prefix_cache=True), use_tqdm=False) for prompt, params in work
    ]
    return tokens_of([output for (output,) in runs])
