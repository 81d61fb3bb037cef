"""A checkpoint's tokenizer: Hugging Face's `tokenizers` library, without transformers."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, overload

import tokenizers
from tokenizers import decoders

from qwen2_jax.errors import CheckpointError, RequestError
from qwen2_jax.text.byte_level import token_to_bytes
from qwen2_jax.text.chat_template import ChatTemplate, load_chat_template, render_chat, select_chat_template
from qwen2_jax.text.gguf_tokenizer import gguf_backend, gguf_eos_token_ids, gguf_special_tokens
from qwen2_jax.text.tokenizer_files import load_backend, read_eos_token_ids, read_json, read_special_tokens


class Tokenizer:
    """Byte-level BPE, as every Qwen2 has it, with its special tokens and its chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        """Wrap a tokenizer of the `tokenizers` library.

        Args:
            backend: must have a ByteLevel decoder.
            special_tokens: tokens by role, names as in `tokenizer_files.SPECIAL_TOKEN_NAMES`.
            chat_template: jinja source, or several by name.
            eos_token_ids: tokens that end an answer, besides `eos_token`.

        Raises:
            CheckpointError: another decoder, or a special token that is not in the vocabulary.
        """
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise CheckpointError(f"the tokenizer's decoder is {backend.decoder!r}; only ByteLevel is supported")
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        """Tokens by role."""
        for role, token in self.special_tokens.items():
            if backend.token_to_id(token) is None:
                raise CheckpointError(f"{role}={token!r} is not in the tokenizer's vocabulary")
        self.chat_template = chat_template
        first = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids = tuple(dict.fromkeys((*first, *eos_token_ids)))
        """All tokens that end an answer, `eos_token_id` first."""
        self._bytes_of_id: dict[int, bytes] = {}
        self._text_of_id: dict[int, str] = {}

    @classmethod
    def from_dir(cls, folder: str | Path) -> Self:
        """Read a checkpoint folder: tokenizer.json, or vocab.json and merges.txt, and the configs beside them.

        Raises:
            CheckpointError: files are missing, damaged or contradict each other.
        """
        folder = Path(folder)
        config = read_json(folder / "tokenizer_config.json")
        special_tokens = read_special_tokens(folder, config)
        return cls(
            load_backend(folder, config, special_tokens),
            special_tokens=special_tokens,
            chat_template=load_chat_template(folder, config),
            eos_token_ids=read_eos_token_ids(folder),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """Build the tokenizer that a GGUF file's metadata describes; values are plain Python, arrays are lists.

        Raises:
            CheckpointError: the metadata is incomplete, or of a tokenizer that is not byte-level BPE.
        """
        return cls(
            gguf_backend(metadata),
            special_tokens=gguf_special_tokens(metadata),
            chat_template=metadata.get("tokenizer.chat_template"),
            eos_token_ids=gguf_eos_token_ids(metadata),
        )

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `from_dir` and transformers read.

        Ends of an answer other than `eos_token` are the business of generation_config.json.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if isinstance(self.chat_template, Mapping):
            config["chat_template"] = [{"name": k, "template": v} for k, v in self.chat_template.items()]
        elif self.chat_template is not None:
            config["chat_template"] = self.chat_template
        text = json.dumps(config, ensure_ascii=False, indent=2)
        (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")

    def __len__(self) -> int:
        """Return the number of tokens, added ones included; a model's vocabulary may be larger, for padding."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of tokens without those added on top, as in transformers; `len` counts all."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, if there is one."""
        return self._role_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, if there is one."""
        return self._role_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token, if there is one."""
        return self._role_id("pad_token")

    @cached_property
    def all_special_ids(self) -> frozenset[int]:
        """The ids that `decode(..., skip_special_tokens=True)` leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the text's token ids; special tokens written out in it become their ids.

        Args:
            text: any Unicode text.
            add_special_tokens: whether to add what the model expects around a text (Qwen2 expects nothing).

        Raises:
            RequestError: not a string, or one with lone surrogates.
        """
        if not isinstance(text, str):
            raise RequestError(f"cannot tokenize {type(text).__name__} {text!r}; pass a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not valid Unicode: {error}") from error
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token ids; ids that no token has (a model's padding) add nothing."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Return the text of one token by itself, as log-probabilities show it."""
        if token_id not in self._text_of_id:
            self._text_of_id[token_id] = self.decode([token_id])
        return self._text_of_id[token_id]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that a token adds to the text; a part of a character, or none for an unknown id."""
        if token_id not in self._bytes_of_id:
            token = self.backend.id_to_token(token_id)
            self._bytes_of_id[token_id] = b"" if token is None else token_to_bytes(token)
        return self._bytes_of_id[token_id]

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str | None]:
        """Return vocabulary entries as they are written (`Ġthe`); None for an id that no token has."""
        return [self.backend.id_to_token(token_id) for token_id in token_ids]

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        """Return the ids of vocabulary entries; None for one that is not in the vocabulary."""
        return [self.backend.token_to_id(token) for token in tokens]

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tokenize: Literal[False] = False,
        **kwargs: Any,
    ) -> str: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tokenize: Literal[True],
        **kwargs: Any,
    ) -> list[int]: ...
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> str | list[int]:
        """Return the prompt for a conversation, as text or, with `tokenize`, as token ids.

        Args:
            messages: dicts with `role` and `content`, as OpenAI's API has them.
            tools: JSON schemas of the functions that the model may call.
            add_generation_prompt: whether to end with the head of the assistant's answer; None does so unless
                `continue_final_message`.
            continue_final_message: whether to end inside the last message, so that the model goes on with it.
            chat_template: another template's source, or the name of one of the model's.
            tokenize: whether to return token ids.
            **kwargs: variables for the template; they override the special tokens.

        Raises:
            RequestError: no template, malformed messages, or a template that fails or refuses them.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        text = render_chat(
            select_chat_template(self.chat_template, chat_template, has_tools=bool(tools)),
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self.special_tokens, **kwargs},
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _role_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)
