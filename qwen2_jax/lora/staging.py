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
    """A few copies at a time, in the order in which they are asked for; the engine's thread asks, takes and drops."""

    def __init__(self, copy: Callable[[AdapterEntry], Staged]) -> None:
        """`copy` runs in a thread of its own and returns when the adapter is on the devices."""
        self._copy = copy
        self._entries: list[AdapterEntry] = []
        self._threads = ThreadPoolExecutor(MAX_STAGED, thread_name_prefix="qwen2_jax adapters")
        self._is_contended = False
        self._begun = self._begun_before = 0.0

    def begin(self) -> None:
        """Begin to ask in order: from now on, who finds no place comes before all who ask later."""
        self._is_contended = False
        self._begun_before, self._begun = self._begun, time.monotonic()
        self._drop_unwanted(since=self._begun_before)

    def is_done(self, entry: AdapterEntry, *, has_room: bool, in_line: bool = True) -> bool:
        """Start to copy an adapter if that is not under way and there is a place; return whether its copy is made.

        Copies of adapters that find no room on the devices (`has_room`) give way to those of others. Who does not ask
        `in_line` need not come behind those who found no place.
        """
        entry.last_wanted = time.monotonic()
        entry.is_crowded_out = not has_room
        if entry.staged is None:
            if (in_line and self._is_contended) or not self._has_place(has_room, in_line):
                self._is_contended |= in_line and has_room
                return False
            entry.staged = self._threads.submit(self._copy, entry)
            self._entries.append(entry)
        return entry.staged.done()

    def error(self, entry: AdapterEntry) -> BaseException | None:
        """Return why a copy that is done was not made."""
        assert entry.staged is not None
        return entry.staged.exception()

    def take(self, entry: AdapterEntry) -> Staged:
        """Return an adapter's copy, whose place here is free then."""
        return self.drop(entry).result()

    def drop(self, entry: AdapterEntry) -> Future[Staged]:
        """Let go of a copy and return it."""
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

    def _has_place(self, has_room: bool, in_line: bool) -> bool:
        """Return whether there is a place, if need be that of the last copy whose adapter finds no room."""
        if len(self._entries) >= MAX_STAGED:
            self._drop_unwanted(since=self._begun_before if in_line else None)
        if len(self._entries) >= MAX_STAGED and has_room:
            useless = [entry for entry in self._entries if entry.is_crowded_out and _is_made(entry)]
            if useless:
                self.drop(useless[-1])
        return len(self._entries) < MAX_STAGED

    def _drop_unwanted(self, *, since: float | None) -> None:
        """Let go of copies that nobody has asked for in a while, nor `since` then: their requests have ended."""
        before = time.monotonic() - UNWANTED_SECONDS
        before = before if since is None else min(before, since)
        for entry in list(self._entries):
            if entry.last_wanted < before and _is_made(entry):
                self.drop(entry)


def _is_made(entry: AdapterEntry) -> bool:
    return entry.staged is not None and entry.staged.done()
