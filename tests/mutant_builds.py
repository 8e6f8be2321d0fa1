"""The emulator modules of the mutation proof: what they include, and builds of them with all mutants or with one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from forked_tests import PLAIN, SANITIZED
from kernel_mutants import LeftOut, Mutant, find_mutants
from mutant_switches import HEADER, write_switches

MODES = (PLAIN, SANITIZED)


@dataclass(frozen=True)
class Module:
    """An emulator module: its name, the headers it includes and the tests that use it."""

    target: str
    source: str
    headers: frozenset[str]
    tests: tuple[str, ...]


def included_headers(root: Path, file: str) -> set[str]:
    """The project's headers that a file includes, directly or not."""
    found: set[str] = set()
    waiting = [file]
    while waiting:
        path = waiting.pop()
        for name in re.findall(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', (root / path).read_text(), re.M):
            for folder in (Path(path).parent, Path("csrc"), Path("tests/emulator")):
                header = os.path.normpath(folder / name)
                if (root / header).is_file():
                    if header not in found:
                        found.add(header)
                        waiting.append(header)
                    break
    return found


def find_modules(root: Path) -> list[Module]:
    """The emulator modules; a test file belongs to a module when it names it."""
    texts = {path.relative_to(root).as_posix(): path.read_text() for path in sorted(root.glob("tests/test_*.py"))}
    modules = []
    for path in sorted(root.glob("tests/emulator/*_module.cpp")):
        target = re.search(r"PYBIND11_MODULE\((\w+)", path.read_text())[1]
        source = path.relative_to(root).as_posix()
        tests = tuple(test for test, text in texts.items() if f'"{target}"' in text)
        modules.append(Module(target, source, frozenset(included_headers(root, source)), tests))
    return modules


def kernel_files(root: Path, modules: list[Module]) -> list[str]:
    """The kernels, emulated or not, and the CUDA headers that the emulated ones include."""
    kernels = {path.relative_to(root).as_posix() for path in root.glob("csrc/*/*_kernel.cuh")}
    return sorted(kernels | {header for module in modules for header in module.headers if header.endswith(".cuh")})


def modules_of(file: str, modules: list[Module]) -> list[Module]:
    """The modules that include a file, first the one of the file's own name."""
    own = Path(file).name.replace("_kernel.cuh", "_module.cpp")
    return sorted((m for m in modules if file in m.headers), key=lambda module: Path(module.source).name != own)


def find_all(root: Path, modules: list[Module]) -> tuple[list[Mutant], list[LeftOut]]:
    mutants: list[Mutant] = []
    left_out: list[LeftOut] = []
    files = kernel_files(root, modules)
    callers = "".join((root / path).read_text() for path in [*(m.source for m in modules), *files])
    called = {name for name in re.findall(r"\b(\w+)(?:<[^;(){}]*>)?\(", callers) if callers.count(name) > 1}
    for file in files:
        of_file, without = find_mutants(file, (root / file).read_text(), called)
        mutants += of_file
        left_out += without
    return mutants, left_out


def copy_tree(source: Path, target: Path) -> Path:
    """What the modules are made of, and their tests."""
    for name in ("csrc", "tests"):
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(source / name, target / name)
    return target


class Compiler:
    """CMake's own command lines, for copies of the tree."""

    def __init__(self, origin: Path, folder: Path):
        self.origin = origin
        self.commands = {mode: self._compile_commands(mode, folder / f"cmake_{mode}") for mode in MODES}

    def _compile_commands(self, mode: str, build: Path) -> dict[str, list[str]]:
        """By module source; with little optimization, which takes as long as it saves."""
        import pybind11

        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        tools = {name: shutil.which(name, path=path) or name for name in ("cmake", "ninja")}
        subprocess.run(
            [
                tools["cmake"],
                f"-S{self.origin}",
                f"-B{build}",
                "-GNinja",
                f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
                f"-DCMAKE_CXX_COMPILER={shutil.which(os.environ.get('CXX', 'c++'))}",
                "-DCMAKE_BUILD_TYPE=Release",
                "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
                "-DRETINANET_EXT_TESTS=ON",
                f"-DRETINANET_EXT_SANITIZE={int(mode == SANITIZED)}",
                f"-DRETINANET_EXT_PYTHON_INCLUDE={sysconfig.get_path('include')}",
                f"-DRETINANET_EXT_PYBIND11_INCLUDE={pybind11.get_include()}",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        commands = {}
        for entry in json.loads((build / "compile_commands.json").read_text()):
            arguments = shlex.split(entry["command"])
            arguments = arguments[: arguments.index("-o")]
            arguments = [argument for argument in arguments if not re.fullmatch(r"-(O.|g|W.*)", argument)]
            commands[os.path.relpath(entry["file"], self.origin)] = [*arguments, "-Og", "-w", "-shared"]
        return commands

    def compile(self, tree: Path, module: Module, mode: str, *flags: str) -> tuple[str, str]:
        """Path of the module built from a tree, and what the compiler says of errors (empty: there was none)."""
        library = tree / f"{module.target}.{mode}.so"
        library.unlink(missing_ok=True)
        command = [a.replace(str(self.origin), str(tree)) for a in self.commands[mode][module.source]]
        command += [*flags, "-o", str(library), str(tree / module.source)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return str(library), done.stderr if done.returncode != 0 else ""


def first_error(stderr: str) -> str:
    found = re.search(r"error: (.*)", stderr)
    return found[1] if found else stderr[-500:]


class SwitchedTree:
    """A copy of the tree with every mutant behind its number, from 1 on; 0 is none."""

    def __init__(self, compiler: Compiler, folder: Path, mutants: list[Mutant]):
        self.compiler = compiler
        self.tree = copy_tree(compiler.origin, folder)
        self.numbers = {mutant: number for number, mutant in enumerate(mutants, 1)}
        self.most = len(mutants)
        self._write({mutant.file for mutant in mutants})

    def _write(self, files: set[str]) -> None:
        for file in files:
            numbers = {mutant: number for mutant, number in self.numbers.items() if mutant.file == file}
            (self.tree / file).write_text(write_switches((self.compiler.origin / file).read_text(), numbers))

    def build(self, module: Module, mode: str) -> str:
        """The module's library. A mutant where only a constant can stand loses its number: it is compiled alone."""
        while True:
            flags = ["-include", str(self.tree / HEADER), f"-DRETINANET_EXT_MUTANTS={self.most}"]
            library, stderr = self.compiler.compile(self.tree, module, mode, *flags)
            if not stderr:
                return library
            lines = set(re.findall(r"^(.+?):(\d+)(?::\d+)?: (?:error|note): ", stderr, re.M))
            refused = {m for m in self.numbers if (str(self.tree / m.file), str(m.line_number)) in lines}
            if not refused:
                raise SystemExit(f"the unchanged {module.target} does not compile ({mode}): {first_error(stderr)}")
            for mutant in refused:
                del self.numbers[mutant]
            self._write({mutant.file for mutant in refused})
