"""`kernels/bench.py` without a GPU: what is timed and how, at the sizes of a tiny model."""

import json
from pathlib import Path
from typing import Any

import bench
import jax
import jax.numpy as jnp
import pytest
from benchmarking.case import Case, Selection, noise, num_arrays, num_calls
from benchmarking.timing import Limits, compile_function, rates, run_cases
from qwen2_kernels import tuning
from qwen2_kernels.specs import Geometry

GEOMETRY = Geometry(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=256,
    tie_word_embeddings=True,
)
LIMITS = Limits(bandwidth=1e9, flops=1e12)


def cases(*, tune: bool = False) -> list[Case]:
    return bench.select_cases([*bench.OPS], [Selection(name="tiny", geometry=GEOMETRY, tune=tune)])


ALL = {(case.op, case.implementation, case.shape, case.dtype): case for case in cases()}
SMALL = [
    ("linear", "xla", "gate_up, 8 tokens", "bfloat16"),
    ("norm_linear", "separate", "qkv, 1 tokens", "bfloat16"),
    ("rms_norm", "xla", "8 tokens", "bfloat16"),
    ("write_kv", "xla", "1 tokens", "float8_e4m3fn"),
    ("paged_attention_decode", "xla", "8 x 1024", "bfloat16"),
    ("flash_attention", "reference", "4 x 256", "bfloat16"),
]


def test_every_op_has_headlines() -> None:
    ops = {case.op for case in ALL.values()}
    assert ops == {case.op for case in ALL.values() if case.headline}
    assert ops >= {"linear", "rms_norm", "paged_attention_decode", "paged_attention_ragged", "flash_attention"}


def test_cases_come_by_op_and_geometry() -> None:
    selections = [Selection(name=name, geometry=GEOMETRY) for name in ("a", "b")]
    chosen = bench.select_cases(["thresholds", "linear"], selections)
    places = [(case.op.endswith("_threshold"), case.geometry) for case in chosen]
    assert places == sorted(places) and len(set(places)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("key", SMALL, ids=lambda key: key[0])
def test_chains_donate_what_they_return_and_run(key: tuple[str, str, str, str]) -> None:
    case = ALL[key]
    abstract = jax.eval_shape(case.make, jax.ShapeDtypeStruct((), jnp.uint32))
    results = jax.eval_shape(case.function, *abstract)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), results) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract[: len(results)]
    )
    text = compile_function(case).as_text()
    assert text is not None and text.count("alias)") == len(jax.tree.leaves(results))
    [row] = run_cases([case], LIMITS)
    assert row["us"] > 0 and row["share"] > 0 and row["op"] == case.op


def test_what_is_not_supported_or_fails_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    case = ALL["linear", "xla", "qkv, 1 tokens", "bfloat16"]

    def refuse(*_: Any) -> Any:
        raise NotImplementedError("not here")

    def fail(*_: Any) -> Any:
        raise ValueError("broken")

    options = {name: getattr(case, name) for name in ("op", "geometry", "dtype", "shape", "make", "calls", "num_bytes")}
    rows = list(run_cases([Case(implementation="x", function=f, **options) for f in (refuse, fail)], LIMITS))
    assert [row.get("unsupported", row.get("error")) for row in rows] == ["not here", "ValueError: broken"]
    assert "unsupported: not here" in bench.format_row(rows[0]) and "error: ValueError" in bench.format_row(rows[1])


def test_shares_are_those_of_the_limit_that_binds() -> None:
    case = ALL["linear", "xla", "qkv, 1 tokens", "bfloat16"]
    row = rates(case, case.num_bytes / 1e9 * 2, LIMITS)
    assert (row["limit"], row["share"]) == ("bandwidth", 0.5)
    large = ALL["linear", "xla", "qkv, 8192 tokens", "bfloat16"]
    row = rates(large, large.flops / 1e12 * 4, Limits(bandwidth=1e15, flops=1e12))
    assert (row["limit"], row["share"], row["TFLOP/s"]) == ("matmul", 0.25, 0.2)


def test_chains_outgrow_the_cache() -> None:
    assert num_arrays(1 << 20) * (1 << 20) >= 50 << 20
    assert num_arrays(1 << 30, least=2) == 2
    assert num_calls(1 << 30, least=2) == 2 and num_calls(1.0) == 64
    drawn = jax.jit(lambda seed: noise(seed, 3, (999, 37), jnp.float32))(jnp.uint32(0))
    assert abs(float(drawn.mean())) < 0.02 and 0.55 < float(drawn.std()) < 0.6


def test_the_fastest_tiles_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    (tmp_path / "qwen2_kernels").mkdir()
    monkeypatch.setattr(tuning, "device_kind", lambda: "NVIDIA H100")
    tuned = [case for case in cases(tune=True) if case.op == "linear"][:3]
    rows = [{"us": 2.0, "config": {"block_n": 1}}, {"us": 1.0, "config": {"block_n": 2}}, {"error": "too large"}]
    path = bench.write_tuned(tuned, rows)
    assert path.name == "nvidia_h100.json"
    assert json.loads(path.read_text()) == {"linear": {tuned[0].key: {"block_n": 2}}}


def test_every_tuned_case_has_a_key() -> None:
    tuned = list(cases(tune=True))
    assert {case.op for case in tuned} == {"linear", "paged_attention_decode", "paged_attention_ragged"}
    assert all(case.key and case.config is not None for case in tuned)
