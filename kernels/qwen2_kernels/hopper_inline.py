"""Instructions that Pallas Mosaic GPU has no words for, for the attention kernel: see `hopper_attention`."""

from typing import Any

from jax import Array
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


def take_turns(action: str, index: Array) -> None:
    """Meet one other warpgroup at a hardware barrier.

    Args:
        action: "sync" waits for the other, "arrive" only lets it pass.
        index: the barrier's number, 0 to 15.
    """

    def emit(_: Any, barrier: Any) -> None:
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [barrier.registers[()]], f"bar.{action} $0, 256;", "r", has_side_effects=True)

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))(emit)
    inline(index)


def store_rows(out: Any, values: Array, token: Array, start: Array, stop: Array, column: Array) -> None:
    """Store rows of a result from registers, two elements at a time, where TMA would overwrite its neighbours.

    Args:
        out: the array in the GPU's memory [T, N, H]; N * H is at most 2 ** 31.
        values: rows [64, H] of 16-bit elements, in wgmma's layout: those of tokens `token`, `token` + 1 and so on.
        token: the first row's token.
        start, stop: rows of other tokens are left out.
        column: where on N * H the rows start.
    """

    def emit(_: Any, out: Any, values: Any, *scalars: Any) -> None:
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        token, start, stop, column = (scalar.registers[()] for scalar in scalars)
        stride = mgpu.c(ir.MemRefType(out.type).get_strides_and_offset()[0][0], i64)
        base = mgpu.utils.memref_ptr(out)
        indices = values.layout.thread_idxs(values.shape)
        for register, (row, col) in zip(values.registers.flat, indices, strict=True):
            at = arith.addi(token, arith.index_cast(i32, row))
            inside = arith.andi(
                arith.cmpi(arith.CmpIPredicate.sge, at, start), arith.cmpi(arith.CmpIPredicate.slt, at, stop)
            )
            offset = arith.muli(arith.extsi(i64, at), stride)
            offset = arith.addi(offset, arith.extsi(i64, arith.addi(column, arith.index_cast(i32, col))))
            pointer = mgpu.utils.getelementptr(base, [offset], values.mlir_dtype)
            ptx = "{ .reg .pred p; setp.ne.b32 p, $0, 0; @p st.global.b32 [$1], $2; }"
            operands = [arith.extui(i32, inside), pointer, mgpu.utils.bitcast(register, i32)]
            llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, ptx, "r,l,r", has_side_effects=True)

    splat = plgpu.Layout.WG_SPLAT
    arg_types = (plgpu.RefType(), plgpu.Layout.WGMMA, splat, splat, splat, splat)
    plgpu.inline_mgpu(arg_types=arg_types)(emit)(out, values, token, start, stop, column)
