"""Gives requests their blocks: growth, sharing by fork and by prefix, release behind a sliding window."""

from collections import Counter
from collections.abc import Sequence

from qwen2_jax.cache.block_pool import NULL_BLOCK, BlockPool
from qwen2_jax.cache.prefix_cache import PrefixCache, block_key
from qwen2_jax.engine.request import Request, RequestStatus


def peak_blocks(num_tokens: int, *, block_size: int, max_step_tokens: int, release_window: int | None) -> int:
    """Blocks that `num_tokens` tokens of one request hold at most; see `BlockManager` for the arguments."""
    needed = -(-num_tokens // block_size)
    if release_window is None:
        return needed
    return min(needed, -(-(release_window + max_step_tokens) // block_size) + 1)


class BlockManager:
    """The block pool and the prefix cache, as operations on requests."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_step_tokens: int,
        enable_prefix_caching: bool = True,
        release_window: int | None = None,
    ) -> None:
        """Manage `num_blocks` blocks of `block_size` tokens; a request computes at most `max_step_tokens` a step.

        `release_window` is the widest sliding window in tokens if every layer has one, else None.
        """
        self.pool = BlockPool(num_blocks)
        self.prefix_cache = PrefixCache()
        self._block_size = block_size
        self._max_step_tokens = max_step_tokens
        self._enable_prefix_caching = enable_prefix_caching
        self._release_window = release_window

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill or touch."""
        return -(-num_tokens // self._block_size)

    def peak_blocks(self, num_tokens: int) -> int:
        """Blocks that a request of `num_tokens` tokens holds at most, when its steps are confirmed one by one."""
        return peak_blocks(
            num_tokens,
            block_size=self._block_size,
            max_step_tokens=self._max_step_tokens,
            release_window=self._release_window,
        )

    def shared_blocks(self, request: Request) -> list[int]:
        """Return the computed blocks that `request` can start from: its leader's, else the prefix cache's.

        They never cover all known tokens: at least one is left to compute. No reference is taken.
        """
        leader = request.fork_of
        if leader is not None and leader.status is RequestStatus.RUNNING:
            blocks = leader.block_ids[: (request.num_prompt_tokens - 1) // self._block_size]
            if leader.num_computed_tokens >= request.num_prompt_tokens and NULL_BLOCK not in blocks:
                return blocks
        if not self._enable_prefix_caching or not request.use_prefix_cache:
            return []
        num_full = (request.num_tokens - 1) // self._block_size
        self._extend_keys(request, num_full)
        return self.prefix_cache.lookup(request.block_keys[:num_full])

    def admit(self, request: Request, shared: list[int], num_tokens: int, *, spare: int) -> bool:
        """Give `request` the `shared` blocks and new ones up to `num_tokens` tokens, or return False and do nothing.

        Later chunks need blocks too: it is admitted only if all its known tokens fit and `spare` blocks stay free.
        """
        num_shared = len(shared) * self._block_size
        num_hidden = self._num_hidden_blocks(num_shared)
        visible = shared[num_hidden:]
        revived = sum(self.pool.ref_count(block) == 0 for block in visible)
        missing = min(self.blocks_for(request.num_tokens) - num_hidden, self.peak_blocks(request.num_tokens))
        if missing - len(visible) + revived + spare > self.pool.num_free:
            return False
        self.pool.touch(visible)
        request.block_ids = [NULL_BLOCK] * num_hidden + visible
        request.num_known_blocks = request.num_released_blocks = num_hidden
        request.num_computed_tokens = request.num_confirmed_tokens = num_shared
        if request.num_preemptions == 0:
            request.num_cached_tokens = num_shared
        if self._enable_prefix_caching and request.use_prefix_cache:
            self.prefix_cache.record(queries=request.num_tokens, hits=num_shared)
        return self.grow([request], [num_tokens])

    def grow(self, requests: Sequence[Request], totals: Sequence[int]) -> bool:
        """Give each request the blocks for its total number of tokens, or return False and give none to any."""
        missing = [
            max(self.blocks_for(total) - len(request.block_ids), 0)
            for request, total in zip(requests, totals, strict=True)
        ]
        if sum(missing) > self.pool.num_free:
            return False
        for request, count in zip(requests, missing, strict=True):
            if count:
                blocks = self.pool.allocate(count)
                self.prefix_cache.forget(blocks)
                request.block_ids += blocks
        return True

    def confirm(self, request: Request, num_tokens: int) -> None:
        """Note that the first `num_tokens` tokens are computed: cache full blocks, release those out of the window."""
        request.num_confirmed_tokens = num_tokens
        num_full = num_tokens // self._block_size
        if num_full > request.num_known_blocks and self._enable_prefix_caching and not request.whole_prompt:
            self._extend_keys(request, num_full)
            for i in range(request.num_known_blocks, num_full):
                self.prefix_cache.insert(request.block_keys[i], request.block_ids[i])
            request.num_known_blocks = num_full
        if self._release_window is not None:
            self._release(request, self._num_hidden_blocks(num_tokens))

    def free(self, request: Request) -> None:
        """Take all blocks from `request`; what the prefix cache knows stays usable until it is overwritten."""
        self.pool.free(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = request.num_confirmed_tokens = 0
        request.num_known_blocks = request.num_released_blocks = 0

    def check_integrity(self, requests: Sequence[Request]) -> None:
        """Raise `AssertionError` unless exactly `requests` hold the blocks in use, each enough for its tokens."""
        self.pool.check_integrity()
        self.prefix_cache.check_integrity()
        held = Counter(block for request in requests for block in request.block_ids if block != NULL_BLOCK)
        for block in range(1, self.pool.num_blocks):
            if held[block] != self.pool.ref_count(block):
                raise AssertionError(f"block {block}: {self.pool.ref_count(block)} references, {held[block]} holders")
        for request in requests:
            if not request.num_confirmed_tokens <= request.num_computed_tokens <= request.num_tokens_with_in_flight:
                raise AssertionError(f"request {request.request_id!r} has confirmed more than it computed")
            if len(request.block_ids) < self.blocks_for(request.num_computed_tokens):
                raise AssertionError(f"request {request.request_id!r} has fewer blocks than its tokens need")

    def _num_hidden_blocks(self, num_tokens: int) -> int:
        if self._release_window is None:
            return 0
        # The next query, at position num_tokens, sees the keys at num_tokens - window + 1 and later.
        return max(num_tokens - self._release_window + 1, 0) // self._block_size

    def _release(self, request: Request, num_blocks: int) -> None:
        first = request.num_released_blocks
        if num_blocks > first:
            self.pool.free(request.block_ids[first:num_blocks])
            request.block_ids[first:num_blocks] = [NULL_BLOCK] * (num_blocks - first)
            request.num_released_blocks = num_blocks

    def _extend_keys(self, request: Request, num_blocks: int) -> None:
        keys, size = request.block_keys, self._block_size
        for i in range(len(keys), num_blocks):
            tokens = request.tokens(i * size, (i + 1) * size)
            keys.append(block_key(keys[-1] if keys else None, tokens, request.cache_salt))
