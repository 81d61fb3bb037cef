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
            _log_once(op, elsewhere, "Triton and jax-triton are not installed: pip install 'qwen2-jax[cuda]'")
            return implementations[elsewhere]
        _log_once(op, f"{gpu} on a GPU, {elsewhere} elsewhere", reason)
        return functools.partial(_by_platform, implementations[gpu], implementations[elsewhere])
    if name not in implementations:
        known = ", ".join(["auto", *implementations])
        raise ValueError(f"{op} has no implementation {name!r}; use one of {known}")
    return implementations[name]


def _by_platform(gpu: Implementation, elsewhere: Implementation, *arrays: Any, **options: Any) -> Any:
    return jax.lax.platform_dependent(
        *arrays, cuda=functools.partial(gpu, **options), default=functools.partial(elsewhere, **options)
    )


@functools.cache
def _log_once(op: str, choice: str, reason: str) -> None:
    logger.info("%s: %s (%s)", op, choice, reason)
