"""Launches of Mosaic kernels that several programs for a mesh of GPUs share."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from qwen2_kernels import lowering
from qwen2_kernels.linear.mosaic import linear_mosaic
from qwen2_kernels.lowering import lowered_once

DEVICE = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
FEATURES, SIZE = 256, 512


def mesh(*sizes: int) -> AbstractMesh:
    names = ("tp",) * len(sizes)
    return AbstractMesh(sizes, names, axis_types=(AxisType.Explicit,) * len(sizes), abstract_device=DEVICE)


def modules(tokens: int, scale: float, *sizes: int) -> list[str]:
    """Lower a program of two products on a mesh of these sizes; return the hashes of its Mosaic kernels."""

    def program(x: jax.Array, kernel: jax.Array) -> jax.Array:
        dtype = jnp.dtype(jnp.bfloat16)
        options: dict[str, Any] = {"eps": 1e-6, "activation": None, "out_dtype": dtype}
        island = functools.partial(linear_mosaic, norm_weight=None, bias=None, residual=None, **options)
        run = jax.shard_map(island, in_specs=(P(), P()), out_specs=P(), check_vma=False) if sizes else island
        return run(run(x, kernel)[:, :1] * jnp.ones_like(x), kernel) * scale

    with jax.sharding.use_abstract_mesh(mesh(*sizes)):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((tokens, SIZE), (FEATURES, SIZE))]
        text = jax.jit(program).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text)


@pytest.mark.parametrize("sizes", [(1,), (2,)])
def test_programs_for_a_mesh_have_the_same_module(sizes: tuple[int, ...]) -> None:
    lowering._export.cache_clear()
    first, second, other = modules(8, 1, *sizes), modules(8, 2, *sizes), modules(16, 1, *sizes)
    assert set(first) == set(second) and len(set(first)) == 1
    assert set(first).isdisjoint(other)
    assert lowering._export.cache_info().misses == 2


def test_without_a_mesh_each_program_has_its_own() -> None:
    """If this fails, JAX no longer numbers its modules, and half of what `lowered_once` is for has gone."""
    assert set(modules(8, 1)).isdisjoint(modules(8, 2))


def test_options_tell_launches_apart() -> None:
    traced: list[int] = []

    @functools.partial(lowered_once, static_argnames=("factor",))
    def launch(arrays: dict[str, jax.Array], *, factor: int) -> jax.Array:
        traced.append(factor)
        return arrays["a"] * factor + arrays["b"]

    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh(1)):
        for _ in range(2):
            program = jax.jit(lambda a, b: launch({"a": a, "b": b}, factor=2) + launch({"a": b, "b": a}, factor=3))
            text = program.trace(shape, shape).lower(lowering_platforms=("cuda",)).as_text()
            assert "dense<2.0" in text and "dense<3.0" in text
    assert traced == [2, 3]
    assert launch({"a": jnp.float32(5), "b": jnp.float32(1)}, factor=4) == 21


def test_what_a_launch_raises_comes_through_and_leaves_jax_as_it_was() -> None:
    @functools.partial(lowered_once, static_argnames=())
    def launch(x: jax.Array) -> jax.Array:
        raise ValueError(f"no tile for {x.shape}")

    before = dict(jax.config.values)
    with jax.sharding.use_abstract_mesh(mesh(1)), pytest.raises(ValueError, match=r"no tile for \(4,\)"):
        jax.jit(launch).trace(jax.ShapeDtypeStruct((4,), jnp.float32))
    assert jax.config.values == before
