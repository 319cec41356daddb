"""What Triton's interpreter cannot show, looked for in compiled kernels: order in memory, and NaN.

Interpreted, a program does one operation after the other on whole tiles: a barrier that is missing,
a load past what was just written or a maximum that drops NaN changes nothing there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Constants = dict[str, Any]

# Kernels whose running maximum over classes (`decode.keep`) hands NaN on, and when it is compiled
# in: the first tile of classes needs none, the last one may need none.
KEEPS_NAN: dict[str, Callable[[Constants], bool]] = {
    "decode.resample": lambda c: (
        c["C"] > 2 * c["CLASSES"] and (c["LABELS"] or (c["SCORES"] and c["MARGIN"]))
    ),
    "uncertainty.double": lambda c: c["C"] > 2 * c["CLASSES"] and (c["LABELS"] or c["MARGIN"]),
    "uncertainty.sampled": lambda c: c["C"] > 2 * c["CLASSES"],
}
# Kernels with dots, which use tensor cores unless PRECISION is "ieee".
DOTS = ("point_head.forward", "point_head.dgrad")
# Kernels whose threads read what other threads of the program wrote, where there are hidden layers,
# and the parameter. Writes wait for reads too: without backward, a layer's output goes over its
# input.
READ_BACK = {"point_head.forward": "scratch", "point_head.dgrad": "gradients"}

INSTRUCTION = re.compile(r"(?P<condition>@!?%p\d+\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)")
REGISTER = re.compile(r"%rd?\d+\b")  # of 32 and 64 bits


@dataclass
class Block:
    """Instructions in a row, and the labels of the blocks that may follow.

    A step is (opcode, the parameter that the address is made from) for an access to global memory,
    with "" for an address that came through shared memory, and ("barrier", "") where all threads of
    the program meet.
    """

    steps: list[tuple[str, str]] = field(default_factory=list)
    next: list[str] = field(default_factory=list)


def problems(kernel: str, ptx: str, parameters: Sequence[str], constants: Constants) -> list[str]:
    """What is wrong with a kernel, a line each.

    Args:
        kernel: its name, "point_head.forward" say.
        ptx: what the compiler made of it.
        parameters: the names of what it is given at run time, in order.
        constants: what was compiled in.
    """
    found = set()
    keeps_nan = KEEPS_NAN.get(kernel, lambda constants: False)
    if keeps_nan(constants) and "max.NaN." not in ptx:
        found.add("drops NaN: there is no max.NaN")
    blocks = blocks_of(ptx, parameters)
    steps = [step for block in blocks.values() for step in block.steps]
    read = {name for opcode, name in steps if reads(opcode)}
    written = {name for opcode, name in steps if writes(opcode)}
    for opcode, name in steps:
        # no barrier orders these
        if name in written and (".nc" in opcode or "async.bulk" in opcode):
            found.add(f"{opcode} of {name}, which it writes")
    both = READ_BACK.get(kernel)
    followed = both in read & written and "" not in read | written
    if both and constants["LAYERS"] > 0 and not followed:
        found.add(f"cannot be followed: no address, or one of no known origin, is of {both}")
    for earlier, later, name in unordered(blocks):
        if later == "read" or name == both:
            found.add(f"{later}s {name} with no barrier after a {earlier}")
    return sorted(found)


def reads(opcode: str) -> bool:
    return opcode.startswith(("ld.", "cp."))


def writes(opcode: str) -> bool:
    return opcode.startswith(("st.", "red.", "atom."))


def unordered(blocks: dict[str, Block]) -> set[tuple[str, str, str]]:
    """("write", "read", parameter) where a read can follow a write with no barrier in between.

    And ("read", "write", parameter) the other way round, on any way through the kernel.
    """
    found = set()
    # what may have happened since the last barrier when a block begins
    before: dict[str, set[tuple[str, str]]] = defaultdict(set)
    waiting = list(blocks)
    while waiting:
        label = waiting.pop()
        since = set(before[label])
        for opcode, name in blocks[label].steps:
            if opcode == "barrier":
                since.clear()
            elif name:
                later, earlier = ("read", "write") if reads(opcode) else ("write", "read")
                if (earlier, name) in since:
                    found.add((earlier, later, name))
                since.add((later, name))
        for following in blocks[label].next:
            if not since <= before[following]:
                before[following] |= since
                waiting.append(following)
    return found


def blocks_of(ptx: str, parameters: Sequence[str]) -> dict[str, Block]:
    """A kernel's blocks by label, in order; a branch ends one, as a label begins one."""
    parameter_of = parameters_of_addresses(ptx, parameters)
    block = Block()
    blocks = {"": block}
    for line in lines_of(ptx):
        label = ""
        if line.endswith(":"):
            label = line[:-1]
            block.next.append(label)
        elif match := INSTRUCTION.fullmatch(line):
            condition, opcode, operands = match.groups()
            if opcode in ("bra", "bra.uni", "ret"):
                label = f"after {len(blocks)}"
                block.next += [operands] * (opcode != "ret") + [label] * bool(condition)
            elif re.fullmatch(r"bar(rier\.cta|rier)?\.sync(\.aligned)?\s+0", line):
                block.steps.append(("barrier", ""))
            elif ".global" in opcode and (reads(opcode) or writes(opcode)):
                block.steps.append((opcode, parameter_of(operands)))
        if label:
            block = blocks[label] = Block()
    return blocks


def parameters_of_addresses(ptx: str, parameters: Sequence[str]) -> Callable[[str], str]:
    """Tells from the operands of an access which pointer its address is made from; "" if none."""
    pointers = {
        f"param_{number}": parameters[int(number)]
        for number in re.findall(r"\.ptr[^,\n]*_param_(\d+)", ptx)
        if int(number) < len(parameters)  # behind them comes scratch memory of Triton's own
    }
    made_from: dict[str, set[str]] = defaultdict(set)
    for line in lines_of(ptx):
        match = INSTRUCTION.fullmatch(line)
        accesses = match and (reads(match["opcode"]) or writes(match["opcode"]))
        if not match or (accesses and not match["opcode"].startswith("ld.param")):
            continue  # what memory held is no address
        results, _, operands = match["operands"].partition(",")
        for register in REGISTER.findall(results):
            made_from[register].update(REGISTER.findall(operands))
            made_from[register].update(re.findall(r"param_\d+", operands))

    def parameter_of(operands: str) -> str:
        waiting, seen = re.findall(r"\[\s*(%rd\d+)", operands), set()
        while waiting:
            if (origin := waiting.pop()) not in seen:
                seen.add(origin)
                waiting += made_from[origin]
        names = [pointers[origin] for origin in seen if origin in pointers]
        return names[0] if len(names) == 1 else ""

    return parameter_of


def lines_of(ptx: str) -> Iterator[str]:
    """Labels and instructions of the kernel's body, without comments, braces and line numbers."""
    body = re.search(r"\n\{\n(.*?)\n\}", ptx, re.DOTALL)
    for line in re.sub(r"//.*", "", body[1] if body else "").replace(";", "\n").splitlines():
        if (line := line.strip()) and not line.startswith("."):
            yield line
