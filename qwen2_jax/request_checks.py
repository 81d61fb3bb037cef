"""Checks of single values in a request; each raises `RequestError` naming the value and what is allowed."""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from qwen2_jax.errors import RequestError


def check_number(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """Return `value` if it is a finite number in [low, high], or in (low, high] with `open_low`."""
    allowed = f"a finite number in {'(' if open_low else '['}{low}, {high}{')' if high == math.inf else ']'}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise RequestError(f"{name}={value!r} is not allowed; use {allowed}")
    if value < low or value > high or (open_low and value == low):
        raise RequestError(f"{name}={value!r} is out of range; use {allowed}")
    return value


def check_integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` if it is an integer, not a bool, in [low, high]; `high=None` means no upper bound."""
    allowed = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name}={value!r} is not allowed; use {allowed}")
    if value < low or (high is not None and value > high):
        raise RequestError(f"{name}={value!r} is out of range; use {allowed}")
    return value


def check_instance(name: str, value: object, kind: type, allowed: str) -> None:
    """Refuse a `value` that is not a `kind`; `allowed` says what to use instead."""
    if not isinstance(value, kind):
        raise RequestError(f"{name}={value!r} is not allowed; use {allowed}")


def check_list(name: str, value: object) -> Iterable[Any]:
    """Return `value` if it is a list or another collection, but no string and no mapping."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise RequestError(f"{name}={value!r} is not allowed; use a list")
    return value


def check_distinct(name: str, value: object) -> tuple[Any, ...]:
    """Return the entries of a list, each once; `None` is an empty one."""
    given = () if value is None else check_list(name, value)
    try:
        return tuple(dict.fromkeys(given))
    except TypeError as error:
        raise RequestError(f"{name}={value!r} is not allowed; use a list of strings or numbers") from error


def check_logit_bias(given: object) -> dict[int, float]:
    """Return `given` with integer keys (JSON objects have string ones) and its values clamped to [-100, 100]."""
    if not isinstance(given, Mapping):
        raise RequestError(f"logit_bias={given!r} is not allowed; use a dict from token id to number")
    biases: dict[int, float] = {}
    for key, bias in given.items():
        is_digits = isinstance(key, str) and key.isascii() and key.isdigit()
        token_id = check_integer("token id in logit_bias", int(key) if is_digits else key, 0)
        biases[token_id] = min(100.0, max(-100.0, float(check_number(f"logit_bias[{key}]", bias, -math.inf))))
    return biases
