"""What XLA makes of a step for an H100 that is not here: how many kernels a layer is, and that nothing is copied."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import gpu_compiler

ROOT = Path(__file__).parent.parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not gpu_compiler.is_here(), reason="needs the compiler: make .venv/gpu-compiler.stamp"),
]

LAYERS = 2
BLOCK = 64 * 4 * 128 * 2  # bytes of a block's keys, 7B
POOLS = LAYERS * 2 * 2000 * BLOCK
MEBIBYTE = 1 << 20

# Of each layer, and of what stands around the layers. One row of 7B: qkv with its norm, cache write, attention, o,
# norm, gate and up, down. Several: norm, qkv, and so on; a prefill attends twice, for rows of one token and the others.
KERNELS = {
    "decode_greedy:1": ({"triton": 7}, {"triton": 2}),
    "decode_greedy:8": ({"triton": 4, "mosaic": 4}, {"triton": 1, "matmul": 1}),
    "decode_greedy_lora:8": ({"triton": 12, "mosaic": 4}, {"triton": 1, "matmul": 1}),
    "prefill:2048": ({"triton": 4, "mosaic": 5}, {"triton": 1}),
    "prefill_lora:2048": ({"triton": 12, "mosaic": 5}, {"triton": 1}),
}
SAMPLED = ("decode:1", "decode:8", "decode:256", "decode_lora:8", "sample:32")
LARGEST_COPY = {"decode": 64 << 10, "prefill": 2048 * 3584 * 2}
"""Bytes; in a prefill the tokens' embeddings."""


def compile_programs(*options: str) -> dict[str, dict[str, Any]]:
    """Return what `scripts/gpu_programs.py` says of each program."""
    command = [sys.executable, "scripts/gpu_programs.py", "--layers", str(LAYERS), *options]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    return {f"{row['program']}:{row['bucket']}": row for row in rows}


def kernels(row: dict[str, Any]) -> dict[str, int]:
    return {kind: row["step"][kind] for kind in ("triton", "mosaic", "matmul") if kind in row["step"]}


def test_a_step_of_7b() -> None:
    rows = compile_programs("--geometry", "7b", "--adapters", "--only", ",".join(KERNELS))
    for name, (layer, around) in KERNELS.items():
        row = rows[name]
        expected = {kind: LAYERS * layer.get(kind, 0) + around.get(kind, 0) for kind in {**layer, **around}}
        assert kernels(row) == expected, name
        # XLA's own: positions, embeddings, rotary angles, the likeliest token; a prefill's tables of tiles, too.
        assert set(row["step"]) == {"fusion", *expected} and row["step"]["fusion"] <= 30, name
        assert row["largest_copy_bytes"] <= LARGEST_COPY[name.split("_")[0].split(":")[0]], row["largest_copy"]
        assert row["aliased_bytes"] > POOLS
        assert row["temporary_bytes"] < (16 if "decode" in name else 128) * MEBIBYTE
        # The steps of a call are a loop around that, and each is one CUDA graph; a prefill's kernels are launched.
        assert set(row["around"]) == ({"copy", "fusion", "while"} if "decode" in name else set()), name
        assert row["commands"] == {"CommandBuffer": 1} if "decode" in name else "CommandBuffer" not in row["commands"]


def test_one_row_of_half_a_billion_is_six_kernels_a_layer() -> None:
    """Norms are inside their projections: see `norm_linear`."""
    [row] = compile_programs("--geometry", "0.5b", "--only", "decode_greedy:1").values()
    assert kernels(row) == {"triton": LAYERS * 6 + 2}


def test_two_gpus_add_up_twice_a_layer_and_gather_only_logits() -> None:
    [row] = compile_programs(
        "--geometry", "7b", "--adapters", "--tensor-parallel-size", "2", "--only", "decode_greedy_lora:8"
    ).values()
    started = row["step"].get("all-reduce-start", 0)
    assert row["step"]["all-reduce"] + started == LAYERS * 2 + 1  # and one for the embeddings
    assert row["step"]["all-gather"] == 1
    assert row["largest_copy_bytes"] < MEBIBYTE, row["largest_copy"]
    assert not {"collective-permute", "all-to-all", "reduce-scatter"} & set(row["step"])


def test_a_sampled_call_is_one_graph() -> None:
    """Its loop and conditionals are the graph's nodes, so that the host waits for nothing."""
    rows = compile_programs("--geometry", "7b", "--adapters", "--only", ",".join(SAMPLED))
    for name, row in rows.items():
        logits = int(name.split(":")[1]) * 152064 * 4
        assert row["call_commands"] == {"CommandBuffer": 1}, name
        assert row["largest_copy_bytes"] < 1.1 * logits, row["largest_copy"]
        if "decode" in name:
            assert row["step"]["conditional"] == 2, name  # what is asked of the choice, and of log-probabilities
            assert set(row["step"]) <= {"fusion", "copy", "conditional", "triton", "mosaic", "matmul"}
            assert row["around"]["while"] == 1 and row["aliased_bytes"] > POOLS


def test_two_gpus_sample_without_a_condition_that_the_host_reads() -> None:
    [row] = compile_programs("--geometry", "7b", "--tensor-parallel-size", "2", "--only", "decode:8").values()
    assert row["step"]["conditional"] == 2 and "Conditional" not in row["commands"]


def test_whole_heads_of_adapters_are_multiplied_where_they_lie() -> None:
    options = ("--geometry", "7b", "--adapters", "--vocab-adapters", "--only", "sample_greedy_lora:32")
    [row] = compile_programs(*options).values()
    assert row["largest_copy_bytes"] < 32 * 152064 * 4 * 1.1, row["largest_copy"]
