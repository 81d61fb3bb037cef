"""The mesh, and how heads are dealt out over devices that their number does not fit."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from qwen2_jax.errors import ConfigError
from qwen2_jax.parallel import TP, HeadLayout, make_mesh, out_sharding, pad_to_multiple, replicated

heads = st.tuples(st.integers(1, 8), st.integers(1, 12), st.sampled_from([1, 2, 3, 4, 6, 8, 16]))


@given(heads)
def test_every_query_head_lies_once_beside_its_kv_head(sizes: tuple[int, int, int]) -> None:
    kv_heads, group, tp = sizes
    layout = HeadLayout(kv_heads * group, kv_heads, tp)
    assert layout.padded_kv_heads == kv_heads * layout.copies == len(layout.kv_source) == len(layout.q_source)
    assert layout.padded_kv_heads % tp == 0
    assert all(len(slots) == layout.padded_group for slots in layout.q_source)
    placed = [(query, layout.kv_source[head]) for head, slots in enumerate(layout.q_source) for query in slots]
    real = [(query, source) for query, source in placed if query is not None]
    assert sorted(query for query, _ in real) == list(range(kv_heads * group))
    assert all(source == query // group for query, source in real)


@given(heads)
def test_copies_are_even_and_no_more_than_needed(sizes: tuple[int, int, int]) -> None:
    kv_heads, group, tp = sizes
    layout = HeadLayout(kv_heads * group, kv_heads, tp)
    assert {layout.kv_source.count(source) for source in range(kv_heads)} == {layout.copies}
    assert list(layout.kv_source) == sorted(layout.kv_source)
    assert layout.copies == 1 or kv_heads % tp
    loads = [sum(query is not None for query in slots) for slots in layout.q_source]
    assert max(loads) == layout.padded_group and max(loads) - min(loads) <= 1


@pytest.mark.parametrize(
    "sizes, kv_source, q_source",
    [
        ((4, 2, 1), (0, 1), ((0, 1), (2, 3))),
        ((4, 2, 2), (0, 1), ((0, 1), (2, 3))),
        ((4, 4, 2), (0, 1, 2, 3), ((0,), (1,), (2,), (3,))),
        ((4, 2, 4), (0, 0, 1, 1), ((0,), (1,), (2,), (3,))),
        ((7, 1, 2), (0, 0), ((0, 2, 4, 6), (1, 3, 5, None))),
        ((7, 1, 4), (0, 0, 0, 0), ((0, 4), (1, 5), (2, 6), (3, None))),
        (
            (14, 2, 4),
            (0, 0, 1, 1),
            ((0, 2, 4, 6), (1, 3, 5, None), (7, 9, 11, 13), (8, 10, 12, None)),
        ),
        ((2, 2, 4), (0, 0, 1, 1), ((0,), (None,), (1,), (None,))),
    ],
)
def test_layouts_literally(sizes: tuple[int, int, int], kv_source: tuple, q_source: tuple) -> None:
    layout = HeadLayout(*sizes)
    assert layout.kv_source == kv_source
    assert layout.q_source == q_source


@pytest.mark.parametrize(
    "size, multiple, expected", [(10, 4, 12), (12, 4, 12), (1, 4, 4), (151936, 4, 151936), (5, 1, 5)]
)
def test_pad_to_multiple(size: int, multiple: int, expected: int) -> None:
    assert pad_to_multiple(size, multiple) == expected


def test_a_mesh_of_the_first_devices() -> None:
    mesh = make_mesh(2)
    assert mesh.axis_names == (TP,) and mesh.shape[TP] == 2
    assert mesh.devices.tolist() == jax.devices()[:2]
    assert mesh.axis_types == (AxisType.Explicit,)
    assert replicated(mesh).is_fully_replicated


@pytest.mark.parametrize("size", [0, -1, 1000])
def test_a_mesh_needs_its_devices(size: int) -> None:
    count = len(jax.devices())
    with pytest.raises(
        ConfigError, match=rf"tensor_parallel_size={size} .* there are {count} \(cpu\): use 1 to {count}"
    ):
        make_mesh(size)


def test_an_out_sharding_counts_only_under_a_mesh() -> None:
    assert out_sharding(None, TP) is None
    with jax.set_mesh(make_mesh(2)):
        assert out_sharding(None, TP) == P(None, TP)
