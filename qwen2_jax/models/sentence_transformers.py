"""Reads what a sentence-transformers folder says about pooling, a dense layer and normalisation."""

from pathlib import Path
from typing import Any

from qwen2_jax.errors import CheckpointError
from qwen2_jax.models.checkpoint import EmbeddingModules, read_json, read_json_value

_SUPPORTED = ("Transformer", "Pooling", "Dense", "Normalize")


def read_modules(folder: Path) -> tuple[EmbeddingModules, str | None]:
    """Return what `modules.json` asks for, and the dense layer's subfolder if it has one.

    Raises `CheckpointError` for a module, a pooling mode or an activation that is not supported.
    """
    by_type: dict[str, str] = {}
    for kind, subfolder in _modules(folder / "modules.json"):
        if kind not in _SUPPORTED or kind in by_type:
            raise CheckpointError(
                f"{folder}: the module {kind!r} is not supported here; each of {', '.join(_SUPPORTED)} may come once"
            )
        by_type[kind] = subfolder
    if by_type.get("Transformer"):
        raise CheckpointError(f"{folder}: the transformer lies in {by_type['Transformer']!r}; it must lie at the top")
    if "Pooling" not in by_type or sorted(by_type, key=_SUPPORTED.index) != list(by_type):
        raise CheckpointError(
            f"{folder}: the modules {', '.join(by_type)} are not supported in this order; there must be a Pooling, and "
            f"they come as {', '.join(_SUPPORTED)}"
        )
    _check_pooling(folder / by_type["Pooling"] / "config.json")
    dense = by_type.get("Dense")
    if dense is not None:
        _check_dense(folder / dense / "config.json")
    return EmbeddingModules(pooling="mean", normalize="Normalize" in by_type), dense


def module_folders(folder: Path) -> list[str]:
    """Return the subfolders of the modules that `modules.json` names; none without that file."""
    path = folder / "modules.json"
    return [subfolder for _, subfolder in _modules(path) if subfolder] if path.is_file() else []


def _modules(path: Path) -> list[tuple[str, str]]:
    """Return each module's class name and subfolder, in order."""
    modules = read_json_value(path)
    if not isinstance(modules, list):
        raise CheckpointError(f"{path} is not a list of modules; download it again")
    return [_module(path, module) for module in modules]


def _module(path: Path, module: Any) -> tuple[str, str]:
    if isinstance(module, dict):
        kind, subfolder = module.get("type"), module.get("path")
        if isinstance(kind, str) and isinstance(subfolder, str) and ".." not in Path(subfolder).parts:
            relative = not Path(subfolder).is_absolute()
            if relative:
                return kind.rpartition(".")[2], subfolder
    raise CheckpointError(f"{path}: {str(module)[:80]} is not a module with a 'type' and a relative 'path'")


def _check_pooling(path: Path) -> None:
    config = read_json(path)
    modes = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
    modes += [config["pooling_mode"]] if config.get("pooling_mode") else []
    if any(mode not in ("mean", "mean_tokens") for mode in modes):
        raise CheckpointError(
            f"{path} asks for the pooling {modes}; only the mean over a sequence's tokens is supported"
        )
    if config.get("include_prompt") is False:
        raise CheckpointError(f"{path}: include_prompt=false is not supported; the mean is over all tokens")


def _check_dense(path: Path) -> None:
    config = read_json(path)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    if activation.rpartition(".")[2] != "Identity":
        raise CheckpointError(f"{path} applies {activation} after the dense layer; only Identity is supported")
