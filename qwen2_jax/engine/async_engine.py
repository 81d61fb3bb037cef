"""Runs an engine in a thread of its own, so that callers of any kind (threads, event loops) can share it."""

import asyncio
import atexit
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

from qwen2_jax.engine.engine import Engine, Output
from qwen2_jax.engine.input_processor import ProcessedInput
from qwen2_jax.errors import Qwen2JaxError

logger = logging.getLogger(__name__)

Listener = Callable[[Output | BaseException], object]


class EngineDeadError(Qwen2JaxError, RuntimeError):
    """The engine has failed or was shut down; the request it is raised for was not completed."""


class AsyncEngine:
    """An engine and its thread. Every submitted request's listener gets outputs up to a finished one, or an error."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}
        self._names = itertools.count()
        self._error: BaseException | None = None
        self._gate = threading.Lock()  # nothing enters the inbox once `_error` is set
        self._thread = threading.Thread(target=self._serve, name="qwen2_jax engine", daemon=True)
        self._thread.start()
        # A thread that is inside JAX while the interpreter is taken down aborts the process.
        atexit.register(self.shutdown)

    def new_request_id(self) -> str:
        """Return an id that no other request of this engine has."""
        return str(next(self._names))

    def submit(self, requests: list[tuple[ProcessedInput, Listener]]) -> None:
        """Queue requests together; listeners are called in the engine's thread and must not block."""
        self._post(lambda: self._add(requests))

    def abort(self, request_ids: list[str]) -> None:
        """End requests early; each one's listener gets a last output with finish reason "abort"."""

        def run() -> None:
            for request_id in request_ids:
                output = self.engine.abort(request_id)
                if output is not None:
                    self._deliver(output)

        # An engine that has stopped has ended all its requests: there is nothing to abort.
        with contextlib.suppress(EngineDeadError):
            self._post(run)

    def call[T](self, function: Callable[[Engine], T]) -> T:
        """Run `function` in the engine's thread, between two steps, and return what it returns."""
        answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answer.put((True, function(self.engine)))
            except Exception as error:
                answer.put((False, error))

        self._post(run)
        ok, value = answer.get()
        if not ok:
            raise value
        return value

    async def stream(self, source: ProcessedInput) -> AsyncGenerator[Output, None]:
        """Submit one request and yield its outputs; leaving the loop early aborts it."""
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[Output | BaseException] = asyncio.Queue()
        self.submit([(source, lambda output: loop.call_soon_threadsafe(outputs.put_nowait, output))])
        finished = False
        try:
            while not finished:
                output = await outputs.get()
                if isinstance(output, BaseException):
                    finished = True
                    raise output
                finished = output.finished
                yield output
        finally:
            if not finished:
                self.abort([source.request_id])

    def shutdown(self) -> None:
        """Stop the thread and let go of the device's memory. Requests that are unfinished get an `EngineDeadError`."""
        atexit.unregister(self.shutdown)
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join()

    def _post(self, command: Callable[[], None]) -> None:
        with self._gate:
            if self._error is not None:
                raise EngineDeadError("the engine does not run any more") from self._error
            self._inbox.put(command)

    def _serve(self) -> None:
        try:
            while self._drain_inbox(block=not self.engine.has_unfinished):
                for output in self.engine.step():
                    self._deliver(output)
                for request_id, error in self.engine.take_failures():
                    self._tell(request_id, self._listeners.pop(request_id), error)
            reason = EngineDeadError("the engine was shut down")
        except BaseException as error:
            logger.exception("the engine failed")
            reason = error
        with self._gate:
            self._error = reason
        self._fail_all()
        self.engine.close()

    def _drain_inbox(self, *, block: bool) -> bool:
        """Run what callers have posted, waiting for the first if `block`; False after `shutdown`."""
        while True:
            try:
                command = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = False

    def _add(self, requests: list[tuple[ProcessedInput, Listener]]) -> None:
        for source, listener in requests:
            try:
                self.engine.add(source)
            except Qwen2JaxError as error:
                self._tell(source.request_id, listener, error)
            else:
                self._listeners[source.request_id] = listener

    def _deliver(self, output: Output) -> None:
        listener = self._listeners[output.request_id]
        if output.finished:
            del self._listeners[output.request_id]
        heard = self._tell(output.request_id, listener, output)
        if not heard and not output.finished:
            del self._listeners[output.request_id]
            self.engine.abort(output.request_id)

    def _tell(self, request_id: str, listener: Listener, output: Output | BaseException) -> bool:
        """Call a listener and return whether it could take `output`; one that cannot ends its own request alone."""
        try:
            listener(output)
        except Exception:  # the caller's event loop has been closed, say
            logger.warning("request %s: its listener failed and is told nothing more", request_id, exc_info=True)
            return False
        return True

    def _fail_all(self) -> None:
        """Give every listener, and every command still in the inbox, its end."""
        while not self._inbox.empty():
            command = self._inbox.get()
            if command is not None:
                try:
                    command()
                except Exception:
                    logger.exception("a command failed after the engine had stopped")
        for request_id, listener in self._listeners.items():
            error = EngineDeadError("the engine stopped before this request was finished")
            error.__cause__ = self._error
            self._tell(request_id, listener, error)
        self._listeners.clear()
