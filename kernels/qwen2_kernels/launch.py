"""How a Triton kernel becomes part of a JAX program. The only importer of jax-triton."""

from importlib.util import find_spec
from typing import Any


def has_triton() -> bool:
    """Whether this installation can compile Triton kernels (the `cuda` extra brings what they need)."""
    return find_spec("triton") is not None and find_spec("jax_triton") is not None


def triton_call(
    *args: Any,
    kernel: Any,
    out_type: Any = (),
    grid: Any,
    num_warps: int,
    num_stages: int,
    **constexprs: Any,
) -> Any:
    """Launch `kernel` on arrays, `jax.Ref`s and numbers, in the order of its parameters; `constexprs` go by name.

    A number that goes by its place is no constant of the compiled kernel. A `jax.Ref` argument is written in place.
    Pointers to the results, described by `out_type` (a pytree of `jax.ShapeDtypeStruct`), follow the arguments.
    """
    import jax_triton

    return jax_triton.triton_call(
        *args, kernel=kernel, out_type=out_type, grid=grid, num_warps=num_warps, num_stages=num_stages, **constexprs
    )
