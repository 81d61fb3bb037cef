"""Finds blocks whose keys and values are already computed for the beginning of a sequence."""

import hashlib
from array import array
from collections.abc import Hashable, Iterable, Sequence

BlockKey = tuple[Hashable, bytes]
"""What a full block is found by: the salt, and the digest of all tokens up to the end of the block."""


def block_key(parent: BlockKey | None, token_ids: Sequence[int], salt: Hashable) -> BlockKey:
    """Return the key of the block that holds `token_ids` and follows the block of key `parent` (None: the first one).

    The digest chains over every token before the block (BLAKE2b, 32 bytes: no two sequences share one by chance or by
    design). `salt` stands for everything else that changes keys and values; it is compared exactly.
    """
    digest = hashlib.blake2b(parent[1] if parent else b"", digest_size=32)
    digest.update(array("q", token_ids).tobytes())
    return salt, digest.digest()


class PrefixCache:
    """A map from block keys to blocks whose contents are computed.

    It holds no references: a block stays known while it lies on the pool's free list, and must be reported to `forget`
    when the pool hands it out again.
    """

    def __init__(self) -> None:
        self._blocks: dict[BlockKey, int] = {}
        self._keys: dict[int, BlockKey] = {}
        self.queries = 0
        self.hits = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def lookup(self, keys: Iterable[BlockKey]) -> list[int]:
        """Return the blocks of the longest known beginning of the chain `keys`."""
        found = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def insert(self, key: BlockKey, block: int) -> None:
        """Make a computed block known; of two blocks with the same contents the first one stays."""
        if key not in self._blocks:
            self._blocks[key] = block
            self._keys[block] = key

    def forget(self, blocks: Iterable[int]) -> None:
        """Forget blocks that are about to be overwritten; unknown ones are skipped."""
        for block in blocks:
            key = self._keys.pop(block, None)
            if key is not None:
                del self._blocks[key]

    def record(self, *, queries: int, hits: int) -> None:
        """Count one admitted sequence: tokens that were looked for and tokens that were found."""
        self.queries += queries
        self.hits += hits

    def reset(self) -> None:
        """Forget every block. The counters go on."""
        self._blocks.clear()
        self._keys.clear()

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless keys and blocks correspond one to one."""
        if {block: key for key, block in self._blocks.items()} != self._keys or len(self._blocks) != len(self._keys):
            raise AssertionError("the prefix cache's two maps disagree")
