"""What XLA makes of a program: its optimised HLO, read as text, as counts of what a GPU is told to do."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"\b(pred|[a-z]+?\d+\w*)\[([\d,]*)\]")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_THUNK = re.compile(r"( *)\d+: k(\w+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_TARGETS = {"triton_kernel_call_ffi": "triton", "mosaic_gpu_v2": "mosaic"}
_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all"}
"""What the GPU is not told."""
_IN_PLACE = {"dynamic-update-slice", "scatter"}
"""Roots of fusions that write a part of what they are given."""
_BITS = {"pred": 8}


@dataclass(frozen=True)
class Instruction:
    """An instruction of a computation."""

    opcode: str
    shape: str
    text: str
    is_root: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of its results together."""
        total = 0
        for dtype, sizes in _SHAPE.findall(self.shape):
            bits = _BITS.get(dtype) or int(re.sub(r"^\D+(\d+).*", r"\1", dtype))
            total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
        return total

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        branches = [name.strip(" %") for found in _BRANCHES.findall(self.text) for name in found.split(",")]
        return _CALLS.findall(self.text) + branches


class OptimisedHlo:
    """The computations of a compiled program, `jax.stages.Compiled.as_text()`."""

    def __init__(self, text: str) -> None:
        self._computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if (head := _HEAD.match(line)) is not None:
                current = self._computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif (found := _INSTRUCTION.match(_COMMENT.sub("", line.strip()))) is not None:
                current.append(Instruction(found[3], found[2], line, line.lstrip().startswith("ROOT")))

    def step(self) -> str:
        """Return the computation that has the layers: the one with most kernels that is no condition's, or else all."""
        every = [instruction for computation in self._computations.values() for instruction in computation]
        branches = {name for found in every if found.opcode == "conditional" for name in found.called}
        steps = [self.entry, *(name for name in self._computations if name not in branches)]
        return max(steps, key=lambda name: sum(self.kinds(name)[kind] for kind in ("triton", "mosaic")))

    def kinds(self, name: str) -> Counter[str]:
        """Count what computation `name` tells the GPU to do.

        Kernels are `triton`, `mosaic`, `matmul` (cuBLAS) and `fusion` (XLA's own); the rest goes by HLO's opcodes.
        """
        return Counter(self._kind(i) for i in self._computations[name] if i.opcode not in _NOTHING)

    def copied(self) -> Mapping[str, int]:
        """Return the bytes that XLA's own operations write anywhere in the program, by the HLO of the operation.

        Kernels and collectives are left out, and so is what is updated in place.
        """
        roots = {self._root(instruction): instruction for instruction in self._executed()}
        return {
            found.text.strip()[:300]: found.num_bytes
            for root, found in roots.items()
            if found.opcode in ("copy", "copy-start", "fusion", "transpose", "concatenate", "slice", "convert")
            and root.opcode not in {*_IN_PLACE, "custom-call"}
        }

    def _executed(self) -> Iterator[Instruction]:
        """All instructions outside fusions: those of computations that something else than a fusion runs."""
        waiting, seen = [self.entry], set[str]()
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self._computations:
                continue
            seen.add(name)
            for instruction in self._computations[name]:
                yield instruction
                if instruction.opcode in ("while", "conditional", "call"):
                    waiting += instruction.called

    def _kind(self, instruction: Instruction) -> str:
        inner = self._inner(instruction)
        calls = [found for found in inner if found.opcode == "custom-call"]
        if instruction.opcode == "fusion" and calls:
            instruction = calls[0]
        if instruction.opcode != "custom-call":
            return instruction.opcode
        target = _TARGET.search(instruction.text)
        name = target[1] if target else "custom-call"
        return _TARGETS.get(name, "matmul" if name.startswith("__cublas") else name)

    def _root(self, instruction: Instruction) -> Instruction:
        """The instruction that a fusion's result comes from; others are their own."""
        roots = [found for found in self._inner(instruction) if found.is_root]
        calls = [found for found in self._inner(instruction) if found.opcode == "custom-call"]
        return (calls or roots or [instruction])[0] if instruction.opcode == "fusion" else instruction

    def _inner(self, instruction: Instruction) -> Sequence[Instruction]:
        if instruction.opcode != "fusion":
            return ()
        return [found for name in instruction.called for found in self._computations.get(name, ())]


def call_commands(thunks: str) -> Counter[str]:
    """Count what the host starts in a call of a program, one after another.

    `thunks` is XLA's own list, a line each: a number, a kind and more, those inside others indented. What is inside a
    command buffer, a conditional or a loop is not counted.
    """
    found = [(len(entry[1]), entry[2]) for entry in map(_THUNK.match, thunks.splitlines()) if entry is not None]
    least = min((depth for depth, _ in found), default=0)
    return Counter(kind for depth, kind in found if depth == least)


def step_commands(thunks: str) -> Counter[str]:
    """Count what the host starts for a step: in the body of the loop that it runs, or else in the whole call."""
    commands = call_commands(thunks)
    if "While" not in commands:
        return commands
    lines = thunks.splitlines()
    body = next(index for index, line in enumerate(lines) if line.strip() == "body:") + 1
    return call_commands("\n".join(lines[body:]))
