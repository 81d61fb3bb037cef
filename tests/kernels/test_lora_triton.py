"""What Triton makes of `lora_delta` and `lora_gated` at Qwen2.5's sizes: it compiles for an H100, with wide reads."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton.triton_lib
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from qwen2_kernels.lora import api, triton_expand, triton_gated, triton_shrink
from qwen2_kernels.lora.batch import DOWN_PROJECTION, GATE_UP_PROJECTION, O_PROJECTION, RANKS, LoRABatch, qkv_projection
from qwen2_kernels.lora.segments import build_lora_tables, table_sizes
from qwen2_kernels.specs import QWEN2_5

lora_delta: Any = api.lora_delta
lora_gated: Any = api.lora_gated
H100 = AbstractMesh(
    (), (), abstract_device=AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
)
NUM_PAGES = 64


def struct(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def abstract_batch(tokens: int, max_pages: int) -> LoRABatch:
    sizes = table_sizes(tokens, max_groups=32, max_pages=max_pages, num_pages=NUM_PAGES)
    tables = build_lora_tables(np.full(tokens, -1), [], sizes)
    tables = {name: struct(*table.shape, dtype=table.dtype) for name, table in tables.items()}
    make: Any = LoRABatch
    return make(**tables, tile=sizes.tile, max_pages=sizes.max_pages)


@functools.cache
def lowered(
    model: str, projection: str, tokens: int, max_pages: int = 1, *, vectors: bool = False, dtype: Any = jnp.bfloat16
) -> tuple[str, list[str]]:
    """The StableHLO of an op and the PTX of its kernels, compiled for an H100."""
    geometry = QWEN2_5[model]
    *columns, size = geometry.projections[projection]
    parts = {
        "qkv": qkv_projection(geometry.group, geometry.head_dim),
        "o": O_PROJECTION,
        "gate_up": GATE_UP_PROJECTION,
        "down": DOWN_PROJECTION,
    }[projection]
    x = struct(tokens, size, dtype=dtype)
    banks = (
        struct(NUM_PAGES, len(parts.modules), RANKS, size, dtype=dtype),
        struct(NUM_PAGES, RANKS, *columns, dtype=dtype),
    )
    rows = struct(8, *columns, dtype=jnp.float32) if vectors else None
    if projection == "gate_up":
        run = functools.partial(lora_gated, activation="silu")
        arguments = (x, struct(tokens, *columns, dtype=dtype), *banks)
        options = {"bias_bank": rows, "scale_bank": rows}
    else:
        run = functools.partial(lora_delta, projection=parts)
        arguments, options = (x, *banks), {"bias_bank": rows}
    binaries = []

    def compile_to_ptx(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        binaries.append(result.binary if isinstance(result.binary, str) else result.binary.decode())
        return result

    original = jax_triton.triton_lib.compile_ttir_to_ptx_inplace
    with pytest.MonkeyPatch.context() as patch, jax.sharding.use_abstract_mesh(H100):
        patch.setattr(jax_triton.triton_lib, "compile_ttir_to_ptx_inplace", compile_to_ptx)
        traced = jax.jit(run).trace(*arguments, abstract_batch(tokens, max_pages), **options)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text, binaries


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that other tests have compiled would not be compiled again."""
    for module in (triton_shrink, triton_expand, triton_gated):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(kernel, "_jT_kernel_cache", {}, raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("tokens, max_pages", [(1, 1), (32, 4), (128, 1), (128, 8), (8192, 4)])
@pytest.mark.parametrize("projection", ["qkv", "o", "gate_up", "down"])
@pytest.mark.parametrize("model", ["0.5b", "7b"])
def test_compiles_for_an_h100_with_wide_reads(model: str, projection: str, tokens: int, max_pages: int) -> None:
    text, binaries = lowered(model, projection, tokens, max_pages, vectors=tokens != 1)
    assert text.count("triton_kernel_call") == len(binaries) == 2
    for ptx in binaries:
        assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global", ptx)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
def test_steps_of_other_sizes_share_compiled_kernels() -> None:
    assert [len(lowered("1.5b", "down", tokens, 2)[1]) for tokens in (40, 64, 200)] == [2, 0, 0]


def test_auto_is_triton_on_a_gpu_where_dtypes_agree() -> None:
    for dtype, calls in ((jnp.float32, 2), (jnp.float16, 0)):
        assert lowered("0.5b", "o", 2, dtype=dtype)[0].count("triton_kernel_call") == calls
