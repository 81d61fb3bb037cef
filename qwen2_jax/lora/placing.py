"""Brings adapters into the forms that they have in host memory and on the devices."""

from dataclasses import dataclass
from typing import Any

import jax

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.adapter import Adapter
from qwen2_jax.lora.banks import DeviceBanks
from qwen2_jax.lora.entry import AdapterEntry, HostCopy
from qwen2_jax.lora.pages import PageLayout
from qwen2_jax.lora.vocab import DeviceVocabBanks, VocabLayout
from qwen2_jax.models.adapters import Banks, PageUse, TokenGroup

VOCAB_FIELDS = (
    "embed_tokens",
    "lm_head",
    "full_embed_tokens",
    "full_lm_head",
    "embed_token_rows",
    "lm_head_token_rows",
)
"""What an `Adapter` may change in embeddings and head."""


@dataclass(frozen=True, kw_only=True)
class Staged:
    """An adapter's arrays on the devices, on their way to its places: pages with their modules' bits."""

    pages: list[tuple[int, Any]]
    vectors: Any
    vocab_pages: list[tuple[int, Any]]
    vocab_vectors: dict[str, Any] | None
    full: dict[str, Any]


class Placer:
    """The banks of one engine and the layouts that fit them."""

    def __init__(
        self, layout: PageLayout, banks: DeviceBanks, vocab: tuple[VocabLayout, DeviceVocabBanks] | None = None
    ) -> None:
        """`vocab` is for adapters that change embeddings or head; None where there is no room for such."""
        self._layout, self._banks = layout, banks
        self._vocab_layout, self._vocab_banks = vocab or (None, None)

    @property
    def banks(self) -> Banks:
        """What steps with adapters take."""
        return Banks(layers=self._banks.banks, vocab=None if self._vocab_banks is None else self._vocab_banks.banks)

    def compile(self) -> None:
        """Compile the programs that write."""
        self._banks.compile()
        if self._vocab_banks is not None:
            self._vocab_banks.compile()

    @property
    def programs(self) -> list[jax.stages.Compiled]:
        """The programs that `compile` has made."""
        return [*self._banks.programs, *([] if self._vocab_banks is None else self._vocab_banks.programs)]

    def host_copy(self, name: str, adapter: Adapter) -> HostCopy:
        """Return the adapter called `name` as it is copied to the devices; `AdapterError` for what is not served."""
        changed = [field for field in VOCAB_FIELDS if getattr(adapter, field) is not None]
        if changed and self._vocab_layout is None:
            raise AdapterError(
                f"adapter {name!r} changes {', '.join(changed)}, and there is no room for that: start with "
                "max_vocab_loras (low-rank updates and replaced tokens) or max_full_vocab (whole matrices)"
            )
        return HostCopy(
            pages=self._layout.pages(adapter),
            vectors=self._layout.vectors(adapter),
            vocab=None if self._vocab_layout is None else self._vocab_layout.copy(adapter),
        )

    def stage(self, host: HostCopy) -> Staged:
        """Copy an adapter to the devices and wait until it is there; steps go on meanwhile."""
        vocab_pages, vocab_vectors, full = [], None, {}
        if host.vocab is not None and self._vocab_banks is not None:
            vocab_pages = [(page.modules, self._vocab_banks.place(page.arrays)) for page in host.vocab.pages]
            full = self._vocab_banks.place(host.vocab.full)
            if host.vocab.vectors is not None:
                vocab_vectors = self._vocab_banks.place(host.vocab.vectors)
        staged = Staged(
            pages=[(page.modules, self._banks.place_page(page)) for page in host.pages],
            vectors=None if host.vectors is None else self._banks.place_vectors(host.vectors),
            vocab_pages=vocab_pages,
            vocab_vectors=vocab_vectors,
            full=full,
        )
        jax.block_until_ready([getattr(staged, name) for name in staged.__dataclass_fields__])
        return staged

    def write(self, entry: AdapterEntry, staged: Staged) -> None:
        """Write an adapter to its places, behind the steps launched before, and say what its tokens add."""
        pages, row = entry.places["pages"], entry.place("vectors")
        for page, (_, placed) in zip(pages, staged.pages, strict=True):
            self._banks.write_page(page, placed)
        if staged.vectors is not None:
            self._banks.write_vectors(pages, row, staged.vectors)
        entry.group = _group(pages, staged.pages, row)
        if self._vocab_banks is not None and "vocab_pages" in entry.places:
            for page, (_, placed) in zip(entry.places["vocab_pages"], staged.vocab_pages, strict=True):
                self._vocab_banks.write(page, placed)
            for bank, placed in staged.full.items():
                self._vocab_banks.write(entry.place(bank), {bank: placed})
            if staged.vocab_vectors is not None:
                row, pages = entry.place("vocab_vectors"), entry.places["vocab_pages"]
                self._vocab_banks.write_vectors(pages, row, staged.vocab_vectors)
            entry.vocab_group = _group(entry.places["vocab_pages"], staged.vocab_pages, -1)

    def delete(self) -> None:
        """Let go of the device's memory."""
        for array in jax.tree.leaves(self.banks):
            array.delete()


def _group(numbers: list[int], pages: list[tuple[int, Any]], vector: int) -> TokenGroup:
    uses = (PageUse(page=number, modules=bits) for number, (bits, _) in zip(numbers, pages, strict=True))
    return TokenGroup(pages=tuple(uses), vector=vector)
