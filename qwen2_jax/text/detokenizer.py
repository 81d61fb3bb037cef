"""Turns token ids into text as they arrive, without ever showing half a character."""

import codecs
from collections.abc import Iterable

from qwen2_jax.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Decodes one output token by token; a token costs the same however long the output is.

    Byte-level BPE may split a character over several tokens. The bytes of an unfinished character are held back until
    they are complete, or shown to be invalid, so that `"".join` of all `feed` results and `finish` equals the
    tokenizer's `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped_ids = tokenizer.all_special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_characters = 0
        self.offsets: list[int] = []
        """For each token, how many characters of text were complete before it (OpenAI's `text_offset`)."""

    def feed(self, token_ids: Iterable[int]) -> str:
        """Return the text that these tokens complete; it may be empty."""
        return "".join([self._feed_one(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """Return what is left when no more tokens come: U+FFFD for an unfinished character, or nothing."""
        rest = self._decoder.decode(b"", final=True)
        self._num_characters += len(rest)
        return rest

    def _feed_one(self, token_id: int) -> str:
        self.offsets.append(self._num_characters)
        if token_id in self._skipped_ids:
            return ""
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        self._num_characters += len(text)
        return text
