"""What XLA is told when it compiles for a GPU: above all, which programs' kernels become CUDA graphs."""

import functools
import logging

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen2_jax.parallel import replicated

logger = logging.getLogger(__name__)

Options = dict[str, bool | int | str]

_OPTIONS: Options = {
    # Its autotuning takes a third of the start, and what it finds is slower here than cuBLAS.
    "xla_gpu_enable_triton_gemm": False,
    # Time cuBLAS's candidates, without comparing their results with one another's.
    "xla_gpu_autotune_level": 1,
}
_EXPERIMENTAL_OPTIONS: Options = {
    # It compiles each fusion on its own to choose between emitters, which is almost half of the compilation.
    "xla_gpu_experimental_enable_fusion_autotuner": False,
}
"""Left out where XLA does not know them, as another version may."""
_NO_GRAPH: Options = {"xla_gpu_graph_min_graph_size": 2**30}
_CONCURRENT: Options = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
_WITH_LOOP: Options = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
}
"""XLA's own list, and loops."""


def is_gpu(mesh: Mesh) -> bool:
    """Return whether the devices of `mesh` are GPUs."""
    return mesh.devices.flat[0].platform == "gpu"


def compiler_options(
    mesh: Mesh, *, as_graph: bool = False, has_loop: bool = False, is_concurrent: bool = False
) -> Options | None:
    """Return the options to compile a program with for the devices of `mesh`; None where they are not GPUs.

    `as_graph` makes a CUDA graph of its kernels, which saves the host a launch for each. But a graph whose buffers have
    moved is brought up to date first, and the host waits until what is under way of it is done: for programs whose
    buffers stay where they are. `has_loop` makes its loop a node of that graph, and `is_concurrent` lets kernels that
    do not need one another run beside one another.
    """
    if not is_gpu(mesh):
        return None
    options = gpu_options(mesh)
    if not as_graph:
        return options | _NO_GRAPH
    return options | (_CONCURRENT if is_concurrent else {}) | (_WITH_LOOP if has_loop else {})


@functools.cache
def gpu_options(mesh: Mesh) -> Options:
    """Return what all programs for the GPUs of `mesh` have in common; finding out compiles something small."""
    known = dict(_OPTIONS)
    smallest = jax.jit(lambda: jnp.zeros(()), out_shardings=replicated(mesh)).lower()
    for name, value in _EXPERIMENTAL_OPTIONS.items():
        try:
            smallest.compile({name: value})
            known[name] = value
        except jax.errors.JaxRuntimeError as error:
            if f"No such compile option: '{name}'" not in str(error):
                raise
            logger.info("this version of XLA does not know the option %s", name)
    return known
