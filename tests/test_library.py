"""What the compiled library asks of the process it is loaded into: the stable ABI of torch and of Python, no more."""

import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import retinanet_ext

LIBRARY = Path(retinanet_ext.__file__).parent / "_C.abi3.so"

# Of Python's stable ABI (Misc/stable_abi.toml), what an empty module needs. Look an addition up there.
STABLE_PYTHON = {"PyModule_Create2", "PyModuleDef_Init"}

# at:: and c10:: inside a mangled name: at the start of a nested name, possibly after qualifiers.
UNSTABLE_TORCH = re.compile(r"N[KVrRO]*(?:2at|3c10)[0-9A-Z]")


@dataclass
class Dynamic:
    needed: list[str]
    search_paths: list[str]
    undefined: list[str]
    defined: list[str]


def read_dynamic(path: Path) -> Dynamic:
    """The dynamic section and symbols of a 64-bit little-endian ELF file: what ``readelf -d --dyn-syms`` shows."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
    sections_at = struct.unpack_from("<Q", data, 0x28)[0]
    entry_size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = []
    for i in range(count):
        _, kind, _, _, at, size, link = struct.unpack_from("<IIQQQQI", data, sections_at + i * entry_size)
        sections.append((kind, at, size, link))

    def text(table: int, offset: int) -> str:
        start = sections[table][1] + offset
        return data[start : data.index(b"\0", start)].decode()

    found = Dynamic([], [], [], [])
    for kind, at, size, link in sections:
        if kind == 6:  # SHT_DYNAMIC: pairs of tag and value
            for tag, value in struct.iter_unpack("<QQ", data[at : at + size]):
                if tag == 1:
                    found.needed.append(text(link, value))
                elif tag in (15, 29):  # DT_RPATH, DT_RUNPATH
                    found.search_paths.append(text(link, value))
        elif kind == 11:  # SHT_DYNSYM
            for name, _, _, section, _, _ in struct.iter_unpack("<IBBHQQ", data[at : at + size]):
                if name:
                    (found.defined if section else found.undefined).append(text(link, name))
    return found


@pytest.fixture(scope="module")
def library():
    return read_dynamic(LIBRARY)


def test_the_pattern_knows_torch_symbols():
    for name in (
        "_ZN2at4_ops10sum_default4callERKNS_6TensorE",
        "_ZNK3c1010TensorImpl5sizesEv",
        "_ZTIN3c105ErrorE",
        "_ZN5torch8autograd3fooERKN2at6TensorE",
    ):
        assert UNSTABLE_TORCH.search(name)
    for name in (
        "aoti_torch_get_dim",
        "torch_call_dispatcher",
        "_ZNSt6vectorIlSaIlEE4dataEv",
        "_ZN6format2atEv",
    ):
        assert not UNSTABLE_TORCH.search(name)


def test_only_the_stable_c_interface_of_torch(library):
    assert [name for name in library.undefined if UNSTABLE_TORCH.search(name)] == []
    assert any(name.startswith("aoti_torch_") for name in library.undefined)


def test_only_stable_python_symbols(library):
    python = {name for name in library.undefined if re.match(r"_?Py", name)}
    assert python
    assert python <= STABLE_PYTHON


def test_no_pybind11():
    assert b"pybind11" not in LIBRARY.read_bytes()


def test_dependencies(library):
    assert "libtorch_cpu.so" in library.needed
    system = re.compile(r"(libtorch_cpu|libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|ld-linux-.*)\.so(\.\d+)?")
    assert [name for name in library.needed if not system.fullmatch(name)] == []


def test_no_search_path_of_the_machine_that_built_it(library):
    assert library.search_paths == []


def test_exports_its_module_and_no_symbol_of_its_own(library):
    assert "PyInit__C" in library.defined
    assert [name for name in library.defined if "retinanet_ext" in name] == []


def test_importing_the_package_imports_torch_and_numpy_alone():
    """Of distributions outside the standard library, beside what ``import torch, numpy`` brings by itself."""
    program = (
        "import sys, torch, numpy; before = {name.split('.')[0] for name in sys.modules}\n"
        "import retinanet_ext; after = {name.split('.')[0] for name in sys.modules}\n"
        "print(*sorted(after - before - set(sys.stdlib_module_names)))\n"
        "print(*sorted(name for name in sys.modules if name.startswith('retinanet_ext.')))"
    )
    package_parent = str(LIBRARY.parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=package_parent, capture_output=True, text=True, check=True
    )
    added, modules = done.stdout.splitlines()
    assert added.split() == ["retinanet_ext"]
    parts = {name.split(".")[1] for name in modules.split()}
    assert parts.isdisjoint({"data", "engine", "cli", "models", "interop"})
