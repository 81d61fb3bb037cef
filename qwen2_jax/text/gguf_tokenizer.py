"""Rebuilds a tokenizer from the `tokenizer.ggml.*` metadata of a GGUF file, whose format ggml's gguf.md describes."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from qwen2_jax.errors import CheckpointError
from qwen2_jax.text.byte_level import add_bos_eos, bpe_kind, build_bpe

_CONTROL = 3
_USER_DEFINED = 4
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def gguf_backend(metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that a GGUF file describes.

    Args:
        metadata: the file's keys and plain Python values; arrays are lists.

    Raises:
        CheckpointError: a key is missing, the tokenizer is not byte-level BPE, its pre-tokenizer is unknown, or its
            parts do not fit together.
    """
    model = _get(metadata, "model")
    if model != "gpt2":
        raise CheckpointError(f"tokenizer.ggml.model={model!r} is not supported; only byte-level BPE, 'gpt2', is")
    kind = bpe_kind(_get(metadata, "pre"))
    tokens, types = _get(metadata, "tokens"), _get(metadata, "token_type")
    if len(types) != len(tokens):
        raise CheckpointError(f"the GGUF file has {len(types)} token types for {len(tokens)} tokens")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"{len(tokens) - len(vocab)} of the GGUF file's {len(tokens)} tokens are duplicates")
    tokenizer = build_bpe(vocab, [_merge(line) for line in _get(metadata, "merges")], kind)
    tokenizer.add_tokens([_added(token) for token, type_ in zip(tokens, types, strict=True) if type_ == _USER_DEFINED])
    tokenizer.add_special_tokens(
        [_added(token, special=True) for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL]
    )
    names = gguf_special_tokens(metadata)
    bos = names.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", kind.add_bos) else None
    eos = names.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if bos is not None or eos is not None:
        add_bos_eos(tokenizer, bos=bos, eos=eos)
    return tokenizer


def gguf_special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the tokens with a role, by Hugging Face's names: `{"eos_token": "<|im_end|>", ...}`.

    Raises:
        CheckpointError: a role's token id is outside the vocabulary.
    """
    tokens = _get(metadata, "tokens")
    names: dict[str, str] = {}
    for name, gguf_name in _NAMES.items():
        token_id = metadata.get(f"tokenizer.ggml.{gguf_name}_token_id")
        if token_id is None:
            continue
        if not 0 <= token_id < len(tokens):
            raise CheckpointError(f"tokenizer.ggml.{gguf_name}_token_id={token_id} is not one of {len(tokens)} tokens")
        names[name] = tokens[token_id]
    return names


def gguf_eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end an answer: end of sequence, then end of turn if that is another one."""
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _get(metadata: Mapping[str, Any], name: str) -> Any:
    key = f"tokenizer.ggml.{name}"
    if key not in metadata:
        raise CheckpointError(f"the GGUF file has no {key}; convert the model again with a current llama.cpp")
    return metadata[key]


def _merge(line: str) -> tuple[str, str]:
    left, _, right = line.partition(" ")
    if not left or not right:
        raise CheckpointError(f"tokenizer.ggml.merges has the line {line!r}; it should be two tokens and a space")
    return left, right


def _added(token: str, *, special: bool = False) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)
