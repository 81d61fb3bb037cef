"""Norms and cache writes that ask for the kernel that is read next: for which addresses, and on which GPUs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton.triton_lib
import numpy as np
import pytest
import triton.language as tl
from jax.sharding import AbstractDevice, AbstractMesh
from qwen2_kernels import rms_norm, write_kv
from qwen2_kernels.row_prefetch import LINE, MAX_TOKENS, MIN_TOKENS, NUM_BYTES, PROGRAM_ROWS, prefetch_programs
from qwen2_kernels.specs import QWEN2_5

from tests.kernels.interpreter import triton_interpreter

REQUEST = "cp.async.bulk.prefetch.L2.global"
TOKENS, KV_HEADS, GROUP, HEAD, SIZE = 3, 2, 3, 8, 24


def norm(kernel: Any, implementation: str = "triton") -> Any:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((TOKENS, SIZE), np.float32))
    return rms_norm(x, jnp.ones(SIZE), eps=1e-6, prefetch=kernel, implementation=implementation)


def write(kernel: Any, implementation: str = "triton") -> Any:
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((TOKENS, KV_HEADS, GROUP + 2, HEAD), np.float32))
    angles = jnp.asarray(rng.standard_normal((TOKENS, HEAD // 2), np.float32))
    pools = (jnp.zeros((2, 4, KV_HEADS, HEAD)), jnp.zeros((2, 4, KV_HEADS, HEAD)))
    slots = jnp.array([5, -1, 2])
    return write_kv(qkv, angles, angles, *pools, slots, prefetch=kernel, implementation=implementation)


def mesh(name: str) -> AbstractMesh:
    return AbstractMesh((), (), abstract_device=AbstractDevice(device_kind=name, platform="gpu", num_cores=132))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="looks into Triton's interpreter")
@pytest.mark.parametrize("run", [norm, write])
@pytest.mark.parametrize("rows", [1, PROGRAM_ROWS, 3 * PROGRAM_ROWS + 1])
def test_asks_for_the_beginning_of_each_row_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], rows: int
) -> None:
    asked: list[tuple[np.ndarray, np.ndarray]] = []

    def record(asm: Any, constraints: str, args: Any, **_: Any) -> Any:
        asked.append((args[0].handle.data.copy(), args[1].handle.data.copy()))
        return args[1]

    monkeypatch.setattr(tl, "inline_asm_elementwise", record)
    kernel = jnp.zeros((rows, 64))
    with triton_interpreter():
        plain, asking = run(None), run(kernel)
    jax.tree.map(np.testing.assert_array_equal, plain, asking)
    addresses = np.unique(np.concatenate([address for address, _ in asked]))
    assert len(addresses) == rows and set(np.diff(addresses)) <= {64 * 4}
    assert {int(size) for _, sizes in asked for size in np.unique(sizes)} == {64 * 4}


@pytest.mark.parametrize("run", [norm, write])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_other_implementations_do_not_ask(run: Callable[..., Any], implementation: str) -> None:
    kernel = jnp.zeros((8, SIZE))
    jax.tree.map(np.testing.assert_array_equal, run(None, implementation), run(kernel, implementation))


@pytest.mark.parametrize("model", QWEN2_5)
@pytest.mark.parametrize("name", ["qkv", "o", "gate_up"])
def test_what_is_asked_for_fits(model: str, name: str) -> None:
    kernel: Any = jax.ShapeDtypeStruct(QWEN2_5[model].projections[name], jnp.bfloat16)
    programs, sizes = prefetch_programs(kernel, MIN_TOKENS)
    rows, row_bytes = sizes["NEXT_ROWS"], sizes["NEXT_ROW_BYTES"]
    assert (programs - 1) * PROGRAM_ROWS < rows <= programs * PROGRAM_ROWS and rows * row_bytes == kernel.size * 2
    assert 0 < sizes["NEXT_BYTES"] <= row_bytes and sizes["NEXT_BYTES"] % 16 == 0
    assert rows * sizes["NEXT_BYTES"] <= max(NUM_BYTES, rows * LINE)


def test_many_tokens_and_other_kernels_ask_for_nothing() -> None:
    kernel: Any = jax.ShapeDtypeStruct((512, 64), jnp.bfloat16)
    assert prefetch_programs(kernel, MAX_TOKENS)[0] == 2
    odd: Any = jax.ShapeDtypeStruct((512, 60), jnp.bfloat16)
    refused = ((None, 2), (kernel, MIN_TOKENS - 1), (kernel, MAX_TOKENS + 1), (odd, 2))
    assert [prefetch_programs(*given)[0] for given in refused] == [0] * len(refused)


@pytest.mark.slow
@pytest.mark.parametrize(
    "gpu, tokens, asks",
    [("NVIDIA H100 80GB HBM3", 8, True), ("NVIDIA H100 80GB HBM3", 256, False), ("NVIDIA A100", 8, False)],
)
@pytest.mark.parametrize("op", ["rms_norm", "write_kv"])
def test_is_compiled_where_the_gpu_can_be_asked(gpu: str, tokens: int, asks: bool, op: str) -> None:
    def struct(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    kernel, angle = struct(3584, 3584), struct(tokens, 64, dtype=jnp.float32)
    run, arrays = {
        "rms_norm": (functools.partial(rms_norm, eps=1e-6), (struct(tokens, 3584), struct(3584))),
        "write_kv": (
            write_kv,
            (struct(tokens, 4, 9, 128), angle, angle, *[struct(9, 64, 4, 128)] * 2, struct(tokens, dtype=jnp.int32)),
        ),
    }[op]
    ptx = []

    def compile_to_ptx(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        ptx.append(result.binary if isinstance(result.binary, str) else result.binary.decode())
        return result

    original = jax_triton.triton_lib.compile_ttir_to_ptx_inplace
    with pytest.MonkeyPatch.context() as patch, jax.sharding.use_abstract_mesh(mesh(gpu)):
        patch.setattr(jax_triton.triton_lib, "compile_ttir_to_ptx_inplace", compile_to_ptx)
        jax.jit(run).trace(*arrays, prefetch=kernel).lower(lowering_platforms=("cuda",))
    assert (REQUEST in "".join(ptx)) == asks
