"""The block pool: order of reuse, sharing, and its own mistakes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_jax.cache.block_pool import NULL_BLOCK, BlockPool
from qwen2_jax.errors import CapacityError


def test_hands_out_all_but_the_null_block() -> None:
    pool = BlockPool(5)
    assert (pool.num_usable, pool.num_free) == (4, 4)
    assert pool.allocate(4) == [1, 2, 3, 4]
    with pytest.raises(CapacityError, match="1 blocks were asked for and 0 of 4 are free"):
        pool.allocate(1)
    pool.check_integrity()


def test_a_pool_needs_a_block_besides_the_null_block() -> None:
    with pytest.raises(CapacityError, match="num_blocks=1 "):
        BlockPool(1)


def test_the_least_recently_freed_block_and_the_tail_of_a_chain_are_reused_first() -> None:
    pool = BlockPool(6)
    first, second = pool.allocate(2), pool.allocate(3)
    pool.free(second)
    pool.free(first)
    assert pool.allocate(5) == [*reversed(second), *reversed(first)]


def test_a_shared_block_is_free_after_its_last_reference() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.touch(blocks[:1])
    pool.free(blocks)
    assert pool.num_free == 1
    pool.free(blocks[:1])
    assert pool.num_free == 2
    pool.check_integrity()


def test_touch_takes_a_free_block_off_the_free_list() -> None:
    pool = BlockPool(4)
    pool.free(pool.allocate(3))
    pool.touch([2])
    assert pool.ref_count(2) == 1
    assert pool.allocate(2) == [3, 1]


def test_null_entries_are_skipped_when_freed_and_refused_when_shared() -> None:
    pool = BlockPool(3)
    pool.free([NULL_BLOCK, *pool.allocate(1), NULL_BLOCK])
    assert pool.num_free == 2
    with pytest.raises(ValueError, match="null block"):
        pool.touch([NULL_BLOCK])


def test_freeing_twice_is_an_error() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(ValueError, match="block 1 is freed"):
        pool.free(blocks)


def test_integrity_check_finds_a_lost_block() -> None:
    pool = BlockPool(3)
    pool._ref_counts[1] = 1
    with pytest.raises(AssertionError, match="in use"):
        pool.check_integrity()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), max_size=60))
def test_counts_match_a_model(steps: list[tuple[int, int]]) -> None:
    pool, model = BlockPool(8), dict.fromkeys(range(1, 8), 0)
    for action, number in steps:
        if action == 0 and number <= pool.num_free:
            for block in pool.allocate(number):
                assert model[block] == 0
                model[block] = 1
        elif action == 1 and number:
            pool.touch([number])
            model[number] += 1
        elif action == 2 and model.get(number):
            pool.free([number])
            model[number] -= 1
        assert pool.num_free == sum(count == 0 for count in model.values())
        pool.check_integrity()
