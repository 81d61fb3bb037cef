"""Programs on disk: what is kept comes back, what is broken is made again, and other facts are another program."""

import logging
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax.config import EngineConfig, ModelConfig
from qwen2_jax.engine import build
from qwen2_jax.engine.compilation import ProgramSpec, compile_programs
from qwen2_jax.engine.executable_cache import ExecutableCache
from qwen2_jax.engine.lowered_programs import export_program, import_program
from qwen2_jax.parallel import make_mesh, replicated
from tests.engine.processing import MODEL

MESH = make_mesh(1)


def spec(factor: float) -> ProgramSpec:
    vector = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=replicated(MESH))
    return ProgramSpec(function=lambda x: x * factor, arguments=(vector,), out_shardings=replicated(MESH))


def fresh() -> float:
    """Return a factor whose program no cache of JAX's has seen."""
    return float(np.float32(random.SystemRandom().uniform(1, 2)))


def run(cache: ExecutableCache, factor: float) -> float:
    """Compile or load the one program, named alike whatever the factor, and run it on ones."""
    compiled = compile_programs({"scale": spec(factor)}, MESH, cache, use_tqdm=False)
    return float(compiled["scale"](jax.device_put(jnp.ones(4), replicated(MESH)))[0])


def test_a_kept_program_is_loaded_instead_of_compiled(tmp_path: Path) -> None:
    factor = fresh()
    assert run(ExecutableCache(tmp_path, MESH, "model"), factor) == factor
    assert run(ExecutableCache(tmp_path, MESH, "model"), 5.0) == factor


def test_other_facts_are_another_program(tmp_path: Path) -> None:
    factor = fresh()
    assert run(ExecutableCache(tmp_path, MESH, "model"), factor) == factor
    assert run(ExecutableCache(tmp_path, MESH, "another"), 5.0) == 5.0


@pytest.mark.parametrize("damage", [b"", b"no pickle", None, b"cno_module\nno_name\n.", b"cjax\nno_name\n."])
def test_a_broken_file_is_reported_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    run(ExecutableCache(tmp_path, MESH, "model"), fresh())
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-200] if damage is None else damage)
    with caplog.at_level(logging.WARNING):
        assert run(ExecutableCache(tmp_path, MESH, "model"), 5.0) == 5.0
    assert f"{path} cannot be loaded" in caplog.text


def test_a_folder_that_takes_nothing_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    factor = fresh()
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert run(ExecutableCache(tmp_path / "file", MESH, "model"), factor) == factor
    assert "cannot be kept" in caplog.text


def test_many_may_write_at_once(tmp_path: Path) -> None:
    cache, data = ExecutableCache(tmp_path, MESH), [bytes([index]) * 100_000 for index in range(8)]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            list(threads.map(lambda each: cache.write("name", each), data))
            assert cache.read("name") in data
    assert len(list(tmp_path.iterdir())) == 1


def test_what_the_compiler_gave_before_is_not_kept_twice(tmp_path: Path) -> None:
    """JAX's own cache knows the program by the second time; serialised again it would load, but not run."""
    factor = fresh()
    for name in ("first", "second", "second"):
        assert run(ExecutableCache(tmp_path / name, MESH), factor) == factor
    assert not (tmp_path / "second").exists()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    cache = ExecutableCache(tmp_path / "deep" / "folder", MESH)
    assert cache.read("workspace") is None
    cache.write("workspace", b"123")
    assert ExecutableCache(tmp_path / "deep" / "folder", MESH).read("workspace") == b"123"


def test_what_is_not_kept_is_compiled_as_others_have_lowered_it(tmp_path: Path) -> None:
    """What they leave as it was is lowered here; who has all asks nobody."""
    factors = {"kept": fresh(), "lowered": fresh(), "left": fresh()}
    specs = {name: spec(factor) for name, factor in factors.items()}
    asked: list[list[str]] = []

    def lowered(missing: list[str]) -> Iterator[tuple[str, ProgramSpec]]:
        asked.append(missing)
        for name in missing:
            spec = specs[name]
            yield name, import_program(export_program(spec, MESH.abstract_mesh), spec) if name == "lowered" else spec

    def run_all() -> dict[str, float]:
        others = {name: spec(5.0) for name in ("kept", "lowered")}
        programs = compile_programs(
            specs | others, MESH, ExecutableCache(tmp_path, MESH), use_tqdm=False, lowered=lowered
        )
        ones = jax.device_put(jnp.ones(4), replicated(MESH))
        return {name: float(program(ones)[0]) for name, program in programs.items()}

    compile_programs({"kept": specs["kept"]}, MESH, ExecutableCache(tmp_path, MESH), use_tqdm=False)
    assert run_all() == factors
    assert run_all() == factors
    assert asked == [["lowered", "left"]]


def test_a_start_is_known_by_its_model_and_options(tmp_path: Path) -> None:
    model = ModelConfig.from_hf(MODEL)

    def record(**options: Any) -> ExecutableCache:
        found = build._start_record(tmp_path, "gpu", model, EngineConfig(**options), jnp.dtype("bfloat16"))
        assert found is not None
        return found

    assert build._start_record(tmp_path, "cpu", model, EngineConfig(), jnp.dtype("bfloat16")) is None
    assert "start" not in record()
    record().write("start", b"")
    assert "start" in record() and "start" not in record(max_num_seqs=3)
