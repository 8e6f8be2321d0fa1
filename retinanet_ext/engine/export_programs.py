"""Exports for PyTorch itself: torch.export programs, and weights for torchvision's models."""

from __future__ import annotations

from pathlib import Path

import torch

from retinanet_ext.interop import save_torchvision_weights
from retinanet_ext.models import RetinaNet

from .checkpoint import write_atomically
from .export_modules import ExportedDetector, trace
from .export_report import METADATA_NAME, Exported, ExportOptions, describe_detections


def trace_detector(model: RetinaNet, options: ExportOptions) -> torch.export.ExportedProgram:
    detector = ExportedDetector(model, options.size)
    return trace(detector, options.size, options.batch_size, options.device)


def write_pt2(model: RetinaNet, options: ExportOptions, metadata: str, output: Path) -> Exported:
    """The detector as `torch.export.load` reads it, with `metadata` as an extra file."""
    program = trace_detector(model, options)
    write_atomically(output, lambda stream: torch.export.save(program, stream, extra_files={METADATA_NAME: metadata}))
    usage = (
        f"import torch, retinanet_ext; detector = torch.export.load({str(output)!r}).module()\n"
        f"boxes, scores, labels, counts = detector({options.example})"
    )
    return Exported(output, options.takes, describe_detections(model, options), usage)


def write_torchvision(model: RetinaNet, options: ExportOptions, metadata: str, output: Path) -> Exported:
    """The weights, as a state dict of torchvision's names."""
    save_torchvision_weights(output, model)
    usage = (
        "import torch  # model: torchvision's RetinaNet of this backbone, norm and anchors, see docs/export.md\n"
        f"model.load_state_dict(torch.load({str(output)!r}, weights_only=True))"
    )
    gives = f"a state dict of {len(model.state_dict())} tensors, {model.num_classes} classes"
    return Exported(output, "nothing: these are weights alone", gives, usage)
