"""Machine code (SASS) of the kernels in a CUDA library: what it counts, how it flows, which way is the fast path.

A kernel holds much code that nearly no element meets: rows with a positive, partial vectors, strided gradients. Counts
over the whole kernel would drown the few instructions that the time goes into, so `fast_paths` looks for these in the
control flow. A basic block that holds EX2 for 1, 2, ... whole vectors evaluates as many, because the fast path alone
treats a vector in straight-line code. The fast path of a loop is then the cheapest way once around it that evaluates
exactly the vectors of a thread's batch and makes their 128-bit accesses, or nearly as many where no way does. Other
kernels are known by another special function (a division's RCP), or by their 128-bit accesses alone, which the way then
makes to the number. Cheap counts issue slots; a narrower access is ``NARROW_ACCESS_COST``, because lanes lie 16 bytes
apart: a warp's access of whatever width moves 512 bytes through a cache of 128 bytes a clock, while the multiprocessor
could start 16 instructions. Nothing is taken from line numbers: the compiler merges equal instructions of different
source lines and keeps one of the lines.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = "sm_90"  # the one that is disassembled
NARROW_ACCESS_COST = 16
LOADS, STORES = ("LDG", "LD", "LDGSTS"), ("STG", "ST")

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
ENUM = re.compile(r"enum class (\w+)[^{;]*\{([^}]*)\}")


class ToolMissing(Exception):
    """NVIDIA's disassembler is not here."""


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "" or like "!P0"
    opcode: str  # with its modifiers, like "LDG.E.128"
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bits(self) -> int:
        """Width of a load from global memory or a store to it; 0 for any other instruction."""
        if self.base not in (*LOADS, *STORES):
            return 0
        widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
        return next((widths[word] for word in self.opcode.split(".") if word in widths), 32)

    @property
    def target(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if found else None


# Kernels that headers of NVIDIA's put into every library: names in cub and thrust.
OTHER_LIBRARIES = ("_ZN3cub", "_ZN6thrust")


@dataclass
class Kernel:
    name: str  # readable, see readable_name
    architecture: str
    compiler: str  # like "13.0"
    registers: int
    stack: int
    shared: int
    local: int
    instructions: list[Instruction] = field(default_factory=list)  # of ARCHITECTURE, else empty


# The tools.


@cache
def find_tools() -> str:
    """The PATH on which cuobjdump and nvdisasm are found: CUDA_HOME, the PATH, NVIDIA's PyPI packages, triton."""
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders += [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep)]
    for package, patterns in (("nvidia", ("cu*/bin", "*/bin")), ("triton", ("backends/nvidia/bin",))):
        spec = importlib.util.find_spec(package)
        for location in spec.submodule_search_locations or [] if spec else []:
            folders += [folder for pattern in patterns for folder in sorted(Path(location).glob(pattern))]
    path = os.pathsep.join(map(str, folders))
    for tool in ("cuobjdump", "nvdisasm"):
        if shutil.which(tool, path=path) is None:
            raise ToolMissing(f"{tool} was not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return path


def cuobjdump(*arguments: str, folder: str | None = None) -> str:
    path = find_tools()
    command = [shutil.which("cuobjdump", path=path), *arguments]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


@cache
def enumerators() -> dict[str, list[str]]:
    """Names of the values of each ``enum class`` in csrc, to write template arguments by."""
    # Headers of kernels come last, so that theirs holds where the CPU has another of the same name.
    headers = [*sorted((ROOT / "csrc").rglob("*.h")), *sorted((ROOT / "csrc").rglob("*.cuh"))]
    sources = [header.read_text() for header in headers]
    found = ENUM.findall(re.sub(r"//.*", "", "\n".join(sources)))
    return {name: [value.partition("=")[0].strip() for value in body.split(",")] for name, body in found}


def readable_name(mangled: str) -> str:
    """``focal_index_kernel<BFloat16, kSum, kTwo, false>`` of a mangled name: no namespaces, no parameters."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    pointer = library.__cxa_demangle(mangled.encode(), None, None, ctypes.byref(status))
    name = ctypes.string_at(pointer).decode() if pointer else mangled

    def enumerator(match: re.Match) -> str:
        values = enumerators().get(match[1], [])
        return values[int(match[2])] if int(match[2]) < len(values) else match[0]

    name = re.sub(r"\(anonymous namespace\)::|\b[a-z]\w*::", "", name)
    name = re.sub(r"\((\w+)\)(\d+)", enumerator, name)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for position, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:position]
    return name


def read_sass(text: str) -> dict[str, list[Instruction]]:
    """Instructions of each function, by its mangled name, in the output of ``cuobjdump --dump-sass``."""
    functions: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if "Function :" in line:
            instructions = functions[line.split(":", 1)[1].strip()] = []
        elif match := INSTRUCTION.search(line):
            instructions.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4].strip()))
    return functions


def read_library(library: Path) -> list[Kernel]:
    """Every kernel of ours of every architecture in a shared library, by name."""
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        cuobjdump("--extract-elf", "all", str(library.resolve()), folder=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            architecture = cubin.name.split(".")[-2]
            compiler = re.search(rb"Cuda compilation tools, release ([\d.]+)", cubin.read_bytes())
            usage = RESOURCES.findall(cuobjdump("--dump-resource-usage", str(cubin)))
            code = read_sass(cuobjdump("--dump-sass", str(cubin))) if usage and architecture == ARCHITECTURE else {}
            for mangled, registers, stack, shared, local in usage:
                if mangled.startswith(OTHER_LIBRARIES):
                    continue
                kernels.append(
                    Kernel(
                        name=readable_name(mangled),
                        architecture=architecture,
                        compiler=compiler[1].decode() if compiler else "unknown",
                        registers=int(registers),
                        stack=int(stack),
                        shared=int(shared),
                        local=int(local),
                        instructions=code.get(mangled, []),
                    )
                )
    return sorted(kernels, key=lambda kernel: (kernel.name, kernel.architecture))


# Counting.


def special_functions(instructions: list[Instruction]) -> Counter[str]:
    """MUFU by kind: EX2, LG2, RCP, ..."""
    return Counter(one.opcode.split(".")[1] for one in instructions if one.base == "MUFU")


def accesses(instructions: list[Instruction], *bases: str) -> dict[str, int]:
    """How many loads or stores of each width in bits, the widest first."""
    counts = Counter(one.bits for one in instructions if one.base in bases)
    return {str(bits): counts[bits] for bits in sorted(counts, reverse=True)}


def loads(instructions: list[Instruction]) -> dict[str, int]:
    return accesses(instructions, *LOADS)


def stores(instructions: list[Instruction]) -> dict[str, int]:
    return accesses(instructions, *STORES)


def spills(instructions: list[Instruction]) -> int:
    return sum(one.base in ("LDL", "STL") for one in instructions)


def float_operations(instructions: list[Instruction]) -> int:
    return sum(re.fullmatch(r"F(ADD|MUL|FMA|MNMX|SEL|SETP|SET)", one.base) is not None for one in instructions)


def pipe(instruction: Instruction) -> str:
    """Which unit executes it: fma, alu, mufu, or other (memory, control, uniform)."""
    if instruction.base in ("MUFU", "F2F", "F2I", "I2F", "FRND"):
        return "mufu"
    if instruction.base in ("FADD", "FMUL", "FFMA", "IMAD", "HADD2", "HMUL2", "HFMA2"):
        return "fma"
    if re.match(r"F|I|V|LOP3|PLOP3|LEA|SHF|PRMT|SEL|MOV|P2R|R2P", instruction.base):
        return "alu"
    return "other"


# Control flow.


def basic_blocks(instructions: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """The blocks in order of address, and the numbers of each one's successors. A call returns behind itself."""
    index = {one.address: number for number, one in enumerate(instructions)}
    starts = {0}
    for number, one in enumerate(instructions):
        if one.base in ("BRA", "EXIT", "RET", "BRX", "JMX", "BSYNC"):
            starts.add(number + 1)
        if one.base in ("BRA", "BSSY") and one.target in index:
            starts.add(index[one.target])
    order = sorted(start for start in starts if start < len(instructions))
    block_of = {start: number for number, start in enumerate(order)}
    blocks, successors = [], []
    for number, (start, end) in enumerate(zip(order, [*order[1:], len(instructions)], strict=True)):
        blocks.append(instructions[start:end])
        last = instructions[end - 1]
        behind = [number + 1] if end < len(instructions) else []
        if last.base == "BRA" and last.target in index:
            conditional = bool(last.predicate) or "." in last.opcode or "," in last.operands or "P" in last.operands
            taken = block_of[index[last.target]]
            successors.append([taken, *behind] if conditional else [taken])
        elif last.base in ("EXIT", "RET", "BRX", "JMX"):
            successors.append(behind if last.predicate else [])
        else:
            successors.append(behind)
    return blocks, successors


def forward_order(successors: list[list[int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """The blocks reachable from the first, each before what follows it, and the edges that go back (a loop's end)."""
    state = [0] * len(successors)  # 1: being visited, 2: done
    finished: list[int] = []
    back = []
    stack = [(0, iter(successors[0]))]
    state[0] = 1
    while stack:
        block, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            stack.pop()
            state[block] = 2
            finished.append(block)
        elif state[following] == 0:
            state[following] = 1
            stack.append((following, iter(successors[following])))
        elif state[following] == 1:
            back.append((block, following))
    return finished[::-1], back


def loop_bodies(successors: list[list[int]], back: list[tuple[int, int]]) -> dict[int, set[int]]:
    """The blocks of each loop, by the block it begins with."""
    predecessors: list[list[int]] = [[] for _ in successors]
    for block, following in enumerate(successors):
        for other in following:
            predecessors[other].append(block)
    bodies: dict[int, set[int]] = {}
    for last, first in back:
        body = bodies.setdefault(first, {first})
        waiting = [last]
        while waiting:
            block = waiting.pop()
            if block not in body:
                body.add(block)
                waiting += predecessors[block]
    return bodies


@dataclass
class FastPaths:
    """The fast way through each innermost loop that has one, and once around the outermost loop."""

    loops: list[list[Instruction]]
    around: list[Instruction]


def fast_paths(
    instructions: list[Instruction],
    vectors: int,
    width: int,
    special: str | None,
    count: int,
    wide_loads: int,
    wide_stores: int,
) -> FastPaths:
    """The fast paths of a kernel (see the module) that takes `count` MUFU of the kind `special` an element, if any.

    A kernel without such a loop has one from its entry to an exit, if any.
    """
    blocks, successors = basic_blocks(instructions)
    order, back = forward_order(successors)
    exits = [(block, 0) for block in order if not successors[block]]
    backward = set(back)
    forward = [
        [following for following in successors[block] if (block, following) not in backward]
        for block in range(len(blocks))
    ]
    costs = [sum(NARROW_ACCESS_COST if 0 < one.bits < 128 else 1 for one in block) for block in blocks]
    # What each block does of the whole: vectors evaluated, where that can be told, wide loads, wide stores.
    vectors = vectors if special else 0
    wanted = (vectors, wide_loads, wide_stores)
    done = [
        (
            special_functions(block)[special] // (count * width) if special else 0,
            loads(block).get("128", 0),
            stores(block).get("128", 0),
        )
        for block in blocks
    ]

    def cheapest(first: int, last: int, body: set[int]) -> tuple[tuple[int, int], list[Instruction]] | None:
        # For each block, by what is done up to its end: slots so far, and the block and its key before.
        reached: dict[int, dict[tuple, tuple[int, tuple | None]]] = {first: {done[first]: (costs[first], None)}}
        for block in order:
            for key, (cost, _) in reached.get(block, {}).items():
                for following in forward[block]:
                    ahead = tuple(map(sum, zip(key, done[following], strict=True)))
                    if following not in body or ahead[0] > vectors:
                        continue
                    known = reached.setdefault(following, {})
                    if ahead not in known or cost + costs[following] < known[ahead][0]:
                        known[ahead] = (cost + costs[following], (block, key))
        ends = {
            key: cost
            for key, (cost, _) in reached.get(last, {}).items()
            if (key[0] == vectors if special else key == wanted)
        }
        if not ends:
            return None
        # First the wide accesses nearest to those wanted, then the fewest slots.
        rank, key = min(
            ((sum(abs(count - other) for count, other in zip(key, wanted, strict=True)), cost), key)
            for key, cost in ends.items()
        )
        path, state = [], (last, key)
        while state is not None:
            path.append(state[0])
            state = reached[state[0]][state[1]][1]
        return rank, [one for block in reversed(path) for one in blocks[block]]

    for edges in (back, exits):
        bodies = loop_bodies(successors, edges)
        ways: dict[int, tuple[tuple[int, int], list[Instruction]]] = {}
        for last, first in edges:
            way = cheapest(first, last, bodies[first])
            if way and (first not in ways or way[0] < ways[first][0]):
                ways[first] = way
        if ways:
            inner = [first for first in sorted(ways) if not bodies[first] & ({*ways} - {first})]
            outer = max((len(bodies[first]), first) for first in ways)[1]
            return FastPaths([ways[first][1] for first in inner], ways[outer][1])
    return FastPaths([], [])
