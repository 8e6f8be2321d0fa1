"""Exports to ONNX: the whole detector in standard operators, or the network alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from retinanet_ext.data.extras import MissingExtraError, require_all
from retinanet_ext.models import RetinaNet

from .checkpoint import write_atomically
from .export_modules import SIZE_DIVISIBLE, ExportedDetector, ExportedHeads, ExportedNetwork, trace
from .export_report import METADATA_NAME, Exported, ExportOptions, describe_detections
from .settings import SettingError

if TYPE_CHECKING:
    import onnx

# What torch's own translations, and those in export_onnx_operators.py, are written in.
OPSET = 18


def check_onnx() -> None:
    """Raises SettingError, with the command that mends it, where a package is missing."""
    try:
        require_all("onnx", "onnxscript", extra="export")
    except MissingExtraError as error:
        raise SettingError("format", str(error)) from error


def write_onnx(model: RetinaNet, options: ExportOptions, metadata: str, output: Path) -> Exported:
    """The detector, from images to boxes."""
    detector = ExportedDetector(model, options.size)
    _write(detector, options, metadata, output)
    usage = _usage(output, options, ", ".join(detector.output_names))
    return Exported(output, options.takes, describe_detections(model, options), usage)


def write_onnx_heads(model: RetinaNet, options: ExportOptions, metadata: str, output: Path) -> Exported:
    """The network without post-processing, and the anchors."""
    heads = ExportedHeads(model, options.size)
    _write(heads, options, metadata, output)
    levels = len(heads.output_names) // 2
    gives = (
        f"{levels} of cls_logits [{options.batch}, n, {model.num_classes}], {levels} of box_deltas "
        f"[{options.batch}, n, 4], a pair for each level, anchors [N, 4] in pixels of the input, N the sum of all n"
    )
    return Exported(output, options.takes, gives, _usage(output, options, "*logits_and_deltas, anchors"))


def _usage(output: Path, options: ExportOptions, names: str) -> str:
    return (
        f"import numpy, onnxruntime; session = onnxruntime.InferenceSession({str(output)!r})\n"
        f'{names} = session.run(None, {{"images": numpy.random.rand{options.example_shape}.astype("float32")}})'
    )


def _write(module: ExportedNetwork, options: ExportOptions, metadata: str, output: Path) -> None:
    import onnx

    module.checks_sides = False  # the graph does, see below: torch takes twice as long to translate the program's own
    program = trace(module, options.size, options.batch_size, options.device)
    model = translate(program, ["images"], module.output_names)
    _name_dimensions(model.graph, options)
    if options.size is None:
        _check_sides(model.graph)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_NAME, metadata
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    write_atomically(output, lambda stream: stream.write(content))


def translate(
    program: torch.export.ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]
) -> onnx.ModelProto:
    """A program, `retinanet_ext::detect` in it or not, in standard operators and with its weights inside."""
    from .export_onnx_operators import detect

    with warnings.catch_warnings(), _quiet("onnx_ir"):
        warnings.simplefilter("ignore")  # of torch's own deprecated calls, nothing that a caller could mend
        translated = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table={torch.ops.retinanet_ext.detect.default: detect},
            input_names=list(input_names),
            output_names=list(output_names),
            verbose=False,
        )
    return translated.model_proto


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the notes of an optimizer on what it left as it was."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _name_dimensions(graph: onnx.GraphProto, options: ExportOptions) -> None:
    """Open dimensions are called batch, height and width, where torch calls them s34 or 32*s87."""
    names = {}
    open_axes = {0: "batch"} if options.batch_size is None else {}
    if options.size is None:
        open_axes |= {2: "height", 3: "width"}
    for axis, name in open_axes.items():
        names[graph.input[0].type.tensor_type.shape.dim[axis].dim_param] = name
    for value in (*graph.input, *graph.output):
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            if dimension.dim_param:
                dimension.dim_param = names.get(dimension.dim_param, f"{value.name}_{axis}")
    # Shapes of values in between are for optimizers, which infer them again, and have the other names.
    del graph.value_info[:]


def _check_sides(graph: onnx.GraphProto) -> None:
    """Sides that are no multiples of 32 are an error where the model runs.

    The translation has lost torch's own check, and boxes would be off by up to a cell. ONNX has no assertion; cutting
    the images into squares of 32 pixels fails where that leaves a remainder, and joining them again changes nothing.
    """
    from onnx import helper

    name = graph.input[0].name
    cut, joined = f"{name}_in_squares", f"{name}_of_squares"
    for node in graph.node:
        for index, value in enumerate(node.input):
            if value == name:
                node.input[index] = joined
    graph.node.insert(0, helper.make_node("SpaceToDepth", [name], [cut], blocksize=SIZE_DIVISIBLE))
    graph.node.insert(1, helper.make_node("DepthToSpace", [cut], [joined], blocksize=SIZE_DIVISIBLE, mode="DCR"))
