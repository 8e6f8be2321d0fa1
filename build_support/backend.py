"""PEP 517/660 build backend: setuptools', plus the requirements that only this machine can tell.

pip builds in an environment of its own. torch is added to it only where the target environment has none, and
NVIDIA's compiler only where CUDA is wanted and no nvcc is at hand; see ``toolchain.py``.
"""

from __future__ import annotations

import sys

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that are not overridden below

from . import toolchain


def _missing_requirements() -> list[str]:
    try:
        return toolchain.missing_requirements()
    except toolchain.BuildError as error:
        # The message alone, without a traceback through pip's hooks.
        sys.exit(f"\nretinanet_ext cannot be built here: {error}\n")


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _missing_requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _missing_requirements()
