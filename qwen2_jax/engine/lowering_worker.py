"""A process that traces and lowers programs for another one: `python -m qwen2_jax.engine.lowering_worker`.

Tracing and lowering are Python, which threads do not speed up. `lowering_pool.py` starts some of these, which touch no
GPU, and talks to them in pickles. On stdin come a dict of JAX's options, then shares of work: the facts that programs
are made from, a description of the mesh, and keys. On stdout goes a triple for each key: the key, the program as bytes
or None, and what went wrong or None. The end of stdin ends the process, whatever it is doing.
"""

import os
import pickle
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax
from jax.sharding import AbstractMesh, Mesh

from qwen2_jax.engine.compilation import ProgramSpec
from qwen2_jax.engine.lowered_programs import export_program
from qwen2_jax.engine.model_loader import abstract_model
from qwen2_jax.engine.program_facts import ProgramFacts, make_programs
from qwen2_jax.engine.program_specs import ProgramKey

Share = tuple[ProgramFacts, AbstractMesh, list[ProgramKey]]
Reply = tuple[ProgramKey, bytes | None, str | None]


class LoweringWorker:
    """Lowers what it is told, one program after another."""

    def __init__(self) -> None:
        """Know no programs yet."""
        self._known: tuple[ProgramFacts, AbstractMesh] | None = None
        self._specs: Mapping[ProgramKey, ProgramSpec] = {}

    def work(self, facts: ProgramFacts, mesh: AbstractMesh, keys: list[ProgramKey]) -> Iterator[Reply]:
        """Lower the programs `keys` of those that `facts` describe, for the devices of `mesh`."""
        if (facts, mesh) != self._known:
            self._specs = abstract_programs(facts, mesh)
            self._known = facts, mesh
        for key in keys:
            try:
                yield key, export_program(self._specs[key], mesh), None
            except Exception as raised:  # of any kind: the other process lowers the program itself, and raises it there
                yield key, None, f"{type(raised).__name__}: {raised}"


def abstract_programs(facts: ProgramFacts, mesh: Mesh | AbstractMesh) -> dict[ProgramKey, ProgramSpec]:
    """Return the programs that `facts` describe, for devices that need not be here."""
    graphdef, params = abstract_model(facts.model, mesh, facts.dtype)
    programs = make_programs(facts.model, facts.config, facts.dtype, graphdef)
    return facts.table(cast(Mesh, mesh), programs, params).specs()  # shardings take either kind of mesh


def main() -> None:
    """Serve the process at the other end of stdin and stdout until it is gone."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not end up among the replies
    _adopt_options(pickle.load(sys.stdin.buffer))
    shares = queue.SimpleQueue[Share]()
    threading.Thread(target=_receive, args=(shares,), daemon=True).start()
    worker = LoweringWorker()
    while True:
        for reply in worker.work(*shares.get()):
            pickle.dump(reply, replies)
            replies.flush()


def _receive(shares: queue.SimpleQueue[Share]) -> None:
    while True:
        try:
            shares.put(pickle.load(sys.stdin.buffer))
        except EOFError:
            os._exit(0)  # in the middle of a program, too


def _adopt_options(options: Mapping[str, Any]) -> None:
    """Set JAX's options as they are in the other process, which may have set them in its program."""
    for name, value in options.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)


if __name__ == "__main__":
    main()
