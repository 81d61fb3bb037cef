"""Which waiting requests may start, as far as their adapters are concerned."""

from qwen2_jax.engine.request import Request
from qwen2_jax.engine.schedule import AdapterGate
from qwen2_jax.lora.entry import AdapterEntry, Admission

MAX_PASSED = 64
"""Requests with other adapters that may start before one whose adapter finds no room."""


class AdapterAdmission:
    """Keeps the adapters of running requests on the device, and is fair to those that find no room."""

    def __init__(self, gate: AdapterGate | None) -> None:
        """Without a gate no request has an adapter."""
        self._gate = gate
        self._absent: dict[AdapterEntry, Admission] = {}
        self._crowded_out: list[AdapterEntry] = []
        self._gives_way = False

    def begin(self) -> None:
        """Begin to look at the waiting requests, from the first on."""
        self._absent, self._crowded_out, self._gives_way = {}, [], False
        if self._gate is not None:
            self._gate.begin_pass()

    def acquire(self, request: Request) -> Admission:
        """Keep the request's adapter on the device, unless one that adapters in use crowd out has waited long enough.

        Who comes later would only prolong the use of theirs. An adapter that is not there for one request is not there
        for the others that wait for it either: thousands of them cost little.
        """
        adapter = request.adapter
        if adapter is None or self._gate is None:
            return Admission.READY
        if self._gives_way:
            return Admission.FULL
        if adapter in self._absent:
            return self._absent[adapter]
        admission = self._gate.acquire(adapter)
        if admission in (Admission.FULL, Admission.LOADING):
            self._absent[adapter] = admission
        if admission is Admission.FULL:
            self._crowded_out.append(adapter)
            self._gives_way = adapter.num_passed >= MAX_PASSED
        return admission

    def note_start(self, request: Request) -> None:
        """Take note that `request` starts before those that were crowded out."""
        if request.adapter is not None:
            for other in self._crowded_out:
                other.num_passed += 1
                self._gives_way |= other.num_passed >= MAX_PASSED

    def release(self, request: Request, *, is_wanted: bool = False) -> None:
        """Let go of the adapter of a request that no longer runs; `is_wanted` where it waits to run again."""
        if request.adapter is not None and self._gate is not None:
            self._gate.release(request.adapter, is_wanted=is_wanted)
