"""Tile sizes as data: `tuned/<gpu>.json`, written by `kernels/bench.py --tune`.

The file maps an op to configurations by key; a key names what the best tiles depend on, and each op makes its own. What
is not in the file, or a GPU without one, gets the op's defaults.
"""

import functools
import json
import re
from importlib import resources
from typing import Any

import jax


def tuned[C](op: str, key: str, config: type[C], default: C) -> C:
    """Return what was tuned for `key` of `op` on this GPU, as a `config`, or `default`."""
    found = _table(slug(device_kind())).get(op, {}).get(key)
    return default if found is None else config(**found)


def device_kind() -> str:
    """Return the name of the GPU that programs are compiled for, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def slug(kind: str) -> str:
    """Return a device's name as a file name: `NVIDIA H100 80GB HBM3` is `nvidia_h100_80gb_hbm3`."""
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")


@functools.cache
def _table(name: str) -> dict[str, dict[str, Any]]:
    path = resources.files("qwen2_kernels") / "tuned" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}
