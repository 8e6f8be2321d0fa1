"""The compiled export: a minute of compiling, so that one package serves all its tests."""

import json
import subprocess
import sys

import pytest
import torch
from busy_checkpoint import model_config, save_busy_checkpoint

from retinanet_ext.cli import main
from retinanet_ext.engine.checkpoint import load_model
from retinanet_ext.engine.export import export
from retinanet_ext.engine.export_modules import ExportedDetector
from retinanet_ext.engine.export_programs import check_compiler
from retinanet_ext.engine.settings import SettingError

SIZE = (64, 64)
CONFIG = model_config()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_busy_checkpoint(tmp_path_factory.mktemp("weights"), CONFIG)


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    try:
        check_compiler()
    except SettingError as error:
        pytest.skip(str(error))
    return export(weights, "aoti", tmp_path_factory.mktemp("aoti") / "detector.pt2")


@pytest.mark.parametrize("batch", [1, 3])
def test_detections_are_the_model_s(exported, weights, batch):
    """At most twice as far from float64 as PyTorch's own float32 is, channels last: the compiler's choice of layout."""
    package = torch._inductor.aoti_load_package(str(exported.path))
    torch.manual_seed(4)
    images = torch.rand(batch, 3, *SIZE)
    outputs = package(images)
    own = ExportedDetector(load_model(weights)[0], SIZE)
    exact = ExportedDetector(load_model(weights)[0], SIZE).double()
    with torch.no_grad():
        expected, true = own(images.to(memory_format=torch.channels_last)), exact(images.double())
    # Two scores that are nearer to each other than their error would trade places.
    assert (true[1][:, :-1] - true[1][:, 1:]).min() > 2e-5
    for found, rounded, value in zip(outputs, expected, true, strict=True):
        assert found.dtype == rounded.dtype
        if not found.is_floating_point():
            assert torch.equal(found, rounded)
        assert (found - value).abs().max() <= 2 * (rounded - value).abs().max()
    assert outputs[3].min() > 10


def test_classes_travel_along(exported):
    metadata = torch._inductor.aoti_load_package(str(exported.path)).get_metadata()
    content = json.loads(metadata["retinanet_ext.json"])
    assert content["class_names"] == ["disc", "square", "star"]
    assert content["model_config"] == CONFIG


def test_the_report_s_lines_run_and_refuse_what_they_must(exported):
    first, second = exported.usage.splitlines()
    other_size = second.replace("64, 64)", "96, 64)")
    other_layout = second.replace("rand(1, 3, 64, 64)", "rand(2, 3, 64, 64).to(memory_format=torch.channels_last)")
    assert len({second, other_size, other_layout}) == 3
    refused = "\n".join(
        f"try:\n    {line}\nexcept RuntimeError:\n    print('refused')" for line in (other_size, other_layout)
    )
    code = "\n".join([first, second, "print(counts.dtype)", refused])
    # Not in a checkout, whose package is not built.
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=exported.path.parent
    )
    assert done.stdout.splitlines() == ["torch.int32", "refused", "refused"], done.stderr
    for what in ("unmatched dim value", "unmatched stride value"):
        assert what in done.stderr


def test_needs_a_compiler(weights, tmp_path, capsys):
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    try:
        with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
            assert main(["export", str(weights), "--format", "aoti", "--output", str(tmp_path / "out.pt2")]) == 2
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()
    assert "--format: aoti needs a C++ compiler, and none was found" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_open_sizes_are_refused(weights, tmp_path):
    with pytest.raises(SettingError, match="dynamic_size: not for the format aoti"):
        export(weights, "aoti", tmp_path / "out.pt2", dynamic_size=True)
