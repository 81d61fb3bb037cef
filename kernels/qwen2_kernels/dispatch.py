"""How an op picks its implementation."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)


def select(op: str, implementations: Mapping[str, Callable[..., Any]], name: str, *, auto: str, reason: str) -> Any:
    """Return the implementation called `name`, or the one called `auto` where `name` is `"auto"`.

    `reason` says why `auto` is what it is; it is logged once per op and choice.

    Raises:
        ValueError: an unknown name.
    """
    if name == "auto":
        _log_once(op, auto, reason)
        return implementations[auto]
    if name not in implementations:
        known = ", ".join(["auto", *implementations])
        raise ValueError(f"{op} has no implementation {name!r}; use one of {known}")
    return implementations[name]


@functools.cache
def _log_once(op: str, name: str, reason: str) -> None:
    logger.info("%s: %s (%s)", op, name, reason)
