"""`adapter_config.json`: every field of PEFT 0.21's LoraConfig is known, and is used, harmless or refused by name."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import regex

from qwen2_jax.config.fields import LARGEST_INT, shown
from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.keys import EMBED_TOKENS, LM_HEAD

# About the training, the base's name, or modules that the tensors show better.
_NO_EFFECT = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
)  # fmt: skip
_USED = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias",
    "init_lora_weights", "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip
_VARIANT = "adapters of this variant of LoRA are not served"
_REFUSED = {
    "fan_in_fan_out": "no module of a Qwen2 stores its weight transposed",
    "layer_replication": "a model with repeated layers is another model",
    "alora_invocation_tokens": "an activated LoRA, which starts in the middle of a prompt, is not served",
    "use_qalora": "its inputs are pooled in groups",
    "use_bdlora": "its matrices are block-diagonal",
    "kasa_config": _VARIANT,
    "velora_config": _VARIANT,
    "monteclora_config": _VARIANT,
    "arrow_config": "adapters that are chosen for each token are not served",
    "target_parameters": "only modules can be adapted, not single parameters",
    "megatron_config": "Megatron's parallel layers are not served",
}
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
# LoRA-GA too: PEFT subtracts the initial update from the base weights (`LoraLayer.lora_ga_init`).
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# A match takes microseconds, unless the expression tries all ways to cut a name into pieces.
_MATCH_SECONDS = 1.0
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The fields that change what an adapter computes; names are PEFT's.

    Patterns keep the file's order, because the first match counts. `modules_to_save` holds the modules' last names.
    `trainable_token_indices` has the keys `embed_tokens` and `lm_head` or fewer.
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    modules_to_save: tuple[str, ...]
    trainable_token_indices: Mapping[str, tuple[int, ...]]
    ensure_weight_tying: bool

    def rank(self, path: str) -> int:
        """Return the rank of the module called `path` in the model that was trained.

        Raises `AdapterError` for a pattern that does not come to an end with this path.
        """
        return _first_match("rank_pattern", self.rank_pattern, path, self.r)

    def scaling(self, path: str) -> float:
        """Return what multiplies `B @ A` of the module called `path` in the model that was trained; see `rank`."""
        rank = self.rank(path)
        alpha = _first_match("alpha_pattern", self.alpha_pattern, path, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def canonical(self) -> bytes:
        """Return the same bytes for all configs that compute the same with the same tensors."""
        patterns = {name: list(getattr(self, name).items()) for name in ("rank_pattern", "alpha_pattern")}
        return json.dumps(asdict(self) | patterns, sort_keys=True).encode()


def parse_config(file: Path, content: Mapping[str, Any]) -> AdapterConfig:
    """Read the content of the `adapter_config.json` at `file`; null stands for a field's default, but for `r` and
    `lora_alpha`.

    Raises `AdapterError`, which names the field, for a value that is wrong or asks for what is not served, and for an
    unknown field that is set to something.
    """
    fields = {name: value for name, value in content.items() if value is not None}
    _check_kind(file, fields)
    use_dora, lora_bias = _bool(file, fields, "use_dora"), _bool(file, fields, "lora_bias")
    if use_dora and lora_bias:
        raise AdapterError(f"{file}: use_dora and lora_bias are both true, which PEFT does not define; train one")
    if fields.get("bias", "none") not in ("none", "all", "lora_only"):
        raise _wrong(file, "bias", fields["bias"], "'none', 'all' or 'lora_only'")
    return AdapterConfig(
        r=_rank(file, "r", content.get("r", 8)),
        lora_alpha=_alpha(file, "lora_alpha", content.get("lora_alpha", 8)),
        rank_pattern=_pattern(file, fields, "rank_pattern", _rank),
        alpha_pattern=_pattern(file, fields, "alpha_pattern", _alpha),
        use_rslora=_bool(file, fields, "use_rslora"),
        use_dora=use_dora,
        lora_bias=lora_bias,
        modules_to_save=_modules_to_save(file, fields.get("modules_to_save", [])),
        trainable_token_indices=_token_indices(file, fields.get("trainable_token_indices", {})),
        ensure_weight_tying=_bool(file, fields, "ensure_weight_tying"),
    )


def _check_kind(file: Path, fields: Mapping[str, Any]) -> None:
    peft_type = fields.get("peft_type")
    if peft_type != "LORA":
        raise AdapterError(f"{file}: peft_type={shown(peft_type)} is not served; use a LoRA adapter ('LORA')")
    for name, value in fields.items():
        if name in _NO_EFFECT or name in _USED or _is_off(value):
            continue
        if name in _REFUSED:
            raise AdapterError(f"{file}: {name}={shown(value)} is not served: {_REFUSED[name]}")
        raise AdapterError(
            f"{file}: the field {shown(name)}={shown(value)} is unknown, and could change what the adapter computes; "
            "remove it if it does not"
        )
    _check_init(file, fields.get("init_lora_weights", True))


def _check_init(file: Path, value: Any) -> None:
    """Refuse the initialisations that change the base's weights: the adapter is right on that changed base alone."""
    name = value.lower() if isinstance(value, str) else ""
    if name.startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            f"{file}: init_lora_weights={shown(value)} changed the base's weights before training, so the adapter does "
            "not fit the base as it is; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    if not isinstance(value, bool) and name not in _PLAIN_INITS:
        raise _wrong(file, "init_lora_weights", value, f"true, false or one of {', '.join(_PLAIN_INITS)}")


def _is_off(value: Any) -> bool:
    return value is False or value == "" or (isinstance(value, list | dict) and not value)


def _wrong(file: Path, field: str, value: Any, wanted: str) -> AdapterError:
    return AdapterError(f"{file}: {field}={shown(value)} is not {wanted}")


def _bool(file: Path, fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(file, name, value, "true or false")
    return value


def _rank(file: Path, field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_INT:
        raise _wrong(file, field, value, f"an integer from 1 to {LARGEST_INT}")
    return value


def _alpha(file: Path, field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) <= _FLOAT32_MAX:
        raise _wrong(file, field, value, "a finite number other than 0, which multiplies the update")
    return float(value)


def _pattern[T](file: Path, fields: Mapping[str, Any], name: str, read: Callable[[Path, str, Any], T]) -> dict[str, T]:
    pattern = fields.get(name, {})
    if not isinstance(pattern, dict):
        raise _wrong(file, name, pattern, "an object from modules to numbers")
    for key in pattern:
        try:
            re.compile(_expression(key))  # what PEFT matches with, and stricter
            regex.compile(_expression(key), regex.V0)
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            raise AdapterError(
                f"{file}: the key {shown(key)} of {name} is not a regular expression: {error}"
            ) from error
    return {key: read(file, f"{name}[{shown(key)}]", value) for key, value in pattern.items()}


def _expression(key: str) -> str:
    """PEFT's expression for a pattern's key (`peft.utils.other.get_pattern_key`)."""
    return rf"(.*\.)?({key})$"


def _first_match[T](name: str, pattern: Mapping[str, T], path: str, default: T) -> T:
    return next((value for key, value in pattern.items() if _matches(name, key, path)), default)


def _matches(name: str, key: str, path: str) -> bool:
    """Whether PEFT takes a pattern's key for the module called `path`. Unlike `re`, `regex` can be told to give up."""
    try:
        return regex.match(_expression(key), path, regex.V0, timeout=_MATCH_SECONDS) is not None
    except TimeoutError as error:
        raise AdapterError(
            f"the key {shown(key)} of {name} takes more than {_MATCH_SECONDS:g} s to match {path!r}; write a simpler "
            "regular expression"
        ) from error


def _modules_to_save(file: Path, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _wrong(file, "modules_to_save", value, "a list of modules' names")
    return tuple(sorted({name.rpartition(".")[2] for name in value}))


def _token_indices(file: Path, value: Any) -> dict[str, tuple[int, ...]]:
    field = "trainable_token_indices"
    by_module = {EMBED_TOKENS: value} if isinstance(value, list) and value else value or {}
    if not isinstance(by_module, dict):
        raise _wrong(file, field, value, "a list of token ids, or an object from modules to such lists")
    found: dict[str, tuple[int, ...]] = {}
    for key, ids in by_module.items():
        module = key.rpartition(".")[2]
        if module not in (EMBED_TOKENS, LM_HEAD) or module in found:
            raise AdapterError(f"{file}: {field} names {shown(key)}; use {EMBED_TOKENS!r} and {LM_HEAD!r}, each once")
        if not isinstance(ids, list) or not ids or not all(_is_token_id(i) for i in ids) or _repeats(ids):
            raise _wrong(file, f"{field}[{shown(key)}]", ids, "a list of distinct token ids")
        found[module] = tuple(ids)
    return found


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_INT


def _repeats(values: Iterable[int]) -> bool:
    values = list(values)
    return len(set(values)) < len(values)
