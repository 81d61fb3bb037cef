"""Several adapters as one: a method applied to the sum of their products, module by module."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from tqdm.auto import tqdm

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.adapter import Adapter, LowRank
from qwen2_jax.lora.keys import EMBED_TOKENS, LM_HEAD, SCORE
from qwen2_jax.lora.merge_factors import Factors, concatenated, delta_of, factorised, truncated
from qwen2_jax.lora.merge_methods import combine
from qwen2_jax.lora.reader import ModuleId
from qwen2_jax.lora_requests import MergeOptions, check_weights

_INTO_BASE = "merge this adapter alone, with weight 1, into a checkpoint"
REPLACING_FIELDS = ("full_embed_tokens", "full_lm_head", "embed_token_rows", "lm_head_token_rows")
"""Fields of an `Adapter` that replace whole rows of the base's matrices."""


@dataclass(frozen=True, kw_only=True)
class MergedAdapter:
    """The merge, and what each module lost to its rank: `||M - scaling * b @ a|| / ||M||`, M being what was merged."""

    adapter: Adapter
    errors: Mapping[ModuleId, float]

    @property
    def largest_error(self) -> float:
        """The largest of `errors`."""
        return max(self.errors.values(), default=0.0)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One adapter's update of a module."""

    update: LowRank
    weight: float
    key: str


def merge_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    options: MergeOptions = MergeOptions(),  # noqa: B008  frozen
    *,
    use_tqdm: bool = False,
    go_on: Callable[[], None] = lambda: None,
) -> MergedAdapter:
    """Return the merge of `adapters`, all for one base, with a weight for each; its arrays are float32, its scalings 1.

    `linear` is exact without a rank (PEFT's "cat"), and has the least error at a smaller one (PEFT's "svd"); no product
    is multiplied out. The other methods make matrices whose rank is full, one module at a time, and go back to the
    nearest product of `options.rank` or of the sum of the ranks (PEFT's "ties_svd" and so on): **this loses part of
    them**, and `errors` says how much. A module that an adapter leaves alone counts as zero there. The bias of B
    (`lora_bias`) is merged by the same method, and exactly.

    What replaces weights of the base instead of adding to them can be merged in one case: biases that are equal in all
    adapters, in a linear merge whose weights sum to 1. The digest follows from those of `adapters`, the weights and the
    options. `go_on` is called before each module, and ends the merge by raising. Raises `AdapterError` for other
    replaced biases, for magnitudes (DoRA), full copies, token rows and classification heads, for adapters that do not
    fit each other, and for weights that are not finite.
    """
    check_weights(len(adapters), weights)
    for place, adapter in enumerate(adapters, 1):
        _refuse_replacements(f"adapter {place} of {len(adapters)}", adapter)
    biases = _shared_biases(adapters, weights, options)
    merged: dict[ModuleId, LowRank] = {}
    errors: dict[ModuleId, float] = {}
    parts = _parts_by_module(adapters, weights)
    for module in tqdm(parts, desc="Merging modules", disable=not use_tqdm):
        go_on()
        merged[module], errors[module] = _merge_module(module, parts[module], options)
    adapter = Adapter(
        linear={(layer, name): update for (layer, name), update in merged.items() if layer is not None},
        embed_tokens=merged.get((None, EMBED_TOKENS)),
        lm_head=merged.get((None, LM_HEAD)),
        biases=biases,
        full_embed_tokens=None,
        full_lm_head=None,
        embed_token_rows=None,
        lm_head_token_rows=None,
        digest=_digest(adapters, weights, options),
    )
    return MergedAdapter(adapter=adapter, errors=errors)


def merged_rank(adapters: Sequence[Adapter], options: MergeOptions) -> int:
    """Return the largest rank that a module of the merge of `adapters` will have; 0 without any."""
    ranks: Counter[ModuleId] = Counter()
    limits: dict[ModuleId, int] = {}
    for adapter in adapters:
        for module, update in updates_of(adapter).items():
            ranks[module] += update.rank
            limits[module] = min(update.b.shape[0], update.a.shape[1])

    def rank_of(module: ModuleId, total: int) -> int:
        asked = options.rank or total
        # Products side by side keep their ranks; one that is factorised anew has no more than its matrix.
        return total if options.method == "linear" and total <= asked else min(asked, limits[module])

    return max((rank_of(module, total) for module, total in ranks.items()), default=0)


def updates_of(adapter: Adapter) -> dict[ModuleId, LowRank]:
    """Return the low-rank updates by module, the layers' in order, then those of the embedding and the head."""
    found: dict[ModuleId, LowRank] = {module: adapter.linear[module] for module in sorted(adapter.linear)}
    ends = ((EMBED_TOKENS, adapter.embed_tokens), (LM_HEAD, adapter.lm_head))
    return found | {(None, name): update for name, update in ends if update is not None}


def named(module: ModuleId) -> str:
    """Return how a message names a module: `q_proj of layer 3`, or `lm_head`."""
    layer, name = module
    return name if layer is None else f"{name} of layer {layer}"


def _parts_by_module(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[ModuleId, list[_Part]]:
    parts: dict[ModuleId, list[_Part]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for module, update in updates_of(adapter).items():
            key = f"{adapter.digest}/{named(module)}"
            parts.setdefault(module, []).append(_Part(update=update, weight=weight, key=key))
    return parts


def _merge_module(module: ModuleId, parts: Sequence[_Part], options: MergeOptions) -> tuple[LowRank, float]:
    shapes = {(part.update.b.shape[0], part.update.a.shape[1]) for part in parts}
    if len(shapes) > 1:
        sizes = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise AdapterError(f"the adapters' {named(module)} have sizes {sizes}; merge adapters for one base model")
    with np.errstate(over="ignore", invalid="ignore"):
        factors = _factors(module, parts, options)
        bias = _merge_bias(parts, options)
    _check_finite(module, *([] if bias is None else [bias]))
    return LowRank(a=factors.a, b=factors.b, scaling=1.0, bias=bias, magnitude=None), factors.error


def _factors(module: ModuleId, parts: Sequence[_Part], options: MergeOptions) -> Factors:
    updates, weights = [part.update for part in parts], [part.weight for part in parts]
    if options.method == "linear":
        factors = concatenated(updates, weights)
        _check_finite(module, factors.a, factors.b)
        return factors if options.rank is None else truncated(factors, options.rank)
    deltas = [partial(delta_of, update) for update in updates]
    delta = combine(options, deltas, weights, [part.key for part in parts])
    _check_finite(module, delta)
    return factorised(delta, options.rank or sum(update.rank for update in updates))


def _merge_bias(parts: Sequence[_Part], options: MergeOptions) -> np.ndarray | None:
    having = [(part, part.update.bias) for part in parts if part.update.bias is not None]
    if not having:
        return None
    deltas = [partial(np.multiply, bias.astype(np.float32), np.float32(part.update.scaling)) for part, bias in having]
    return combine(options, deltas, [part.weight for part, _ in having], [f"{part.key}/bias" for part, _ in having])


def _check_finite(module: ModuleId, *arrays: np.ndarray) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise AdapterError(
            f"the merge of {named(module)} is beyond float32; use smaller weights, or leave out the adapter whose "
            "values are far too large"
        )


def _refuse_replacements(which: str, adapter: Adapter) -> None:
    for module, update in updates_of(adapter).items():
        if update.magnitude is not None:
            raise AdapterError(
                f"{which} has a DoRA magnitude for {named(module)}, which scales the base's rows and is no sum of "
                f"products; {_INTO_BASE}"
            )
    if adapter.score is not None:
        raise AdapterError(
            f"{which} has a classification head ({SCORE}), of which a merge has none; classify with this adapter alone"
        )
    for field in REPLACING_FIELDS:
        if getattr(adapter, field) is not None:
            raise AdapterError(
                f"{which} has {field}, which replaces what the base has and is no sum of products; {_INTO_BASE}"
            )


def _shared_biases(
    adapters: Sequence[Adapter], weights: Sequence[float], options: MergeOptions
) -> dict[tuple[int, str], np.ndarray]:
    """Return the replaced biases, where a weighted sum of what they add to the base's is the same replacement."""
    first = adapters[0].biases
    for module in sorted({module for adapter in adapters for module in adapter.biases}):
        if not all(_equal(first.get(module), adapter.biases.get(module)) for adapter in adapters):
            raise AdapterError(
                f"the adapters replace the bias of {named(module)} by different values, or not all of them do; what is "
                "added to the base's bias is not known, so they cannot be merged"
            )
    if first and (options.method != "linear" or not math.isclose(sum(weights), 1, rel_tol=1e-6)):
        raise AdapterError(
            f"the adapters replace biases of the base; these merge only with method='linear' and weights that sum to "
            f"1, not with method={options.method!r} and the sum {sum(weights):g}"
        )
    return dict(first)


def _equal(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    return first is second or (first is not None and second is not None and np.array_equal(first, second))


def _digest(adapters: Sequence[Adapter], weights: Sequence[float], options: MergeOptions) -> str:
    identity = [[adapter.digest for adapter in adapters], [float(weight) for weight in weights], asdict(options)]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
