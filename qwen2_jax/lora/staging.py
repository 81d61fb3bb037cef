"""Adapters on their way to the devices: copies that threads make while steps go on."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from qwen2_jax.lora.entry import AdapterEntry
from qwen2_jax.lora.placing import Staged

MAX_STAGED = 4
"""Adapters that are copied to the devices at a time: each takes its size once more until it is in its pages."""
UNWANTED_SECONDS = 1.0
"""How long a copy waits on the devices for someone who wants it."""
_NOTHING_PENDING_SECONDS = 0.001


class Staging:
    """A few copies at a time; the engine's thread starts, takes and drops them."""

    def __init__(self, copy: Callable[[AdapterEntry], Staged]) -> None:
        """`copy` runs in a thread of its own and returns when the adapter is on the devices."""
        self._copy = copy
        self._entries: list[AdapterEntry] = []
        self._threads = ThreadPoolExecutor(MAX_STAGED, thread_name_prefix="qwen2_jax adapters")

    def is_done(self, entry: AdapterEntry) -> bool:
        """Start to copy an adapter if that is not under way and not too many are; return whether its copy is made."""
        entry.last_wanted = time.monotonic()
        if entry.staged is None:
            self._drop_unwanted()
            if len(self._entries) >= MAX_STAGED:
                return False
            entry.staged = self._threads.submit(self._copy, entry)
            self._entries.append(entry)
        return entry.staged.done()

    def take(self, entry: AdapterEntry) -> Future[Staged]:
        """Return an adapter's copy, whose place here is free then."""
        staged, entry.staged = entry.staged, None
        assert staged is not None
        self._entries.remove(entry)
        return staged

    def wait(self, seconds: float) -> None:
        """Wait until a copy is made, at most so long."""
        pending = [entry.staged for entry in self._entries if entry.staged is not None and not entry.staged.done()]
        made = threading.Event()
        for future in pending:
            future.add_done_callback(lambda _: made.set())
        made.wait(seconds if pending else _NOTHING_PENDING_SECONDS)

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _drop_unwanted(self) -> None:
        """Let go of copies that nobody has asked for in a while: their requests have ended."""
        before = time.monotonic() - UNWANTED_SECONDS
        for entry in list(self._entries):
            if entry.last_wanted < before and entry.staged is not None and entry.staged.done():
                self.take(entry)
