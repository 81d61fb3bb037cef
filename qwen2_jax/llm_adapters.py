"""Adapters as a caller of `LLM` sees them: found for each prompt, loaded ahead of time, listed and unloaded."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from qwen2_jax.engine.async_engine import AsyncEngine
from qwen2_jax.errors import AdapterError, CapacityError, RequestError
from qwen2_jax.lora.entry import AdapterEntry, AdapterStats, Admission
from qwen2_jax.lora.manager import AdapterManager
from qwen2_jax.types import AdapterRequest

LoRARequests = AdapterRequest | Sequence[AdapterRequest | None] | None
_READERS = 4
"""Threads that read the adapters of one call."""
_FINDERS = 32
"""Threads that find those of streams: most wait for the hub, or for a merge."""
_POLL_SECONDS = 0.001


@dataclass(frozen=True, kw_only=True)
class LoadedLoRA:
    """An adapter that the engine knows."""

    name: str
    path: str
    """Its folder, or which folders it is the merge of."""
    digest: str
    """SHA-256 of its weights and of what its config says about them; of a merge, of those, the weights and options."""
    applied: dict[str, int]
    """How many layers it changes, by module."""
    nbytes: int
    resident: bool
    """Whether it is on the device now."""
    pinned: bool
    requests: int
    """Running requests that use it."""


class Adapters:
    """The adapters of one engine."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="qwen2_jax adapter readers")
        self._finders = ThreadPoolExecutor(_FINDERS, thread_name_prefix="qwen2_jax adapter finders")
        self._finding: dict[AdapterRequest, Future[list[AdapterEntry | None]]] = {}

    def find(self, requests: LoRARequests, count: int) -> list[AdapterEntry | None]:
        """Return each prompt's adapter, read and checked; one request is for all prompts.

        Raises:
            AdapterError: an adapter that cannot be served, or any without `enable_lora`.
            RequestError: another number of requests than of prompts.
        """
        listed = list(requests) if isinstance(requests, Sequence) else [requests] * count
        if len(listed) != count:
            raise RequestError(f"lora_request has {len(listed)} entries for {count} prompts; pass one per prompt")
        for request in listed:
            if request is not None and not isinstance(request, AdapterRequest):
                raise AdapterError(
                    f"lora_request={request!r} is not a LoRARequest(name, id, path), a MergedLoRARequest or None"
                )
        distinct = list(dict.fromkeys(request for request in listed if request is not None))
        if not distinct:
            return [None] * count
        find = self._manager().find
        entries = [find(distinct[0])] if len(distinct) == 1 else list(self._readers.map(find, distinct))
        found = dict(zip(distinct, entries, strict=True))
        return [None if request is None else found[request] for request in listed]

    async def find_one(self, request: AdapterRequest | None) -> AdapterEntry | None:
        """Return one prompt's adapter, as `find` does.

        Tasks that ask for the same adapter wait for one thread, so that slow ones leave threads for others.
        """
        if request is None or not isinstance(request, AdapterRequest):
            return self.find(request, 1)[0]
        finding = self._finding.get(request)
        if finding is None or finding.done():
            finding = self._finders.submit(self.find, request, 1)
            self._finding[request] = finding
            finding.add_done_callback(lambda _: self._finding.pop(request, None))
        return (await asyncio.shield(asyncio.wrap_future(finding)))[0]

    def load(self, request: AdapterRequest, *, pin: bool) -> LoadedLoRA:
        """Bring an adapter to the device; see `LLM.load_lora`."""
        if not isinstance(request, AdapterRequest):
            self.find(request, 1)  # says what is wrong
        manager = self._manager()
        entry = manager.find(request, ask_hub=True)
        while True:
            outcome = self._engine.call(lambda _: manager.load(entry, pin=pin))
            if outcome is Admission.READY:
                return _describe(entry)
            if outcome is Admission.FAILED:
                assert entry.error is not None
                raise entry.error
            if outcome is Admission.FULL:
                raise CapacityError(
                    f"adapter {request.lora_name!r} finds no room beside those in use or pinned; unload one, wait, or "
                    "start with a larger max_loras"
                )
            time.sleep(_POLL_SECONDS)

    def unload(self, name: str) -> None:
        """Forget the adapters of a name; see `LLM.unload_lora`."""
        manager = self._manager()
        if not self._engine.call(lambda _: manager.unload(name)):
            raise manager.unknown(name)

    def list(self) -> list[LoadedLoRA]:
        """Return the adapters that are known."""
        return [_describe(entry) for entry in self._manager().entries()]

    def stats(self) -> AdapterStats:
        """Return counts of loads, evictions and waiting times."""
        return self._manager().stats()

    def _manager(self) -> AdapterManager:
        manager = self._engine.engine.adapters
        if manager is None:
            raise AdapterError("adapters are not served: start with enable_lora=True")
        return manager


def _describe(entry: AdapterEntry) -> LoadedLoRA:
    return LoadedLoRA(
        name=entry.request.lora_name,
        path=str(entry.source),
        digest=entry.digest,
        applied=dict(entry.applied),
        nbytes=entry.nbytes,
        resident=entry.is_resident,
        pinned=entry.is_pinned,
        requests=entry.pins,
    )
