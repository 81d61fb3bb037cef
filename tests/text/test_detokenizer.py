"""The incremental detokenizer equals a whole decode, and shows no half characters on the way."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.text import IncrementalDetokenizer, Tokenizer

PROPERTY = settings(max_examples=200)


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Return one token for each byte."""
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in range(256)}
    return [by_bytes[bytes([byte])] for byte in data]


@PROPERTY
@given(ids=st.lists(st.integers(0, 50_000), max_size=30), skip=st.booleans())
def test_random_ids_give_the_whole_decode(smollm2: Tokenizer, ids: list[int], skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(smollm2, skip_special_tokens=skip)
    pieces = [detokenizer.feed([token_id]) for token_id in ids]
    assert "".join(pieces) + detokenizer.finish() == smollm2.decode(ids, skip_special_tokens=skip)


@PROPERTY
@given(data=st.binary(max_size=24) | st.text(max_size=8).map(str.encode))
def test_random_bytes_give_the_whole_decode(qwen2: Tokenizer, data: bytes) -> None:
    ids = byte_ids(qwen2, data)
    detokenizer = IncrementalDetokenizer(qwen2)
    text = detokenizer.feed(ids) + detokenizer.finish()
    assert text == qwen2.decode(ids) == data.decode(errors="replace")


@PROPERTY
@given(text=st.text(max_size=20))
def test_valid_text_never_shows_a_replacement_character(qwen2: Tokenizer, text: str) -> None:
    ids = byte_ids(qwen2, text.encode())
    detokenizer = IncrementalDetokenizer(qwen2)
    shown = ""
    for token_id in ids:
        shown += detokenizer.feed([token_id])
        assert text.startswith(shown)
    assert shown == text
    assert detokenizer.finish() == ""


def test_an_emoji_appears_with_its_last_token(qwen2: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(qwen2)
    ids = byte_ids(qwen2, "🙂".encode())
    assert [detokenizer.feed([token_id]) for token_id in ids] == ["", "", "", "🙂"]


def test_an_unfinished_character_becomes_a_replacement_at_the_end(qwen2: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(qwen2)
    assert detokenizer.feed(byte_ids(qwen2, b"a\xf0\x9f")) == "a"
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_special_tokens_are_skipped_or_kept(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("hi<|im_end|>\n")
    assert IncrementalDetokenizer(smollm2).feed(ids) == "hi\n"
    assert IncrementalDetokenizer(smollm2, skip_special_tokens=False).feed(ids) == "hi<|im_end|>\n"


def test_offsets_are_where_each_token_starts(qwen2: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(qwen2)
    detokenizer.feed([*qwen2.encode("hello world"), *byte_ids(qwen2, "ü!".encode())])
    assert detokenizer.offsets == [0, 5, 8, 9, 10, 11, 11, 12]


def test_ids_that_no_token_has_add_nothing(smollm2: Tokenizer) -> None:
    assert IncrementalDetokenizer(smollm2).feed([19556, 60_000, 17]) == "Hello!"


def test_chunks_of_any_size_give_the_same_text(smollm2: Tokenizer) -> None:
    rng = random.Random(0)
    ids = smollm2.encode("日本語 🙂👩‍👩‍👧‍👦 naïve\n" * 5)
    expected = smollm2.decode(ids)
    for _ in range(20):
        detokenizer = IncrementalDetokenizer(smollm2)
        text, rest = "", ids
        while rest:
            size = rng.randint(1, 7)
            text += detokenizer.feed(rest[:size])
            rest = rest[size:]
        assert text + detokenizer.finish() == expected
