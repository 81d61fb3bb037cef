"""A program that one process lowers and another compiles: as bytes, which know neither devices nor Python."""

import dataclasses
import pickle
from typing import Any

import jax
from jax import export
from jax.sharding import AbstractMesh

from qwen2_jax.engine.compilation import ProgramSpec

_KERNELS = ("mosaic_gpu_v2", "triton_kernel_call_ffi")
"""Custom calls of which JAX does not promise that another version knows them; both processes have one version."""


def export_program(spec: ProgramSpec, mesh: AbstractMesh) -> bytes:
    """Trace and lower a program for the devices that `mesh` describes, which need not be here."""
    arguments, structure = jax.tree.flatten(spec.arguments)
    results = None

    def function(*leaves: Any) -> list[Any]:
        nonlocal results
        outputs, results = jax.tree.flatten(spec.function(*jax.tree.unflatten(structure, leaves)))
        return outputs

    platform: str = mesh.abstract_device.platform
    lower = export.export(
        jax.jit(function),
        platforms=("cuda" if platform == "gpu" else platform,),
        disabled_checks=[export.DisabledSafetyCheck.custom_call(name) for name in _KERNELS],
    )
    with jax.sharding.use_abstract_mesh(mesh), jax.default_matmul_precision(spec.matmul_precision):
        exported = lower(*arguments)
    # Nobody differentiates it, and functions cannot be pickled.
    return pickle.dumps((dataclasses.replace(exported, _get_vjp=None), results))


def import_program(data: bytes, spec: ProgramSpec) -> ProgramSpec:
    """Return `spec` with what `export_program` gave of it in the place of its function: there is little to lower."""
    exported, results = pickle.loads(data)

    def function(*arguments: Any) -> Any:
        return jax.tree.unflatten(results, exported.call(*jax.tree.leaves(arguments)))

    return dataclasses.replace(spec, function=function)
