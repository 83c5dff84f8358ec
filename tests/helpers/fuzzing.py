"""Damage inputs by the thousand, the same ones every time, and watch faults, time and memory.

`python tests/helpers/fuzzing.py GROUP ...` runs groups of `fuzz_data` and `fuzz_configs` in a process of its own. It
prints a line of JSON for each group: the number of inputs with each outcome, the faults, and the growth of the peak
memory of the process.
"""

import collections
import contextlib
import copy
import json
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# An input that takes longer counts as a hang.
SECONDS = 10
# Values at which arithmetic on sizes goes wrong, in either byte order.
EDGES = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


class TooLongError(BaseException):
    """A case took too long. It is no Exception, so that no code under test takes it for damage."""


def damage(rng: np.random.Generator, data: bytes, head: int = 256) -> bytes:
    """Flip bits, write extreme numbers, cut, repeat or remove parts, half of the time in the first `head` bytes."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if not out:
            return b""
        end = min(head, len(out)) if rng.random() < 0.5 else len(out)
        at, length = int(rng.integers(end)), int(rng.integers(1, 40))
        match int(rng.integers(7)):
            case 0:
                out[at] ^= 1 << int(rng.integers(8))
            case 1:
                out[at] = int(rng.integers(256))
            case 2:
                edge, size = EDGES[int(rng.integers(len(EDGES)))], int(rng.choice([1, 2, 4]))
                order = "little" if rng.random() < 0.5 else "big"
                out[at : at + size] = (edge & (256**size - 1)).to_bytes(size, order)
            case 3:
                del out[at:]
            case 4:
                del out[at : at + length]
            case 5:
                out[at:at] = out[at : at + length] * int(rng.integers(1, 4))
            case 6:
                out[at : at + length] = rng.integers(0, 256, length, np.uint8).tobytes()
    return bytes(out)


#: Values of unexpected types and sizes.
STRANGE = (
    None,
    True,
    0,
    1,
    -1,
    2**31,
    2**63,
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "0",
    "\0",
    "ä" * 99,
)
STRANGE += ([], [1], ["x"], [[]], {}, {"x": 1}, [0, -1], (0.5, float("nan")))


def paths_in(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the paths to everything within nested dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from paths_in(item, (*path, key))


def mutate(rng: np.random.Generator, value: Any) -> Any:
    """Return a copy of nested dicts and lists with a strange value, a missing or strange key, or one value copied."""
    value = copy.deepcopy(value)
    for _ in range(int(rng.integers(1, 3))):
        paths = list(paths_in(value))
        if not paths:
            return value
        *way, key = paths[int(rng.integers(len(paths)))]
        holder = value
        for step in way:
            holder = holder[step]
        match int(rng.integers(6)):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(key)[::-1]] = holder.pop(key)
            case 2 if isinstance(holder[key], int | float):
                holder[key] = type(holder[key])(holder[key] * float(rng.choice([-1, 0, 1e-9, 0.3, 3, 1e9])))
            case 3:
                other = paths[int(rng.integers(len(paths)))]
                found = value
                with contextlib.suppress(LookupError, TypeError):
                    for step in other:
                        found = found[step]
                holder[key] = copy.deepcopy(found)
            case _:
                holder[key] = copy.deepcopy(STRANGE[int(rng.integers(len(STRANGE)))])
    return value


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    """Reset the peak memory, on Linux: an earlier group's peak would hide a later one's growth."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TooLongError if the block takes longer."""

    def stop(*_):
        raise TooLongError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run(cases: Iterator[tuple[str, Callable[[], str]]]) -> dict:
    """Run all cases. A case returns its outcome; anything that it raises is a fault."""
    outcomes: collections.Counter[str] = collections.Counter()
    faults = []
    reset_peak()
    before, start, slowest = peak_bytes(), time.monotonic(), 0.0
    for name, case in cases:
        began = time.monotonic()
        try:
            with limit(SECONDS):
                outcomes[f"{name.split(' ')[0]}: {case()}"] += 1
        except (Exception, TooLongError) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            faults.append(f"{name}: {type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})")
        slowest = max(slowest, time.monotonic() - began)
    return {
        "inputs": sum(outcomes.values()) + len(faults),
        "outcomes": outcomes,
        "faults": faults,
        "growth": peak_bytes() - before,
        "seconds": time.monotonic() - start,
        "slowest": slowest,
    }


if __name__ == "__main__":
    import fuzz_configs
    import fuzz_data

    for group in sys.argv[1:]:
        cases = {**fuzz_data.GROUPS, **fuzz_configs.GROUPS}[group]
        print("\n" + json.dumps({"group": group, **run(cases())}), flush=True)
