"""YOLO data sets: what the reader yields, and that what is wrong is named by file and line."""

import sys

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

from retinanet_ext.data import DatasetError, YoloDataset, names_splits, open_dataset  # noqa: E402


def write_yolo(root, labels, names=("cat", "dog"), split="train", size=(40, 20), **more):
    """`labels`: image name -> text of its label file, None for none."""
    for name, text in labels.items():
        image = root / "images" / split / name
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (90, 120, 150)).save(image)
        if text is not None:
            label = (root / "labels" / split / name).with_suffix(".txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(text)
    content = {"path": ".", split: f"images/{split}", "names": names, **more}
    (root / "data.yaml").write_text(yaml.safe_dump(content))
    return root / "data.yaml"


def test_boxes_and_classes(tmp_path):
    labels = {
        "a.png": "1 0.5 0.5 0.5 0.5\n\n0 0.1 0.25 0.2 0.5\n",
        "b.png": "0 0.25 0.5 0.75 0.5 0.5 1.0\n",
        "empty.png": "",
        "none.png": None,
    }
    dataset = open_dataset(write_yolo(tmp_path, labels, names=["cat", "dog"], nc=2), "train")
    assert isinstance(dataset, YoloDataset)
    assert dataset.problems == []
    assert dataset.class_names == ["cat", "dog"]
    assert [record.path.name for record in dataset.records] == ["a.png", "b.png", "empty.png", "none.png"]
    image, target = dataset[0]
    assert image.shape == (3, 20, 40)
    np.testing.assert_allclose(target["boxes"], [[10, 5, 30, 15], [0, 0, 8, 10]], atol=1e-5)
    assert target["labels"].tolist() == [1, 0]
    # An outline becomes its box.
    np.testing.assert_allclose(dataset[1][1]["boxes"], [[10, 10, 30, 20]], atol=1e-5)
    assert len(dataset[2][1]["boxes"]) == len(dataset[3][1]["boxes"]) == 0
    assert [record.image_id for record in dataset.records] == [1, 2, 3, 4]


def test_names_as_a_mapping_and_classes_of_a_model(tmp_path):
    file = write_yolo(tmp_path, {"a.png": "7 .5 .5 .5 .5\n3 .5 .5 .2 .2\n"}, names={7: "dog", 3: "cat"})
    assert open_dataset(file, "train").class_names == ["cat", "dog"]
    dataset = open_dataset(file, "train", class_names=["bird", "dog"])
    assert dataset.records[0].labels.tolist() == [1]
    (problem,) = dataset.problems
    assert problem.object == "line 2 (cat)"
    assert "unknown class: 'cat'" in problem.message
    with pytest.raises(DatasetError, match="none of its classes is one of the model's"):
        open_dataset(file, "train", class_names=["x", "y"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.5", "broken label: expected class cx cy width height"),
        ("0 0.5 0.5 0.5 0.5 0.9", "broken label: expected class cx cy width height"),
        ("0 0.5 x 0.5 0.5", "broken label: expected numbers"),
        ("0.5 0.5 0.5 0.5 0.5", "broken label: expected a whole class number, got '0.5'"),
        ("nan 0.5 0.5 0.5 0.5", "broken label: expected a whole class number, got 'nan'"),
        ("0 20 10 20 10", "broken label: expected parts of the image from 0 to 1"),
        ("2 0.5 0.5 0.5 0.5", "unknown class: 'class 2'"),
        ("-1 0.5 0.5 0.5 0.5", "unknown class: 'class -1'"),
        ("0 0.5 0.5 0 0.5", "degenerate box"),
        ("0 nan 0.5 0.5 0.5", "box is not finite"),
        ("0 0.5 0.5 0.5 0.5", "duplicate line: it is line 1 too"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    dataset = open_dataset(write_yolo(tmp_path, {"a.png": f"0 0.5 0.5 0.5 0.5\n{line}\n"}), "train")
    (problem,) = dataset.problems
    assert problem.file == str(tmp_path / "labels" / "train" / "a.txt")
    assert problem.object.split(" (")[0] == "line 2"
    assert problem.message.startswith(message)
    assert dataset.num_objects == 1


def test_a_box_over_the_edge_is_clipped_and_named(tmp_path):
    dataset = open_dataset(write_yolo(tmp_path, {"a.png": "1 0.9 0.5 0.4 0.5\n"}), "train")
    np.testing.assert_allclose(dataset.records[0].boxes, [[28, 5, 40, 15]], atol=1e-4)
    assert "box partly outside the image" in str(dataset.problems[0])


def test_images_are_found_by_list_folder_and_parent(tmp_path):
    file = write_yolo(tmp_path, {"a.png": "0 .5 .5 .5 .5", "b.png": "1 .5 .5 .5 .5"})
    (tmp_path / "list.txt").write_text("images/train/b.png\n\nimages/train/none.png\n")
    content = yaml.safe_load(file.read_text())
    content.update(val="list.txt", test="../images/train", both=["images/train", "list.txt"])
    del content["path"]
    file.write_text(yaml.safe_dump(content))
    val = open_dataset(tmp_path, "val")  # the folder with data.yaml in it
    assert [record.path.name for record in val.records] == ["b.png"]
    assert "missing image" in str(val.problems[0])
    assert len(open_dataset(file, "test")) == 2
    both = open_dataset(file, "both")
    assert len(both) == 2
    assert any("duplicate image" in str(problem) for problem in both.problems)
    assert names_splits(file)
    assert not names_splits(tmp_path / "a.json")


def test_labels_speak_of_the_upright_image(tmp_path):
    file = write_yolo(tmp_path, {"a.jpg": "0 0.5 0.25 1 0.5\n"}, size=(40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "images" / "train" / "a.jpg", exif=exif)
    dataset = open_dataset(file, "train")
    image, target = dataset[0]
    assert image.shape == (3, 40, 20)
    assert target["boxes"].tolist() == [[0, 0, 20, 20]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a\n", "not a yaml file"),
        ("- a\n", "expected the keys names, train and val"),
        ("train: x\n", "expected the keys names, train and val"),
        ("names: []\ntrain: images/train\n", "names: expected at least one class"),
        ("names: {a: b}\ntrain: images/train\n", "names: expected a list of names"),
        ("names: [a, a]\ntrain: images/train\n", "names: expected names that differ"),
        ("names: [a]\nval: images/train\n", "no such split: train; there are val"),
        ("names: [a]\ntrain: nowhere\n", "train: no such file or folder"),
        ("names: [a]\ntrain: bare\n", "none of its 1 images has a label file; the first would be"),
        ("names: [a]\ntrain: hollow\n", "no usable image"),
    ],
)
def test_a_yaml_that_cannot_be_used(text, message, tmp_path):
    write_yolo(tmp_path, {"a.png": "0 .5 .5 .5 .5"})
    (tmp_path / "bare").mkdir()
    (tmp_path / "hollow").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "bare" / "a.png")
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DatasetError, match=message) as error:
        open_dataset(tmp_path / "data.yaml", "train")
    assert str(tmp_path / "data.yaml") in str(error.value)


def test_a_count_of_classes_that_is_not_theirs_is_reported(tmp_path):
    dataset = open_dataset(write_yolo(tmp_path, {"a.png": "0 .5 .5 .5 .5"}, nc=80), "train")
    assert "number of classes: nc is 80, names has 2" in str(dataset.problems[0])


def test_without_pyyaml_its_command_is_named(tmp_path, monkeypatch):
    file = write_yolo(tmp_path, {"a.png": "0 .5 .5 .5 .5"})
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r'PyYAML is needed .* pip install "retinanet_ext\[train\]"'):
        open_dataset(file, "train")
