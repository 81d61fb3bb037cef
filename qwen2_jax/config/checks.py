"""Checks of options: each raises `ConfigError`, which names the option, its value and what would be right."""

from typing import Any

from qwen2_jax.errors import ConfigError


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def check_type(name: str, value: Any, kind: Any, wanted: str) -> None:
    """Raise unless `value` is of type `kind`, which is called `wanted`."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={value!r} is not {wanted}")


def check_number(name: str, value: Any) -> float:
    """Return `value`; raise unless it is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={value!r} is not a number")
    return value


def check_int(name: str, value: Any, low: int, high: int | None = None, *, optional: bool = False) -> None:
    """Raise unless `value` is an integer from `low` to `high` (None: any), or, if `optional`, None."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name}={value!r} is not an integer {limits}")
