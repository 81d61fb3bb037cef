"""How a caller names adapters: one for a request to run with, or several merged as one. `types` exports these names."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from qwen2_jax.errors import AdapterError

Method = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
MajoritySign = Literal["total", "frequency"]
ELECTING: tuple[Method, ...] = ("ties", "dare_ties")
"""The methods in which adapters vote on each entry's sign."""
DRAWING: tuple[Method, ...] = ("dare_linear", "dare_ties")
"""The methods that drop entries at random."""


@dataclass(frozen=True)
class LoRARequest:
    """Names the LoRA adapter that a request runs with.

    Raises:
        AdapterError: an empty name, path, revision or subfolder, or an id that is not a positive integer.
    """

    lora_name: str
    lora_int_id: int
    """A number of at least 1 that is this adapter's alone."""
    lora_path: str
    """A local folder in PEFT's format, or a hub id."""
    revision: str | None = field(default=None, kw_only=True)
    """The branch, tag or commit of a hub id; None is the main branch."""
    subfolder: str | None = field(default=None, kw_only=True)
    """The adapter's folder within `lora_path`; None is `lora_path` itself."""

    def __post_init__(self) -> None:
        _check_name(self.lora_name, self.lora_int_id)
        _check_text("lora_path", self.lora_path)
        for name, value in (("revision", self.revision), ("subfolder", self.subfolder)):
            if value is not None:
                _check_text(name, value)


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How adapters are merged; what the method has no use for is refused, so that no option is ignored.

    Raises `AdapterError`, which names the field, its value and what is allowed.
    """

    method: Method = "linear"
    """`linear`: the weighted sum. `magnitude_prune`: that of each delta's largest entries. `dare_linear`: that of
    random entries, scaled up by `1 / density`. `ties` and `dare_ties`: of what either of these leaves, each entry takes
    the sign that prevails, and the mean of the weighted entries with that sign."""
    density: float | None = None
    """The share of a delta's entries that is kept, in (0, 1]; needed by all methods but `linear`."""
    majority_sign_method: MajoritySign | None = None
    """Which sign prevails in `ties` and `dare_ties`: the sum's (`total`, also for None) or the more frequent."""
    seed: int | None = None
    """What `dare_linear` and `dare_ties` draw from; None is 0."""
    rank: int | None = None
    """The most that a module of the result may have; None is the sum of the merged ranks."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise AdapterError(f"method={self.method!r} is unknown; use one of {', '.join(get_args(Method))}")
        self._check_density()
        if self.majority_sign_method not in (None, *get_args(MajoritySign)):
            raise AdapterError(
                f"majority_sign_method={self.majority_sign_method!r} is unknown; use 'total' or 'frequency'"
            )
        if self.majority_sign_method is not None and self.method not in ELECTING:
            raise self._useless("majority_sign_method", ELECTING)
        if self.seed is not None and self.method not in DRAWING:
            raise self._useless("seed", DRAWING)
        if self.seed is not None and not _is_int(self.seed):
            raise AdapterError(f"seed={self.seed!r} is not an integer")
        if self.rank is not None and (not _is_int(self.rank) or self.rank < 1):
            raise AdapterError(f"rank={self.rank!r} is not a positive integer; leave it out for the sum of the ranks")

    def _check_density(self) -> None:
        pruning = tuple(method for method in get_args(Method) if method != "linear")
        if self.method == "linear":
            if self.density is not None:
                raise self._useless("density", pruning)
        elif self.density is None:
            raise AdapterError(
                f"method={self.method!r} needs density, the share of entries to keep: in (0, 1], say 0.5"
            )
        elif isinstance(self.density, bool) or not isinstance(self.density, int | float) or not 0 < self.density <= 1:
            raise AdapterError(f"density={self.density!r} is not in (0, 1]; it is the share of entries to keep")

    def _useless(self, field: str, methods: tuple[Method, ...]) -> AdapterError:
        return AdapterError(
            f"{field}={getattr(self, field)!r} has no effect with method={self.method!r}; leave it out, or use "
            f"{' or '.join(methods)}"
        )


@dataclass(frozen=True)
class MergedLoRARequest:
    """Names several adapters that a request runs with as one, their merge; it is made when it is first asked for.

    Raises:
        AdapterError: an empty name, an id that is not a positive integer, no adapter, or weights that are not finite or
            not one for each adapter.
    """

    lora_name: str
    lora_int_id: int
    """A number of at least 1 that is this name's alone."""
    adapters: Sequence[LoRARequest]
    """What is merged; one may come twice. Their own names and ids are not registered."""
    weights: Sequence[float]
    """What multiplies each adapter's update."""
    options: MergeOptions = MergeOptions()
    """The method, and what belongs to it."""

    def __post_init__(self) -> None:
        _check_name(self.lora_name, self.lora_int_id)
        for name in ("adapters", "weights"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise AdapterError(f"{name}={value!r} is not allowed; use a list")
            object.__setattr__(self, name, tuple(value))  # requests are keys of tables
        for each in self.adapters:
            if not isinstance(each, LoRARequest):
                raise AdapterError(f"adapters has {each!r}, which is not a LoRARequest(name, id, path)")
        check_weights(len(self.adapters), self.weights)
        if not isinstance(self.options, MergeOptions):
            raise AdapterError(f"options={self.options!r} is not a MergeOptions")


AdapterRequest = LoRARequest | MergedLoRARequest
"""What names an adapter."""


def check_weights(count: int, weights: Sequence[float]) -> None:
    """Raise `AdapterError` unless there are adapters, `count` of them, and a finite weight for each."""
    if not count or count != len(weights):
        raise AdapterError(f"{count} adapters and {len(weights)} weights; give at least one, and a weight each")
    for weight in weights:
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not abs(weight) <= sys.float_info.max:
            raise AdapterError(f"weight={weight!r} is not a finite number")


def _check_name(name: str, number: int) -> None:
    _check_text("lora_name", name)
    if not _is_int(number) or number < 1:
        raise AdapterError(f"lora_int_id={number!r} is not allowed; use an integer of at least 1")


def _check_text(name: str, value: str) -> None:
    if not isinstance(value, str) or not value:
        raise AdapterError(f"{name}={value!r} is not allowed; use a string that is not empty")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
