"""`retinanet-ext check-data`: every form of data set read through, what is wrong named, the rest counted and drawn."""

import json
import shutil

import pytest

for module in ("PIL.Image", "matplotlib", "yaml"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from PIL import Image  # noqa: E402

from retinanet_ext.cli import main  # noqa: E402
from retinanet_ext.data import find_splits, generate_shapes  # noqa: E402


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("data"), train_images=4, val_images=2, image_size=32)


@pytest.fixture
def data(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path / "set")
    return tmp_path / "set"


def run(capsys, *argv):
    status = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_clean_set(data, tmp_path, capsys):
    status, out, err = run(capsys, "check-data", data, "--run-dir", tmp_path / "out")
    assert (status, err) == (0, "")
    assert "4 images" in out
    assert "2 images" in out
    assert f"0 problems; pictures: {tmp_path / 'out'}\nnext: retinanet-ext anchors {data}" in out
    one, images = data / "annotations" / "instances_train.json", data / "train"
    shown = run(capsys, "check-data", one, "--images", images, "--run-dir", tmp_path / "one")[1]
    assert f"next: retinanet-ext anchors {one} --images {images}\n" in shown
    content = json.loads(one.read_text())
    discs = [a for a in content["annotations"] if a["category_id"] == 1]
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["disc"])
    assert row == ["disc", str(len({a["image_id"] for a in discs})), str(len(discs)), "0"]
    names = {
        "problems.txt",
        *(f"{split}_{kind}" for split in ("train", "val") for kind in ("labels.png", "samples.jpg")),
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    with Image.open(tmp_path / "out" / "train_samples.jpg") as picture:
        assert min(picture.size) > 400


def test_everything_that_is_wrong_is_named(data, tmp_path, capsys):
    json_file = data / "annotations" / "instances_train.json"
    content = json.loads(json_file.read_text())
    content["annotations"][0]["bbox"] = [3, 3, 0, 5]
    content["annotations"][1]["bbox"] = [500, 500, 5, 5]
    json_file.write_text(json.dumps(content))
    # Its header is whole: only decoding finds it.
    broken = data / "train" / "000002.jpg"
    broken.write_bytes(broken.read_bytes()[:-400])
    shutil.copy(data / "train" / "000001.jpg", data / "val" / "000001.jpg")
    status, out, err = run(capsys, "check-data", data, "--run-dir", tmp_path / "out")
    assert status == 1
    problems = (tmp_path / "out" / "problems.txt").read_text()
    first, second = (f"annotation {content['annotations'][i]['id']} " for i in (0, 1))
    for text in (
        f"{json_file}: {first}",
        f"{json_file}: {second}",
        "degenerate box",
        "box outside the image",
        f"{broken}: broken image",
        f"{data / 'val' / '000001.jpg'}: val: image in two splits: it is {data / 'train' / '000001.jpg'} of train too",
    ):
        assert text in problems
        assert text in out
    assert f"4 problems, all in {tmp_path / 'out' / 'problems.txt'}" in err


def test_splits_that_are_asked_for_and_a_file_twice(data, tmp_path, capsys):
    shutil.copy(data / "train" / "000001.jpg", data / "train" / "000003.jpg")
    status, out, _ = run(capsys, "check-data", data, "--split", "train", "--run-dir", tmp_path / "out")
    assert status == 1
    assert f"repeated image: it is {data / 'train' / '000001.jpg'} too" in out
    assert not (tmp_path / "out" / "val_labels.png").exists()
    status, _, err = run(capsys, "check-data", data, "--split", "night", "--run-dir", tmp_path / "none")
    assert status == 1
    assert "split night: " in err
    assert not (tmp_path / "none").exists()


def test_a_folder_that_holds_something_is_left_alone(data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    status, _, err = run(capsys, "check-data", data, "--run-dir", tmp_path / "out")
    assert status == 1
    assert "is not empty" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_splits_of_each_form(data, tmp_path):
    assert find_splits(data) == ["train", "val"]
    assert find_splits(data / "annotations" / "instances_val.json") == ["val"]
    assert find_splits(tmp_path / "nowhere") == []
    lists = tmp_path / "voc" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for name in ("test", "train", "night"):
        (lists / f"{name}.txt").write_text("a\n")
    assert find_splits(tmp_path / "voc") == ["train", "test"]
    (tmp_path / "data.yaml").write_text("names: [a]\nval: x\ntest: y\ntrain:\n")
    assert find_splits(tmp_path / "data.yaml") == find_splits(tmp_path) == ["val", "test"]


def write_yolo(folder):
    for split, count in (("train", 3), ("val", 1)):
        for index in range(count):
            image = folder / "images" / split / f"{index}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (40 * index, 90, 20 if split == "train" else 40)).save(image)
            label = folder / "labels" / split / f"{index}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("0 0.5 0.5 0.5 0.5\n")
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cell]\n")
    return folder / "data.yaml"


def write_voc(folder):
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for index in range(4):
        Image.new("RGB", (32, 32), (40 * index, 90, 20)).save(folder / "JPEGImages" / f"{index}.jpg")
        (folder / "Annotations" / f"{index}.xml").write_text(
            f"<annotation><filename>{index}.jpg</filename><size><width>32</width><height>32</height><depth>3</depth></size>"
            "<object><name>cell</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>24</xmax><ymax>24</ymax></bndbox></object>"
            "</annotation>"
        )
    (folder / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n2\n")
    (folder / "ImageSets" / "Main" / "val.txt").write_text("3\n")
    return folder


@pytest.mark.parametrize("write", [write_yolo, write_voc])
def test_other_layouts_are_checked_trained_on_and_evaluated(write, tmp_path, capsys, without_pictures):
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    (tmp_path / "set").mkdir()
    data = write(tmp_path / "set")
    status, out, _ = run(capsys, "check-data", data, "--run-dir", tmp_path / "checked")
    assert status == 0, out
    status, out, _ = run(capsys, "anchors", data, "--min-size", "32", "--max-size", "32")
    assert status == 0
    assert "cell" in out
    tiny = ("--arch", "resnet18", "--min-size", "32", "--max-size", "32", "--batch-size", "2", "--device", "cpu")
    argv = ("train", data, "--epochs", "1", "--run-dir", tmp_path / "run", *tiny)
    status, out, _ = run(capsys, *argv)
    assert status == 0
    assert "cell" in out
    status, out, _ = run(capsys, "val", tmp_path / "run", data, "--device", "cpu")
    assert status == 0
    assert "cell" in out
