"""Numbers as keys of 32 bits that order like them, in Triton: what is searched for is found a bit at a time."""

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """Return the keys of float32 numbers."""
    bits = x.to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@triton.jit
def as_float(keys):
    """Return the numbers of keys."""
    bits = tl.where(keys >> 31 != 0, keys & 0x7FFFFFFF, keys ^ 0xFFFFFFFF).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def largest(keys, weights, target):
    """Return the largest key from which on the weights add up to `target`, 0 if all of them do not."""
    found, bit = tl.full((), 0, tl.uint32), tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = found | bit
        reached = tl.sum(tl.where(keys >= candidate, weights, 0.0))
        found = tl.where(reached >= target, candidate, found)
        bit = bit >> 1
    return found
