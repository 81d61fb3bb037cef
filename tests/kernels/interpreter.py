"""Runs the Triton kernels of a module on the CPU, through Triton's interpreter, without torch.

The interpreter walks the grid program by program in numpy: it proves what a kernel computes, not how fast, nor that it
is free of races. bfloat16 is a plain integer to numpy: give it float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import jax_triton
import numpy as np
from triton.runtime.interpreter import InterpretedFunction, _patch_lang
from triton.runtime.jit import JITFunction


class HostTensor:
    """As much of a torch tensor as the interpreter touches: memory in numpy."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = jnp.dtype(array.dtype).name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "HostTensor":
        return self

    def cpu(self) -> "HostTensor":
        return self

    def new_empty(self, size: int, device: str) -> "HostTensor":
        return HostTensor(np.empty(size, self.array.dtype))

    def set_(self, storage: "HostTensor", *_: Any) -> None:
        self.array, self.dtype = storage.array, storage.dtype

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def copy_(self, other: "HostTensor") -> None:
        assert other.array is self.array


def interpreted_call(*args: Any, kernel: Any, out_type: Any, grid: tuple[int, ...], **options: Any) -> Any:
    """Stand in for `jax_triton.triton_call`, on concrete arrays."""
    constexprs = {name: value for name, value in options.items() if name not in ("num_warps", "num_stages")}
    tensors = [arg if isinstance(arg, int) else HostTensor(np.array(arg[...])) for arg in args]
    leaves, tree = jax.tree.flatten(out_type)
    outputs = [HostTensor(np.full(leaf.shape, np.nan if _is_float(leaf.dtype) else -7, leaf.dtype)) for leaf in leaves]
    InterpretedFunction(kernel.fn)[grid](*tensors, *outputs, **constexprs)
    for arg, tensor in zip(args, tensors, strict=True):
        if isinstance(arg, jax.Ref) and isinstance(tensor, HostTensor):
            arg[...] = jnp.asarray(tensor.array)
    return jax.tree.unflatten(tree, [jnp.asarray(output.array) for output in outputs])


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _call_interpreted(function: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
    scope = _patch_lang(function.fn)
    try:
        return InterpretedFunction(function.fn).rewrite()(*args, **kwargs)
    finally:
        scope.restore()


@contextmanager
def triton_interpreter() -> Iterator[None]:
    """Let every Triton kernel of the block run here; the ops must be called eagerly, not under `jax.jit`.

    On a GPU the kernels run there, compiled, and this does nothing.
    """
    if jax.default_backend() != "cpu":
        yield
        return
    with (
        mock.patch.object(jax_triton, "triton_call", interpreted_call),
        mock.patch.object(JITFunction, "__call__", _call_interpreted),  # functions that kernels call, Triton's own too
        np.errstate(all="ignore"),
    ):
        yield
