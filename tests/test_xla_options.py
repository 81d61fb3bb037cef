"""XLA's options for the programs of a GPU."""

import jax
import pytest

from qwen2_jax import xla_options
from qwen2_jax.parallel import make_mesh

KNOWN = "xla_gpu_experimental_enable_fusion_autotuner"


@pytest.fixture(autouse=True)
def forget() -> None:
    xla_options.gpu_options.cache_clear()


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_options, "_EXPERIMENTAL_OPTIONS", {"xla_gpu_of_another_version": True, KNOWN: False})
    known = xla_options.gpu_options(make_mesh(1))
    assert known == xla_options._OPTIONS | {KNOWN: False}


def test_a_value_that_xla_does_not_take_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_options, "_EXPERIMENTAL_OPTIONS", {KNOWN: "perhaps"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="perhaps"):
        xla_options.gpu_options(make_mesh(1))
