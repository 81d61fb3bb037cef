"""An adapter's pages, read as the kernels read them, add up to its updates; what it lacks is zeros or NaN there."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.config import ModelConfig
from qwen2_jax.lora.adapter import Adapter, LowRank
from qwen2_jax.lora.pages import Page, PageLayout
from qwen2_jax.lora.targets import targets
from qwen2_jax.models.adapters import MODULES, PROJECTIONS
from qwen2_jax.models.weight_layout import WeightLayout
from tests.lora.adapters import base_config

# Two devices and one KV head: it is copied, the second copy has a query slot of zeros, and so is one column.
SPLIT = base_config("heads_7_1", intermediate_size=97)
CASES = {"one device": (base_config(), 1), "two devices": (SPLIT, 2)}
Update = tuple[int, str, int]
"""A layer, a module and a rank."""


def make_layout(config: ModelConfig, tp: int, dtype: str = "float32") -> PageLayout:
    return PageLayout(config, WeightLayout.on(config, tp), dtype)


def make_adapter(config: ModelConfig, *updates: Update, extras: bool = False, **changes: object) -> Adapter:
    rng, linear = np.random.default_rng(0), {}
    for layer, name, rank in updates:
        target = targets(config)[name]
        linear[layer, name] = LowRank(
            a=rng.standard_normal((rank, target.in_features)).astype(np.float32),
            b=rng.standard_normal((target.out_features, rank)).astype(np.float32),
            scaling=float(rng.uniform(0.5, 2)),
            bias=rng.standard_normal(target.out_features).astype(np.float32) if extras else None,
            magnitude=rng.uniform(1, 2, target.out_features).astype(np.float32) if extras else None,
        )
    nothing = {field.name: None for field in dataclasses.fields(Adapter)}
    return Adapter(**(nothing | {"linear": linear, "biases": {}, "digest": ""} | changes))  # pyright: ignore[reportArgumentType]


def module_index(name: str) -> tuple[str, int]:
    """Return the fused projection of a module, and its index there."""
    return next((fused, names.index(name)) for fused, names in PROJECTIONS.items() if name in names)


def padded_inputs(config: ModelConfig, tp: int, name: str, x: np.ndarray) -> np.ndarray:
    """Lay out inputs [in] as the projection gets them; what is padding there is 7, which must not count."""
    layout = WeightLayout.on(config, tp)
    if name == "o_proj":
        heads = layout.heads
        out = np.full((heads.padded_kv_heads, heads.padded_group, config.head_dim), 7, np.float32)
        for kv_head, slots in enumerate(heads.q_source):
            for slot, source in enumerate(slots):
                if source is not None:
                    out[kv_head, slot] = x.reshape(-1, config.head_dim)[source]
        return out
    if name == "down_proj":
        return np.pad(x, (0, layout.intermediate_size - len(x)), constant_values=7)
    return x


def padded_outputs(config: ModelConfig, tp: int, name: str, y: np.ndarray) -> np.ndarray:
    """Lay out a module's outputs [out] as its fused projection has them, zeros elsewhere."""
    fused, index = module_index(name)
    layout = WeightLayout.on(config, tp)
    if fused == "gate_up":
        out = np.zeros((2, layout.intermediate_size), np.float32)
        out[index, : len(y)] = y
        return out
    if fused != "qkv":
        return y
    heads = layout.heads
    rows = y.reshape(-1, config.head_dim)
    out = np.zeros((heads.padded_kv_heads, heads.padded_group + 2, config.head_dim), np.float32)
    for kv_head, slots in enumerate(heads.q_source):
        if index:
            out[kv_head, heads.padded_group + index - 1] = rows[heads.kv_source[kv_head]]
            continue
        for slot, source in enumerate(slots):
            if source is not None:
                out[kv_head, slot] = rows[source]
    return out


def others(config: ModelConfig, tp: int, name: str) -> np.ndarray:
    """Return where the outputs of the fused projection's other modules are."""
    names = set(PROJECTIONS[module_index(name)[0]]) - {name}
    sizes = {other: targets(config)[other].out_features for other in names}
    return np.any([padded_outputs(config, tp, other, np.ones(size)) for other, size in sizes.items()], axis=0)


def apply(pages: list[Page], layer: int, name: str, x: np.ndarray) -> np.ndarray:
    """Return what the pages add to the fused projection for inputs of one of its modules."""
    fused, index = module_index(name)
    total = np.float32(0)
    for page in pages:
        factors = page.factors[fused]
        a, b = factors.a[layer, index], factors.b[layer] * factors.scaling[layer]
        total = total + b @ (a.reshape(len(a), -1) @ x.reshape(-1))
    return np.asarray(total)


def check(config: ModelConfig, tp: int, adapter: Adapter) -> list[Page]:
    """Compare every module of every layer with its update, the outputs of the projection's other modules left out."""
    pages = make_layout(config, tp).pages(adapter)
    rng = np.random.default_rng(1)
    for layer in range(config.num_hidden_layers):
        for name in MODULES:
            update = adapter.linear.get((layer, name))
            x = rng.standard_normal(targets(config)[name].in_features).astype(np.float32)
            y = np.zeros(targets(config)[name].out_features) if update is None else update.b @ (update.a @ x)
            expected = padded_outputs(config, tp, name, y * (1 if update is None else update.scaling))
            found = apply(pages, layer, name, padded_inputs(config, tp, name, x)) * ~others(config, tp, name)
            np.testing.assert_allclose(found, expected if pages else 0 * found, rtol=1e-4, atol=1e-4)
    return pages


def check_where_given(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(found[expected != 0], expected[expected != 0])


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=20, derandomize=True)
@given(data=st.data())
def test_pages_add_up_to_the_updates(case: str, data: st.DataObject) -> None:
    config, tp = CASES[case]
    update = st.tuples(st.integers(0, 2), st.sampled_from(MODULES), st.integers(1, 40))
    updates = data.draw(st.lists(update, max_size=8, unique_by=lambda drawn: drawn[:2]))
    pages = check(config, tp, make_adapter(config, *updates))
    assert len(pages) == -(-max((rank for *_, rank in updates), default=0) // 16)
    for index, page in enumerate(pages):
        present = {name for _, name, rank in updates if rank > 16 * index}
        assert {name for bit, name in enumerate(MODULES) if page.modules >> bit & 1} == present


def test_ranks_behind_the_last_are_zeros_and_the_scaling_is_kept_apart() -> None:
    """The device multiplies in float32: a factor in bfloat16 is not rounded a second time."""
    adapter = make_adapter(base_config(), (1, "up_proj", 18))
    update = adapter.linear[1, "up_proj"]
    _, last = make_layout(base_config(), 1, "bfloat16").pages(adapter)
    factors = last.factors["gate_up"]
    assert factors.a.dtype == factors.b.dtype == "bfloat16" and factors.scaling.dtype == np.float32
    np.testing.assert_array_equal(factors.a[1, 1, :2], update.a[16:].astype("bfloat16"))
    np.testing.assert_array_equal(factors.b[1, 1, :, :2], update.b[:, 16:].astype("bfloat16"))
    assert factors.scaling[1, 1] == np.float32(update.scaling)
    assert not factors.a[1, 1, 2:].any() and not factors.b[1, 1, :, 2:].any()
    assert not factors.a[:, 0].any() and not factors.a[[0, 2]].any() and not factors.b[[0, 2]].any()


@pytest.mark.parametrize("case", CASES)
def test_vectors_lie_as_the_outputs_do(case: str) -> None:
    config, tp = CASES[case]
    q_bias = np.arange(1, 1 + config.num_attention_heads * config.head_dim, dtype=np.float32)
    adapter = make_adapter(config, (2, "v_proj", 4), (0, "gate_proj", 4), extras=True, biases={(1, "q_proj"): q_bias})
    vectors = make_layout(config, tp).vectors(adapter)
    assert vectors is not None
    for layer, name in adapter.linear:
        fused, update = module_index(name)[0], adapter.linear[layer, name]
        assert update.bias is not None and update.magnitude is not None
        bias = padded_outputs(config, tp, name, update.bias * np.float32(update.scaling))
        np.testing.assert_array_equal(vectors.bias[fused][layer], bias)
        check_where_given(vectors.magnitude[fused][layer], padded_outputs(config, tp, name, update.magnitude))
    check_where_given(vectors.replaced_bias[1], padded_outputs(config, tp, "q_proj", q_bias))


def test_without_biases_and_magnitudes_there_are_no_vectors() -> None:
    layout = make_layout(base_config(), 1)
    assert layout.vectors(make_adapter(base_config(), (0, "q_proj", 4))) is None
    bias = {(0, "k_proj"): np.ones(32, np.float32)}
    vectors = layout.vectors(make_adapter(base_config(), biases=bias))
    assert vectors is not None
    given = ~np.isnan(vectors.replaced_bias)
    assert given[0, :, -2].all() and given.sum() == 32
    assert all(np.isnan(part).all() for part in vectors.magnitude.values())
    assert not any(part.any() for part in vectors.bias.values())
