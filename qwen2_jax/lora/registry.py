"""Which adapters are known, by the requests that name them. Any thread may ask."""

import threading
from collections.abc import Hashable
from weakref import WeakValueDictionary

from qwen2_jax.errors import AdapterError, nearest
from qwen2_jax.lora.entry import AdapterEntry
from qwen2_jax.types import AdapterRequest

_LISTED = 8
"""Names that an error lists."""


class Registry:
    """The adapters of one engine: those of a name and a content are one, wherever its files are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: dict[AdapterRequest, tuple[Hashable, AdapterEntry]] = {}
        self._entries: dict[tuple[str, str], AdapterEntry] = {}
        self._names: dict[int, str] = {}
        self._reading: WeakValueDictionary[AdapterRequest, threading.Lock] = WeakValueDictionary()

    def __len__(self) -> int:
        """Return how many adapters are known."""
        return len(self._entries)

    def reading(self, request: AdapterRequest) -> threading.Lock:
        """Return the lock for reading the adapter of `request`, which threads that ask for it at once share."""
        with self._lock:
            return self._reading.setdefault(request, threading.Lock())

    def known(self, request: AdapterRequest, signature: Hashable) -> AdapterEntry | None:
        """Return the adapter that was read for `request` from files of this `signature`, if it can still be used.

        Raises `AdapterError` for an id that another name has.
        """
        with self._lock:
            self._check_id(request)
            found = self._latest.get(request)
            return found[1] if found is not None and found[0] == signature and _is_usable(found[1]) else None

    def add(self, entry: AdapterEntry, signature: Hashable) -> AdapterEntry:
        """Take in what was read from files of this `signature`; return it, or the one of the same name and content.

        Raises `AdapterError` for an id that another name has.
        """
        request = entry.request
        with self._lock:
            self._check_id(request)
            known = self._entries.get((request.lora_name, entry.digest))
            if known is not None and _is_usable(known):
                known.source, known.request = entry.source, request
                entry = known
            self._entries[request.lora_name, entry.digest] = entry
            self._latest[request] = signature, entry
            self._names[request.lora_int_id] = request.lora_name
            return entry

    def forget(self, name: str) -> list[AdapterEntry]:
        """Forget the adapters of a name and return them."""
        with self._lock:
            gone = [entry for entry in self._entries.values() if entry.request.lora_name == name]
            self._entries = {key: entry for key, entry in self._entries.items() if key[0] != name}
            self._latest = {request: found for request, found in self._latest.items() if request.lora_name != name}
            self._names = {number: known for number, known in self._names.items() if known != name}
            for entry in gone:
                entry.is_unloaded = True
            return gone

    def entries(self) -> list[AdapterEntry]:
        """Return the adapters in the order in which they came."""
        with self._lock:
            return list(self._entries.values())

    def unknown(self, name: str) -> AdapterError:
        """Return the error for a name that no adapter has."""
        names = list(dict.fromkeys(entry.request.lora_name for entry in self.entries()))
        listed = ", ".join(map(repr, names[:_LISTED])) or "none"
        return AdapterError(f"no adapter {name!r} is loaded{nearest(name, names)}; loaded are {listed}")

    def _check_id(self, request: AdapterRequest) -> None:
        known = self._names.get(request.lora_int_id, request.lora_name)
        if known != request.lora_name:
            raise AdapterError(
                f"lora_int_id={request.lora_int_id} is the adapter {known!r}'s; give {request.lora_name!r} another"
            )


def _is_usable(entry: AdapterEntry) -> bool:
    return not entry.is_unloaded and entry.error is None
