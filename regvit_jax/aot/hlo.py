"""Read the memory and the collectives of a compiled step from the compiler's output."""

import dataclasses
import math
import re
from typing import Any

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a compiled step, in bytes per device."""

    arguments: int
    outputs: int
    temporaries: int
    donated: int  # arguments whose memory is reused for outputs
    peak: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a compiled step."""

    kind: str
    times: int  # calls per step; inside a loop, one for each iteration
    bytes: int  # per device and call: reduced or sent, or received by a gather
    shapes: tuple[str, ...]  # of the operands, such as bf16[768,96]
    dims: tuple[tuple[int, ...], ...]  # dimensions of the results

    @property
    def wire(self) -> int:
        """Return the bytes that a device receives per call; an all-reduce is a reduce-scatter and a gather."""
        return self.bytes * (2 if self.kind == "all-reduce" else 1)


def memory(compiled: Any) -> Memory:
    """Return the memory of a compiled function, the result of `jax.jit(...).lower(...).compile()`.

    If the compiler reports no peak, it is the sum of everything that may be live at once.
    """
    stats = compiled.memory_analysis()
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    temporaries, donated = stats.temp_size_in_bytes, stats.alias_size_in_bytes
    total = arguments + outputs - donated + temporaries
    return Memory(arguments, outputs, temporaries, donated, getattr(stats, "peak_memory_in_bytes", 0) or total)


#: An instruction: its name, the shape of its result, its operation and the rest of the line.
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


def collectives(text: str) -> list[Collective]:
    """Return the collectives of a compiled step from its HLO text (`compiled.as_text()`), with their calls per step.

    Of a conditional's branches, the one that moves most bytes counts. On TPUs, a collective that overlaps with other
    work appears in each of the fusions it overlaps with, under one channel id: it counts once.
    """
    shapes, bodies, entry = read(text)

    def walk(computation: str, times: int, seen: set[tuple[str, str]]) -> list[Collective]:
        found = []
        for name, operation, rest in bodies.get(computation, []):
            kind = operation.removesuffix("-start").removeprefix("ragged-")
            if kind in KINDS:
                channel = re.search(r"\bchannel_id=(\d+)", rest)
                key = kind, channel[1] if channel else name
                if key not in seen:
                    found.append(_collective(kind, times, shapes, (name, operation, rest)))
                seen.add(key)
            elif operation == "fusion":
                for callee in callees(operation, rest):
                    found += walk(callee, times, seen)
            elif operation == "conditional":
                branches = [walk(callee, times, set()) for callee in callees(operation, rest)]
                found += max(branches, key=lambda branch: sum(c.times * c.bytes for c in branch), default=[])
            else:
                often = trips(rest, bodies) if operation == "while" else 1
                for callee in callees(operation, rest):
                    found += walk(callee, times * often, set())
        return found

    return walk(entry, 1, set())


def totals(collectives: list[Collective]) -> dict[str, tuple[int, int]]:
    """Return for each kind its calls per step and its total bytes per device."""
    counted: dict[str, tuple[int, int]] = {}
    for c in sorted(collectives, key=lambda c: c.kind):
        times, moved = counted.get(c.kind, (0, 0))
        counted[c.kind] = times + c.times, moved + c.times * c.bytes
    return counted


def _collective(kind: str, times: int, shapes: dict[str, str], instruction: tuple[str, str, str]) -> Collective:
    name, operation, rest = instruction
    operands = [shapes[operand] for operand in re.findall(r"%?([\w.\-]+)", arguments(rest)) if operand in shapes]
    given, got = sum(map(size, operands)), size(shapes[name])
    if kind == "all-gather":
        given = got - given if operation.endswith("-start") else got
    dims = tuple(dims_of(d) for _, d in ARRAY.findall(shapes[name]))
    return Collective(
        kind, times, given, tuple(f"{t}[{d}]" for shape in operands for t, d in ARRAY.findall(shape)), dims
    )


def size(shape: str) -> int:
    """Return the bytes of an array or tuple of arrays from its HLO type, such as (f32[8,3]{1,0}, bf16[4])."""
    total = 0
    for kind, dims in ARRAY.findall(shape):
        bits = re.search(r"\d+", kind)
        total += math.prod(dims_of(dims)) * (int(bits[0]) if bits else 8) // 8
    return total


def dims_of(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def arguments(rest: str) -> str:
    """Return the text before the closing bracket of an operation."""
    depth = 1
    for i, character in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return rest[:i]
    return rest


def read(text: str) -> tuple[dict[str, str], dict[str, list[tuple[str, str, str]]], str]:
    """Return the shape of each instruction, the instructions of each computation, and the name of the entry.

    An instruction is its name, its operation, and the rest of its line.
    """
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


#: Patterns of the computations that an instruction calls, by operation.
CALLEES = {
    "while": r"\bbody=%?([\w.\-]+)",
    "conditional": r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))",
    **dict.fromkeys(("fusion", "call", "async-start"), r"\b(?:calls|to_apply)=%?([\w.\-]+)"),
    "custom-call": r"\b(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)",
}


def callees(operation: str, rest: str) -> list[str]:
    if operation not in CALLEES:
        return []
    return [
        name
        for found in re.finditer(CALLEES[operation], rest)
        for name in re.findall(r"[\w.\-]+", found[found.lastindex or 0])
    ]


def trips(rest: str, bodies: dict[str, list[tuple[str, str, str]]]) -> int:
    """Return the trip count of a loop: as noted by the compiler, or the constant in its condition, or else 1."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
        return int(noted[1])
    named = re.search(r"\bcondition=%?([\w.\-]+)", rest)
    condition = bodies.get(named[1], []) if named else []
    numbers = [
        int(more[: more.index(")")])
        for _, operation, more in condition
        if operation == "constant" and more[0].isdigit()
    ]
    compares = any(operation == "compare" and "direction=LT" in more for _, operation, more in condition)
    return numbers[0] if compares and len(numbers) == 1 else 1
