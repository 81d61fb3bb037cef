"""An adapter that the engine knows: where it comes from, what of it is in memory, and who uses it."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
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


@dataclass(frozen=True, kw_only=True)
class HostCopy:
    """An adapter in host memory, in the form that is copied to the devices."""

    pages: list[Page]
    vectors: Vectors | None
    vocab: VocabCopy | None = None

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
    """The first request that named it."""
    source: AdapterSource
    """Where it is read again once it has left host memory."""
    digest: str
    """Of its content: another content is another adapter."""
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
    error: AdapterError | None = None

    @property
    def is_resident(self) -> bool:
        """Whether it is on the device."""
        return self.group is not None

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
    """Time that requests waited for their adapters, over all of them."""
