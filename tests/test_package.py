"""What the package promises from outside: its public names, its wheel, and locks that fit its requirements."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import fields
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import qwen2_jax
from qwen2_jax.cli_options import ENGINE_OPTIONS
from qwen2_jax.config import CacheConfig, EngineConfig, LoadConfig, LoRAConfig

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", [name for name in qwen2_jax.__all__ if name != "__version__"])
def test_public_name_exists_and_says_what_it_is(name: str) -> None:
    value = getattr(qwen2_jax, name)
    assert inspect.isclass(value)
    assert value.__name__ == name
    assert inspect.getdoc(value)


def test_type_checkers_see_the_names_that_are_imported_late() -> None:
    tree = ast.parse(inspect.getsource(qwen2_jax))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("qwen2_jax")
        for alias in node.names
    }
    late = {name: module for module, names in qwen2_jax._EXPORTS.items() for name in names}
    assert seen == late
    assert sorted([*late, "__version__"]) == dir(qwen2_jax)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLMM'"):
        _ = qwen2_jax.LLMM


def test_console_script_is_importable() -> None:
    module, function = PROJECT["scripts"]["qwen2-jax"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_engine_options_of_the_command_line_are_arguments_of_the_llm() -> None:
    options = {field.name for config in (LoadConfig, CacheConfig, LoRAConfig, EngineConfig) for field in fields(config)}
    assert ENGINE_OPTIONS.keys() <= options | inspect.signature(qwen2_jax.LLM).parameters.keys()


def _build(target: str, source: Path, destination: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(destination)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [built] = destination.iterdir()
    return built


@pytest.mark.slow
def test_wheel_ships_the_two_packages_and_nothing_else(tmp_path: Path) -> None:
    """By way of the source distribution, as a package index would build it."""
    with tarfile.open(_build("sdist", ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    version = f"qwen2_jax-{qwen2_jax.__version__}"
    with zipfile.ZipFile(_build("wheel", tmp_path / version, tmp_path / "wheel")) as archive:
        names = archive.namelist()
    info = f"{version}.dist-info"
    assert {name.split("/")[0] for name in names} == {"qwen2_jax", "qwen2_kernels", info}
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt", "qwen2_jax/py.typed", *_package_files()} <= set(
        names
    )


def _package_files() -> set[str]:
    folders = {"qwen2_jax": ROOT / "qwen2_jax", "qwen2_kernels": ROOT / "kernels" / "qwen2_kernels"}
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in folders.items()
        for path in folder.rglob("*.py")
    }


def _imported(folder: str) -> set[str]:
    trees = [ast.parse(path.read_text()) for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    own = {"qwen2_jax", "qwen2_kernels"} | sys.stdlib_module_names
    return {module.split(".")[0] for module in modules} - own


@pytest.mark.parametrize(
    ("folder", "extras"), [("qwen2_jax", []), ("kernels/qwen2_kernels", ["cuda"])], ids=["qwen2_jax", "qwen2_kernels"]
)
def test_every_import_is_a_declared_dependency(folder: str, extras: list[str]) -> None:
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    distributions = packages_distributions()
    for module in _imported(folder):
        assert {canonicalize_name(name) for name in distributions[module]} & declared, f"{module} is not a dependency"


def _pins(*files: str) -> dict[str, str]:
    lines = [line for file in files for line in (ROOT / "requirements" / file).read_text().splitlines()]
    pins = [line for line in lines if line and not line.startswith(("#", "-r demo.txt"))]
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[^=;\s]+(; sys_platform == '\w+')?", pin), f"{pin!r} is not an exact pin"
    requirements = [Requirement(pin) for pin in pins]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in requirements}


@pytest.mark.parametrize(
    ("files", "extras"),
    [(["demo.txt"], ["demo"]), (["demo.txt", "dev.txt"], ["demo", "dev"])],
    ids=["demo", "dev"],
)
def test_lock_satisfies_the_requirements(files: list[str], extras: list[str]) -> None:
    wanted = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    pins = _pins(*files)
    for requirement in map(Requirement, wanted):
        assert Version(pins[canonicalize_name(requirement.name)]) in requirement.specifier, str(requirement)
