"""What a build needs and what this machine offers: torch's headers, a C++ compiler, nvcc, GPU architectures.

Every question is answered here, once, as a :class:`Plan`; the PEP 517 hooks (``backend.py``) ask it which
packages to add to pip's build environment, ``setup.py`` hands it to CMake. Whatever is missing ends in a
:class:`BuildError` that says what was looked for, what was found and which command mends it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

MIN_TORCH = (2, 10)
TORCH_REQUIREMENT = "torch>=2.10"
SUPPORTED_CUDA_MAJORS = (12, 13)
# The CUDA major of the torch that PyPI has for Linux, which pip brings where there is none.
CUDA_MAJOR_OF_PYPI = 13
# By these pip and uv are told to look for packages elsewhere, or to take another torch.
OTHER_PLACES_OF_PACKAGES = (
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CONSTRAINT", "PIP_CONFIG_FILE"),
    *("UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_NO_INDEX"),
    *("UV_CONSTRAINT", "UV_BUILD_CONSTRAINT", "UV_CONFIG_FILE", "UV_TORCH_BACKEND"),
)
# What CUDA 13 compiles for: the answer before its compiler has been downloaded, which then is asked itself.
CUDA_13_ARCHS = ["75", "80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121"]
COMPILER_LAUNCHERS = ("ccache", "sccache", "distcc")
CUDA_OFF_HINT = "RETINANET_EXT_CUDA=0 pip install .   # the CPU operators only"


def install_with(**variables: str) -> str:
    """The command that installs with these variables, and with what else the user has set for this build."""
    of_the_user = {name: os.environ.get(name, "").strip() for name in ("RETINANET_EXT_CUDA", "TORCH_CUDA_ARCH_LIST")}
    variables = {name: value for name, value in {**of_the_user, **variables}.items() if value}
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), "pip install ."])


class BuildError(Exception):
    """A build that cannot work, with the reason and the command that mends it."""


@dataclass(frozen=True)
class Torch:
    """The torch installation to build against."""

    site_packages: Path
    version: str
    cuda: str | None  # torch.version.cuda, such as "13.0"; None for a CPU build

    @property
    def root(self) -> Path:
        return self.site_packages / "torch"


@dataclass(frozen=True)
class Cxx:
    """The C++ compiler, with what the variable CXX puts before and behind it."""

    path: str
    launcher: str | None = None
    flags: str = ""


@dataclass(frozen=True)
class Nvcc:
    path: Path
    version: tuple[int, int]

    @property
    def release(self) -> str:
        return ".".join(map(str, self.version))

    @property
    def toolkit(self) -> Path:
        return self.path.parent.parent


@dataclass
class Plan:
    """Everything CMake has to know."""

    torch: Torch
    cxx: Cxx
    cuda: bool
    cuda_reason: str
    nvcc: Nvcc | None = None
    archs: list[str] = field(default_factory=list)  # CMake's notation, such as "90-real"

    def summary(self) -> str:
        cuda = f"yes: {self.cuda_reason}" if self.cuda else f"no: {self.cuda_reason}"
        lines = [
            "retinanet_ext build",
            f"  torch headers   {self.torch.version} at {self.torch.root}",
            f"  C++ compiler    {self.cxx.path}",
            f"  CUDA            {cuda}",
        ]
        if self.cuda and self.nvcc:
            lines.append(f"  nvcc            {self.nvcc.release} at {self.nvcc.path}")
            lines.append(f"  architectures   {' '.join(self.archs)}")
        return "\n".join(lines)


def candidate_site_packages() -> list[Path]:
    """Where the environment that will run the package keeps its packages.

    Inside pip's build isolation ``sys.path`` hides the target environment, but ``sysconfig`` still names it.
    """
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    in_venv = sys.prefix != sys.base_prefix
    if in_venv:
        config = Path(sys.prefix) / "pyvenv.cfg"
        text = config.read_text() if config.is_file() else ""
        if re.search(r"include-system-site-packages\s*=\s*true", text, re.IGNORECASE):
            base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
            places += [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
            places += [site.getusersitepackages(), *sys.path]
    else:
        places += [site.getusersitepackages(), *site.getsitepackages()]
    places += sys.path  # the build environment itself: torch added by the hook, or no isolation at all
    return list(dict.fromkeys(Path(place).resolve() for place in places if place))


def find_torch() -> Torch | None:
    """The first torch with headers on the target's path, or None; an outdated one is an error."""
    for place in candidate_site_packages():
        version_file = place / "torch" / "version.py"
        if not version_file.is_file():
            continue
        facts: dict[str, object] = {}
        exec(version_file.read_text(), facts)
        version = str(facts["__version__"])
        release = tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", version).groups())
        if release < MIN_TORCH:
            raise BuildError(
                f"torch {version} is installed in {place}, and retinanet_ext needs torch 2.10 or newer.\n"
                'Mend it with:  pip install --upgrade "torch>=2.10"'
            )
        if (place / "torch/include/torch/csrc/stable/library.h").is_file():
            cuda = facts.get("cuda")
            return Torch(place, version, str(cuda) if cuda else None)
    return None


def find_cxx() -> Cxx:
    """CXX as build tools read it, such as "ccache g++ -O1"; without it c++, g++ or clang++."""
    wanted = os.environ.get("CXX", "").strip()
    words = shlex.split(wanted)
    launcher = None
    if words and Path(words[0]).name in COMPILER_LAUNCHERS:
        launcher = shutil.which(words.pop(0))
    for name in words[:1] if wanted else ["c++", "g++", "clang++"]:
        path = shutil.which(name)
        if path:
            return Cxx(path, launcher, shlex.join(words[1:]))
    looked = f"CXX={wanted}" if wanted else "c++, g++ and clang++ on the PATH"
    raise BuildError(
        f"no C++ compiler was found (looked for {looked}).\n"
        "Mend it with:  apt-get install g++   (Debian, Ubuntu)   or   dnf install gcc-c++   (Fedora, RHEL)"
    )


def check_python_headers() -> None:
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise BuildError(
            f"Python.h was not found in {sysconfig.get_path('include')}.\n"
            "Mend it with:  apt-get install python3-dev   (Debian, Ubuntu)   or   dnf install python3-devel"
        )


def cuda_wanted() -> str:
    value = os.environ.get("RETINANET_EXT_CUDA", "auto").lower()
    if value not in ("auto", "0", "1"):
        raise BuildError(
            f"RETINANET_EXT_CUDA must be auto, 1 or 0, and it is {value!r}.\n"
            f"Mend it with:  {install_with(RETINANET_EXT_CUDA='1')}   or:  {CUDA_OFF_HINT}"
        )
    return value


def nvcc_from_pypi() -> Path | None:
    """nvcc of NVIDIA's PyPI packages, where the build environment holds them."""
    for place in dict.fromkeys(sys.path):
        for nvcc in sorted(Path(place or ".").glob("nvidia/cu*/bin/nvcc")):
            return nvcc.resolve()
    return None


def find_nvcc() -> Nvcc | None:
    """nvcc by CUDACXX, CUDA_HOME or CUDA_PATH, the PATH, then NVIDIA's PyPI packages."""
    path: Path | None = None
    if os.environ.get("CUDACXX"):
        path = Path(shutil.which(os.environ["CUDACXX"]) or os.environ["CUDACXX"])
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if path is None and os.environ.get(variable):
            path = Path(os.environ[variable]) / "bin" / "nvcc"
            if not path.is_file():
                raise BuildError(
                    f"{variable}={os.environ[variable]}, and there is no bin/nvcc in it.\n"
                    f"Mend it with:  {install_with(**{variable: '/path/to/the/cuda/toolkit'})}   or:  {CUDA_OFF_HINT}"
                )
    if path is None:
        found = shutil.which("nvcc")
        path = Path(found) if found else nvcc_from_pypi()
    if path is None:
        return None
    try:
        text = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{path} --version failed: {error}.\nMend the CUDA toolkit, or:  {CUDA_OFF_HINT}") from error
    version = re.search(r"release (\d+)\.(\d+)", text)
    if version is None:
        raise BuildError(
            f"{path} --version names no release:\n{text}"
            f"Mend it with:  {install_with(CUDACXX='/path/to/nvcc')}   or:  {CUDA_OFF_HINT}"
        )
    # A wrapper script on the PATH is followed to the toolkit that it runs.
    dry = subprocess.run([str(path), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    real = (Path(top.group(1).strip()) / "bin" / "nvcc") if top else path.resolve()
    return Nvcc(real.resolve() if real.is_file() else path.resolve(), (int(version[1]), int(version[2])))


def pypi_compiler(torch_cuda: str | None) -> str:
    """NVIDIA's compiler for torch's CUDA version, as a requirement; PyPI has one for CUDA 13 only.

    By the package that pins the parts of one toolkit: they number themselves differently, and compiler and headers of
    two releases do not fit. None: torch is not installed yet, and the toolkit that it pins itself decides.
    """
    check_arch_list(CUDA_13_ARCHS)
    return "cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]" + (f"=={torch_cuda}.*" if torch_cuda else ">=13,<14")


def check_supported(nvcc: Nvcc) -> None:
    if nvcc.version[0] not in SUPPORTED_CUDA_MAJORS:
        raise BuildError(
            f"nvcc {nvcc.release} ({nvcc.path}) is not supported; retinanet_ext builds with CUDA 12 and 13.\n"
            f"Mend it with:  {install_with(CUDA_HOME='/path/to/cuda-13')}   or:  {CUDA_OFF_HINT}"
        )


def check_nvcc(nvcc: Nvcc, torch: Torch) -> None:
    check_supported(nvcc)
    if torch.cuda and nvcc.version[0] != int(torch.cuda.split(".")[0]):
        major = torch.cuda.split(".")[0]
        raise BuildError(
            f"nvcc is of CUDA {nvcc.release} ({nvcc.path}), and torch {torch.version} is built for CUDA {torch.cuda}; "
            f"the majors must be equal.\n"
            f"Mend it with:  {install_with(CUDA_HOME=f'/path/to/cuda-{major}')}   or:  {CUDA_OFF_HINT}"
        )


def other_places() -> str:
    """What pip and uv were told in the environment of where packages come from; empty where it is PyPI alone."""
    return " ".join(filter(None, (os.environ.get(name) for name in OTHER_PLACES_OF_PACKAGES)))


def check_nvcc_before_torch(nvcc: Nvcc, wanted: str) -> None:
    """What can be said of nvcc while torch is not there yet: ahead of pip's download of gigabytes, not behind it.

    Where pip looks elsewhere than on PyPI the torch that comes may be for another CUDA, or for none, and it has to come
    first. (Of pip's command line and its configuration files a build learns nothing.)
    """
    elsewhere = other_places()
    if elsewhere and wanted != "1":
        return
    check_supported(nvcc)
    check_arch_list(supported_archs(nvcc))
    major = CUDA_MAJOR_OF_PYPI
    if not elsewhere and nvcc.version[0] != major:
        raise BuildError(
            f"there is no torch here, the newest, which pip would bring, is for CUDA {major}, and nvcc is of CUDA "
            f"{nvcc.release} ({nvcc.path}); the majors must be equal.\n"
            f"Mend it with a torch for CUDA {nvcc.version[0]} first (https://pytorch.org/get-started/locally), "
            f"or with:  {install_with(CUDA_HOME=f'/path/to/cuda-{major}')}   or:  {CUDA_OFF_HINT}"
        )


def supported_archs(nvcc: Nvcc) -> list[str]:
    """Compute capabilities this nvcc compiles for, such as ["75", "80", "90"]."""
    run = subprocess.run([str(nvcc.path), "--list-gpu-arch"], capture_output=True, text=True)
    archs = re.findall(r"compute_(\d+[af]?)", run.stdout)
    if run.returncode != 0 or not archs:
        raise BuildError(
            f"{nvcc.path} --list-gpu-arch names no GPU architectures:\n{run.stdout}{run.stderr}"
            f"Mend it with:  {install_with(CUDACXX='/path/to/nvcc')}   or:  {CUDA_OFF_HINT}"
        )
    return archs


def torch_archs(torch: Torch) -> list[str]:
    """Compute capabilities of the target torch's own kernels; needs no GPU."""
    code = "import torch; print(torch._C._cuda_getArchFlags() or '')"
    environment = {**os.environ, "PYTHONPATH": str(torch.site_packages)}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    if run.returncode != 0:
        raise BuildError(
            f"torch {torch.version} in {torch.site_packages} does not import, and is asked for its GPU architectures:\n"
            f"{run.stderr}Mend it, or name them:  {install_with(TORCH_CUDA_ARCH_LIST='9.0')}   or:  {CUDA_OFF_HINT}"
        )
    return re.findall(r"sm_(\d+)", run.stdout)


def parse_arch_list(text: str, supported: list[str]) -> list[str]:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") in CMake's notation (["80-real", "90"])."""
    archs = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST holds {entry!r}; entries look like 9.0 or 9.0+PTX.\n"
                f"Mend it with:  {install_with(TORCH_CUDA_ARCH_LIST='9.0')}"
            )
        capability = match[1] + match[2]
        if capability not in supported:
            known = ", ".join(f"{arch[:-1]}.{arch[-1]}" for arch in supported if arch.isdigit())
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST holds {entry}, which this nvcc does not compile for (it knows {known}).\n"
                f"Mend it with:  {install_with(TORCH_CUDA_ARCH_LIST='9.0')}   (or leave it unset)"
            )
        archs.append(capability + match[3] + ("" if match[4] else "-real"))
    return archs


def check_arch_list(supported: list[str]) -> list[str]:
    """TORCH_CUDA_ARCH_LIST in CMake's notation; [] where it is not set."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    return parse_arch_list(listed, supported) if listed else []


def choose_archs(torch: Torch, nvcc: Nvcc) -> list[str]:
    supported = supported_archs(nvcc)
    listed = check_arch_list(supported)
    if listed:
        return listed
    if not torch.cuda:
        raise BuildError(
            f"RETINANET_EXT_CUDA=1 with torch {torch.version}, a CPU build, which names no GPU architectures.\n"
            f"Mend it with:  {install_with(TORCH_CUDA_ARCH_LIST='9.0')}"
        )
    archs = [arch for arch in torch_archs(torch) if arch in supported]
    if not archs:
        raise BuildError(
            f"none of torch's GPU architectures is one that nvcc at {nvcc.path} compiles for.\n"
            f"Mend it with:  {install_with(TORCH_CUDA_ARCH_LIST='9.0')}   or:  {CUDA_OFF_HINT}"
        )
    # Machine code for each, and PTX for the newest, which later GPUs compile at load.
    archs.sort(key=int)
    return [f"{arch}-real" for arch in archs[:-1]] + [archs[-1]]


def decide_cuda(torch: Torch) -> tuple[bool, str]:
    wanted = cuda_wanted()
    if wanted == "0":
        return False, "RETINANET_EXT_CUDA=0"
    if wanted == "1":
        return True, "RETINANET_EXT_CUDA=1"
    if torch.cuda:
        return True, f"torch {torch.version} is built for CUDA {torch.cuda}"
    return (
        False,
        f"torch {torch.version} is a CPU build (RETINANET_EXT_CUDA=1 compiles the CUDA part all the same)",
    )


def no_compiler_error(torch: Torch) -> BuildError:
    wanted = "13.0" if torch.cuda is None else torch.cuda
    usual = Path("/usr/local/cuda")
    variables = {"CUDA_HOME": str(usual) if (usual / "bin/nvcc").is_file() else "/path/to/the/cuda/toolkit"}
    if torch.cuda is None and not os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        variables["TORCH_CUDA_ARCH_LIST"] = "9.0"  # which this torch does not name
    return BuildError(
        "the CUDA part is wanted and no nvcc was found (looked at CUDACXX, CUDA_HOME, CUDA_PATH and the PATH; "
        "NVIDIA's compiler on PyPI serves builds against a torch for CUDA 13).\n"
        f"Mend it with a CUDA {wanted} toolkit and:  {install_with(**variables)}   or:  {CUDA_OFF_HINT}"
    )


def missing_requirements() -> list[str]:
    """Packages that pip must add to the build environment; every error that can be known by now is raised."""
    find_cxx()
    check_python_headers()
    wanted = cuda_wanted()
    torch = find_torch()
    if torch is None:
        # pip takes the newest torch, which is known only once it is there.
        if wanted == "0":
            return [TORCH_REQUIREMENT]
        nvcc = find_nvcc()
        # A torch for CUDA 12 comes from such an index: NVIDIA's compiler for CUDA 13 would drive pip to another one.
        if nvcc is None and re.search(r"cu12\d", other_places()):
            return [TORCH_REQUIREMENT]
        if nvcc is None:
            return [TORCH_REQUIREMENT, pypi_compiler(None)]
        check_nvcc_before_torch(nvcc, wanted)
        return [TORCH_REQUIREMENT]
    if not decide_cuda(torch)[0]:
        return []
    nvcc = find_nvcc()
    if nvcc is not None:
        check_nvcc(nvcc, torch)
        choose_archs(torch, nvcc)
        return []
    if torch.cuda is None or not torch.cuda.startswith("13."):
        raise no_compiler_error(torch)
    return [pypi_compiler(torch.cuda)]


def make_plan() -> Plan:
    """Decide the whole build; called once the build environment is complete."""
    cxx = find_cxx()
    check_python_headers()
    torch = find_torch()
    if torch is None:
        raise BuildError(
            "torch was not found in this environment.\n"
            'Mend it with:  pip install "torch>=2.10"   (or build without --no-build-isolation)'
        )
    cuda, reason = decide_cuda(torch)
    plan = Plan(torch=torch, cxx=cxx, cuda=cuda, cuda_reason=reason)
    if cuda:
        plan.nvcc = find_nvcc()
        if plan.nvcc is None:
            raise no_compiler_error(torch)
        check_nvcc(plan.nvcc, torch)
        plan.archs = choose_archs(torch, plan.nvcc)
    return plan
