"""Reads a PEFT LoRA adapter exactly: the tensors say which modules are adapted, the config how they are scaled."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.adapter import Adapter, LowRank, TokenRows
from qwen2_jax.lora.config import AdapterConfig
from qwen2_jax.lora.files import CONFIG, read_config, read_entries, weights_file
from qwen2_jax.lora.keys import CLASSIFICATION_HEADS, EMBED_TOKENS, LM_HEAD, SCORE, Part, TensorKey, parse_key
from qwen2_jax.lora.targets import Target, targets
from qwen2_jax.lora.tensors import Weights, read_weights
from qwen2_jax.models.checkpoint import TensorEntry
from qwen2_jax.models.safetensors_reader import DTYPES

ModuleId = tuple[int | None, str]
"""A layer and a projection's name; no layer for the embedding and the head."""

_DTYPES = tuple(name for name, _ in DTYPES.values())
_UPDATE_PARTS: tuple[Part, ...] = ("a", "b", "lora_bias", "magnitude")
# The tensor whose presence must agree with a field of the config, for modules with a low-rank update.
_OPTIONAL_PARTS: tuple[tuple[str, Part], ...] = (("lora_bias", "lora_bias"), ("use_dora", "magnitude"))


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    name: str
    path: str
    entry: TensorEntry


def read_adapter(path: Path, base: ModelConfig) -> Adapter:
    """Return the adapter in the folder `path`, for a model with the sizes of `base`.

    Every tensor of the file is one that is used, or a copy of the base's own. Raises `AdapterError` for files that are
    missing or damaged, for a field or a tensor that is not served, and for what does not fit `base`; it names the file,
    the field or tensor, and what would be right.
    """
    folder = Path(path)
    config, file, table = read_config(folder), weights_file(folder), targets(base)
    modules: dict[ModuleId, dict[Part, _Tensor]] = {}
    for name, entry in read_entries(file).items():
        key = parse_key(file, name)
        _check_place(file, name, key, entry, table.get(key.module), base)
        parts = modules.setdefault((key.layer, key.module), {})
        if key.part in parts and key.part != "copy":
            raise AdapterError(
                f"{file}: the tensors {parts[key.part].name!r} and {name!r} are the same part of {key.module}; a file "
                "holds one adapter"
            )
        parts[key.part] = _Tensor(name=name, path=key.path, entry=entry)
    used = [tensor for parts in modules.values() for part, tensor in parts.items() if part != "copy"]
    weights = read_weights(config, file, {tensor.name: tensor.entry for tensor in used})
    return _Reader(file=file, config=config, base=base, table=table, modules=modules, weights=weights).read()


def _check_place(
    file: Path, name: str, key: TensorKey, entry: TensorEntry, target: Target | None, base: ModelConfig
) -> None:
    """Raise `AdapterError` unless the base has a place for a tensor of this name and type, or it is a `score`."""
    at, tables = f"{file}: the tensor {name!r}", (base.vocab_size, base.hidden_size)
    if entry.dtype not in _DTYPES:
        raise AdapterError(f"{at} has dtype {entry.dtype}; use one of {', '.join(_DTYPES)}")
    if key.module == SCORE:
        return _check_score(at, key.part, entry.shape, base.hidden_size)
    if target is None:
        raise AdapterError(f"{at} is for {key.module}, which a {base.architecture} does not have")
    if key.layer is not None and key.layer >= base.num_hidden_layers:
        raise AdapterError(
            f"{at} is for layer {key.layer}, but the base has {base.num_hidden_layers} layers; the adapter was trained "
            "for another model"
        )
    if key.layer is not None and key.part in ("full", "token_rows", "copy"):
        raise AdapterError(
            f"{at} replaces a whole projection, which is not served; only {EMBED_TOKENS} and {LM_HEAD} can be among "
            "modules_to_save"
        )
    if key.part == "bias" and not target.has_bias:
        raise AdapterError(f"{at} replaces a bias, which the base's {key.module} does not have")
    if key.part in ("full", "copy") and entry.shape != tables:
        raise AdapterError(
            f"{at} has shape {list(entry.shape)}, the base's has {list(tables)} (vocab_size and hidden_size); adapters "
            "with a resized vocabulary or for another size of model are not served"
        )


def _check_score(at: str, part: Part, shape: tuple[int, ...], hidden_size: int) -> None:
    """Raise `AdapterError` unless a classification head may have such a part."""
    if part == "bias":
        raise AdapterError(
            f"{at} is a bias, which the head of a Qwen2ForSequenceClassification does not have; classifiers of tokens "
            "are not served"
        )
    if part not in ("full", "copy"):
        raise AdapterError(
            f"{at} is an update of a classification head, which is not served; train the head as one of "
            "modules_to_save, and leave it out of target_modules"
        )
    if len(shape) != 2 or not shape[0] or shape[1] != hidden_size:
        raise AdapterError(
            f"{at} has shape {list(shape)} where a classification head is [num_labels, {hidden_size}]: the base has "
            f"hidden_size={hidden_size}"
        )


@dataclass(frozen=True, kw_only=True)
class _Reader:
    file: Path
    config: AdapterConfig
    base: ModelConfig
    table: Mapping[str, Target]
    modules: Mapping[ModuleId, Mapping[Part, _Tensor]]
    weights: Weights

    def read(self) -> Adapter:
        """Return the adapter; raises `AdapterError`."""
        self._check_modules_to_save()
        updates = {module: self._low_rank(module) for module in self.modules if self._has(module, *_UPDATE_PARTS)}
        embed, head = updates.get((None, EMBED_TOKENS)), updates.get((None, LM_HEAD))
        full_embed, full_head = self._full(EMBED_TOKENS), self._full(LM_HEAD)
        embed_rows, head_rows = self._token_rows(EMBED_TOKENS), self._token_rows(LM_HEAD)
        if self._ties:
            head = self._tied_head(embed) if head is None and embed is not None else head
            full_head = full_embed if full_head is None else full_head
        adapter = Adapter(
            linear={(layer, name): update for (layer, name), update in updates.items() if layer is not None},
            embed_tokens=embed,
            lm_head=head,
            biases=self._biases(),
            full_embed_tokens=full_embed,
            full_lm_head=full_head,
            embed_token_rows=embed_rows,
            lm_head_token_rows=embed_rows if head_rows is None and self._head_shares_rows else head_rows,
            score=self._full(SCORE),
            digest=self.weights.digest,
        )
        self._check_changes(EMBED_TOKENS, adapter.embed_tokens, adapter.full_embed_tokens, adapter.embed_token_rows)
        self._check_changes(LM_HEAD, adapter.lm_head, adapter.full_lm_head, adapter.lm_head_token_rows)
        if adapter.nbytes == 0:
            raise AdapterError(f"{self.file} changes no module of the base: it has no tensors of an adapter")
        return adapter

    @property
    def _ties(self) -> bool:
        """Whether the head follows the embedding; PEFT ignores the field where the base does not tie them."""
        return self.config.ensure_weight_tying and self.base.tie_word_embeddings

    @property
    def _head_shares_rows(self) -> bool:
        """Whether the embedding's new rows are the tied head's too (`set_additional_trainable_modules` in PEFT)."""
        rows = self.config.trainable_token_indices
        same = rows.get(LM_HEAD) in (None, rows.get(EMBED_TOKENS))
        return self.base.tie_word_embeddings and EMBED_TOKENS in rows and same

    def _has(self, module: ModuleId, *parts: Part) -> bool:
        return any(part in self.modules.get(module, {}) for part in parts)

    def _low_rank(self, module: ModuleId) -> LowRank:
        parts, target = self.modules[module], self.table[module[1]]
        some = next(iter(parts.values())).name
        a, b = parts.get("a"), parts.get("b")
        if a is None or b is None:
            raise AdapterError(
                f"{self.file}: beside the tensor {some!r} there is no lora_{'A' if a is None else 'B'} of its module; "
                "is the file whole?"
            )
        for field, part in _OPTIONAL_PARTS:
            if getattr(self.config, field) != (part in parts):
                given, has = str(getattr(self.config, field)).lower(), "a" if part in parts else "no"
                raise AdapterError(f"{self.file}: {field}={given}, but beside {a.name!r} there is {has} {part} tensor")
        rank = self.config.rank(a.path)
        out = (target.out_features,)
        return LowRank(
            a=self._load(a, (rank, target.in_features), rank=rank),
            b=self._load(b, (target.out_features, rank), rank=rank),
            scaling=self.config.scaling(a.path),
            bias=self._load(parts["lora_bias"], out) if "lora_bias" in parts else None,
            magnitude=self._load(parts["magnitude"], out) if "magnitude" in parts else None,
        )

    def _tied_head(self, embed: LowRank) -> LowRank:
        """The head's update where the file leaves it to the embedding's, transposed (`LoraLayer.update_layer`)."""
        if embed.magnitude is not None:
            raise AdapterError(f"{self.file}: use_dora=true, but there is no magnitude tensor for {LM_HEAD}")
        scaling = self.config.scaling(LM_HEAD)
        return LowRank(a=embed.b.T, b=embed.a.T, scaling=scaling, bias=None, magnitude=None)

    def _biases(self) -> dict[tuple[int, str], np.ndarray]:
        return {
            (layer, name): self._load(parts["bias"], (self.table[name].out_features,))
            for (layer, name), parts in self.modules.items()
            if layer is not None and "bias" in parts
        }

    def _full(self, name: str) -> np.ndarray | None:
        tensor = self.modules.get((None, name), {}).get("full")
        # A copy, which does not keep the memory of the whole file.
        return None if tensor is None else self._load(tensor, tensor.entry.shape).copy()

    def _token_rows(self, name: str) -> TokenRows | None:
        token_ids = self.config.trainable_token_indices.get(name, ())
        tensor = self.modules.get((None, name), {}).get("token_rows")
        outside = [token_id for token_id in token_ids if token_id >= self.base.vocab_size]
        if outside:
            raise AdapterError(
                f"{self.file.with_name(CONFIG)}: trainable_token_indices has {outside[0]} for {name}, but the base's "
                f"vocabulary has {self.base.vocab_size} tokens; a resized vocabulary is not served"
            )
        if tensor is not None and token_ids:
            rows = self._load(tensor, (len(token_ids), self.base.hidden_size))
            return TokenRows(token_ids=np.array(token_ids, np.int32), rows=rows)
        if tensor is not None:
            raise AdapterError(
                f"{self.file}: for the tensor {tensor.name!r} trainable_token_indices in {CONFIG} names no tokens"
            )
        if token_ids and not (name == LM_HEAD and self._head_shares_rows):
            raise AdapterError(f"{self.file}: trainable_token_indices names tokens of {name}, but there is no tensor")
        return None

    def _load(self, tensor: _Tensor, shape: tuple[int, ...], *, rank: int | None = None) -> np.ndarray:
        found, at = tensor.entry.shape, f"{self.file}: the tensor {tensor.name!r}"
        if found != shape:
            sizes = f"hidden_size={self.base.hidden_size} and vocab_size={self.base.vocab_size}"
            of_rank = "" if rank is None else f"{CONFIG} gives it the rank {rank} (r or rank_pattern), and "
            raise AdapterError(
                f"{at} has shape {list(found)} where {list(shape)} is needed: {of_rank}the base has {sizes}"
            )
        if tensor.name in self.weights.not_finite:
            raise AdapterError(
                f"{at} has values that are not finite; the training has diverged, or the file is damaged"
            )
        return self.weights.arrays[tensor.name]

    def _check_modules_to_save(self) -> None:
        for name in self.config.modules_to_save:
            if name not in (EMBED_TOKENS, LM_HEAD, *CLASSIFICATION_HEADS):
                raise AdapterError(
                    f"{self.file.with_name(CONFIG)}: modules_to_save names {name!r}, which is not served; only "
                    f"{EMBED_TOKENS}, {LM_HEAD} and {' or '.join(CLASSIFICATION_HEADS)} are"
                )
            tied = name == LM_HEAD and self._ties and self._has((None, EMBED_TOKENS), "full")
            # PEFT names both heads for every classifier, which has one of them.
            module = SCORE if name in CLASSIFICATION_HEADS else name
            if not self._has((None, module), "full") and not tied:
                raise AdapterError(f"{self.file}: modules_to_save names {name!r}, but there is no tensor for it")

    def _check_changes(self, name: str, *changes: object) -> None:
        if sum(change is not None for change in changes) > 1:
            raise AdapterError(
                f"{self.file}: {name} has more than one of a LoRA, a full copy (modules_to_save) and new rows "
                "(trainable_token_indices), which PEFT does not combine"
            )
