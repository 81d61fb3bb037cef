"""Cases of the tests that need a GPU, and how they run: each op compiled once, against its reference."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

ON_GPU = jax.default_backend() != "cpu"
MAX_SEEDS = 4


@dataclass(frozen=True, kw_only=True)
class GpuCase:
    """An op that is compiled once and runs on several inputs."""

    op: str
    implementation: str
    label: str
    run: Callable[..., Any]
    """The op without its implementation."""
    make: Callable[[int], tuple[Any, ...]]
    """Draws the op's arrays from a seed; their shapes are always the same."""
    seeds: int = 1
    """At most `MAX_SEEDS`."""
    tolerance: float = 0.03
    """Absolute, and relative to values above 1."""

    @property
    def name(self) -> str:
        """What the test is called."""
        return f"{self.op}-{self.implementation}-{self.label}"

    @property
    def input_name(self) -> str:
        """What it shares with the other implementations: inputs, and what comes of them."""
        return f"{self.op}-{self.label}"


class GpuCases:
    """The cases of one test file, with one set of inputs, and of programs, for all implementations of an input.

    The cases of an input are a group of pytest-xdist's, so that one process compiles them, all at once. Without a GPU
    there are none: the interpreters' suites do what can be done there.
    """

    def __init__(self, cases: Iterable[GpuCase], *, needs_gpu: bool = True) -> None:
        """`needs_gpu=False` keeps the cases on a CPU."""
        found = list(cases) if ON_GPU or not needs_gpu else []
        self.cases = sorted(found, key=lambda case: (case.input_name, case.name))
        """The implementations of an input one after another."""
        self._programs = lru_cache(1)(self._compile_input)
        self._expected = lru_cache(MAX_SEEDS)(self._compute_expected)

    @property
    def parametrize(self) -> Any:
        """The mark of a test that takes one `case` after another."""
        cases = [
            pytest.param(case, id=case.name, marks=pytest.mark.xdist_group(case.input_name)) for case in self.cases
        ]
        return pytest.mark.parametrize("case", cases)

    def check(self, case: GpuCase) -> None:
        """Assert that an implementation gives what the reference gives; skip what it does not support."""
        try:
            program = self._programs(case.input_name)[case.implementation].result()
        except NotImplementedError as error:
            pytest.skip(str(error))
        for seed in range(case.seeds):
            arrays, expected = self._expected(case.input_name, seed)
            for one, other in zip(jax.tree.leaves(program(*arrays)), expected, strict=True):
                assert one.dtype == other.dtype
                wide, exact = (np.asarray(array.astype(jnp.float32)) for array in (one, other))
                known = np.isfinite(exact)  # a token of NaN is NaN in its own place only
                assert known.mean() >= 0.5
                np.testing.assert_allclose(wide[known], exact[known], rtol=case.tolerance, atol=case.tolerance)

    def mosaic_ops(self) -> set[str]:
        """Return the ops of which a Mosaic kernel compiles."""
        found = set[str]()
        for case in self.cases:
            if case.implementation == "mosaic" and case.op not in found and self._is_supported(case):
                found.add(case.op)
        return found

    def _is_supported(self, case: GpuCase) -> bool:
        try:
            _compile(case, case.implementation, _shapes(case))
        except NotImplementedError:
            return False
        return True

    def _compile_input(self, input_name: str) -> dict[str, Future[Any]]:
        """Compile every implementation of an input, and the reference."""
        cases = [case for case in self.cases if case.input_name == input_name]
        shapes = _shapes(cases[0])
        wanted = {"reference": cases[0]} | {case.implementation: case for case in cases}
        with ThreadPoolExecutor() as threads:
            return {name: threads.submit(_compile, case, name, shapes) for name, case in wanted.items()}

    def _compute_expected(self, input_name: str, seed: int) -> tuple[tuple[Any, ...], list[Array]]:
        arrays = next(case for case in self.cases if case.input_name == input_name).make(seed)
        return arrays, jax.tree.leaves(self._programs(input_name)["reference"].result()(*arrays))


def _shapes(case: GpuCase) -> tuple[Any, ...]:
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), case.make(0))


def _compile(case: GpuCase, implementation: str, shapes: tuple[Any, ...]) -> Any:
    return jax.jit(partial(case.run, implementation=implementation)).lower(*shapes).compile()


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0, dtype: Any = jnp.bfloat16) -> Array:
    """Normal numbers; the same million after another in large arrays, whose axes it does not divide."""
    numbers = scale * np.random.default_rng(seed).standard_normal(997 * 1009, np.float32)
    return jnp.asarray(np.resize(numbers.astype(dtype), shape))


def tokens_with_nan(seed: int, tokens: int, size: int) -> Array:
    """Tokens [T, K], one of which is NaN where there are several."""
    x = normal(seed, (tokens, size))
    return x.at[tokens // 2].set(jnp.nan) if tokens > 1 else x
