"""The attention kernel for NVIDIA Hopper that `flash_attention.mosaic` and `paged_attention.mosaic` share.

Its design is FlashAttention-3's (Shah et al. 2024), in Pallas Mosaic GPU. A program of the grid runs a warpgroup that
copies tiles of keys and values to shared memory with TMA, and two or three that each attend with 64 queries: QK^T and
PV on the tensor cores (wgmma), between them an online softmax in base 2. Consumers take turns at issuing products, so
that one's softmax runs beside another's products; each also issues the next QK^T together with the last PV.

What is attended lies in a table of tiles (`hopper_tiles`): up to 64 * consumers queries of one row, and the blocks of
keys they see. Programs are as many as the GPU has SMs; each works off tiles of falling cost (`hopper_program`).
"""

import functools

import jax
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen2_kernels.hopper_config import ALIGNMENT, Config, Mask
from qwen2_kernels.hopper_program import Locate, program
from qwen2_kernels.lowering import lowered_once


@functools.partial(lowered_once, static_argnames=("config", "copies", "locate", "mask", "out_scale", "scale"))
def attend(
    q: Array,
    k: Array,
    v: Array,
    tiles: tuple[Array, Array],
    *indices: Array,
    locate: Locate,
    copies: int = 1,
    scale: float,
    out_scale: float = 1.0,
    mask: Mask,
    config: Config,
) -> Array:
    """Run the kernel on arrays that `hopper_config.unsupported` does not object to.

    Args:
        q: queries [T, N, H].
        k, v: keys and values [S, K, H]; query head n reads head n // (N / K).
        tiles: what `hopper_tiles.make_tiles` returns.
        indices: what else `locate` reads, in the GPU's memory.
        locate: `locate(tile, position, *indices)` returns where on S each of a block's `copies` equal parts starts: a
            multiple of 8. The block holds the keys from `position` on. Equal ones (`==`) do the same.
        copies: how many parts a block has.
        scale, out_scale: what logits and results are multiplied by.
        mask: which keys a query sees.
        config: how the kernel is laid out.

    Returns:
        [T, N, H] in `q`'s dtype; tokens of no tile are not written.
    """
    heads, head_dim = q.shape[1:]
    transforms = (
        # Pyright takes them for abstract: JAX's own base class has a method that they do not need.
        plgpu.TilingTransform((ALIGNMENT, 64)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )
    smem = functools.partial(plgpu.SMEM, dtype=q.dtype, transforms=transforms)
    blocks = smem((config.stages, config.kv_tile, head_dim))
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages)
    empty = plgpu.Barrier(num_arrivals=config.consumers, num_barriers=config.stages)
    kernel = plgpu.kernel(
        functools.partial(
            program,
            locate=locate,
            scale=scale,
            out_scale=out_scale,
            mask=mask,
            config=config,
            group=heads // k.shape[1],
        ),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(tiles[0].shape[0] * heads if config.programs is None else config.programs,),
        grid_names=("program",),
        num_threads=config.consumers + 1,
        thread_name="warpgroup",
        kernel_name="hopper_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        scratch_types=dict(
            q=smem((config.query_buffers, config.query_tile, head_dim)),
            out=smem((config.query_tile, head_dim)),
            k=blocks,
            v=blocks,
            q_full=plgpu.Barrier(num_barriers=config.query_buffers),
            q_empty=plgpu.Barrier(num_arrivals=config.consumers, num_barriers=config.query_buffers),
            k_full=full,
            k_empty=empty,
            v_full=full,
            v_empty=empty,
        ),
    )
    return kernel(q, k, v, *tiles, *indices)
