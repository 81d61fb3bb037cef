"""Typed reading of a Hugging Face config: every value is checked, and a wrong one is named in a `ConfigError`."""

import math
from collections.abc import Mapping
from typing import Any

from qwen2_jax.errors import ConfigError

LARGEST_INT = 2**31 - 1
_ADVICE = "correct config.json or pass hf_overrides"


def shown(value: Any) -> str:
    """Return `value` as an error message shows it: cut short where it is long."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _present(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    if value is not None:
        return value
    if default is ...:
        raise ConfigError(f"the config has no {key!r}, which the model needs; {_ADVICE}={{{key!r}: ...}}")
    return default


def _wrong(key: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"{key}={shown(value)} is not {wanted}; {_ADVICE}")


def read_int(config: Mapping[str, Any], key: str, *, low: int = 1, high: int = LARGEST_INT, default: Any = ...) -> Any:
    """Return `config[key]` if it is an int in `[low, high]`; `default` where it is absent or null.

    Raises `ConfigError` for another type (a bool or a float is not an int), a value out of range, or an
    absent key without a default.
    """
    value = _present(config, key, default)
    if value is default:
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _wrong(key, value, f"an integer from {low} to {high}")
    return value


def read_float(config: Mapping[str, Any], key: str, *, low: float = 0.0, default: Any = ...) -> Any:
    """Return `config[key]` as a float if it is a finite number above 0 and at least `low`; see `read_int`."""
    value = _present(config, key, default)
    if value is default:
        return value
    wanted = f"a finite number of at least {low}" if low > 0 else "a finite number above 0"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(key, value, wanted)
    if isinstance(value, int) and abs(value) > LARGEST_INT**2:
        raise _wrong(key, value, wanted)
    if not math.isfinite(value) or value <= 0 or value < low:
        raise _wrong(key, value, wanted)
    return float(value)


def read_bool(config: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """Return `config[key]` if it is a bool; `default` where it is absent or null; `ConfigError` otherwise."""
    value = _present(config, key, default)
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return value


def read_choice(config: Mapping[str, Any], key: str, choices: tuple[str, ...], *, default: Any = ...) -> str:
    """Return `config[key]` if it is one of `choices`; `default` where it is absent or null; see `read_int`."""
    value = _present(config, key, default)
    if not isinstance(value, str) or value not in choices:
        raise _wrong(key, value, f"one of {', '.join(map(repr, choices))}")
    return value


def read_token_ids(config: Mapping[str, Any], key: str, vocab_size: int) -> tuple[int, ...]:
    """Return the token ids in `config[key]`, which is one id, a list of ids, or absent (no ids)."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise _wrong(key, value, f"a token id, or a list of token ids, from 0 to vocab_size - 1 = {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def read_mapping(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a copy of the object at `config[key]`, empty where it is absent or null."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(key, value, "an object or null")
    return dict(value)


def merge_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with `overrides` laid over it; objects merge key by key, every other value is replaced."""
    merged = dict(config)
    for key, value in overrides.items():
        below = merged.get(key)
        merged[key] = merge_overrides(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
