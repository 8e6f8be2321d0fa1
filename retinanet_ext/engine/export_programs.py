"""Exports for PyTorch itself: torch.export programs, as they are and compiled, and weights for torchvision's models."""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

import torch

from retinanet_ext.interop import save_torchvision_weights
from retinanet_ext.models import RetinaNet

from .checkpoint import write_atomically
from .export_modules import ExportedDetector, trace
from .export_report import METADATA_NAME, Exported, ExportOptions, describe_detections
from .settings import SettingError


def trace_detector(model: RetinaNet, options: ExportOptions) -> torch.export.ExportedProgram:
    detector = ExportedDetector(model, options.size)
    return trace(detector, options.size, options.batch_size, options.device)


def write_pt2(model: RetinaNet, options: ExportOptions, metadata: str, output: Path) -> Exported:
    """The detector as `torch.export.load` reads it, with `metadata` as an extra file."""
    program = trace_detector(model, options)
    # Not into the file: where the disk is full, the archive's destructor would end the process.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={METADATA_NAME: metadata})
    write_atomically(output, lambda stream: stream.write(content.getbuffer()))
    usage = (
        f"import torch, retinanet_ext; detector = torch.export.load({str(output)!r}).module()\n"
        f"boxes, scores, labels, counts = detector({options.example})"
    )
    return Exported(output, options.takes, describe_detections(model, options), usage)


def check_compiler() -> None:
    """Raises SettingError where AOTInductor would find no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise SettingError(
            "format",
            "aoti needs a C++ compiler, and none was found: install g++ (apt-get install g++), or name one in CXX",
        ) from error


def write_aoti(model: RetinaNet, options: ExportOptions, metadata: str, output: Path) -> Exported:
    """The detector compiled for this kind of machine, as `torch._inductor.aoti_load_package` reads it.

    The compiled code calls `retinanet_ext::detect` by name: who loads it imports this library first.
    """
    program = trace_detector(model, options)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / output.name
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(package),
            inductor_configs={
                "aot_inductor.metadata": {METADATA_NAME: metadata},
                # The check of inputs would refuse one image: of an open batch the least is recorded as 2.
                "aot_inductor.check_lowerbound": False,
            },
        )
        with package.open("rb") as compiled:
            write_atomically(output, lambda stream: shutil.copyfileobj(compiled, stream))
    usage = (
        # Compiled code reads whatever memory it is given as images of its own size and layout, unless told to look.
        'import os; os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"; import torch, retinanet_ext\n'
        f"boxes, scores, labels, counts = torch._inductor.aoti_load_package({str(output)!r})({options.example})"
    )
    return Exported(output, f"{options.takes}, contiguous", describe_detections(model, options), usage)


def write_torchvision(model: RetinaNet, options: ExportOptions, metadata: str, output: Path) -> Exported:
    """The weights, as a state dict of torchvision's names."""
    save_torchvision_weights(output, model)
    usage = (
        "import torch  # model: torchvision's RetinaNet of this backbone, norm and anchors, see docs/export.md\n"
        f"model.load_state_dict(torch.load({str(output)!r}, weights_only=True))"
    )
    gives = f"a state dict of {len(model.state_dict())} tensors, {model.num_classes} classes"
    return Exported(output, "nothing: these are weights alone", gives, usage)
