"""How an op picks its implementation."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

from qwen2_kernels.launch import has_triton

logger = logging.getLogger(__name__)

Implementation = Callable[..., Any]


def select(
    op: str, implementations: Mapping[str, Implementation], name: str, *, gpu: str, elsewhere: str, reason: str
) -> Implementation:
    """Return the implementation called `name`.

    `"auto"` is the one called `gpu` where the program runs on an NVIDIA GPU and `elsewhere` on any other platform: the
    choice is made when the program is lowered, so that one traced program serves both. A GPU without Triton installed
    gets `elsewhere`. `reason` says why; it is logged once per op and choice.

    Raises:
        ValueError: an unknown name.
    """
    if name == "auto":
        if not has_triton():
            log_once(op, elsewhere, "Triton and jax-triton are not installed: pip install 'qwen2-jax[cuda]'")
            return implementations[elsewhere]
        log_once(op, f"{gpu} on a GPU, {elsewhere} elsewhere", reason)
        return functools.partial(_by_platform, implementations[gpu], implementations[elsewhere])
    if name not in implementations:
        known = ", ".join(["auto", *implementations])
        raise ValueError(f"{op} has no implementation {name!r}; use one of {known}")
    return implementations[name]


def by_platform(*arrays: Any, gpu: Callable[..., Any], elsewhere: Callable[..., Any]) -> Any:
    """Return what `gpu` or `elsewhere` makes of `arrays`, by the platform that the program runs on.

    Under a mesh the platform is known and only one of them is traced; else both are, and lowering chooses.
    """
    platform = mesh_platform()
    if platform is None:
        return jax.lax.platform_dependent(*arrays, cuda=gpu, default=elsewhere)
    return (gpu if platform == "gpu" else elsewhere)(*arrays)


def mesh_platform() -> str | None:
    """Return the platform of the mesh that a program is traced for, whose devices need not be here, or None."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def _by_platform(gpu: Implementation, elsewhere: Implementation, *arrays: Any, **options: Any) -> Any:
    return by_platform(
        *arrays, gpu=functools.partial(gpu, **options), elsewhere=functools.partial(elsewhere, **options)
    )


@functools.cache
def log_once(op: str, choice: str, reason: str) -> None:
    """Log why an op has chosen an implementation; the same choice for the same reason only once."""
    logger.info("%s: %s (%s)", op, choice, reason)
