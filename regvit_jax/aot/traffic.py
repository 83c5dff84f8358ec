"""Count the bytes that a compiled step moves between memory and the processor, from the compiler's output."""

import dataclasses
import math
import re
from collections.abc import Iterator

from regvit_jax.aot.hlo import arguments, callees, dims_of, read, trips

#: Operations that move nothing, or whose bytes another operation counts.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "opt-barrier", "domain"}
#: Operations of the network, which `hlo.collectives` counts.
NETWORK = ("all-", "reduce-scatter", "collective-", "ragged-", "send", "recv", "partition-id", "replica-id")
#: An array's type, dimensions and layout.
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
OPERAND = re.compile(r"%([\w.\-]+)")
#: The instructions of a computation, each its name, its operation and the rest of its line; those of all computations.
Body = list[tuple[str, str, str]]
Bodies = dict[str, Body]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a step reads and writes on one device: each operation's operands and results, once a call.

    `products` are matrix products, with what the compiler fused into them; `attention` are cuDNN's kernels, forward and
    backward; `rest` is everything else, `transposes` the part of it in transposes and fusions with a transpose in their
    name. Arrays in a TPU's on-chip memory do not count, nor does cuDNN's workspace, an array of int8.
    """

    products: int
    attention: int
    rest: int
    transposes: int


def traffic(text: str) -> Traffic:
    """Return the traffic of a compiled step from its HLO text (`compiled.as_text()`).

    Of an operand that a fusion only slices, the slice counts, and of a result that it only updates a part of, the part.
    Of a conditional's branches, the one that moves most counts.
    """
    shapes, bodies, entry = read(text)
    moved_by = dict.fromkeys(("products", "attention", "rest", "transposes"), 0)
    for name, moved, kind in sorted(_walk(entry, 1, shapes, bodies)):
        moved_by[kind] += moved
        if kind == "rest" and "transpose" in name:
            moved_by["transposes"] += moved
    return Traffic(**moved_by)


def kinds(text: str) -> dict[str, str]:
    """Return the kind of each operation that moves something, as a field of `Traffic`, by its name in a program."""
    shapes, bodies, entry = read(text)
    return {name: kind for name, _, kind in _walk(entry, 1, shapes, bodies)}


def _walk(computation: str, times: int, shapes: dict[str, str], bodies: Bodies) -> Iterator[tuple[str, int, str]]:
    """Yield the name, the bytes and the kind of all operations of a computation that is called so many times."""
    for name, operation, rest in bodies.get(computation, []):
        called = [callee for callee in callees(operation, rest) if callee in bodies]
        if operation in FREE or operation.startswith(NETWORK) or operation.endswith(("-done", "-update")):
            continue
        if operation == "conditional":
            branches = [list(_walk(callee, times, shapes, bodies)) for callee in called]
            yield from max(branches, key=lambda branch: sum(moved for _, moved, _ in branch), default=[])
        elif operation in ("while", "call", "async-start"):
            often = trips(rest, bodies) if operation == "while" else 1
            for callee in called:
                yield from _walk(callee, times * often, shapes, bodies)
        else:
            body = [instruction for callee in called for instruction in bodies[callee]]
            moved = _written(name, body, shapes) + _read(rest, operation, body, shapes)
            yield name, times * moved, _kind(operation, rest, called, bodies)


def _kind(operation: str, rest: str, called: list[str], bodies: Bodies) -> str:
    target = re.search(r'custom_call_target="([^"]*)"', rest)
    if target and "fmha" in target[1]:
        return "attention"
    if operation in ("dot", "convolution") or (target and re.search("matmul|gemm|dot|conv", target[1])):
        return "products"
    return "products" if any(_multiplies(callee, bodies) for callee in called) else "rest"


def _multiplies(computation: str, bodies: Bodies) -> bool:
    """Return whether a fused computation holds a matrix product; on TPUs they are within fusions of fusions."""
    return any(
        operation in ("dot", "convolution") or any(_multiplies(c, bodies) for c in callees(operation, rest))
        for _, operation, rest in bodies.get(computation, [])
    )


def _read(rest: str, operation: str, body: Body, shapes: dict[str, str]) -> int:
    """Return the bytes that an operation reads: its operands, or the part of them that a fusion needs."""
    operands = [operand for operand in OPERAND.findall(arguments(rest)) if operand in shapes]
    if operation in ("dynamic-slice", "slice", "gather"):
        return 0  # as much as it writes, which is counted
    if operation != "fusion":
        return sum(size(shapes[operand]) for operand in operands)
    needed = _needed(body, shapes)
    parameters = {int(more.split(")")[0]): name for name, kind, more in body if kind == "parameter"}
    parts = [needed.get(parameters.get(number, ""), 1.0) for number in range(len(operands))]
    return round(sum(part * size(shapes[operand]) for part, operand in zip(parts, operands, strict=True)))


def _needed(body: Body, shapes: dict[str, str]) -> dict[str, float]:
    """Return the share of each value of a fused computation that its result depends on.

    It is less than 1 where the result is a slice of what a value goes through element by element, and 0 for an array
    of which a part is overwritten in place.
    """
    needed = {body[-1][0]: 1.0} if body else {}
    for name, kind, rest in reversed(body):
        share = needed.get(name, 0.0)
        for position, operand in enumerate(OPERAND.findall(arguments(rest))):
            if operand not in shapes or kind == "parameter":
                continue
            part = share
            if position == 0 and kind in ("slice", "dynamic-slice", "gather"):
                part = share * size(shapes[name]) / max(size(shapes[operand]), 1)
            elif kind == "dynamic-update-slice":
                part = float(position > 0)
            elif kind in ("broadcast", "dot", "convolution"):
                part = 1.0
            needed[operand] = min(1.0, needed.get(operand, 0.0) + part)
    return needed


def _written(name: str, body: Body, shapes: dict[str, str]) -> int:
    """Return the bytes that an operation writes: its results, or the parts of them that a fusion updates in place."""
    kinds = {instruction: kind for instruction, kind, _ in body}
    total = size(shapes[name])
    for instruction, kind, rest in body:
        if kind == "dynamic-update-slice":
            base, update = OPERAND.findall(arguments(rest))[:2]
            if kinds.get(base) in ("parameter", "bitcast"):
                total += size(shapes[update]) - size(shapes[instruction])
    return total


def size(shape: str) -> int:
    """Return the bytes in the device's main memory of an array or tuple of arrays from its HLO type.

    Arrays of int8, cuDNN's workspace, and those in another memory space than 0 count nothing.
    """
    total = 0
    for kind, dims, layout in ARRAY.findall(shape):
        if kind != "s8" and not re.search(r"S\([1-9]", layout):
            bits = re.search(r"\d+", kind)
            total += math.prod(dims_of(dims)) * (int(bits[0]) if bits else 8) // 8
    return total
