"""What the build decides and what it says when it cannot work: build_support, asked as pip's hooks ask it.

Real installs (with and without CUDA, with the compiler from PyPI, from an sdist, editable) are steps of .ci/run.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "build_support").is_dir(), reason="the sources are not beside the tests")


@pytest.fixture
def site_packages(tmp_path):
    """A site-packages folder with a torch that has headers and a version, and nothing else."""

    def make(version: str, cuda: str | None, folder: str = "site-packages") -> Path:
        site = tmp_path / folder
        headers = site / "torch/include/torch/csrc/stable"
        headers.mkdir(parents=True)
        (headers / "library.h").touch()
        (site / "torch/version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
        return site

    return make


@pytest.fixture
def programs(tmp_path):
    """A PATH of its own, with a C++ compiler and whatever else a test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        return path

    add("c++", "exit 0")  # with nothing else on the PATH, whatever this machine has in /bin
    add.folder = folder
    return add


def fake_nvcc(version: str, archs: str = "compute_80 compute_90") -> str:
    listing = "\n".join(f"echo {arch}" for arch in archs.split())
    return (
        f'case "$1" in\n--version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;\n'
        f"--list-gpu-arch) {listing} ;;\nesac"
    )


def ask(site: Path, programs, **environment: str) -> subprocess.CompletedProcess:
    """The requirements hook, in a process whose target environment is `site`."""
    code = (
        "import sys; from pathlib import Path; from build_support import backend, toolchain\n"
        "toolchain.candidate_site_packages = lambda: [Path(sys.argv[1])]\n"
        "print(backend._missing_requirements())"
    )
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RETINANET_EXT", "CUDA", "TORCH_CUDA", "CXX", "PIP_", "UV_"))
    }
    return subprocess.run(
        [sys.executable, "-c", code, str(site)],
        cwd=ROOT,
        env={**clean, "PATH": str(programs.folder), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_cpu_torch_needs_nothing_more(site_packages, programs):
    result = ask(site_packages("2.13.0+cpu", None), programs)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_missing_torch_is_added_to_the_build_environment(tmp_path, programs):
    result = ask(tmp_path, programs, RETINANET_EXT_CUDA="0")
    assert result.stdout.strip() == "['torch>=2.10']", result.stderr


def test_missing_torch_and_nvcc_are_added_together(tmp_path, programs):
    """The torch that pip brings is one for CUDA 13 and pins cuda-toolkit, which then is the compiler's too."""
    result = ask(tmp_path, programs)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['torch>=2.10', 'cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]>=13,<14']"
    programs("nvcc", fake_nvcc("13.0"))
    assert ask(tmp_path, programs).stdout.strip() == "['torch>=2.10']"


@pytest.mark.parametrize(
    ("release", "environment", "words"),
    [
        (
            "12.4",
            {},
            "there is no torch here, the newest, which pip would bring, is for CUDA 13, and nvcc is of CUDA 12.4",
        ),
        ("11.8", {}, "nvcc 11.8"),
        ("11.8", {"RETINANET_EXT_CUDA": "1", "PIP_INDEX_URL": "https://example.org"}, "nvcc 11.8"),
        ("13.0", {"TORCH_CUDA_ARCH_LIST": "1.0"}, "TORCH_CUDA_ARCH_LIST holds 1.0"),
        ("13.0", {"TORCH_CUDA_ARCH_LIST": "sm_90"}, "entries look like 9.0"),
    ],
)
def test_a_compiler_that_cannot_work_is_refused_before_torch_is_downloaded(
    tmp_path, programs, release, environment, words
):
    programs("nvcc", fake_nvcc(release))
    assert_refused(ask(tmp_path, programs, **environment), words)


@pytest.mark.parametrize("elsewhere", ["PIP_INDEX_URL", "PIP_FIND_LINKS", "UV_INDEX"])
def test_where_pip_looks_elsewhere_torch_may_be_for_any_cuda(tmp_path, programs, elsewhere):
    programs("nvcc", fake_nvcc("12.8"))
    result = ask(tmp_path, programs, **{elsewhere: "https://example.org/cu128"})
    assert result.stdout.strip() == "['torch>=2.10']", result.stderr


def test_no_compiler_for_cuda_13_beside_a_torch_for_cuda_12(tmp_path, programs):
    """pip would take another torch to build with than the one that it installs."""
    for name in ("PIP_EXTRA_INDEX_URL", "UV_INDEX"):
        result = ask(tmp_path, programs, **{name: "https://download.pytorch.org/whl/cu128"})
        assert result.stdout.strip() == "['torch>=2.10']", result.stderr
    mirror = ask(tmp_path, programs, PIP_INDEX_URL="https://example.org/simple")
    assert "cuda-toolkit" in mirror.stdout


def test_cuda_torch_without_nvcc_takes_the_compiler_of_its_own_version(site_packages, programs):
    result = ask(site_packages("2.11.0+cu130", "13.0"), programs)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]==13.0.*']"


def test_cuda_can_be_declined(site_packages, programs):
    result = ask(site_packages("2.11.0+cu130", "13.0"), programs, RETINANET_EXT_CUDA="0")
    assert result.stdout.strip() == "[]", result.stderr


def assert_refused(result: subprocess.CompletedProcess, *parts: str) -> None:
    assert result.returncode != 0
    assert "retinanet_ext cannot be built here" in result.stderr
    assert "Traceback" not in result.stderr
    for part in (*parts, "Mend it with"):
        assert part in result.stderr


def test_cuda_12_torch_without_nvcc_asks_for_a_toolkit(site_packages, programs):
    result = ask(site_packages("2.10.0+cu128", "12.8"), programs)
    assert_refused(result, "no nvcc was found", "CUDA 12.8 toolkit", "CUDA_HOME=")


def test_cuda_wanted_where_nothing_can_compile(site_packages, programs):
    result = ask(site_packages("2.13.0+cpu", None), programs, RETINANET_EXT_CUDA="1")
    mend = r"RETINANET_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=9\.0 CUDA_HOME=/\S+ pip install \."
    assert_refused(result, "no nvcc was found", "RETINANET_EXT_CUDA=0 pip install .")
    assert re.search(rf"CUDA 13\.0 toolkit and:  {mend} ", result.stderr)


def test_compiler_of_another_cuda_major(site_packages, programs):
    programs("nvcc", fake_nvcc("12.4"))
    result = ask(site_packages("2.11.0+cu130", "13.0"), programs)
    assert_refused(result, "nvcc is of CUDA 12.4", "built for CUDA 13.0", "CUDA_HOME=/path/to/cuda-13")


def test_unsupported_compiler(site_packages, programs):
    programs("nvcc", fake_nvcc("11.8"))
    result = ask(site_packages("2.13.0+cpu", None), programs, RETINANET_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    mend = "with:  RETINANET_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 CUDA_HOME=/path/to/cuda-13 pip install ."
    assert_refused(result, "nvcc 11.8", "CUDA 12 and 13", mend)


@pytest.mark.parametrize(
    ("archs", "words"),
    [
        ("9.9", "does not compile for (it knows 8.0, 9.0)"),
        ("sm_90", "entries look like 9.0"),
        ("8.0;5.2", "5.2"),
    ],
)
def test_unsupported_arch_list(site_packages, programs, archs, words):
    programs("nvcc", fake_nvcc("13.0"))
    site = site_packages("2.13.0+cpu", None)
    mend = "with:  RETINANET_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 pip install ."
    assert_refused(ask(site, programs, RETINANET_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST=archs), words, mend)


@pytest.mark.parametrize("archs", ["banana", "1.0", "9.9"])
def test_unsupported_arch_list_before_the_compiler_is_downloaded(site_packages, programs, archs):
    result = ask(site_packages("2.11.0+cu130", "13.0"), programs, TORCH_CUDA_ARCH_LIST=archs)
    assert_refused(result, f"TORCH_CUDA_ARCH_LIST holds {archs}" if archs != "banana" else "'banana'")


def test_cpu_torch_with_cuda_needs_an_arch_list(site_packages, programs):
    programs("nvcc", fake_nvcc("13.0"))
    result = ask(site_packages("2.13.0+cpu", None), programs, RETINANET_EXT_CUDA="1")
    mend = "with:  RETINANET_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 pip install ."
    assert_refused(result, "names no GPU architectures", mend)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo something else", "--version names no release"),
        ('[ "$1" = --version ] && echo "release 13.0," || { echo "no such option" >&2; exit 1; }', "no such option"),
    ],
)
def test_a_compiler_that_does_not_answer(site_packages, programs, script, words):
    programs("nvcc", script)
    result = ask(site_packages("2.13.0+cpu", None), programs, RETINANET_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;9.0")
    mend = "with:  RETINANET_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST='8.0;9.0' CUDACXX=/path/to/nvcc pip install ."
    assert_refused(result, words, mend)


def test_no_cxx_compiler(site_packages, programs):
    (programs.folder / "c++").unlink()
    result = ask(site_packages("2.13.0+cpu", None), programs, PATH=str(programs.folder))
    assert_refused(result, "no C++ compiler was found", "apt-get install g++")


def test_cxx_names_a_missing_compiler(site_packages, programs):
    result = ask(site_packages("2.13.0+cpu", None), programs, CXX="no-such-compiler")
    assert_refused(result, "CXX=no-such-compiler")


@pytest.mark.parametrize(
    ("cxx", "compiler", "launcher", "flags"),
    [
        ("mycxx", "mycxx", None, ""),
        ("mycxx -O1 -g", "mycxx", None, "-O1 -g"),
        ("ccache mycxx", "mycxx", "ccache", ""),
    ],
)
def test_cxx_with_a_launcher_and_flags(programs, monkeypatch, cxx, compiler, launcher, flags):
    for name in ("mycxx", "ccache"):
        programs(name, "exit 0")
    monkeypatch.setenv("PATH", str(programs.folder))
    monkeypatch.setenv("CXX", cxx)
    found = import_toolchain().find_cxx()
    assert Path(found.path).name == compiler
    assert (found.launcher and Path(found.launcher).name) == launcher
    assert found.flags == flags


def test_outdated_torch(site_packages, programs):
    result = ask(site_packages("2.9.1", None), programs)
    assert_refused(result, "torch 2.9.1", "2.10 or newer", "pip install --upgrade")


def test_cuda_home_without_a_toolkit(site_packages, programs, tmp_path):
    result = ask(site_packages("2.11.0+cu130", "13.0"), programs, CUDA_HOME=str(tmp_path / "nowhere"))
    assert_refused(result, "there is no bin/nvcc in it")


def test_unknown_cuda_setting(site_packages, programs):
    result = ask(site_packages("2.13.0+cpu", None), programs, RETINANET_EXT_CUDA="yes")
    assert_refused(result, "must be auto, 1 or 0, and it is 'yes'", "with:  RETINANET_EXT_CUDA=1 pip install .")


def import_toolchain():
    sys.path.insert(0, str(ROOT))
    try:
        from build_support import toolchain
    finally:
        sys.path.remove(str(ROOT))
    return toolchain


def test_sdist_holds_every_file_of_the_repository(tmp_path):
    """What git tracks is in the sdist, but for continuous integration's and git's own files."""
    try:
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the sources are not a git checkout")
    code = "from setuptools import setup; setup()"
    copy = tmp_path / "copy"
    for name in tracked.split():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    run = subprocess.run(
        [sys.executable, "-c", code, "-q", "sdist", "--dist-dir", str(tmp_path)],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    if "No module named 'setuptools'" in run.stderr:
        pytest.skip("setuptools is not installed")
    assert run.returncode == 0, run.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    missing = {name for name in tracked.split() if not name.startswith((".ci", ".git"))} - packed
    assert missing == set()


def test_arch_list_in_cmake_notation():
    toolchain = import_toolchain()
    supported = ["80", "90", "90a", "100"]
    assert toolchain.parse_arch_list("8.0;9.0+PTX", supported) == ["80-real", "90"]
    assert toolchain.parse_arch_list("8.0 9.0a 10.0+PTX", supported) == ["80-real", "90a-real", "100"]


def planned(site: Path, programs, monkeypatch, **environment: str):
    """What `make_plan` decides in such an environment."""
    for name in list(os.environ):
        if name.startswith(("RETINANET_EXT", "CUDA", "TORCH_CUDA", "CXX", "PIP_", "UV_")):
            monkeypatch.delenv(name)
    for name, value in {"PATH": str(programs.folder), **environment}.items():
        monkeypatch.setenv(name, value)
    toolchain = import_toolchain()
    monkeypatch.setattr(toolchain, "candidate_site_packages", lambda: [site])
    monkeypatch.setattr(toolchain, "check_python_headers", lambda: None)
    return toolchain.make_plan()


def give_kernels(site: Path, flags: str | None) -> None:
    """A torch that imports, and says which machine code it was built with."""
    (site / "torch/__init__.py").write_text(
        "class _C:\n    @staticmethod\n    def _cuda_getArchFlags():\n" + f"        return {flags!r}\n"
    )


def test_summary_of_a_build_for_the_cpu(site_packages, programs, monkeypatch):
    site = site_packages("2.13.0+cpu", None)
    assert planned(site, programs, monkeypatch).summary().splitlines() == [
        "retinanet_ext build",
        f"  torch headers   2.13.0+cpu at {site / 'torch'}",
        f"  C++ compiler    {programs.folder / 'c++'}",
        "  CUDA            no: torch 2.13.0+cpu is a CPU build "
        "(RETINANET_EXT_CUDA=1 compiles the CUDA part all the same)",
    ]


def test_summary_of_a_build_for_cuda(site_packages, programs, monkeypatch):
    nvcc = programs("nvcc", fake_nvcc("13.0"))
    site = site_packages("2.11.0+cu130", "13.0")
    plan = planned(site, programs, monkeypatch, TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX")
    assert plan.summary().splitlines()[3:] == [
        "  CUDA            yes: torch 2.11.0+cu130 is built for CUDA 13.0",
        f"  nvcc            13.0 at {nvcc}",
        "  architectures   80-real 90",
    ]
    declined = planned(site, programs, monkeypatch, RETINANET_EXT_CUDA="0").summary().splitlines()
    assert declined[3:] == ["  CUDA            no: RETINANET_EXT_CUDA=0"]


def test_architectures_are_those_of_torch_that_nvcc_compiles_for(site_packages, programs, monkeypatch):
    """In order, as numbers; machine code for each, and for the newest PTX too."""
    programs("nvcc", fake_nvcc("13.0", "compute_75 compute_80 compute_90 compute_90a compute_100 compute_120"))
    site = site_packages("2.11.0+cu130", "13.0")
    for flags, archs in (
        ("sm_70 sm_100 sm_75 sm_90 sm_80 compute_120", ["75-real", "80-real", "90-real", "100"]),
        ("sm_90", ["90"]),
    ):
        give_kernels(site, flags)
        assert planned(site, programs, monkeypatch).archs == archs


@pytest.mark.parametrize("flags", ["sm_50 sm_60", None])
def test_no_architecture_of_torch_that_nvcc_compiles_for(site_packages, programs, flags):
    nvcc = programs("nvcc", fake_nvcc("13.0"))
    site = site_packages("2.11.0+cu130", "13.0")
    give_kernels(site, flags)
    assert_refused(ask(site, programs), f"none of torch's GPU architectures is one that nvcc at {nvcc} compiles for")


def test_a_torch_that_does_not_import_names_no_architectures(site_packages, programs):
    programs("nvcc", fake_nvcc("13.0"))
    site = site_packages("2.11.0+cu130", "13.0")
    (site / "torch/__init__.py").write_text("raise OSError('libcudart.so.13 is gone')\n")
    result = ask(site, programs)
    assert result.returncode != 0
    assert "retinanet_ext cannot be built here" in result.stderr
    assert f"torch 2.11.0+cu130 in {site} does not import" in result.stderr
    assert "libcudart.so.13 is gone\nMend it, or name them:  TORCH_CUDA_ARCH_LIST=9.0" in result.stderr
    assert ask(site, programs, TORCH_CUDA_ARCH_LIST="9.0").stdout.strip() == "[]"
