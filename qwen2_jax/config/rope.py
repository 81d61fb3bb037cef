"""Rotary position embeddings as a config describes them, in either of Hugging Face's two spellings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen2_jax.config.fields import read_bool, read_float, read_int, read_mapping
from qwen2_jax.config.refused import refuse_other_maths
from qwen2_jax.errors import ConfigError, reject_unknown

ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_SPELLING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_PARAMETERS = (
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
)
_GROWS = "its angles depend on the length reached so far, so keys already in the cache would change"
_REFUSED_TYPES = {
    "dynamic": f"{_GROWS}; use 'yarn' with the same factor",
    "longrope": f"{_GROWS}; use 'yarn' with the same factor",
    "mrope": "it belongs to the multimodal Qwen2-VL models",
}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Parameters of the rotary embedding, with the names and the meaning of transformers' `modeling_rope_utils`."""

    rope_theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], max_position_embeddings: int) -> "RopeConfig":
        """Read `rope_scaling` with a top-level `rope_theta`, or `rope_parameters` (transformers 5).

        Raises `ConfigError` for a missing base frequency, an unknown or unsupported `rope_type`, an unknown
        parameter, a wrong value, or two spellings that contradict each other.
        """
        given = _one_spelling(config)
        rope_type = _rope_type(given)
        reject_unknown("rope parameter", given, (*_SPELLING, *_PARAMETERS))
        refuse_other_maths(given)
        theta = read_float(given, "rope_theta")
        original = None
        if rope_type in ("yarn", "llama3"):
            original = read_int(config, "original_max_position_embeddings", default=None)
            original = original or read_int(given, "original_max_position_embeddings", default=max_position_embeddings)
        if rope_type == "yarn" and "factor" in given and given["factor"] is None and original:
            given["factor"] = max(max_position_embeddings / original, 1.0)
        llama3 = ... if rope_type == "llama3" else None
        low = read_float(given, "low_freq_factor", default=llama3)
        high = read_float(given, "high_freq_factor", default=llama3)
        if rope_type == "llama3" and high <= low:
            raise ConfigError(f"high_freq_factor={high} must be above low_freq_factor={low}")
        return cls(
            rope_theta=theta,
            rope_type=rope_type,
            factor=read_float(given, "factor", low=1.0, default=1.0 if rope_type == "default" else ...),
            original_max_position_embeddings=original,
            attention_factor=read_float(given, "attention_factor", default=None),
            beta_fast=read_float(given, "beta_fast", default=32.0),
            beta_slow=read_float(given, "beta_slow", default=1.0),
            mscale=read_float(given, "mscale", default=None),
            mscale_all_dim=read_float(given, "mscale_all_dim", default=None),
            truncate=read_bool(given, "truncate", default=True),
            low_freq_factor=low or 1.0,
            high_freq_factor=high or 4.0,
        )


def _one_spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the two spellings into one object with `rope_theta`; `rope_scaling` goes first, as in transformers."""
    scaling, parameters = read_mapping(config, "rope_scaling"), read_mapping(config, "rope_parameters")
    theta = parameters.get("rope_theta")
    if scaling and parameters and _rope_type(parameters) != "default" and scaling != parameters:
        raise ConfigError(
            f"rope_scaling={scaling} contradicts rope_parameters={parameters}; "
            "drop one of them, e.g. hf_overrides={'rope_parameters': None}"
        )
    given = scaling or parameters
    spelled = [value for value in (given.get("rope_theta"), theta, config.get("rope_theta")) if value is not None]
    if any(value != spelled[0] for value in spelled[1:]):
        raise ConfigError(
            f"the config gives rope_theta as {spelled}; keep one, e.g. hf_overrides={{'rope_theta': None}}"
        )
    if not spelled:
        raise ConfigError(
            "the config has no 'rope_theta', neither at the top nor in 'rope_parameters'; it is never assumed: "
            "pass hf_overrides={'rope_theta': ...} (Qwen2 and Qwen2.5 use 1000000.0)"
        )
    return {**given, "rope_theta": spelled[0]}


def _rope_type(given: Mapping[str, Any]) -> str:
    names = [given[key] for key in ("rope_type", "type") if given.get(key) is not None]
    if len(names) == 2 and names[0] != names[1]:
        raise ConfigError(f"rope_type={names[0]!r} contradicts type={names[1]!r}; keep one of them")
    name = names[0] if names else "default"
    if isinstance(name, str) and name in _REFUSED_TYPES:
        raise ConfigError(f"rope_type={name!r} is not supported: {_REFUSED_TYPES[name]}")
    if not isinstance(name, str) or name not in ROPE_TYPES:
        raise ConfigError(f"rope_type={name!r} is unknown; use one of {', '.join(map(repr, ROPE_TYPES))}")
    return name
