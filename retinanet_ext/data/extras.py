"""The optional packages behind data, training, plots and exports, imported at the moment they are needed."""

import importlib
from types import ModuleType

_PACKAGES = {"PIL": "Pillow", "faster_coco_eval": "faster-coco-eval", "yaml": "PyYAML"}


class MissingExtraError(ImportError):
    """A package of an extra is not installed."""


def require(module: str, extra: str = "train") -> ModuleType:
    """Import `module` (for example "PIL.Image"), or raise MissingExtraError with the command that installs
    the `extra` that has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = _PACKAGES.get(module.split(".")[0], module)
        raise MissingExtraError(
            f"{package} is needed here and could not be imported ({error}). "
            f'Install it with: pip install "retinanet_ext[{extra}]"'
        ) from error


def require_all(*modules: str, extra: str = "train") -> None:
    """Import every module of `modules` now, so that a missing one is named before hours of work and not
    after."""
    for module in modules:
        require(module, extra)
