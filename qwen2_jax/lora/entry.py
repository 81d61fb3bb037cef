"""An adapter that the engine knows: where it comes from, what of it is in memory, and who uses it."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen2_jax.errors import AdapterError
from qwen2_jax.types import AdapterRequest

if TYPE_CHECKING:
    from qwen2_jax.lora.pages import Page, Vectors
    from qwen2_jax.lora.sources import AdapterSource
    from qwen2_jax.lora.vocab import VocabCopy
    from qwen2_jax.models.adapters import TokenGroup


class Admission(enum.Enum):
    """What a request's adapter says to its start."""

    READY = enum.auto()
    """It is on the device and stays there until it is released."""
    LOADING = enum.auto()
    """It is on its way."""
    FULL = enum.auto()
    """Adapters that are in use take all the room."""
    FAILED = enum.auto()
    """It cannot be loaded any more; its `error` says why."""


class Holding(enum.Enum):
    """Whose an adapter's places on the devices are, where they are not running requests'."""

    IDLE = enum.auto()
    """Anyone's who needs them."""
    PINNED = enum.auto()
    """Its own, used or not."""


@dataclass(frozen=True, kw_only=True)
class HostCopy:
    """An adapter in host memory, in the form that is copied to the devices."""

    pages: list[Page]
    vectors: Vectors | None
    vocab: VocabCopy | None = None

    @cached_property
    def nbytes(self) -> int:
        """The bytes of all its arrays."""
        vocab = self.vocab
        arrays = [array for page in self.pages for part in page.factors.values() for array in vars(part).values()]
        if self.vectors is not None:
            arrays += [*self.vectors.bias.values(), *self.vectors.magnitude.values(), self.vectors.replaced_bias]
        if vocab is not None:
            arrays += [array for page in vocab.pages for array in page.arrays.values()]
            arrays += [*vocab.full.values(), *(vocab.vectors or {}).values()]
        return sum(array.nbytes for array in arrays)

    @property
    def needs(self) -> dict[str, int]:
        """The places that it takes on the devices, by kind."""
        vocab = {}
        if self.vocab is not None:
            vectors = int(self.vocab.vectors is not None)
            vocab = {"vocab_pages": len(self.vocab.pages), "vocab_vectors": vectors} | dict.fromkeys(self.vocab.full, 1)
        return {"pages": len(self.pages), "vectors": int(self.vectors is not None)} | vocab


@dataclass(eq=False, kw_only=True)
class AdapterEntry:
    """One adapter, known by its content. Only the manager changes it."""

    request: AdapterRequest
    """What names it: the request whose files were read last."""
    source: AdapterSource
    """Where it is read again once it has left host memory."""
    digest: str
    """Of its content: another content is another adapter, even of the same name."""
    needs: Mapping[str, int]
    """The places that it takes on the devices, by kind."""
    nbytes: int
    applied: Counter[str]
    """How many layers it changes, by module."""
    score: np.ndarray | None = None
    """Its classification head `[num_labels, D]` in float32, if it has one; it stays on the host."""
    host: HostCopy | None = None
    places: Mapping[str, list[int]] = field(default_factory=dict)
    """The places that it has on the devices, while it is there."""
    group: TokenGroup | None = None
    """What its tokens add in the layers, while it is there."""
    vocab_group: TokenGroup | None = None
    """What they add in the embeddings and the head, if it changes these."""
    pins: int = 0
    """Running requests that use it."""
    is_pinned: bool = False
    """Whether it stays on the device without any."""
    is_unloaded: bool = False
    """Whether it goes once nobody uses it."""
    staged: Future[Any] | None = None
    """Its copy on the way to the devices."""
    last_wanted: float = 0.0
    """When a request has last asked for it, on the monotonic clock."""
    is_crowded_out: bool = False
    """Whether it found no room on the devices when it was last asked for."""
    num_passed: int = 0
    """Requests with other adapters that started while it found no room."""
    holding: Holding | None = None
    """As whose its places are counted; None are requests'."""
    error: AdapterError | None = None

    @property
    def is_resident(self) -> bool:
        """Whether it is on the device."""
        return self.group is not None

    @property
    def now_holding(self) -> Holding | None:
        """Whose its places are now; None are requests', or it has none."""
        if not self.is_resident or (self.pins and not self.is_pinned):
            return None
        return Holding.PINNED if self.is_pinned else Holding.IDLE

    def place(self, kind: str) -> int:
        """Return its place of a kind of which it has one at most; -1 is none."""
        return next(iter(self.places.get(kind, [])), -1)


@dataclass(kw_only=True)
class AdapterStats:
    """Counts since start-up, and how many adapters are where."""

    num_registered: int = 0
    num_resident: int = 0
    num_on_host: int = 0
    num_loads: int = 0
    """Times that an adapter was copied to the device."""
    num_evictions: int = 0
    """Times that one left it for another's sake."""
    num_failures: int = 0
    wait_seconds: float = field(default=0.0)
    """Time from the first request for an adapter that was not there until it was, over all loads."""
