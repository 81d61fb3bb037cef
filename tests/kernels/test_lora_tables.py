"""`build_lora_tables`: whatever the step, every token in one segment with its group's pages, within `table_sizes`."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen2_kernels.lora.segments import PageUse, TableSizes, TokenGroup, build_lora_tables, table_sizes


@st.composite
def steps(draw: st.DrawFn) -> tuple[np.ndarray, list[TokenGroup], TableSizes]:
    """Tokens, groups whose pages differ in number, and sizes that know no more than the step's limits."""
    lengths = draw(st.lists(st.integers(0, 5), max_size=6))
    first = np.cumsum([0, *lengths])
    groups = [
        TokenGroup(pages=tuple(PageUse(page=first[g] + i, modules=1 + g, weight=i + 0.5) for i in range(n)), vector=g)
        for g, n in enumerate(lengths)
    ]
    tokens = draw(st.lists(st.integers(-1, len(groups) - 1), min_size=1, max_size=90))
    num_pages = draw(st.sampled_from([None, max(1, sum(lengths))]))
    most = max([1, *lengths])
    sizes = table_sizes(
        len(tokens),
        max_groups=max(1, len(groups)),
        max_pages=most,
        num_pages=num_pages,
        max_runs=draw(st.sampled_from([None, 1 + sum(a != b for a, b in itertools.pairwise(tokens))])),
        tile=draw(st.integers(1, 20)),
        window=draw(st.sampled_from([None, 1, 7, 16, 40])),
    )
    return np.array(tokens), groups, sizes


@given(steps())
def test_every_token_gets_its_groups_pages(step: tuple[np.ndarray, list[TokenGroup], TableSizes]) -> None:
    token_groups, groups, sizes = step
    tables = build_lora_tables(token_groups, groups, sizes)
    assert sorted(tables["token_order"]) == list(range(len(token_groups)))
    starts, items = tables["segment_starts"], tables["segment_items"]
    [num_segments], [num_items] = tables["num_segments"], tables["num_items"]
    assert starts[0] == items[0] == 0
    assert (starts[num_segments:] == len(token_groups)).all() and (items[num_segments:] == num_items).all()
    for segment in range(num_segments):
        tokens = tables["token_order"][starts[segment] : starts[segment + 1]]
        assert 0 < len(tokens) <= sizes.tile
        [group] = set(token_groups[tokens])
        expected = groups[group] if group >= 0 else TokenGroup()
        assert tables["segment_vectors"][segment] == expected.vector
        listed = range(items[segment], items[segment + 1])
        found = [[tables[f"item_{name}"][i] for name in ("pages", "modules", "weights")] for i in listed]
        assert found == [[use.page, use.modules, use.weight] for use in expected.pages]
        assert all(tables["item_segments"][i] == segment for i in listed)
        first = (tables["segment_pages"][segment], tables["segment_modules"][segment])
        assert first == ((found[0][0], found[0][1]) if found else (0, 0))
        for i in listed:
            assert (tables["item_starts"][i], tables["item_counts"][i]) == (starts[segment], len(tokens))
            assert tables["item_rows"][i] == starts[segment] * sizes.max_pages + (i - items[segment]) * len(tokens)
        assert sizes.window is None or len(set(tokens // sizes.window)) == 1
    assert not tables["segment_modules"][num_segments:].any() and not tables["item_counts"][num_items:].any()


@given(steps())
def test_windows_list_the_pages_of_their_tokens(step: tuple[np.ndarray, list[TokenGroup], TableSizes]) -> None:
    token_groups, groups, sizes = step
    tables = build_lora_tables(token_groups, groups, sizes)
    if sizes.window is None:
        assert "window_entries" not in tables
        return
    np.testing.assert_array_equal(
        tables["token_order"][tables["token_places"][: len(token_groups)]], np.arange(len(token_groups))
    )
    assert (tables["token_places"][len(token_groups) :] == -1).all()
    for window, (start, end) in enumerate(itertools.pairwise(tables["window_entries"])):
        tokens = token_groups[window * sizes.window : (window + 1) * sizes.window]
        expected = [
            (use.page, use.weight, int((tokens == group).sum()))
            for group in sorted(set(tokens) - {-1})
            for use in groups[group].pages
        ]
        items = tables["entry_items"][start:end]
        columns = (tables["item_pages"][items], tables["item_weights"][items], tables["entry_tokens"][start:end])
        assert list(zip(*columns, strict=True)) == expected
        for first in tables["token_order"][tables["segment_starts"][tables["item_segments"][items]]]:
            before = token_groups[window * sizes.window : first]
            assert first // sizes.window == window and token_groups[first] not in before


@given(steps())
def test_shapes_depend_on_the_sizes_alone(step: tuple[np.ndarray, list[TokenGroup], TableSizes]) -> None:
    token_groups, groups, sizes = step
    tables = build_lora_tables(token_groups, groups, sizes)
    none = build_lora_tables(np.full_like(token_groups, -1), [], sizes)
    assert {name: table.shape for name, table in tables.items()} == {name: table.shape for name, table in none.items()}
    assert none["num_items"] == [0]
    dtypes = {name: table.dtype for name, table in tables.items()}
    assert dtypes.pop("item_weights") == np.float32
    assert set(dtypes.values()) == {np.dtype(np.int32)}


def test_a_step_of_many_adapters_has_small_tables() -> None:
    sizes = table_sizes(256, max_groups=32, max_pages=8, num_pages=64)
    assert sizes == TableSizes(tile=16, max_pages=8, max_segments=33 + 223 // 16, max_items=64 + 15 * 8)
    assert table_sizes(1, max_groups=32, max_pages=1) == TableSizes(tile=16, max_pages=1, max_segments=1, max_items=1)
    assert table_sizes(257, max_groups=1, max_pages=1).tile == 64


def test_what_does_not_fit_is_refused() -> None:
    groups = [TokenGroup(pages=(PageUse(page=0, modules=1), PageUse(page=1, modules=1)))]
    sizes = table_sizes(4, max_groups=1, max_pages=1)
    with pytest.raises(ValueError, match=r"\{'pages': 2, .* do not fit \{'pages': 1, .*make table_sizes larger"):
        build_lora_tables(np.zeros(4, int), groups, sizes)
    with pytest.raises(ValueError, match=r"groups are -1 to 0, not \[0 2\]"):
        build_lora_tables(np.array([0, 2]), groups, sizes)
    with pytest.raises(ValueError, match=r"sizes are at least 1, not .*'max_pages': 0"):
        table_sizes(4, max_groups=1, max_pages=0)
