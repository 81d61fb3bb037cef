"""Keeps adapters: at their source, in host memory and on the devices, the least recently used leaving first.

`find` reads and checks an adapter, or merges several, in the thread that asks for it; copies to the devices are
prepared by threads of the manager's own; all that concerns the banks is done by the engine's thread in `acquire`,
`release` and `unload`.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np

from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.adapter import Adapter
from qwen2_jax.lora.entry import AdapterEntry, AdapterStats, Admission, HostCopy
from qwen2_jax.lora.host_tier import HostTier
from qwen2_jax.lora.keys import SCORE
from qwen2_jax.lora.placing import VOCAB_FIELDS, Placer, Staged
from qwen2_jax.lora.registry import Registry
from qwen2_jax.lora.residents import Residents
from qwen2_jax.lora.sizes import LoRASizes
from qwen2_jax.lora.sources import AdapterSource, HubFolders, source_of
from qwen2_jax.lora.staging import UNWANTED_SECONDS, Staging
from qwen2_jax.types import AdapterRequest

logger = logging.getLogger(__name__)

_READ_ATTEMPTS = 3
"""How often an adapter is read whose files change meanwhile."""
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

    def __init__(
        self,
        base: ModelConfig,
        placer: Placer,
        sizes: LoRASizes,
        *,
        max_host_bytes: int | None = None,
        token: str | bool | None = None,
    ) -> None:
        """Serve adapters for the model `base` from the banks of `placer`.

        Copies in host memory take at most `max_host_bytes`, if that is given; `token` is the hub's.
        """
        self._base, self._placer = base, placer
        self._sizes = sizes
        self._hub = HubFolders(token)
        self._registry = Registry()
        self._host = HostTier(sizes.max_on_host, max_host_bytes)
        self._residents = Residents(sizes.places)
        self._waiting_since: WeakKeyDictionary[AdapterEntry, float] = WeakKeyDictionary()
        self._staging = Staging(self._stage)
        self._stats = AdapterStats()
        self._is_closed = threading.Event()

    @property
    def placer(self) -> Placer:
        """The banks on the devices."""
        return self._placer

    def find(self, request: AdapterRequest, *, ask_hub: bool = False) -> AdapterEntry:
        """Return the adapter that `request` names, read and checked if it is new or has changed; from any thread.

        Threads that ask for the same at once read, and merge, it once; others go on meanwhile. The hub is asked for an
        adapter's files the first time, and with `ask_hub`. Raises `AdapterError` for one that cannot be served, and for
        an id that another name has.
        """
        source = source_of(request, self._hub, ask_hub=ask_hub)
        with _as_adapter_error(request, source), self._registry.reading(request):
            for _ in range(_READ_ATTEMPTS):
                signature = source.signature()
                found = self._registry.known(request, signature)
                if found is not None:
                    found.source = source  # who asks now has files that are there
                    self._host.touch(found)
                    return found
                read, host = self._register(request, source)
                if source.signature() == signature:
                    entry = self._registry.add(read, signature)
                    self._host.keep(entry, host)
                    return entry
        raise AdapterError(f"adapter {request.lora_name!r}: {source} changes while it is read; send the request again")

    def begin_pass(self) -> None:
        """Begin to ask for the adapters of waiting requests, in the order in which they come to the devices."""
        self._staging.begin()

    def acquire(self, entry: AdapterEntry, *, in_line: bool = True) -> Admission:
        """Keep the adapter on the device for one request more, if it is there; else see to it that it comes.

        Who does not ask `in_line`, in a pass, gets a place among the copies before those who do.
        """
        if entry.error is not None:
            return Admission.FAILED
        if not entry.is_resident:
            now = time.monotonic()
            if now - entry.last_wanted > UNWANTED_SECONDS:  # whoever waited before has given up
                self._waiting_since.pop(entry, None)
            self._waiting_since.setdefault(entry, now)
            outcome = self._bring(entry, in_line)
            if outcome is not Admission.READY:
                return outcome
            self._stats.wait_seconds += time.monotonic() - self._waiting_since.pop(entry)
            entry.num_passed = 0
        entry.pins += 1
        self._residents.touch(entry)
        self._host.touch(entry)
        return Admission.READY

    def release(self, entry: AdapterEntry, *, is_wanted: bool = False) -> None:
        """Let go of what `acquire` has kept. One that was unloaded leaves, unless its request still waits for it."""
        entry.pins -= 1
        self._residents.touch(entry)
        if entry.is_unloaded and not entry.pins and not is_wanted:
            self._residents.evict(entry)

    def load(self, entry: AdapterEntry, *, pin: bool) -> Admission:
        """Bring an adapter to the device, where `pin` keeps it; to be called until it is READY or FAILED.

        Raises `AdapterError` for one that has been unloaded meanwhile.
        """
        if entry.is_unloaded:
            raise AdapterError(
                f"adapter {entry.request.lora_name!r} was unloaded while it was on its way; load it again"
            )
        outcome = self.acquire(entry, in_line=False)
        if outcome is Admission.READY:
            entry.is_pinned |= pin
            self.release(entry)
        return outcome

    def unload(self, name: str) -> bool:
        """Forget the adapters of a name; those in use go with their last request. False if there are none."""
        entries = self._registry.forget(name)
        for entry in entries:
            self._hub.forget(entry.request)
            self._host.forget(entry)
            entry.is_pinned = False
            self._residents.update(entry)
            if entry.is_resident and not entry.pins:
                self._residents.evict(entry)
        return bool(entries)

    def unknown(self, name: str) -> AdapterError:
        """Return the error for a name that no adapter has."""
        return self._registry.unknown(name)

    def entries(self) -> list[AdapterEntry]:
        """Return the adapters that are known, in the order in which they came."""
        return self._registry.entries()

    def stats(self) -> AdapterStats:
        """Return the counts up to now."""
        self._stats.num_registered, self._stats.num_on_host = len(self._registry), len(self._host)
        self._stats.num_resident = len(self._residents)
        return replace(self._stats)

    def wait(self, seconds: float) -> None:
        """Wait until an adapter on its way has come, at most so long."""
        self._staging.wait(seconds)

    def check_integrity(self) -> None:
        """Raise `AssertionError` if a place is lost, someone else's too, or miscounted."""
        self._residents.check_integrity()

    def close(self) -> None:
        """Stop the threads, whose merges end unfinished, and let go of the device's memory."""
        self._is_closed.set()
        self._staging.close()
        self._placer.delete()

    def _register(self, request: AdapterRequest, source: AdapterSource) -> tuple[AdapterEntry, HostCopy]:
        name, adapter = request.lora_name, self._read(request, source)
        host = self._placer.host_copy(name, adapter)
        if (kind := self._residents.lacking(host.needs)) is not None:
            raise AdapterError(
                f"adapter {name!r} takes {host.needs[kind]} {kind}, and there are {self._sizes.places[kind]}; "
                f"start with a larger {_OPTIONS[kind]}"
            )
        entry = AdapterEntry(
            request=request,
            source=source,
            digest=adapter.digest,
            needs=host.needs,
            nbytes=adapter.nbytes,
            applied=_applied(adapter),
            score=None if adapter.score is None else adapter.score.astype(np.float32),
        )
        return entry, host

    def _read(self, request: AdapterRequest, source: AdapterSource) -> Adapter:
        def check_rank(rank: int) -> None:
            limit = self._sizes.max_rank
            if rank > limit:
                raise AdapterError(
                    f"adapter {request.lora_name!r} has rank {rank} (a replaced token counts as one); max_lora_rank="
                    f"{limit} allows no more, start with max_lora_rank={rank}{source.advice_for_rank(limit)}"
                )

        def go_on() -> None:
            if self._is_closed.is_set():
                raise AdapterError(f"adapter {request.lora_name!r}: the engine has been shut down")

        return source.read(self._base, check_rank, go_on)

    def _bring(self, entry: AdapterEntry, in_line: bool) -> Admission:
        """Move an adapter one step nearer to the device."""
        if self._residents.lacking(entry.needs, beside_pinned=True) is not None:
            error = AdapterError(
                f"adapter {entry.request.lora_name!r} finds no room beside pinned adapters; unload one of them, or "
                "start with a larger max_loras"
            )
            return self._fail(entry, error)
        has_room = self._residents.has_room(entry.needs)
        is_done = self._staging.is_done(entry, has_room=has_room, in_line=in_line)
        if is_done and (error := self._staging.error(entry)) is not None:
            self._staging.drop(entry)
            return self._fail(entry, error)
        if not has_room:
            return Admission.FULL
        if not is_done:
            return Admission.LOADING
        self._stats.num_evictions += self._residents.make_room(entry.needs)
        self._residents.give_places(entry)
        self._placer.write(entry, self._staging.take(entry))
        self._stats.num_loads += 1
        return Admission.READY

    def _fail(self, entry: AdapterEntry, error: BaseException) -> Admission:
        """Note that an adapter cannot be loaded; the requests that wait for it end, and nobody else's."""
        self._waiting_since.pop(entry, None)
        self._stats.num_failures += 1
        if not isinstance(error, AdapterError):
            name = entry.request.lora_name
            logger.error("adapter %r did not come to the devices", name, exc_info=error)
            cause = f"{type(error).__name__}: {error}"
            entry.error = AdapterError(
                f"adapter {name!r} did not come to the devices ({cause}); send the request again, and if memory is "
                "short start with a smaller max_loras or gpu_memory_utilization"
            )
            entry.error.__cause__ = error
        else:
            entry.error = error
        return Admission.FAILED

    def _stage(self, entry: AdapterEntry) -> Staged:
        """Copy an adapter to the devices, from host memory or, where it has left that, from its source."""
        host = self._host.get(entry)
        if host is None:
            name = entry.request.lora_name
            with _as_adapter_error(entry.request, entry.source):
                adapter = self._read(entry.request, entry.source)
            if adapter.digest != entry.digest:
                raise AdapterError(
                    f"adapter {name!r}: {entry.source} has changed since the request was sent; send it again"
                )
            host = self._placer.host_copy(name, adapter)
            self._host.keep(entry, host)
        return self._placer.stage(host)


@contextmanager
def _as_adapter_error(request: AdapterRequest, source: AdapterSource) -> Iterator[None]:
    """Turn what the system says of files into an error that names the adapter."""
    try:
        yield
    except OSError as error:
        raise AdapterError(f"adapter {request.lora_name!r}: {source} cannot be read: {error}") from error


def _applied(adapter: Adapter) -> Counter[str]:
    """Count what an adapter changes, by module."""
    found = Counter(name for _, name in adapter.linear)
    found.update(f"{name}.bias" for _, name in adapter.biases)
    found.update(name for name in (*VOCAB_FIELDS, SCORE) if getattr(adapter, name) is not None)
    return found
