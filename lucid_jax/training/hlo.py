"""Reads collectives and buffers from the text of compiled programs."""

import collections
import dataclasses
import math
import pathlib
import re

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+?\d+\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_VALUE = re.compile(r" value: <\d+ (\S+).*\(size=(\d+),offset=\d+\): (\S+?)\{")
_OPERATION = re.compile(r"%?([\w.\-]+) = .*op_name=\"([^\"]*)\"")
_CONSTANT = re.compile(r" s32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind that a device takes part in during one call.

    Attributes:
      count: Their number; one in a loop counts once an iteration.
      bytes: Total size of their results on one device.
    """

    count: int
    bytes: int


def collectives(text: str) -> dict[str, Traffic]:
    """Returns the collectives of a compiled program, `compiled.as_text()`, by kind.

    A loop whose number of iterations is unknown counts as one iteration.
    """
    computations, entry = _computations(text)
    totals: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])

    def visit(name: str, times: int) -> None:
        # A TPU's asynchronous gather appears where it starts, in the products it overlaps with,
        # and where it ends; only the start is counted.
        overlapped = name.startswith("async_collective_fusion")
        if overlapped or any('"AsyncCollectiveDone"' in line for line in computations[name]):
            return
        for line in computations[name]:
            if match := _COLLECTIVE.search(line):
                result, kind, start = match.groups()
                sizes = _array_bytes(result)
                # The result of a start includes its operand.
                size = max(sizes) if start else sum(sizes)
                totals[kind][0] += times
                totals[kind][1] += times * size
            if match := _LOOP.search(line):
                condition, body = match.groups()
                visit(body, times * _iterations(line, computations[condition]))
                continue
            called = _CALLED.findall(line)
            if match := _BRANCHES.search(line):
                called += re.findall(r"[\w.\-]+", match[1])
            for other in called:
                visit(other, times)

    visit(entry, 1)
    return {kind: Traffic(*totals[kind]) for kind in _KINDS if kind in totals}


def buffers(dump: pathlib.Path) -> tuple[int, tuple[str, ...]]:
    """Returns the main memory that a program needs, in bytes, and its eight largest buffers.

    The compiler writes `dump`, its `xla_dump_to`, even if it then fails for lack of memory.
    """

    def newest(suffix: str) -> str:
        files = sorted(dump.rglob(f"*{suffix}"), key=lambda path: path.stat().st_mtime)
        return files[-1].read_text() if files else ""

    names = dict(_OPERATION.findall(newest("after_optimizations.txt")))
    total = re.search(r"Total bytes: (\d+)", newest("memory-usage-report.txt"))
    sizes: collections.Counter[str] = collections.Counter()
    for name, size, shape in _VALUE.findall(newest("buffer-assignment.txt")):
        line = f"{int(size) / 2**30:7.2f} GiB  {shape}  {names.get(name, name)}"
        sizes[line] = max(sizes[line], int(size))
    return int(total[1]) if total else 0, tuple(line for line, _ in sizes.most_common(8))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation by its name, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if match := _HEADER.match(line):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _iterations(loop: str, condition: list[str]) -> int:
    if match := _TRIPS.search(loop):
        return int(match[1])
    # A scan counts from zero up to the only constant in its condition.
    constants = _CONSTANT.findall("\n".join(condition))
    counts_up = any("direction=LT" in line for line in condition)
    return int(constants[0]) if counts_up and len(constants) == 1 else 1


def _array_bytes(shape: str) -> list[int]:
    """Returns the bytes of each array in a shape or tuple of shapes."""
    sizes = []
    for dtype, dimensions in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        sizes.append(math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8)
    return sizes
