"""One vector carries a step's arrays to the device and gives them back bit by bit."""

import jax
import numpy as np
import pytest

from qwen2_jax.engine.step_inputs import (
    NOWHERE,
    SAMPLING_FLOATS,
    SAMPLING_INTS,
    Field,
    Layout,
    StepLoRA,
    allocate,
    decode_layout,
    packed_size,
    prefill_layout,
    sample_layout,
    sampling_layout,
    unpack,
)
from qwen2_jax.models.adapters import table_sizes

SPARE = 7
LORA = StepLoRA(tables=table_sizes(16, max_groups=3, max_pages=2), vocab=table_sizes(16, max_groups=1, max_pages=2))
LAYOUTS = {
    "decode": decode_layout(3, 5),
    "prefill": prefill_layout(16, 3, 5),
    "sample": sample_layout(3),
    "adapters": prefill_layout(16, 3, 5, LORA),
    "small": {"scalar": Field(()), "empty": Field((0,)), "table": Field((2, 3)), "floats": Field((4,), is_float=True)},
}


def fill(views: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    for view in views.values():
        view[...] = rng.integers(-(2**31), 2**31, view.shape).astype(np.int32)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_packed_comes_out(layout: Layout) -> None:
    packed, views = allocate(layout, SPARE)
    assert packed.shape == (packed_size(layout),) and packed.dtype == np.int32
    fill(views)
    arrays = jax.jit(lambda vector: unpack(vector, layout))(packed)
    assert arrays.keys() == views.keys() == layout.keys()
    for name, field in layout.items():
        assert arrays[name].shape == views[name].shape == field.shape
        assert arrays[name].dtype == views[name].dtype == (np.float32 if field.is_float else np.int32)
        np.testing.assert_array_equal(arrays[name], views[name])


@pytest.mark.parametrize("name", ["decode", "prefill", "sample", "adapters"])
def test_what_is_not_filled_is_padding(name: str) -> None:
    _, views = allocate(LAYOUTS[name], SPARE)
    expected = {"row_indices": SPARE, "token_rows": SPARE, "sample_positions": NOWHERE, "num_steps": 1, "top_p": 1}
    expected |= dict.fromkeys(("slot_mapping", "last_positions", "num_logprobs", "scale_rows", "full_head_rows"), -1)
    expected |= {"repetition_penalty": 1, "full_embed_rows": -1, "vector_rows": -1}
    assert all(np.all(view == expected.get(field, 0)) for field, view in views.items())


def test_floats_keep_their_bits() -> None:
    layout = {"before": Field((1,)), "floats": Field((6,), is_float=True)}
    packed, views = allocate(layout, SPARE)
    views["floats"][:] = [0.1, -0.0, np.inf, -np.inf, np.nan, np.finfo(np.float32).tiny]
    out = np.asarray(unpack(jax.numpy.asarray(packed), layout)["floats"])
    assert out.tobytes() == views["floats"].tobytes()


def test_fields_do_not_overlap() -> None:
    packed, views = allocate(LAYOUTS["prefill"], SPARE)
    for number, view in enumerate(views.values(), 1):
        view.view(np.int32)[...] = number
    counts = np.bincount(packed, minlength=len(views) + 1)
    assert counts[1:].tolist() == [view.size for view in views.values()]
    assert counts[0] == len(packed) - sum(view.size for view in views.values())


def test_fields_start_at_256_bytes() -> None:
    packed, views = allocate(LAYOUTS["prefill"], SPARE)
    assert [(view.ctypes.data - packed.ctypes.data) % 256 for view in views.values()] == [0] * len(views)


def test_both_layouts_carry_what_the_sampler_needs() -> None:
    sampling = sampling_layout(3)
    assert list(sampling) == [*SAMPLING_INTS, *SAMPLING_FLOATS]
    assert all(sampling[name].is_float == (name in SAMPLING_FLOATS) for name in sampling)
    for name in ("decode", "sample"):
        assert sampling.items() <= LAYOUTS[name].items()
    for name in ("decode", "prefill"):
        assert LAYOUTS[name]["block_tables"].shape == (3, 5)
    assert LAYOUTS["prefill"]["query_start_loc"].shape == (4,)


def test_adapters_are_carried_beside_the_rest() -> None:
    """A step without adapters is a shorter one with the same fields."""
    assert LAYOUTS["prefill"].items() < LAYOUTS["adapters"].items()
    assert LAYOUTS["adapters"]["item_weights"].is_float and LAYOUTS["adapters"]["scale_rows"].shape == (16,)
    assert sample_layout(3, StepLoRA(tables=LORA.tables)) == sample_layout(3)
