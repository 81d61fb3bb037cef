"""`qwen2-jax merge` on the golden model and adapters."""

import json
from pathlib import Path

import numpy as np
import pytest

from qwen2_jax.cli import main
from qwen2_jax.lora.merge import merge_adapters
from qwen2_jax.lora.reader import read_adapter
from qwen2_jax.types import MergeOptions
from tests.lora.adapters import ADAPTERS, GOLDEN, base_config

UNTIED, FOLDER = GOLDEN / "untied", ADAPTERS / "untied"


def test_merge_writes_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qv:2").symlink_to(FOLDER / "qv")
    out = str(tmp_path / "merged")
    adapters = ["--adapter", str(tmp_path / "qv:2"), "--adapter", f"{FOLDER / 'rank_40'}:-0.5"]
    options = ["--method", "magnitude_prune", "--density", "0.5", "--rank", "9"]
    assert main(["merge", str(UNTIED), *adapters, *options, "--out", out]) == 0
    config = base_config()
    read = [read_adapter(path, config) for path in (FOLDER / "qv", FOLDER / "rank_40")]
    expected = merge_adapters(read, [1, -0.5], MergeOptions(method="magnitude_prune", density=0.5, rank=9))
    found = read_adapter(Path(out), config)
    assert found.linear.keys() == expected.adapter.linear.keys() and found.max_rank == 9
    for module, update in expected.adapter.linear.items():
        np.testing.assert_array_equal(found.linear[module].b, update.b)
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    size = f"{found.num_modules} modules of rank 9 or less"
    assert f"[{size}, largest relative error {expected.largest_error:.2g}]" in printed.err


@pytest.mark.parametrize(("adapter", "code"), [("dora", 0), ("dora:0.5", 2)])
def test_merge_writes_a_checkpoint_of_one_adapter_as_it_is(adapter: str, code: int, tmp_path: Path) -> None:
    argv = ["merge", str(UNTIED), "--adapter", str(FOLDER / adapter), "--out", str(tmp_path / "merged"), "--checkpoint"]
    assert main(argv) == code
    assert (tmp_path / "merged" / "model.safetensors").is_file() == (code == 0)


def test_merge_needs_the_config_of_the_model_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((UNTIED / "config.json").read_bytes())
    argv = ["merge", "--model", str(tmp_path), "--adapter", f"{FOLDER / 'qv'}:0.5", "--out", str(tmp_path / "merged")]
    assert main(argv) == 0
    written = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path)
    assert main([*argv[:-1], str(tmp_path / "checkpoint"), "--checkpoint"]) == 2


def test_a_folder_with_content_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    assert main(["merge", "/no/such/model", "--adapter", "/no/such/adapter", "--out", str(tmp_path)]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
