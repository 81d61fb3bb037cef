"""The ops of `lora` on an NVIDIA GPU against the references in float32; their cases on a CPU, too."""

from functools import partial

import jax
import pytest

from tests.kernels.gpu_case import ON_GPU, GpuCase, GpuCases
from tests.kernels.gpu_lora_cases import fused_cases, lora_cases
from tests.kernels.test_lora_triton import H100

CASES = GpuCases([*lora_cases(), *fused_cases()])
SMALL = [("0.5b", "qkv", 3), ("0.5b", "gate_up", 20)]
ON_CPU = [] if ON_GPU else list(lora_cases(tuple(SMALL)))


@CASES.parametrize
def test_is_the_reference(case: GpuCase) -> None:
    CASES.check(case)


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_hopper_runs_what_is_written_for_it() -> None:
    if jax.devices()[0].compute_capability != "9.0":
        pytest.skip("not Hopper")
    assert CASES.mosaic_ops() == {"lora_linear_gated"}


@pytest.mark.parametrize("case", ON_CPU, ids=lambda case: case.name)
def test_cases_run_without_a_gpu(case: GpuCase) -> None:
    if case.implementation == "triton":
        with jax.sharding.use_abstract_mesh(H100):
            jax.jit(partial(case.run, implementation="triton")).trace(*case.make(0))
    else:
        GpuCases([case], needs_gpu=False).check(case)
