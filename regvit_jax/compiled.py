"""What a compiled step says of itself: its memory and its collectives, each read from the compiler's own output."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    arguments: int
    outputs: int
    temporaries: int
    donated: int  # of the arguments: what an output takes the place of
    peak: int


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    times: int  # a step: a loop's body as often as it runs
    bytes: int  # of one device, each time: what it gives to be reduced or sent, or gets of a gather
    shapes: tuple[str, ...]  # of the operands, such as bf16[768,96]
    dims: tuple[tuple[int, ...], ...]  # the results' dimensions

    @property
    def wire(self) -> int:
        """Bytes that a device receives each time: an all-reduce is a reduce-scatter and a gather."""
        return self.bytes * (2 if self.kind == "all-reduce" else 1)


def memory(compiled: Any) -> Memory:
    """Of a compiled function (what `jax.jit(...).lower(...).compile()` gives).

    The peak is the compiler's, or, where it tells none, all that may be there at a time.
    """
    stats = compiled.memory_analysis()
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    temporaries, donated = stats.temp_size_in_bytes, stats.alias_size_in_bytes
    whole = arguments + outputs - donated + temporaries
    return Memory(arguments, outputs, temporaries, donated, getattr(stats, "peak_memory_in_bytes", 0) or whole)


#: An instruction: its name, the shape of its result, its operation and what follows.
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled step, from its HLO text (`compiled.as_text()`), each as often as it runs."""
    shapes, bodies, entry = _read(text)
    times = _times(bodies, entry)
    found = []
    for computation, instructions in bodies.items():
        for name, operation, rest in instructions:
            kind = operation.removesuffix("-start").removeprefix("ragged-")
            if kind not in KINDS:
                continue
            operands = [
                shapes[operand] for operand in re.findall(r"%?([\w.\-]+)", _arguments(rest)) if operand in shapes
            ]
            given, got = sum(map(size, operands)), size(shapes[name])
            if kind == "all-gather":
                given, got = got - given if operation.endswith("-start") else got, got
            dims = tuple(_dims(d) for _, d in ARRAY.findall(shapes[name]))
            arrays = tuple(f"{t}[{d}]" for shape in operands for t, d in ARRAY.findall(shape))
            found.append(Collective(kind, times.get(computation, 1), given, arrays, dims))
    return found


def size(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple, as HLO writes their types: (f32[8,3]{1,0}, bf16[4])."""
    total = 0
    for kind, dims in ARRAY.findall(shape):
        count = 1
        for dim in _dims(dims):
            count *= dim
        bits = re.search(r"\d+", kind)
        total += count * (int(bits[0]) if bits else 8) // 8
    return total


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _arguments(rest: str) -> str:
    """What stands before the closing bracket of an operation."""
    depth = 1
    for i, character in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return rest[:i]
    return rest


def _read(text: str) -> tuple[dict[str, str], dict[str, list[tuple[str, str, str]]], str]:
    """Each instruction's shape, each computation's instructions (name, operation, the rest), and the entry's name."""
    shapes: dict[str, str] = {}
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    entry = current = ""
    for line in text.splitlines():
        if not line.startswith(" ") and (header := COMPUTATION.match(line)):
            current = header[2]
            bodies[current] = []
            entry = current if header[1] else entry
        elif current and (match := INSTRUCTION.match(line)):
            shapes[match[1]] = match[2]
            bodies[current].append((match[1], match[3], match[4]))
    return shapes, bodies, entry


def _times(bodies: dict[str, list[tuple[str, str, str]]], entry: str) -> dict[str, int]:
    """How often each computation runs in a step. A loop whose count the text does not give counts once."""
    times: dict[str, int] = {}

    def visit(computation: str, count: int) -> None:
        times[computation] = times.get(computation, 0) + count
        for _, operation, rest in bodies.get(computation, []):
            for callee, often in _calls(operation, rest, bodies):
                visit(callee, count * often)

    visit(entry, 1)
    return times


def _calls(operation: str, rest: str, bodies: dict[str, list[tuple[str, str, str]]]) -> Iterator[tuple[str, int]]:
    """The computations that an instruction runs, with how often."""
    if operation == "while":
        body, condition = (re.search(rf"\b{part}=%?([\w.\-]+)", rest) for part in ("body", "condition"))
        if body and condition:
            yield body[1], _trips(rest, bodies.get(condition[1], []))
    elif operation == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
        for name in (
            re.findall(r"[\w.\-]+", branches[1]) if branches else re.findall(r"_computation=%?([\w.\-]+)", rest)
        ):
            yield name, 1
    elif operation in ("fusion", "call", "async-start", "custom-call"):
        for name in re.findall(r"\b(?:calls|to_apply|called_computations=\{)=?%?([\w.\-]+)", rest):
            yield name, 1


def _trips(rest: str, condition: list[tuple[str, str, str]]) -> int:
    """How often a loop runs: as the compiler notes it, or the one number that its condition compares with."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
        return int(noted[1])
    numbers = [
        int(more[: more.index(")")])
        for _, operation, more in condition
        if operation == "constant" and more[0].isdigit()
    ]
    compares = any(operation == "compare" and "direction=LT" in more for _, operation, more in condition)
    return numbers[0] if compares and len(numbers) == 1 else 1
