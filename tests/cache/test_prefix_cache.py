"""The prefix cache: what a key depends on, and the longest known beginning."""

from collections.abc import Hashable

import pytest

from qwen2_jax.cache.prefix_cache import BlockKey, PrefixCache, block_key


def chain(*blocks: list[int], salt: Hashable = None) -> list[BlockKey]:
    keys: list[BlockKey] = []
    for tokens in blocks:
        keys.append(block_key(keys[-1] if keys else None, tokens, salt))
    return keys


def test_a_key_depends_on_all_tokens_before_and_on_the_salt() -> None:
    keys = {
        chain([1, 2], [3, 4])[1],
        chain([9, 2], [3, 4])[1],
        chain([1, 2], [3, 5])[1],
        chain([1, 2], [3, 4], salt="adapter")[1],
        chain([3, 4])[0],
        chain([1, 2])[0],
    }
    assert len(keys) == 6
    assert chain([1, 2], [3, 4]) == chain([1, 2], [3, 4])


def test_token_ids_do_not_run_together() -> None:
    assert chain([1, 23]) != chain([12, 3])
    assert chain([1, 0]) != chain([1 << 32, 0]) != chain([0, 1])


def test_lookup_gives_the_longest_known_beginning() -> None:
    cache, keys = PrefixCache(), chain([1], [2], [3])
    cache.insert(keys[0], 7)
    cache.insert(keys[2], 9)
    assert cache.lookup(keys) == [7]
    cache.insert(keys[1], 8)
    assert cache.lookup(keys) == [7, 8, 9]
    assert cache.lookup(chain([2], [3])) == []
    cache.check_integrity()


def test_the_first_of_two_equal_blocks_stays() -> None:
    cache, (key,) = PrefixCache(), chain([1])
    cache.insert(key, 3)
    cache.insert(key, 4)
    cache.forget([4])
    assert cache.lookup([key]) == [3]
    cache.check_integrity()


def test_forgotten_blocks_are_not_found() -> None:
    cache, keys = PrefixCache(), chain([1], [2])
    for key, block in zip(keys, (5, 6), strict=True):
        cache.insert(key, block)
    cache.forget([6, 1])
    assert cache.lookup(keys) == [5]
    assert len(cache) == 1
    cache.reset()
    assert cache.lookup(keys) == [] and len(cache) == 0


def test_counters_add_up_and_outlive_a_reset() -> None:
    cache = PrefixCache()
    cache.record(queries=10, hits=4)
    cache.record(queries=5, hits=0)
    cache.reset()
    assert (cache.queries, cache.hits) == (15, 4)


def test_integrity_check_finds_a_half_forgotten_block() -> None:
    cache, (key,) = PrefixCache(), chain([1])
    cache.insert(key, 3)
    del cache._keys[3]
    with pytest.raises(AssertionError, match="disagree"):
        cache.check_integrity()
