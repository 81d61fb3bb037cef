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


def test_only_programs_that_ask_for_it_become_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, no_graph, loop = make_mesh(1), "xla_gpu_graph_min_graph_size", "xla_gpu_enable_command_buffer"
    assert xla_options.compiler_options(mesh, as_graph=True) is None, "a CPU takes no options"
    monkeypatch.setattr(xla_options, "is_gpu", lambda mesh: True)
    plain, graph = (xla_options.compiler_options(mesh, as_graph=as_graph) for as_graph in (False, True))
    assert plain is not None and graph is not None
    assert no_graph in plain and no_graph not in graph and loop not in graph
    both = xla_options.compiler_options(mesh, as_graph=True, has_loop=True, is_concurrent=True)
    assert both is not None and set(both) - set(graph) == {loop, "xla_gpu_command_buffer_scheduling_mode"}
