"""Reads the tokenizer files of a checkpoint folder, in the layouts that Hugging Face's Qwen2 checkpoints have."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from qwen2_jax.errors import CheckpointError
from qwen2_jax.text.byte_level import QWEN2, add_bos_eos, build_bpe

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
"""The roles that Hugging Face gives to special tokens; chat templates read them by these names."""

# What transformers' Qwen2Tokenizer takes for granted, and the tokens that follow the vocabulary of every Qwen2.
_QWEN2_ROLES = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
_QWEN2_ADDED_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty if there is no such file.

    Raises:
        CheckpointError: the file is damaged, or holds something else than an object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; it should be an object")
    return content


def read_special_tokens(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens by role; tokenizer_config.json goes before special_tokens_map.json.

    Without tokenizer.json, roles that neither of them mentions are those of every Qwen2.

    Raises:
        CheckpointError: a token is neither a string nor an object with `content`.
    """
    defaults = {} if (folder / "tokenizer.json").is_file() else _QWEN2_ROLES
    given = {**defaults, **read_json(folder / "special_tokens_map.json"), **tokenizer_config}
    return {role: _content(given[role]) for role in SPECIAL_TOKEN_NAMES if given.get(role) is not None}


def read_eos_token_ids(folder: Path) -> list[int]:
    """Return the ids that generation_config.json names as ends of an answer; none without that file.

    Raises:
        CheckpointError: something else than an id or a list of ids.
    """
    given = read_json(folder / "generation_config.json").get("eos_token_id")
    ids = [] if given is None else given if isinstance(given, list) else [given]
    if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in ids):
        raise CheckpointError(f"eos_token_id={given!r} in {folder / 'generation_config.json'} is no id or list of ids")
    return ids


def load_backend(folder: Path, tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> Tokenizer:
    """Return the tokenizer in tokenizer.json or, without that file, the Qwen2 one of vocab.json and merges.txt.

    Tokens that only `added_tokens_decoder` of tokenizer_config.json knows are added at the ids it gives them. A folder
    with vocab.json and merges.txt alone gets Qwen2's three control tokens after the vocabulary.

    Raises:
        CheckpointError: files are missing, damaged or contradict each other.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return _build_qwen2(folder, tokenizer_config, special_tokens)
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"cannot read {file}: {error}") from error
    _add_missing_tokens(backend, tokenizer_config)
    _add_llama_ends(backend, tokenizer_config, special_tokens)
    return backend


def _add_llama_ends(backend: Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
    """Put the tokens around a text that Hugging Face's Llama tokenizer does, whatever tokenizer.json says of them.

    Models made from Qwen2 may have that class (DeepSeek-R1-Distill-Qwen).
    """
    if not str(config.get("tokenizer_class") or "").startswith("LlamaTokenizer"):
        return
    ends = {"bos": config.get("add_bos_token", True), "eos": config.get("add_eos_token", False)}
    tokens = {end: special_tokens.get(f"{end}_token") if is_on else None for end, is_on in ends.items()}
    if any(token is not None and backend.token_to_id(token) is None for token in tokens.values()):
        return  # `Tokenizer` refuses it by name
    around = backend.encode("").tokens
    if around != [token for token in tokens.values() if token is not None]:
        add_bos_eos(backend, **tokens)


def _build_qwen2(folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> Tokenizer:
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not vocab.is_file() or not merges.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json, and no vocab.json with merges.txt either")
    backend = build_bpe(read_json(vocab), _read_merges(merges), QWEN2)
    _add_missing_tokens(backend, config)
    added = () if "added_tokens_decoder" in config else _QWEN2_ADDED_TOKENS
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (*added, *special_tokens.values())])
    if config.get("add_bos_token"):
        add_bos_eos(backend, bos=special_tokens.get("bos_token"), eos=None)
    return backend


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    start = 1 if lines[0].startswith("#version") else 0
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines[start:], start + 1):
        match line.split(" "):
            case [left, right]:
                merges.append((left, right))
            case [""]:
                pass
            case _:
                raise CheckpointError(f"{path}, line {number}: {line!r} is not two tokens and a space")
    return merges


def _add_missing_tokens(backend: Tokenizer, config: Mapping[str, Any]) -> None:
    known = backend.get_added_tokens_decoder()
    given = config.get("added_tokens_decoder") or {}
    if not isinstance(given, dict) or not all(key.isdecimal() for key in given):
        raise CheckpointError("added_tokens_decoder in tokenizer_config.json must map token ids to tokens")
    for token_id in sorted(int(key) for key in given):
        if token_id in known:
            continue
        token = _added_token(given[str(token_id)])
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if (actual := backend.token_to_id(token.content)) != token_id:
            raise CheckpointError(
                f"added_tokens_decoder gives {token.content!r} the id {token_id}, but in the vocabulary it is {actual}"
            )


def _added_token(options: Any) -> AddedToken:
    content = _content(options)
    flags = options if isinstance(options, dict) else {}
    names = ("lstrip", "rstrip", "normalized", "single_word", "special")
    return AddedToken(content, **{name: bool(flags[name]) for name in names if name in flags})


def _content(token: Any) -> str:
    # A token with options is an object: {"content": "<|im_end|>", "lstrip": false, ...}.
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise CheckpointError(f"special token {token!r} in the tokenizer's config is neither a string nor an object")
    return content
