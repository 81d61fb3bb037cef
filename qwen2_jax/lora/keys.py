"""What the names of an adapter's tensors say: which module of the base, and which part of its change.

PEFT writes `base_model.model.` + the module's name in the model + the part. Trainers leave out the first, a model
without a head leaves out one `model.`, and a raw state dict keeps the adapter's own name inside the part.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen2_jax.errors import AdapterError

Part = Literal["a", "b", "lora_bias", "magnitude", "bias", "full", "token_rows", "copy"]
EMBED_TOKENS = "embed_tokens"
LM_HEAD = "lm_head"
SCORE = "score"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

_PEFT_PREFIX = "base_model.model."
# The head's name in models that call it the inverse of the embedding.
_HEAD_ALIAS = "unembed_tokens"
CLASSIFICATION_HEADS = (SCORE, "classifier")
"""The names of a sequence classifier's head; PEFT saves the one that the model has."""
_MODULE = re.compile(
    rf"(?:model\.)?(?:layers\.(?P<layer>\d{{1,9}})\.(?:self_attn\.(?P<attention>{'|'.join(ATTENTION)})"
    rf"|mlp\.(?P<mlp>{'|'.join(MLP)}))|(?P<other>{EMBED_TOKENS}|{LM_HEAD}|{_HEAD_ALIAS})|(?P<score>{'|'.join(CLASSIFICATION_HEADS)}))\."
)
# `[^.]+` is the adapter's name in a raw state dict.
_LINEAR_PARTS: tuple[tuple[re.Pattern[str], Part], ...] = (
    (re.compile(r"lora_A(\.[^.]+)?\.weight"), "a"),
    (re.compile(r"lora_B(\.[^.]+)?\.weight"), "b"),
    (re.compile(r"lora_B(\.[^.]+)?\.bias"), "lora_bias"),
)
_EMBEDDING_PARTS: tuple[tuple[re.Pattern[str], Part], ...] = (
    (re.compile(r"lora_embedding_A(\.[^.]+)?"), "a"),
    (re.compile(r"lora_embedding_B(\.[^.]+)?"), "b"),
)
_COMMON_PARTS: tuple[tuple[re.Pattern[str], Part], ...] = (
    (re.compile(r"lora_magnitude_vector(\.[^.]+)?(\.weight)?"), "magnitude"),
    (re.compile(r"(base_layer\.)?bias"), "bias"),
    (re.compile(r"(modules_to_save(\.[^.]+)?\.)?weight"), "full"),
    (re.compile(r"token_adapter\.trainable_tokens_delta(\.[^.]+)?"), "token_rows"),
    (re.compile(r"((token_adapter\.)?base_layer|original_module)\.weight"), "copy"),
    (re.compile(r"token_adapter\.trainable_tokens_original(\.[^.]+)?"), "copy"),
)


@dataclass(frozen=True, kw_only=True)
class TensorKey:
    """What one tensor is. `copy` is a copy of the base's own weight, which PEFT saves beside an adapted embedding.

    `layer` is None for `embed_tokens`, `lm_head` and `score`, as every classification head is called. `path` is the
    module's name in the model that was trained, which the patterns of the config are matched with.
    """

    layer: int | None
    module: str
    part: Part
    path: str


def parse_key(file: Path, name: str) -> TensorKey:
    """Return what the tensor `name` of `file` is; raises `AdapterError` where it is nothing of a Qwen2 adapter."""
    rest = name.removeprefix(_PEFT_PREFIX)
    found = _MODULE.match(rest)
    if found is None:
        raise AdapterError(f"{file}: the tensor {name!r} belongs to no module that can be adapted: {_why(rest)}")
    module = found["attention"] or found["mlp"] or (found["other"] or SCORE).replace(_HEAD_ALIAS, LM_HEAD)
    own_parts = _EMBEDDING_PARTS if module == EMBED_TOKENS else _LINEAR_PARTS
    suffix = rest[found.end() :]
    parts = own_parts + _COMMON_PARTS
    part: Part | None = next((part for pattern, part in parts if pattern.fullmatch(suffix)), None)
    if part is None:
        special = {EMBED_TOKENS: "lora_embedding_A and lora_embedding_B", SCORE: "weight"}
        usual = special.get(module, "lora_A.weight and lora_B.weight")
        raise AdapterError(f"{file}: the tensor {name!r} is no part of a LoRA adapter; for {module} it has {usual}")
    layer = None if found["layer"] is None else int(found["layer"])
    return TensorKey(layer=layer, module=module, part=part, path=rest[: found.end() - 1])


def _why(name: str) -> str:
    if re.search(r"norm\.", name):
        return f"a norm as one of modules_to_save is not served; use {EMBED_TOKENS}, {LM_HEAD} or none"
    return (
        f"a Qwen2 has model.layers.N.self_attn.{{{','.join(ATTENTION)}}}, model.layers.N.mlp.{{{','.join(MLP)}}}, "
        f"model.{EMBED_TOKENS} and {LM_HEAD}; was the adapter trained for another architecture?"
    )
