"""The shape of the code: who may import whom, what stays free of jax, and how long files and functions get."""

import ast
import graphlib
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the top down: a module imports from its own layer and the ones below it. The longest matching prefix counts.
LAYERS = (
    ("qwen2_jax.cli", "qwen2_jax.cli_options", "qwen2_jax.server"),
    ("qwen2_jax.llm",),
    ("qwen2_jax.llm_adapters", "qwen2_jax.llm_inputs"),
    ("qwen2_jax.engine.async_engine", "qwen2_jax.engine.build"),
    ("qwen2_jax.engine.engine",),
    ("qwen2_jax.engine",),
    ("qwen2_jax.lora", "qwen2_jax.cache.kv_cache"),
    ("qwen2_jax.models",),
    ("qwen2_jax.cache", "qwen2_jax.text"),
    ("qwen2_jax.parallel", "qwen2_jax.xla_options", "qwen2_kernels"),
    ("qwen2_jax.config",),
    ("qwen2_jax.sampling_params", "qwen2_jax.types", "qwen2_jax.lora_requests", "qwen2_jax.request_checks"),
    ("qwen2_jax.errors", "qwen2_jax"),
)

# The model's arithmetic, and the tables and banks in the kernels' terms.
KERNEL_USERS = tuple(f"qwen2_jax.models.{name}" for name in ("ops", "adapter_ops", "adapters", "vocab_adapters"))

# What a layer's order alone would allow: (importer, imported) by prefix, and the importers that are exempt.
FORBIDDEN = (
    ("qwen2_kernels", "qwen2_jax", ()),
    ("qwen2_jax", "qwen2_kernels", KERNEL_USERS),
    ("qwen2_jax.cache", "qwen2_jax.text", ()),
    ("qwen2_jax.text", "qwen2_jax.cache", ()),
    ("qwen2_jax.engine.scheduler", "qwen2_jax.models", ()),
    ("qwen2_jax.engine.scheduler", "qwen2_jax.text", ()),
    ("qwen2_jax.engine.model_runner", "qwen2_jax.engine.scheduler", ()),
    ("qwen2_jax.engine.model_runner", "qwen2_jax.cache.block_pool", ()),
    ("qwen2_jax.engine.model_runner", "qwen2_jax.cache.prefix_cache", ()),
    ("qwen2_jax.engine.model_runner", "qwen2_jax.text", ()),
    ("qwen2_jax", "torch", ()),
    ("qwen2_jax", "transformers", ()),
)

JAX_FREE = (
    "qwen2_jax",
    "qwen2_jax.errors",
    "qwen2_jax.types",
    "qwen2_jax.config",
    "qwen2_jax.cache.block_pool",
    "qwen2_jax.cache.prefix_cache",
    "qwen2_jax.engine.request",
    "qwen2_jax.engine.scheduler",
    "qwen2_jax.lora.files",
    "qwen2_jax.lora.reader",
    "qwen2_jax.text",
    "qwen2_jax.cli",
)

MAX_FILE_LINES = {"kernels": 350, "qwen2_jax": 300, "scripts": 300, "tests": 300}
MAX_MEDIAN_FILE_LINES = 130
MAX_FUNCTION_LINES = 80


def _sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module_name(path): path for folder in ("qwen2_jax", "kernels/qwen2_kernels") for path in _sources(folder)}


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk everything but the bodies of `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(tree):
        if not _is_type_checking(child):
            yield child
            yield from _runtime_nodes(child)


def _imports(path: Path) -> set[str]:
    """Return the modules that a file imports, inside functions too."""
    found = set()
    for node in _runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _layer(module: str) -> int:
    """Return a module's layer; the package's own `__init__` counts only for itself."""
    matches = [
        (len(prefix), depth)
        for depth, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if _within(module, prefix) and (prefix != "qwen2_jax" or module == prefix)
    ]
    assert matches, f"{module} has no layer: put it into LAYERS"
    return max(matches)[1]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    for imported in _imports(MODULES[module]):
        if imported in MODULES:
            assert _layer(module) <= _layer(imported), f"{module} is below {imported} and may not import it"
        for importer, target, exempt in FORBIDDEN:
            if _within(module, importer) and _within(imported, target):
                assert module in exempt, f"{module} may not import {imported}"


def test_imports_have_no_cycle() -> None:
    graph = {module: _imports(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_bookkeeping_does_not_import_jax() -> None:
    program = (
        "import importlib, sys\n"
        f"for name in {JAX_FREE}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'jax' not in sys.modules, f'{name} imports jax'\n"
    )
    search = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]}\n"
    result = subprocess.run([sys.executable, "-c", search + program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_readme_lists_every_module_of_the_package() -> None:
    listed, folder = set[str](), ""
    for line in (ROOT / "README.md").read_text().splitlines():
        if match := re.match(r"(\S+/) {2,}", line):
            folder = match[1]
        elif match := re.match(r"  (\w+\.py) {2,}", line):
            listed.add(folder + match[1])
    files = [path.relative_to(ROOT) for folder in ("qwen2_jax", "scripts") for path in (ROOT / folder).rglob("*.py")]
    expected = {str(path) for path in files if path.name != "__init__.py"}
    assert {name for name in listed if name.startswith(("qwen2_jax/", "scripts/"))} == expected


@pytest.mark.parametrize("folder", MAX_FILE_LINES)
def test_files_are_short(folder: str) -> None:
    lines = {str(path): len(path.read_text().splitlines()) for path in _sources(folder)}
    assert {path: count for path, count in lines.items() if count > MAX_FILE_LINES[folder]} == {}


def test_the_package_is_made_of_small_files() -> None:
    median = statistics.median(len(path.read_text().splitlines()) for path in MODULES.values())
    assert median <= MAX_MEDIAN_FILE_LINES


@pytest.mark.parametrize("folder", MAX_FILE_LINES)
def test_functions_are_short(folder: str) -> None:
    """A kernel's body, named `*_kernel`, is as long as its algorithm."""
    long = [
        f"{path}:{node.lineno} {node.name}"
        for path in _sources(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.endswith("_kernel")
        if (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []
