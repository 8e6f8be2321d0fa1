"""Runs CMake for the compiled library; everything else about the package stands in pyproject.toml."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_support import toolchain  # noqa: E402

PRODUCTS = ("_C.abi3.so", "_C_cuda.so", "_build_info.json")


def tool(name: str) -> str:
    """A program of the PATH, on which pip puts its build environment first, or else of this Python's environment."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        raise toolchain.BuildError(f"{name} was not found.\nMend it with:  pip install {name}")
    return path


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, and leaves the libraries in the package folder."""

    def run(self) -> None:
        try:
            plan = toolchain.make_plan()
            print(plan.summary(), flush=True)
            in_place = self.inplace or self.editable_mode
            package = (ROOT if in_place else Path(self.build_lib)) / "retinanet_ext"
            if in_place:
                self.build(plan, ROOT / "build" / "editable", package)
            else:
                with tempfile.TemporaryDirectory(prefix="retinanet_ext-") as folder:
                    self.build(plan, Path(folder), package)
        except toolchain.BuildError as error:
            sys.exit(f"\nretinanet_ext cannot be built here: {error}\n")

    def build(self, plan: toolchain.Plan, build_folder: Path, package: Path) -> None:
        configure = [
            tool("cmake"),
            f"-S{ROOT}",
            f"-B{build_folder}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_CXX_COMPILER={plan.cxx.path}",
            f"-DCMAKE_CXX_COMPILER_LAUNCHER={plan.cxx.launcher or ''}",
            f"-DCMAKE_CXX_FLAGS={plan.cxx.flags}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DRETINANET_EXT_VERSION={self.distribution.get_version()}",
            f"-DRETINANET_EXT_TORCH={plan.torch.root}",
            f"-DRETINANET_EXT_PYTHON_INCLUDE={sysconfig.get_path('include')}",
            f"-DRETINANET_EXT_CUDA={'ON' if plan.cuda else 'OFF'}",
            f"-DCMAKE_INSTALL_PREFIX={build_folder / 'products'}",
        ]
        environment = dict(os.environ)
        if plan.nvcc is not None:
            configure.append(f"-DCMAKE_CUDA_COMPILER={plan.nvcc.path}")
            configure.append(f"-DCMAKE_CUDA_HOST_COMPILER={plan.cxx.path}")
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(plan.archs)}")
            # NVIDIA's PyPI packages keep their libraries in lib, where nvcc does not look by itself.
            paths = [str(plan.nvcc.toolkit / "lib"), environment.get("LIBRARY_PATH", "")]
            environment["LIBRARY_PATH"] = os.pathsep.join(path for path in paths if path)

        shutil.rmtree(build_folder / "products", ignore_errors=True)
        # A folder configured otherwise (another torch, another compiler) is of no use to this build; another cmake or
        # ninja, which pip installs anew each time, is no difference.
        settings = "\n".join(word for word in configure[1:] if not word.startswith("-DCMAKE_MAKE_PROGRAM"))
        stamp = build_folder / "configuration.txt"
        if build_folder.exists() and (not stamp.is_file() or stamp.read_text() != settings):
            shutil.rmtree(build_folder)
        build_folder.mkdir(parents=True, exist_ok=True)

        def step(*command: str) -> None:
            if subprocess.run(command, env=environment).returncode != 0:
                raise toolchain.BuildError(f"this command failed, with its own message above:\n  {' '.join(command)}")

        step(*configure)
        stamp.write_text(settings)
        step(tool("cmake"), "--build", str(build_folder))
        step(tool("cmake"), "--install", str(build_folder))
        products = build_folder / "products"
        (products / "_build_info.json").write_text(json.dumps(build_info(plan, self.distribution), indent=2) + "\n")
        install_products(products, package)

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in lists the sources

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "retinanet_ext"
        return [str(folder / name) for name in PRODUCTS if (folder / name).exists()]


def install_products(products: Path, package: Path) -> None:
    """Moves what was built into the package, file by file, and removes what an earlier build left there."""
    package.mkdir(parents=True, exist_ok=True)
    for name in PRODUCTS:
        if (products / name).exists():
            # Under a new name first: a running program keeps the library that it has loaded.
            fresh = package / f".{name}.new"
            shutil.copy2(products / name, fresh)
            os.replace(fresh, package / name)
        else:
            (package / name).unlink(missing_ok=True)


def build_info(plan: toolchain.Plan, distribution) -> dict[str, object]:
    return {
        "version": distribution.get_version(),
        "torch": plan.torch.version,
        "cuda": plan.cuda,
        "cuda_reason": plan.cuda_reason,
        "cuda_version": ".".join(map(str, plan.nvcc.version)) if plan.nvcc else None,
        "cuda_archs": plan.archs,
        "cxx": plan.cxx.path,
    }


# A build folder of its own each time: one left in the tree would carry stale files into the wheel.
build_base = tempfile.mkdtemp(prefix="retinanet_ext-build-")
atexit.register(shutil.rmtree, build_base, ignore_errors=True)

setup(
    # CMake knows the sources; setuptools needs an extension only to tag the wheel by platform and ABI.
    ext_modules=[Extension("retinanet_ext._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={
        "bdist_wheel": {"py_limited_api": "cp310"},
        "build": {"build_base": build_base},
    },
)
