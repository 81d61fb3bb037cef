"""The package's own error types. Every bad input ends in one of these; none of them imports jax."""

import difflib
from collections.abc import Iterable


class Qwen2JaxError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(Qwen2JaxError, ValueError):
    """A model's config or an engine option is wrong; the message names the value and what would be right."""


class CheckpointError(ConfigError):
    """A checkpoint's files are missing, damaged, or do not fit the model that its config describes."""


class RequestError(Qwen2JaxError, ValueError):
    """A request cannot be served as asked: its prompt or its sampling parameters are wrong."""


class AdapterError(Qwen2JaxError, ValueError):
    """A LoRA adapter cannot be used as asked."""


class CapacityError(Qwen2JaxError, RuntimeError):
    """There is not enough memory for what was asked; the message says how much is needed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known name closest to `name`, or `""` if none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def reject_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ConfigError` for the first of `given` that is not in `known`, naming the nearest known one."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}{nearest(name, known)}")
