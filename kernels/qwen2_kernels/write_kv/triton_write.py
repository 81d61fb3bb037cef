"""`write_kv` as one Triton kernel: rotate, quantise and scatter, in place, one program per token tile and KV head."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

from qwen2_kernels.adapted import Adapted
from qwen2_kernels.launch import triton_call


@triton.jit
def _write_kv_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    bias_ptr,
    delta_ptr,
    scale_bank_ptr,
    scale_rows_ptr,
    k_pool_ptr,
    v_pool_ptr,
    q_ptr,
    num_tokens,
    part_size,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    GP: tl.constexpr,
    BT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_ADAPTED: tl.constexpr,
    k_inverse_scale: tl.constexpr,
    v_inverse_scale: tl.constexpr,
    limit: tl.constexpr,
):
    """qkv [PARTS, T, K, G+2, H], delta [T, K, G+2, H], scale_bank [V, K, G+2, H], bias [K, G+2, H] -> q [T, K, G, H],
    and rows of the pools [S, K, H] by slot.

    GP is G+1 as a power of two, part_size is T * K * (G+2) * H.
    """
    half: tl.constexpr = H // 2
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    kv_head = tl.program_id(1)
    is_token = token < num_tokens
    lane = tl.arange(0, half)
    head = tl.arange(0, GP)

    angle = token[:, None] * half + lane[None, :]
    cos = tl.load(cos_ptr + angle, mask=is_token[:, None], other=0.0)[:, None, :]
    sin = tl.load(sin_ptr + angle, mask=is_token[:, None], other=0.0)[:, None, :]
    group = (token.to(tl.int64) * K + kv_head) * (G + 2) * H
    source = group[:, None, None] + head[None, :, None] * H + lane[None, None, :]
    rotates = is_token[:, None, None] & (head < G + 1)[None, :, None]
    low = tl.load(qkv_ptr + source, mask=rotates, other=0.0).to(tl.float32)
    high = tl.load(qkv_ptr + source + half, mask=rotates, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        low += tl.load(qkv_ptr + part * part_size + source, mask=rotates, other=0.0).to(tl.float32)
        high += tl.load(qkv_ptr + part * part_size + source + half, mask=rotates, other=0.0).to(tl.float32)
    columns = kv_head * (G + 2) * H
    if IS_ADAPTED:
        scale_row = tl.load(scale_rows_ptr + token, mask=is_token, other=-1).to(tl.int64)
        scales = (scale_row * K * (G + 2) * H + columns)[:, None, None] + head[None, :, None] * H + lane[None, None, :]
        is_scaled = rotates & (scale_row >= 0)[:, None, None]
        low *= tl.load(scale_bank_ptr + scales, mask=is_scaled, other=1.0)
        high *= tl.load(scale_bank_ptr + scales + half, mask=is_scaled, other=1.0)
        low += tl.load(delta_ptr + source, mask=rotates, other=0.0).to(tl.float32)
        high += tl.load(delta_ptr + source + half, mask=rotates, other=0.0).to(tl.float32)
    if HAS_BIAS:
        shift = bias_ptr + kv_head * (G + 2) * H + head[:, None] * H + lane[None, :]
        has_shift = (head < G + 1)[:, None]
        low += tl.load(shift, mask=has_shift, other=0.0).to(tl.float32)[None, :, :]
        high += tl.load(shift + half, mask=has_shift, other=0.0).to(tl.float32)[None, :, :]
    rotated_low = low * cos - high * sin
    rotated_high = high * cos + low * sin

    target = ((token.to(tl.int64) * K + kv_head) * G * H)[:, None, None] + head[None, :, None] * H + lane[None, None, :]
    is_query = is_token[:, None, None] & (head < G)[None, :, None]
    tl.store(q_ptr + target, rotated_low.to(q_ptr.dtype.element_ty), mask=is_query)
    tl.store(q_ptr + target + half, rotated_high.to(q_ptr.dtype.element_ty), mask=is_query)

    slot = tl.load(slots_ptr + token, mask=is_token, other=-1)
    written = slot >= 0
    row = (slot.to(tl.int64) * K + kv_head) * H
    pool_type = k_pool_ptr.dtype.element_ty
    key_target = row[:, None, None] + lane[None, None, :] + head[None, :, None] * 0
    is_key = written[:, None, None] & (head == G)[None, :, None]
    key_low = tl.clamp(rotated_low * k_inverse_scale, -limit, limit)
    key_high = tl.clamp(rotated_high * k_inverse_scale, -limit, limit)
    tl.store(k_pool_ptr + key_target, key_low.to(pool_type), mask=is_key)
    tl.store(k_pool_ptr + key_target + half, key_high.to(pool_type), mask=is_key)

    column = tl.arange(0, H)
    source = group[:, None] + (G + 1) * H + column[None, :]
    is_value = written[:, None] & is_token[:, None]
    value = tl.load(qkv_ptr + source, mask=is_value, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        value += tl.load(qkv_ptr + part * part_size + source, mask=is_value, other=0.0).to(tl.float32)
    if IS_ADAPTED:
        scale_row = tl.load(scale_rows_ptr + token, mask=is_token, other=-1).to(tl.int64)
        scales = (scale_row * K * (G + 2) * H + columns + (G + 1) * H)[:, None] + column[None, :]
        value *= tl.load(scale_bank_ptr + scales, mask=is_value & (scale_row >= 0)[:, None], other=1.0)
        value += tl.load(delta_ptr + source, mask=is_value, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias_ptr + (kv_head * (G + 2) + G + 1) * H + column).to(tl.float32)[None, :]
    value = tl.clamp(value * v_inverse_scale, -limit, limit)
    tl.store(v_pool_ptr + row[:, None] + column[None, :], value.to(pool_type), mask=written[:, None])


def write_kv_triton(
    qkv: Array,
    cos: Array,
    sin: Array,
    k_pool: Array,
    v_pool: Array,
    slot_mapping: Array,
    bias: Array | None = None,
    adapted: Adapted | None = None,
    *,
    k_scale: float,
    v_scale: float,
) -> tuple[Array, Array, Array]:
    """See `api.write_kv`. `NotImplementedError` for head dims that are not powers of two."""
    tokens, kv_heads, slots, head_dim = qkv.shape[-4:]
    if head_dim & (head_dim - 1):
        raise NotImplementedError(f"write_kv: triton needs a head dim that is a power of two, not {head_dim}")
    group = slots - 2
    tile = 1 if tokens <= 1024 else 4
    k_ref, v_ref = jax.new_ref(k_pool), jax.new_ref(v_pool)
    info = jnp.finfo(k_pool.dtype)
    q = triton_call(
        qkv,
        cos,
        sin,
        slot_mapping,
        qkv if bias is None else bias,  # what is not there is never read
        *((qkv, qkv, qkv) if adapted is None else (adapted.delta, adapted.scale_bank, adapted.scale_rows)),
        k_ref,
        v_ref,
        kernel=_write_kv_kernel,
        out_type=jax.ShapeDtypeStruct((tokens, kv_heads, group, head_dim), qkv.dtype if bias is None else bias.dtype),
        grid=(triton.cdiv(tokens, tile), kv_heads),
        num_warps=4,
        num_stages=1,
        num_tokens=tokens,
        part_size=tokens * kv_heads * slots * head_dim,
        PARTS=qkv.shape[0] if qkv.ndim == 5 else 1,
        K=kv_heads,
        G=group,
        H=head_dim,
        GP=triton.next_power_of_2(group + 1),
        BT=tile,
        HAS_BIAS=bias is not None,
        IS_ADAPTED=adapted is not None,
        k_inverse_scale=1 / k_scale,
        v_inverse_scale=1 / v_scale,
        limit=float(info.max) if info.bits == 8 else float("inf"),
    )
    return q, jax.freeze(k_ref), jax.freeze(v_ref)
