"""Which blocks of the paged cache are in use, by how many sequences, and in what order free ones are handed out."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from qwen2_jax.errors import CapacityError

NULL_BLOCK = 0
"""The block that is never handed out: entries of a block table that no longer matter point at it."""


class BlockPool:
    """Reference counts and a free list over the blocks `1 .. num_blocks - 1`.

    Free blocks keep their contents until they are handed out again, least recently used first, so that a prefix cache
    can bring one back with `touch`. Every operation takes constant time per block.
    """

    def __init__(self, num_blocks: int) -> None:
        """Make a pool of `num_blocks` blocks, the null block included; `CapacityError` if none is left to hand out."""
        if num_blocks < 2:
            raise CapacityError(
                f"num_blocks={num_blocks} leaves no block besides the null block; at least 2 are needed"
            )
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that no sequence refers to."""
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out at all: all but the null block."""
        return self.num_blocks - 1

    def ref_count(self, block: int) -> int:
        """How many sequences refer to `block`."""
        return self._ref_counts[block]

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` free blocks, least recently freed first; `CapacityError` if there are fewer."""
        if count > self.num_free:
            raise CapacityError(f"{count} blocks were asked for and {self.num_free} of {self.num_usable} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def touch(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of `blocks`, taking it off the free list if it is there."""
        for block in blocks:
            if block == NULL_BLOCK:
                raise ValueError("the null block cannot be shared")
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each of `blocks`; null entries are skipped.

        The last block joins the free list first, to be reused first: the tail of a chain is useless without its head.
        """
        for block in reversed(blocks):
            if block == NULL_BLOCK:
                continue
            if self._ref_counts[block] == 0:
                raise ValueError(f"block {block} is freed but no sequence refers to it")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless every block is either free or referred to, and the null block neither."""
        unreferenced = {block for block in range(1, self.num_blocks) if self._ref_counts[block] == 0}
        if unreferenced != set(self._free):
            raise AssertionError(f"blocks both free and in use, or neither: {sorted(unreferenced ^ set(self._free))}")
        if min(self._ref_counts) < 0 or self._ref_counts[NULL_BLOCK]:
            raise AssertionError("a reference count is negative, or the null block has one")
