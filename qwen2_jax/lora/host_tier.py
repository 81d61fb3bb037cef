"""The adapters in host memory, of which the least recently used leaves first. Any thread may ask."""

import threading
from collections import OrderedDict

from qwen2_jax.lora.entry import AdapterEntry, HostCopy


class HostTier:
    """Copies of at most so many adapters and bytes; the last one stays, whatever its size."""

    def __init__(self, max_adapters: int, max_bytes: int | None) -> None:
        """`max_bytes` None is no limit."""
        self._max_adapters, self._max_bytes = max_adapters, max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[AdapterEntry, int] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        """Return how many adapters are there."""
        return len(self._kept)

    def keep(self, entry: AdapterEntry, host: HostCopy) -> None:
        """Keep a copy, for which others may leave; not that of an adapter that was unloaded."""
        with self._lock:
            if entry.is_unloaded:
                return
            self._drop(entry)
            entry.host = host
            self._kept[entry] = host.nbytes
            self._bytes += host.nbytes
            while len(self._kept) > 1 and self._is_full():
                self._drop(next(iter(self._kept)))

    def touch(self, entry: AdapterEntry) -> None:
        """Take note that the adapter is used."""
        with self._lock:
            if entry in self._kept:
                self._kept.move_to_end(entry)

    def get(self, entry: AdapterEntry) -> HostCopy | None:
        """Return the adapter's copy, if it is there."""
        with self._lock:
            return entry.host

    def forget(self, entry: AdapterEntry) -> None:
        """Count an adapter no longer; requests that wait for it still find its copy."""
        with self._lock:
            self._bytes -= self._kept.pop(entry, 0)

    def _is_full(self) -> bool:
        over = self._max_bytes is not None and self._bytes > self._max_bytes
        return over or len(self._kept) > self._max_adapters

    def _drop(self, entry: AdapterEntry) -> None:
        self._bytes -= self._kept.pop(entry, 0)
        entry.host = None
