"""Attention, norms, cache writes and sampling on an NVIDIA GPU against the references in float32."""

import jax
import pytest

from tests.kernels.gpu_case import ON_GPU, GpuCase, GpuCases
from tests.kernels.gpu_cases import attention_cases, elementwise_cases
from tests.kernels.gpu_sampling_cases import sampling_cases

CASES = GpuCases([*attention_cases(), *elementwise_cases(), *sampling_cases()])


@CASES.parametrize
def test_is_the_reference(case: GpuCase) -> None:
    CASES.check(case)


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_hopper_runs_what_is_written_for_it() -> None:
    if jax.devices()[0].compute_capability != "9.0":
        pytest.skip("not Hopper")
    assert CASES.mosaic_ops() == {"flash_attention", "paged_attention"}
