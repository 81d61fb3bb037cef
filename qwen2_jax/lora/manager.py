"""Keeps adapters: at their source, in host memory and on the devices, the least recently used leaving first.

`find` reads and checks an adapter, or merges several, in the thread that asks for it; copies to the devices are
prepared by threads of the manager's own; all that concerns the banks is done by the engine's thread in `acquire`,
`release` and `unload`.
"""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from weakref import WeakValueDictionary

import numpy as np

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import AdapterError, nearest
from qwen2_jax.lora.adapter import Adapter
from qwen2_jax.lora.entry import AdapterEntry, AdapterStats, Admission
from qwen2_jax.lora.keys import SCORE
from qwen2_jax.lora.placing import VOCAB_FIELDS, Placer, Staged
from qwen2_jax.lora.room import Room
from qwen2_jax.lora.sizes import LoRASizes
from qwen2_jax.lora.sources import AdapterSource, source_of
from qwen2_jax.lora.staging import UNWANTED_SECONDS, Staging
from qwen2_jax.types import AdapterRequest

_OPTIONS = {
    "pages": "max_loras",
    "vectors": "max_loras",
    "vocab_pages": "max_vocab_loras",
    "vocab_vectors": "max_vocab_loras",
    "full_embed": "max_full_vocab",
    "full_head": "max_full_vocab",
}
"""The option that each kind of place comes from."""


class AdapterManager:
    """The adapters of one engine."""

    def __init__(self, base: ModelConfig, placer: Placer, sizes: LoRASizes, *, token: str | bool | None = None) -> None:
        """Serve adapters for the model `base` from the banks of `placer`; `token` is the hub's."""
        self._base, self._placer, self._token = base, placer, token
        self._sizes = sizes
        self._room = Room(sizes.places)
        self._lock = threading.RLock()  # of the four tables below and the host copies
        self._by_digest: dict[str, AdapterEntry] = {}
        self._by_source: dict[AdapterSource, tuple[Hashable, AdapterEntry]] = {}
        self._names: dict[int, str] = {}
        self._reading: WeakValueDictionary[AdapterSource, threading.Lock] = WeakValueDictionary()
        self._on_host: OrderedDict[AdapterEntry, None] = OrderedDict()
        self._resident: OrderedDict[AdapterEntry, None] = OrderedDict()
        self._waiting_since: dict[AdapterEntry, float] = {}
        self._staging = Staging(self._stage)
        self._stats = AdapterStats()

    @property
    def placer(self) -> Placer:
        """The banks on the devices."""
        return self._placer

    def find(self, request: AdapterRequest) -> AdapterEntry:
        """Return the adapter that `request` names, read and checked if it is new or has changed; from any thread.

        Threads that ask for the same at once read, and merge, it once; others go on meanwhile. Raises `AdapterError`
        for one that cannot be served, and for an id that another name has.
        """
        source = source_of(request, token=self._token)
        with self._lock:
            reading = self._reading.setdefault(source, threading.Lock())
        with reading:
            return self._find(request, source)

    def _find(self, request: AdapterRequest, source: AdapterSource) -> AdapterEntry:
        signature = source.signature()
        with self._lock:
            self._check_id(request)
            found = self._by_source.get(source)
            if found is not None and found[0] == signature and self._is_usable(found[1]):
                return found[1]
        entry = self._register(request, source)
        with self._lock:
            self._check_id(request)
            self._names[request.lora_int_id] = request.lora_name
            known = self._by_digest.get(entry.digest)
            if known is not None and self._is_usable(known):
                known.host, known.source = known.host or entry.host, source  # the files that were read last are there
                entry = known
            self._by_digest[entry.digest] = entry
            self._by_source[source] = signature, entry
            self._keep_on_host(entry)
        return entry

    def acquire(self, entry: AdapterEntry) -> Admission:
        """Keep the adapter on the device for one request more, if it is there; else see to it that it comes."""
        if entry.error is not None:
            return Admission.FAILED
        if not entry.is_resident:
            now = time.monotonic()
            if now - entry.last_wanted > UNWANTED_SECONDS:  # whoever waited before has given up
                self._waiting_since.pop(entry, None)
            self._waiting_since.setdefault(entry, now)
            outcome = self._bring(entry)
            if outcome is not Admission.READY:
                return outcome
            self._stats.wait_seconds += time.monotonic() - self._waiting_since.pop(entry)
        entry.pins += 1
        self._resident.move_to_end(entry)
        return Admission.READY

    def release(self, entry: AdapterEntry) -> None:
        """Let go of what `acquire` has kept."""
        entry.pins -= 1
        if entry.is_unloaded and not entry.pins:
            self._evict(entry)

    def load(self, entry: AdapterEntry, *, pin: bool) -> Admission:
        """Bring an adapter to the device, where `pin` keeps it; to be called until it is READY or FAILED."""
        outcome = self.acquire(entry)
        if outcome is Admission.READY:
            entry.is_pinned |= pin
            self.release(entry)
        return outcome

    def unload(self, name: str) -> bool:
        """Forget the adapters of a name; those in use go with their last request. False if there are none."""
        with self._lock:
            entries = [entry for entry in self._by_digest.values() if entry.request.lora_name == name]
            for entry in entries:
                del self._by_digest[entry.digest]
                self._on_host.pop(entry, None)
                entry.is_unloaded, entry.is_pinned = True, False
            self._by_source = {source: found for source, found in self._by_source.items() if found[1] not in entries}
            self._names = {number: known for number, known in self._names.items() if known != name}
        for entry in entries:
            if entry.is_resident and not entry.pins:
                self._evict(entry)
        return bool(entries)

    def unknown(self, name: str) -> AdapterError:
        """Return the error for a name that no adapter has."""
        names = [entry.request.lora_name for entry in self.entries()]
        listed = ", ".join(map(repr, names[:8])) or "none"
        return AdapterError(f"no adapter {name!r} is loaded{nearest(name, names)}; loaded are {listed}")

    def entries(self) -> list[AdapterEntry]:
        """Return the adapters that are known, in the order in which they came."""
        with self._lock:
            return list(self._by_digest.values())

    def stats(self) -> AdapterStats:
        """Return the counts up to now."""
        with self._lock:
            self._stats.num_registered, self._stats.num_on_host = len(self._by_digest), len(self._on_host)
        self._stats.num_resident = len(self._resident)
        return replace(self._stats)

    def wait(self, seconds: float) -> None:
        """Wait until an adapter on its way has come, at most so long."""
        self._staging.wait(seconds)

    def check_integrity(self) -> None:
        """Raise `AssertionError` if a place is lost or someone else's, too."""
        self._room.check_integrity(entry.places for entry in self._resident)
        if any(entry.pins < 0 for entry in self._resident):
            raise AssertionError("an adapter was released more often than acquired")

    def close(self) -> None:
        """Stop the threads and let go of the device's memory."""
        self._staging.close()
        self._placer.delete()

    def _check_id(self, request: AdapterRequest) -> None:
        known = self._names.get(request.lora_int_id, request.lora_name)
        if known != request.lora_name:
            raise AdapterError(
                f"lora_int_id={request.lora_int_id} is the adapter {known!r}'s; give {request.lora_name!r} another"
            )

    def _is_usable(self, entry: AdapterEntry) -> bool:
        return not entry.is_unloaded and entry.error is None

    def _register(self, request: AdapterRequest, source: AdapterSource) -> AdapterEntry:
        name, adapter = request.lora_name, self._read(request, source)
        host = self._placer.host_copy(name, adapter)
        if (kind := self._room.lacking(host.needs)) is not None:
            raise AdapterError(
                f"adapter {name!r} takes {host.needs[kind]} {kind}, and there are {self._sizes.places[kind]}; "
                f"start with a larger {_OPTIONS[kind]}"
            )
        return AdapterEntry(
            request=request,
            source=source,
            digest=adapter.digest,
            needs=host.needs,
            nbytes=adapter.nbytes,
            applied=_applied(adapter),
            score=None if adapter.score is None else adapter.score.astype(np.float32),
            host=host,
        )

    def _read(self, request: AdapterRequest, source: AdapterSource) -> Adapter:
        def check_rank(rank: int) -> None:
            limit = self._sizes.max_rank
            if rank > limit:
                raise AdapterError(
                    f"adapter {request.lora_name!r} has rank {rank} (a replaced token counts as one); max_lora_rank="
                    f"{limit} allows no more, start with max_lora_rank={rank}{source.advice_for_rank(limit)}"
                )

        return source.read(self._base, check_rank)

    def _keep_on_host(self, entry: AdapterEntry) -> None:
        self._on_host[entry] = None
        self._on_host.move_to_end(entry)
        while len(self._on_host) > self._sizes.max_on_host:
            oldest, _ = self._on_host.popitem(last=False)
            oldest.host = None

    def _bring(self, entry: AdapterEntry) -> Admission:
        """Move an adapter one step nearer to the device."""
        if not self._staging.is_done(entry):
            return Admission.LOADING
        assert entry.staged is not None
        error = entry.staged.exception()
        if error is None and self._pinned_leave_no_room(entry):
            error = AdapterError(
                f"adapter {entry.request.lora_name!r} finds no room beside pinned adapters; unload one of them, or "
                "start with a larger max_loras"
            )
        if error is None and not self._make_room(entry):
            return Admission.FULL
        staged = self._staging.take(entry)
        if error is not None:
            self._waiting_since.pop(entry, None)
            self._stats.num_failures += 1
            if not isinstance(error, AdapterError):
                raise error
            entry.error = error
            return Admission.FAILED
        entry.places = self._room.take(entry.needs)
        self._placer.write(entry, staged.result())
        self._resident[entry] = None
        self._stats.num_loads += 1
        return Admission.READY

    def _pinned_leave_no_room(self, entry: AdapterEntry) -> bool:
        others = [other.needs for other in self._resident if not other.is_pinned]
        return not self._room.fits(entry.needs, given_back=others)

    def _stage(self, entry: AdapterEntry) -> Staged:
        """Copy an adapter to the devices, from host memory or, where it has left that, from its source."""
        with self._lock:
            host = entry.host
        if host is None:
            name, adapter = entry.request.lora_name, self._read(entry.request, entry.source)
            if adapter.digest != entry.digest:
                raise AdapterError(
                    f"adapter {name!r}: {entry.source} has changed since the request was sent; send it again"
                )
            host = self._placer.host_copy(name, adapter)
            with self._lock:
                if not entry.is_unloaded:
                    entry.host = host
                    self._keep_on_host(entry)
        return self._placer.stage(host)

    def _make_room(self, entry: AdapterEntry) -> bool:
        """Free the places that an adapter takes; False if those in use leave too few."""
        idle = [other for other in self._resident if not other.pins and not other.is_pinned]
        if not self._room.fits(entry.needs, given_back=[other.needs for other in idle]):
            return False
        for other in idle:
            if self._room.fits(entry.needs):
                break
            self._evict(other)
            self._stats.num_evictions += 1
        return True

    def _evict(self, entry: AdapterEntry) -> None:
        """Take an adapter from the device. Steps that read it were launched before any that will overwrite it."""
        self._room.give_back(entry.places)
        entry.places, entry.group, entry.vocab_group = {}, None, None
        del self._resident[entry]


def _applied(adapter: Adapter) -> Counter[str]:
    """Count what an adapter changes, by module."""
    found = Counter(name for _, name in adapter.linear)
    found.update(f"{name}.bias" for _, name in adapter.biases)
    found.update(name for name in (*VOCAB_FIELDS, SCORE) if getattr(adapter, name) is not None)
    return found
