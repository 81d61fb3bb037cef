"""Reading an adapter's tensors: as safetensors reads them, in pieces, with what is not finite named."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora import tensors as reading
from qwen2_jax.lora.config import AdapterConfig
from qwen2_jax.lora.files import read_config, read_entries
from qwen2_jax.lora.tensors import Weights, read_weights
from tests.lora.adapters import write_adapter

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
SHAPES = ((3, 5), (7,), (2, 40), (1, 1), (64,), (0, 4))


@pytest.fixture
def config(tmp_path: Path) -> AdapterConfig:
    return read_config(write_adapter(tmp_path))


@pytest.fixture(params=[8, 64, 4 << 20])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(reading, "_PIECE", request.param)
    return request.param


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"{index}.{np.dtype(dtype).name}": rng.standard_normal(shape).astype(dtype)
        for index, shape in enumerate(SHAPES)
        for dtype in DTYPES
    }


def read(config: AdapterConfig, file: Path, *, without: str | None = None) -> Weights:
    return read_weights(config, file, {name: e for name, e in read_entries(file).items() if name != without})


def test_tensors_are_those_of_safetensors(
    config: AdapterConfig, tensors: dict[str, np.ndarray], piece: int, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    found, expected = read(config, tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert found.arrays.keys() == expected.keys() and found.not_finite == frozenset()
    for name, array in expected.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(
    config: AdapterConfig, tensors: dict[str, np.ndarray], piece: int, value: float, tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    bad = [f"2.{np.dtype(dtype).name}" for dtype in DTYPES]
    for name in bad:
        changed = {other: array.copy() for other, array in tensors.items()}
        changed[name][-1, -1] = value
        save_file(changed, file)
        assert read(config, file).not_finite == {name}
        assert read(config, file, without=name).not_finite == frozenset()


def test_the_digest_is_that_of_the_content(
    config: AdapterConfig, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    digests = []
    for index, name in enumerate(("a", "b", "c")):
        tensors["0.float32"][0, 0] = index // 2
        save_file(tensors, tmp_path / name)
        digests.append(read(config, tmp_path / name).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_file_that_gets_shorter_under_the_reader_says_so(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(bytes(100))
    with file.open("rb") as stream, pytest.raises(OSError, match="ends after 100 bytes"):
        reading._read_piece(stream.fileno(), np.empty(64, np.uint8), 64)


def test_a_file_that_is_gone_says_so(config: AdapterConfig, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    entries = read_entries(file)
    file.unlink()
    with pytest.raises(AdapterError, match=r"x\.safetensors cannot be read"):
        read_weights(config, file, entries)
