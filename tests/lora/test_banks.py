"""Pages and vectors written to the devices are what the kernels read: factors times scaling and magnitude, biases."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from qwen2_jax.config import EngineConfig, LoadConfig
from qwen2_jax.engine.model_loader import LoadedModel, load_model
from qwen2_jax.lora.adapter import Adapter
from qwen2_jax.lora.banks import DeviceBanks
from qwen2_jax.models.adapters import PROJECTIONS
from qwen2_jax.models.weights import open_checkpoint
from tests.lora.adapters import GOLDEN, base_config, read_tensors
from tests.lora.test_pages import make_adapter, make_layout, module_index, padded_inputs, padded_outputs

CONFIG = base_config("heads_7_1")
MODULES = [name for names in PROJECTIONS.values() for name in names]
PAGES, ROW = [3, 1], 1


@pytest.fixture(scope="module", params=[1, 2], ids=["one device", "two devices"])
def tp(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def loaded(tp: int) -> LoadedModel:
    load, engine = LoadConfig(dtype="float32", use_tqdm_on_load=False), EngineConfig(tensor_parallel_size=tp)
    return load_model(open_checkpoint(GOLDEN / "heads_7_1"), CONFIG, load, engine)


@pytest.fixture(scope="module")
def banks(loaded: LoadedModel) -> Iterator[DeviceBanks]:
    """Room for two adapters of two pages each."""
    model = (loaded.config, loaded.graphdef, loaded.params, loaded.mesh, loaded.dtype)
    made = DeviceBanks(*model, num_pages=4, num_vectors=2, max_pages=2)
    made.compile()
    yield made
    for array in jax.tree.leaves(made.banks):
        array.delete()


def write(banks: DeviceBanks, tp: int, adapter: Adapter) -> None:
    """Write an adapter to `PAGES`, and its vectors to `ROW`."""
    layout = make_layout(CONFIG, tp)
    pages, vectors = layout.pages(adapter), layout.vectors(adapter)
    for number, page in zip(PAGES, pages, strict=False):
        banks.write_page(number, banks.place_page(page))
    if vectors is not None:
        banks.write_vectors(PAGES[: len(pages)], ROW, banks.place_vectors(vectors))


def read(banks: DeviceBanks, layer: int, fused: str, kind: str) -> np.ndarray:
    return np.asarray(getattr(getattr(banks.banks[layer], fused), kind))


def delta(banks: DeviceBanks, tp: int, layer: int, name: str, x: np.ndarray) -> np.ndarray:
    """Return what `PAGES` add to the outputs of a module's projection for its inputs, as the kernels do."""
    fused, index = module_index(name)
    a = read(banks, layer, fused, "a")[PAGES, index].reshape(len(PAGES) * 16, -1)
    b = read(banks, layer, fused, "b")[PAGES]
    return np.tensordot(a @ padded_inputs(CONFIG, tp, name, x).reshape(-1), b.reshape(-1, *b.shape[2:]), 1)


def weight(layer: int, name: str) -> np.ndarray:
    """Return the base's weight [out, in] of a module."""
    (found,) = (
        array
        for key, array in read_tensors(GOLDEN / "heads_7_1").items()
        if f".{layer}." in key and f".{name}.weight" in key
    )
    return found.astype(np.float64)


def own(tp: int, name: str, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a module's outputs where its projection has them, and a mask of these places."""
    return padded_outputs(CONFIG, tp, name, y), padded_outputs(CONFIG, tp, name, np.ones(len(y))) != 0


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "magnitudes and biases"])
def test_an_adapter_is_on_the_devices(banks: DeviceBanks, tp: int, extras: bool) -> None:
    updates = [(layer, name, 18 + layer) for layer in range(3) for name in MODULES]
    adapter, rng = make_adapter(CONFIG, *updates, extras=extras), np.random.default_rng(2)
    write(banks, tp, adapter)
    for (layer, name), update in adapter.linear.items():
        fused, change = module_index(name)[0], update.scaling * update.b.astype(np.float64) @ update.a
        scale = np.ones(len(change))
        if update.magnitude is not None and update.bias is not None:
            scale = update.magnitude / np.linalg.norm(weight(layer, name) + change, axis=1)
            for kind, vector in (("scale", scale), ("bias", update.scaling * update.bias)):
                expected, mask = own(tp, name, vector)
                np.testing.assert_allclose(read(banks, layer, fused, kind)[ROW][mask], expected[mask], rtol=1e-5)
        x = rng.standard_normal(update.a.shape[1]).astype(np.float32)
        expected, mask = own(tp, name, scale * (change @ x))
        np.testing.assert_allclose(delta(banks, tp, layer, name, x)[mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_what_is_written_is_finite_also_in_padding(banks: DeviceBanks, tp: int) -> None:
    """A padded head has weights of zero: a NaN there would spread through the product that leaves it out."""
    write(banks, tp, make_adapter(CONFIG, (0, "q_proj", 4), (1, "gate_proj", 4), extras=True))
    for layer, name in ((0, "qkv"), (1, "gate_up"), (2, "down")):
        for kind in ("a", "b", "bias", "scale"):
            assert np.isfinite(read(banks, layer, name, kind)).all(), (layer, name, kind)


def test_a_module_without_a_magnitude_keeps_its_scale(banks: DeviceBanks, tp: int) -> None:
    """Beside one with a magnitude: PEFT's configs can name both."""
    adapter = make_adapter(CONFIG, (0, "q_proj", 4), (0, "v_proj", 4), (0, "up_proj", 4), extras=True)
    plain = {key: dataclasses.replace(update, magnitude=None) for key, update in adapter.linear.items()}
    write(banks, tp, dataclasses.replace(adapter, linear=plain | {(0, "q_proj"): adapter.linear[0, "q_proj"]}))
    queries = own(tp, "q_proj", np.ones(56))[1]
    assert np.all(read(banks, 0, "qkv", "scale")[ROW][queries] != 1)
    for fused, name in (("qkv", "k_proj"), ("qkv", "v_proj"), ("gate_up", "up_proj")):
        size = {"up_proj": 96}.get(name, 8)
        np.testing.assert_array_equal(read(banks, 0, fused, "scale")[ROW][own(tp, name, np.ones(size))[1]], 1)


def test_a_replaced_bias_is_added_as_the_difference(banks: DeviceBanks, loaded: LoadedModel, tp: int) -> None:
    biases = {(1, "k_proj"): np.arange(8, dtype=np.float32)}
    write(banks, tp, make_adapter(CONFIG, (0, "q_proj", 4), biases=biases))
    keys = own(tp, "k_proj", np.ones(8))[1]
    base = np.asarray(loaded.params["model"]["layers"][1]["self_attn"]["qkv_proj"]["bias"])
    bias = read(banks, 1, "qkv", "bias")[ROW]
    np.testing.assert_allclose((base + bias)[keys], own(tp, "k_proj", biases[1, "k_proj"])[0][keys], atol=1e-6)
    assert not bias[~keys].any() and not read(banks, 0, "qkv", "bias")[ROW].any()


def test_other_pages_and_rows_stay_as_they_are(banks: DeviceBanks, tp: int) -> None:
    before = jax.tree.map(np.asarray, banks.banks)
    write(banks, tp, make_adapter(CONFIG, (2, "down_proj", 30), extras=True))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(jax.tree.map(np.asarray, banks.banks)), strict=True):
        kept = [0, 2] if len(old) == 4 else [0]
        np.testing.assert_array_equal(new[kept], old[kept])
