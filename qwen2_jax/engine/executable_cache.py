"""Compiled programs on disk. What is found there is loaded without tracing, Triton's compiler or autotuning.

JAX's own persistent cache needs the lowered program to find its key: seconds for each of dozens of programs.
Here the key is made of what the program is made from: this package's sources, the versions below it, the devices, and
the configurations. The files are as trustworthy as the folder that they lie in: the user's cache folder, like JAX's.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import os
import pickle
import uuid
from importlib import resources
from pathlib import Path

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh

logger = logging.getLogger(__name__)

_DISTRIBUTIONS = ("flax", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-triton", "triton")


class ExecutableCache:
    """The programs of one model in one configuration on one kind of machine."""

    def __init__(self, directory: Path, mesh: Mesh, *facts: object) -> None:
        """Use `directory`; `facts` is all that tells this model and configuration from others, by its `repr`."""
        # Tells Mosaic's runtime where its library lies; a program with a Mosaic kernel cannot be loaded before that.
        importlib.import_module("jax.experimental.mosaic.gpu")
        self._directory, self._mesh = directory, mesh
        device = mesh.devices.flat[0]
        machine = (device.device_kind, device.client.platform_version, mesh.shape, os.environ.get("XLA_FLAGS"))
        self._fingerprint = repr((_sources(), _versions(), machine, facts))

    def __contains__(self, name: str) -> bool:
        """Whether something is kept as `name`, which may be damaged."""
        return self._path(name).exists()

    def read(self, name: str) -> bytes | None:
        """Return what was written as `name`, if it was."""
        path = self._path(name)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s cannot be read (%s)", path, error)
            return None

    def write(self, name: str, data: bytes) -> None:
        """Keep `data` as `name`; another process sees all of it or none. A folder that takes nothing is reported."""
        path = self._path(name)
        unfinished = path.with_suffix(f".{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(data)
            unfinished.replace(path)
        except OSError as error:
            logger.warning("%s cannot be kept (%s): the next start compiles again", name, error)
            with contextlib.suppress(OSError):
                unfinished.unlink()

    def load(self, name: str) -> jax.stages.Compiled | None:
        """Return the program kept as `name`; one that cannot be loaded is reported and counts as missing."""
        data = self.read(name)
        if data is None:
            return None
        try:
            return deserialize_and_load(
                *pickle.loads(data), backend=None, execution_devices=list(self._mesh.devices.flat)
            )
        except Exception as error:  # a damaged pickle may ask for anything
            logger.warning("compiling %s again: %s cannot be loaded (%s)", name, self._path(name), error)
            return None

    def save(self, name: str, compiled: jax.stages.Compiled) -> None:
        """Keep `compiled` as `name`."""
        self.write(name, pickle.dumps(serialize(compiled)))

    def _path(self, name: str) -> Path:
        return self._directory / hashlib.sha256(f"{self._fingerprint} {name}".encode()).hexdigest()


@functools.cache
def _sources() -> str:
    """Return a digest of every source file and table that programs are made from."""
    digest = hashlib.sha256()
    for package in ("qwen2_jax", "qwen2_kernels"):
        root = Path(str(resources.files(package)))
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    installed = {item.metadata["Name"].lower(): item.version for item in importlib.metadata.distributions()}
    return {name: installed[name] for name in _DISTRIBUTIONS if name in installed}
