"""Who waits, who runs, and which row of device state each running request holds."""

from bisect import bisect_left, insort

from qwen2_jax.engine.request import Request, RequestStatus


class RequestQueues:
    """All unfinished requests, waiting and running ones each in the order in which they are served."""

    def __init__(self, *, max_num_seqs: int, by_priority: bool) -> None:
        """Make `max_num_seqs` rows; order by arrival, or by priority first."""
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._requests: dict[str, Request] = {}
        self._by_priority = by_priority
        self._max_num_seqs = max_num_seqs
        self._free_rows = list(range(max_num_seqs))[::-1]

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def has_free_row(self) -> bool:
        """Whether another request can run."""
        return bool(self._free_rows)

    def get(self, request_id: str) -> Request | None:
        """Return the unfinished request of that id, if there is one."""
        return self._requests.get(request_id)

    def add(self, request: Request) -> None:
        """Queue a new request behind those of its rank."""
        self._requests[request.request_id] = request
        insort(self.waiting, request, key=self._rank)

    def start(self, index: int) -> None:
        """Give the waiting request at `index` a row."""
        request = self.waiting.pop(index)
        request.status = RequestStatus.RUNNING
        request.row_index = self._free_rows.pop()
        insort(self.running, request, key=self._rank)

    def preempt(self, request: Request) -> None:
        """Take a running request's row and queue it before the others of its rank."""
        self._take_row(request)
        request.status = RequestStatus.PREEMPTED
        self.waiting.insert(bisect_left(self.waiting, self._rank(request), key=self._rank), request)

    def remove(self, request: Request) -> None:
        """Let a request go, wherever it is."""
        if request.status is RequestStatus.RUNNING:
            self._take_row(request)
        else:
            self.waiting.remove(request)
        del self._requests[request.request_id]
        request.status = RequestStatus.FINISHED

    def check_integrity(self) -> None:
        """Raise `AssertionError` if a request is lost or in two places, or a row is."""
        rows = [request.row_index for request in self.running if request.row_index is not None]
        if sorted(rows + self._free_rows) != list(range(self._max_num_seqs)) or len(rows) != len(self.running):
            raise AssertionError(f"rows {rows} are held by {len(self.running)} requests, {self._free_rows} are free")
        if sorted(self._requests) != sorted(request.request_id for request in self.running + self.waiting):
            raise AssertionError("a request is in no queue, or in two")
        if any(request.status is not RequestStatus.RUNNING for request in self.running):
            raise AssertionError("a request holds a row and is not running")
        if any(request.block_ids or request.row_index is not None for request in self.waiting):
            raise AssertionError("a waiting request holds blocks or a row")

    def _rank(self, request: Request) -> tuple[float, float]:
        return (request.priority if self._by_priority else 0, request.arrival)

    def _take_row(self, request: Request) -> None:
        assert request.row_index is not None
        self.running.remove(request)
        self._free_rows.append(request.row_index)
        request.row_index = None
