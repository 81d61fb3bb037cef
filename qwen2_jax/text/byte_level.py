"""Byte-level BPE as GPT-2 introduced it: each byte is written as one printable character of the vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from qwen2_jax.errors import CheckpointError, nearest

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, kw_only=True)
class BpeKind:
    """What sets one family of byte-level BPE tokenizers apart from the others."""

    split: str | None
    """Regex of the pieces that merges stay within; None is GPT-2's own."""
    single_digits: bool = False
    """Whether every digit is a piece of its own, before `split`."""
    nfc: bool = False
    """Whether text is brought to Unicode's NFC form first."""
    ignore_merges: bool = False
    """Whether a piece that is a vocabulary entry as a whole is taken without merging."""
    add_bos: bool = False
    """Whether prompts begin with the bos token, unless the checkpoint says otherwise."""


QWEN2 = BpeKind(split=_WORDS + r"\p{N}" + _REST, nfc=True)
"""Qwen2 and Qwen2.5; the source of the regex is their tokenizer.json."""

KINDS: Mapping[str, BpeKind] = {
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "llama-bpe": BpeKind(split=_WORDS + r"\p{N}{1,3}" + _REST, ignore_merges=True, add_bos=True),
    "smollm": BpeKind(split=None, single_digits=True),
    "gpt-2": BpeKind(split=None),
}
"""By the name that GGUF gives it in `tokenizer.ggml.pre`."""


def bpe_kind(name: str) -> BpeKind:
    """Return the kind with this GGUF name.

    Raises:
        CheckpointError: the name is not in `KINDS`.
    """
    if name not in KINDS:
        known = ", ".join(KINDS)
        raise CheckpointError(f"unknown pre-tokenizer {name!r}{nearest(name, KINDS)}; supported are {known}")
    return KINDS[name]


def build_bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], kind: BpeKind) -> Tokenizer:
    """Return a tokenizer without added tokens.

    Raises:
        CheckpointError: a merge names a token that the vocabulary lacks.
    """
    try:
        model = models.BPE(vocab=dict(vocab), merges=list(merges), fuse_unk=False, ignore_merges=kind.ignore_merges)
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"the tokenizer's vocabulary and merges do not fit together: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if kind.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if kind.split is not None:
        steps.append(pre_tokenizers.Split(Regex(kind.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def add_bos_eos(tokenizer: Tokenizer, *, bos: str | None, eos: str | None) -> None:
    """Make `tokenizer` put these tokens around a text whenever special tokens are asked for."""
    pieces = [piece for piece in (bos, "$A", eos) if piece is not None]
    tokens = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token is not None]
    tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(pieces), special_tokens=tokens)


def _byte_alphabet() -> dict[str, int]:
    # GPT-2's encoder.py, bytes_to_unicode: printable Latin-1 bytes stand for themselves, the others for the characters
    # from U+0100 on, in order.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def token_to_bytes(token: str) -> bytes:
    """Return the bytes that a vocabulary entry stands for; an entry outside the byte alphabet stands for itself."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()
