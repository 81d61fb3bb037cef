"""Every implementation on an NVIDIA GPU against the references in float32, at the cases of `gpu_cases.py`."""

import functools
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.gpu_cases import GpuCase, gpu_cases

ON_GPU = jax.default_backend() != "cpu"
CASES = gpu_cases() if ON_GPU else []
"""Empty without a GPU: `test_mosaic.py` and the ops' own tests do what can be done there."""


@functools.cache
def programs() -> dict[str, Future[Any]]:
    """Start to compile everything, each case's reference once."""
    threads = ThreadPoolExecutor(os.cpu_count())
    references = {f"{case.op}-{case.label}": (case, "reference") for case in CASES}
    wanted = {case.name: (case, case.implementation) for case in CASES} | references
    return {name: threads.submit(compile_case, *program) for name, program in wanted.items()}


def compile_case(case: GpuCase, implementation: str) -> Any:
    run = functools.partial(case.run, implementation=implementation)
    return jax.jit(run).lower(*case.make(0)).compile()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_is_the_reference(case: GpuCase) -> None:
    try:
        program = programs()[case.name].result()
    except NotImplementedError as error:
        pytest.skip(str(error))
    reference = programs()[f"{case.op}-{case.label}"].result()
    for seed in range(case.seeds):
        arrays = case.make(seed)
        found, expected = (jax.tree.leaves(run(*arrays)) for run in (program, reference))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            wide, exact = (np.asarray(array.astype(jnp.float32)) for array in (one, other))
            known = np.isfinite(exact)  # a token of NaN is NaN in its own place only
            assert known.mean() >= 0.5
            np.testing.assert_allclose(wide[known], exact[known], rtol=case.tolerance, atol=case.tolerance)


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_hopper_runs_what_is_written_for_it() -> None:
    if jax.devices()[0].compute_capability != "9.0":
        pytest.skip("not Hopper")
    names = [name for name in programs() if "mosaic" in name and "e4m3" not in name and "decode" not in name]
    ran = [name for name in names if programs()[name].exception() is None]
    assert {name.split("-")[0] for name in ran} >= {"flash_attention", "linear", "paged_attention"}
