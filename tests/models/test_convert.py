from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qwen2_jax.cli import main
from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import CheckpointError, ConfigError
from qwen2_jax.llm import LLM
from qwen2_jax.models.convert import convert
from qwen2_jax.models.weights import load_weights, open_checkpoint
from qwen2_jax.types import SamplingParams
from scripts.make_tiny_gguf import write_gguf
from scripts.make_tiny_model import make_tiny_model, tiny_config, tiny_tensors

GOLDEN = Path(__file__).parent.parent / "golden" / "tied"


def leaves(path: Path, dtype: Any) -> dict[tuple[Any, ...], np.ndarray]:
    """Return the model's tree at `path`, flat."""
    found: dict[tuple[Any, ...], np.ndarray] = {}
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_hf(checkpoint.config)
    load_weights(checkpoint, config, dtype=dtype, put=found.__setitem__, use_tqdm=False)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_keeps_the_bits_and_the_dtype(tmp_path: Path, dtype: str) -> None:
    source = make_tiny_model(tmp_path / "hf", torch_dtype=dtype)
    folder = convert(source, tmp_path / "new" / "orbax")
    kind = np.dtype(dtype)
    assert {entry.dtype for entry in open_checkpoint(folder).tensors.values()} == {dtype}
    ours, theirs = leaves(folder, kind), leaves(source, kind)
    assert {path: leaf.tobytes() for path, leaf in ours.items()} == {
        path: leaf.tobytes() for path, leaf in theirs.items()
    }


def test_another_dtype_rounds_once(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "hf")
    folder = convert(source, tmp_path / "orbax", dtype="bfloat16")
    assert ModelConfig.from_hf(open_checkpoint(folder).config).dtype == "bfloat16"
    ours, theirs = leaves(folder, ml_dtypes.bfloat16), leaves(source, np.float32)
    assert all(np.array_equal(ours[path], leaf.astype(ml_dtypes.bfloat16)) for path, leaf in theirs.items())


def test_gguf_keeps_its_tokenizer(tmp_path: Path) -> None:
    config = tiny_config()
    source = write_gguf(tmp_path / "tiny.gguf", config, tiny_tensors(config))
    folder = convert(source, tmp_path / "orbax")
    metadata = open_checkpoint(folder).tokenizer_source
    assert isinstance(metadata, dict) and metadata["tokenizer.ggml.tokens"] == ["<|endoftext|>", "<|im_end|>", "é"]
    ours, theirs = leaves(folder, np.float32), leaves(source, np.float32)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[path], theirs[path]) for path in theirs)


def test_an_orbax_checkpoint_is_a_source_too(tmp_path: Path) -> None:
    first = convert(make_tiny_model(tmp_path / "hf"), tmp_path / "first")
    second = convert(first, tmp_path / "second")
    assert open_checkpoint(second).config == open_checkpoint(first).config
    ours, theirs = leaves(second, np.float32), leaves(first, np.float32)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[path], theirs[path]) for path in theirs)


def test_a_destination_with_content_is_refused_before_the_source_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(CheckpointError, match="is not empty; name a new folder"):
            convert("/no/such/model", taken)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_failure_leaves_no_destination(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "hf")
    with pytest.raises(ConfigError, match="dtype='bf16' is not one of"):
        convert(source, tmp_path / "orbax", dtype="bf16")  # pyright: ignore[reportArgumentType]
    next(source.glob("*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        convert(source, tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists()


@pytest.mark.slow
def test_command_line_writes_a_model_that_gives_the_same_tokens(tmp_path: Path) -> None:
    destination = tmp_path / "orbax"
    assert main(["convert", str(GOLDEN), str(destination), "--dtype", "float32"]) == 0
    llm = LLM(
        destination,
        load_format="orbax",
        skip_tokenizer_init=True,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        use_tqdm_on_load=False,
    )
    with np.load(GOLDEN / "golden.npz") as arrays:
        count = sum(name.startswith("prompt_token_ids") for name in arrays)
        prompts = [arrays[f"prompt_token_ids_{i}"].tolist() for i in range(count)]
        expected = [arrays[f"output_token_ids_{i}"].tolist() for i in range(count)]
    params = [
        SamplingParams(temperature=0, max_tokens=len(tokens), ignore_eos=True, detokenize=False) for tokens in expected
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.shutdown()
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
