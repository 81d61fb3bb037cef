"""Lowers a launch of a Pallas Mosaic GPU kernel once in a process, for all programs that have it.

Lowering one takes tenths of a second of Python. XLA compiles one at a time, and none twice that it knows by the hash of
its module; but JAX numbers the modules in their text (`mosaic_gpu.dump_basename`), so that a kernel which is lowered
for each program is another kernel each time.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

from qwen2_kernels.dispatch import mesh_platform

_CUSTOM_CALL = "mosaic_gpu_v2"
_IGNORES_OLDER_VERSIONS = "jax_export_ignore_forward_compatibility"
_LOCK = threading.Lock()


def lowered_once[**A, O](launch: Callable[A, O], *, static_argnames: tuple[str, ...]) -> Callable[A, O]:
    """Return `launch` jitted; programs for a mesh of GPUs share what it is lowered to for equal shapes and options.

    `launch` takes trees of arrays by position, and by name the options of `static_argnames`. It should be the launch
    alone: XLA's own operations lose a little when they are exported. Every device of a mesh gets the same module.
    """
    jitted: Any = jax.jit(launch, static_argnames=static_argnames)

    @functools.wraps(launch)
    def run(*arrays: Any, **options: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh_platform() != "gpu":  # without a mesh, an interpreter may run it
            return jitted(*arrays, **options)
        leaves, structure = jax.tree.flatten(arrays)
        shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        with _LOCK:
            exported = _export(launch, mesh.abstract_device, structure, shapes, tuple(sorted(options.items())))
        return exported.call(*arrays)

    return run  # pyright: ignore[reportReturnType]


@functools.cache
def _export(
    launch: Callable[..., Any],
    device: AbstractDevice,
    structure: Any,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    options: tuple[tuple[str, Any], ...],
) -> export.Exported:
    lower = export.export(
        jax.jit(functools.partial(launch, **dict(options))),
        platforms=("cuda",),
        disabled_checks=[export.DisabledSafetyCheck.custom_call(_CUSTOM_CALL)],
    )
    ignored = jax.config.values[_IGNORES_OLDER_VERSIONS]
    try:
        jax.config.update(_IGNORES_OLDER_VERSIONS, True)  # the module stays in this process
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return lower(*jax.tree.unflatten(structure, shapes))
    finally:
        jax.config.update(_IGNORES_OLDER_VERSIONS, ignored)
