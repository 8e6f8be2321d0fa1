"""Readers: what they yield, and that every kind of broken input is reported with file and object."""

import json

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

from retinanet_ext.data import (  # noqa: E402
    CocoDataset,
    DatasetError,
    UnreadableImageError,
    VocDataset,
    generate_shapes,
    open_dataset,
    summarise,
)


def write_image(path, size=(40, 30), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def write_voc(root, annotations, split="train", size=(40, 30), listed=None):
    """`annotations`: name -> list of (class, (xmin, ymin, xmax, ymax), difficult)."""
    for name, objects in annotations.items():
        write_image(root / "JPEGImages" / f"{name}.png", size)
        items = "".join(
            f"<object><name>{cls}</name><difficult>{int(difficult)}</difficult><bndbox>"
            f"<xmin>{b[0]}</xmin><ymin>{b[1]}</ymin><xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
            for cls, b, difficult in objects
        )
        xml = root / "Annotations" / f"{name}.xml"
        xml.parent.mkdir(parents=True, exist_ok=True)
        xml.write_text(
            f"<annotation><filename>{name}.png</filename><size><width>{size[0]}</width><height>{size[1]}"
            f"</height><depth>3</depth></size>{items}</annotation>"
        )
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("\n".join(listed or annotations) + "\n")
    return root


def write_coco(root, images, annotations, categories=((7, "cat"), (3, "dog")), size=(40, 30)):
    for image in images:
        if isinstance(image, dict) and isinstance(image.get("file_name"), str):
            write_image(root / "images" / image["file_name"], size)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in categories],
    }
    (root / "a.json").write_text(json.dumps(content))
    return root / "a.json"


def entry(image_id, name, width=40, height=30):
    return {"id": image_id, "file_name": name, "width": width, "height": height}


def annotation(annotation_id, image_id, category_id, bbox, **more):
    return {"id": annotation_id, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def the_problem(dataset, *parts):
    """The one problem whose text holds all `parts`; the set has no other."""
    assert len(dataset.problems) == 1, [str(p) for p in dataset.problems]
    text = str(dataset.problems[0])
    for part in parts:
        assert part in text, text
    return dataset.problems[0]


def test_voc_yields_image_boxes_labels(tmp_path):
    root = write_voc(
        tmp_path,
        {"a": [("dog", (1, 2, 20, 30), False), ("cat", (0, 0, 40, 30), True)], "b": []},
    )
    dataset = VocDataset(root, "train")
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.problems == []
    image, target = dataset[0]
    assert image.shape == (3, 30, 40)
    assert image.dtype == torch.float32
    expected = np.asarray(Image.open(root / "JPEGImages" / "a.png"), np.float32) / 255
    assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1))
    assert target["boxes"].tolist() == [[1, 2, 20, 30], [0, 0, 40, 30]]  # as they stand, no shift by one
    assert target["labels"].tolist() == [1, 0]
    assert target["ignore"].tolist() == [False, True]
    assert target["image_id"] == 1
    assert target["orig_size"] == (30, 40)
    assert dataset[1][1]["boxes"].shape == (0, 4)
    assert dataset[1][1]["labels"].dtype == torch.int64


def test_a_data_set_without_any_of_the_models_classes(tmp_path):
    root = write_voc(tmp_path / "voc", {"a": [("dog", (0, 0, 10, 10), 0), ("cat", (5, 5, 20, 20), 0)]})
    own = r"the model has cow, ant; the data set has cat, dog"
    with pytest.raises(DatasetError, match=r"voc \[train\]: none of its classes is one of the model's: " + own):
        VocDataset(root, "train", class_names=["cow", "ant"])
    json_file = write_coco(tmp_path, [entry(1, "1.png")], [])
    many = [f"c{index}" for index in range(30)]
    with pytest.raises(DatasetError, match=r"a\.json: none .* c18, c19 and 10 more; the data set has cat, dog$"):
        CocoDataset(json_file, tmp_path / "images", class_names=many)
    # One in common is enough, and what has no classes has none that could be wrong.
    assert len(CocoDataset(json_file, tmp_path / "images", class_names=["cow", "dog"])) == 1
    empty = write_voc(tmp_path / "empty", {"a": []})
    assert VocDataset(empty, "train", class_names=["cow"]).num_objects == 0


def test_voc_class_names_given(tmp_path):
    root = write_voc(tmp_path, {"a": [("dog", (1, 2, 20, 28), False), ("eel", (1, 2, 20, 28), False)]})
    dataset = VocDataset(root, "train", class_names=["cow", "dog"])
    assert dataset[0][1]["labels"].tolist() == [1]
    the_problem(dataset, "a.xml", "object 2 (eel)", "unknown class: 'eel'")


def test_coco_maps_category_ids_in_ascending_order(tmp_path):
    json_file = write_coco(
        tmp_path,
        [entry(5, "a.png"), entry(2, "b.png")],
        [annotation(1, 5, 7, [1, 2, 10, 20]), annotation(2, 5, 3, [0, 0, 5, 5], iscrowd=1, area=12)],
    )
    dataset = CocoDataset(json_file, tmp_path / "images")
    assert dataset.class_names == ["dog", "cat"]
    assert dataset.category_ids == [3, 7]
    _, target = dataset[0]
    assert target["boxes"].tolist() == [[1, 2, 11, 22], [0, 0, 5, 5]]
    assert target["labels"].tolist() == [1, 0]
    assert target["ignore"].tolist() == [False, True]
    assert target["image_id"] == 5
    assert dataset.records[0].area.tolist() == [200, 12]
    assert dataset.problems == []


def test_coco_classes_of_another_set_are_matched_by_name(tmp_path):
    json_file = write_coco(
        tmp_path, [entry(1, "a.png")], [annotation(1, 1, 3, [0, 0, 5, 5]), annotation(2, 1, 7, [0, 0, 5, 5])]
    )
    dataset = CocoDataset(json_file, tmp_path / "images", class_names=["ant", "dog"])
    assert dataset[0][1]["labels"].tolist() == [1]
    assert dataset.category_ids == [8, 3]
    the_problem(dataset, "a.json", "annotation 2 (image a.png)", "unknown class: 'cat'")


@pytest.mark.parametrize(
    ("box", "message", "kept"),
    [
        ((5, 5, 5, 9), "degenerate box: (5, 5, 5, 9) has width 0", None),
        ((5, 9, 8, 5), "degenerate box", None),
        ((50, 5, 60, 9), "box outside the image", None),
        ((-9, 5, 0, 9), "box outside the image", None),
        ((-2, 5, 50, 9), "box partly outside the image", [0, 5, 40, 9]),
        (("nan", 5, 50, 9), "box is not finite", None),
        ((1, 2, "inf", 9), "box is not finite", None),
        (("x", 5, 50, 9), "box is not four numbers", None),
        (("", 5, 50, 9), "box is not four numbers", None),
    ],
)
def test_voc_reports_bad_boxes(tmp_path, box, message, kept):
    root = write_voc(tmp_path, {"a": [("dog", (1, 1, 9, 9), False), ("dog", box, False)]})
    dataset = VocDataset(root, "train")
    problem = the_problem(dataset, str(root / "Annotations" / "a.xml"), message)
    assert problem.object == "object 2 (dog)"
    assert dataset[0][1]["boxes"].tolist() == [[1, 1, 9, 9]] + ([kept] if kept else [])


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        ([5, 5, 0, 9], "degenerate box"),
        ([5, 5, -3, 9], "degenerate box"),
        ([50, 5, 3, 9], "box outside the image"),
        ([5, 5, float("nan"), 9], "box is not finite"),
        ([5, 5, 3], "box is not four numbers"),
        (None, "box is not four numbers"),
        ("5 5 3 9", "box is not four numbers"),
        ([True, 5, 3, 9], "box is not four numbers"),
        ([5, 5, 1e30, 9], "box partly outside the image"),
    ],
)
def test_coco_reports_bad_boxes(tmp_path, bbox, message):
    json_file = write_coco(tmp_path, [entry(1, "a.png")], [annotation(4, 1, 3, bbox)])
    the_problem(CocoDataset(json_file, tmp_path / "images"), "a.json", "annotation 4", "a.png", message)


def test_rounding_beyond_the_border_is_no_problem(tmp_path):
    json_file = write_coco(tmp_path, [entry(1, "a.png")], [annotation(4, 1, 3, [30.005, 0, 10.004, 30.01])])
    dataset = CocoDataset(json_file, tmp_path / "images")
    assert dataset.problems == []
    assert dataset[0][1]["boxes"][0, 2:].tolist() == [40, 30]


def test_clipping_shrinks_the_annotated_area(tmp_path):
    json_file = write_coco(tmp_path, [entry(1, "a.png")], [annotation(4, 1, 3, [-10, 0, 20, 10], area=190)])
    assert CocoDataset(json_file, tmp_path / "images").records[0].area.tolist() == [100]


def test_missing_and_broken_images_are_left_out(tmp_path):
    names = ("good", "missing", "text", "empty")
    root = write_voc(tmp_path, {name: [("dog", (1, 1, 9, 9), False)] for name in names})
    (root / "JPEGImages" / "missing.png").unlink()
    (root / "JPEGImages" / "text.png").write_text("not an image")
    (root / "JPEGImages" / "empty.png").write_bytes(b"")
    dataset = VocDataset(root, "train")
    assert [record.path.stem for record in dataset.records] == ["good"]
    found = {problem.file.rsplit("/", 1)[1].split(".")[0]: problem.message for problem in dataset.problems}
    assert found["missing"].startswith("missing image: ")
    assert found["text"].startswith("broken image: ")
    assert found["empty"].startswith("broken image: ")
    assert len(dataset.problems) == 3


def test_truncated_pixels_are_found_by_decode_or_at_reading(tmp_path):
    root = write_voc(tmp_path, {name: [("dog", (1, 1, 9, 9), False)] for name in ("good", "cut")})
    path = root / "JPEGImages" / "cut.png"
    path.write_bytes(path.read_bytes()[:-900])
    dataset = VocDataset(root, "train")
    assert dataset.problems == []
    with pytest.raises(UnreadableImageError, match=r"cut\.png: broken image"):
        dataset[1]
    dataset = VocDataset(root, "train", verify="decode")
    the_problem(dataset, "cut.png", "broken image")
    assert len(dataset) == 1


def test_missing_and_broken_xml(tmp_path):
    root = write_voc(tmp_path, {name: [("dog", (1, 1, 9, 9), False)] for name in ("good", "gone", "bad")})
    (root / "Annotations" / "gone.xml").unlink()
    (root / "Annotations" / "bad.xml").write_text("<annotation><object>")
    dataset = VocDataset(root, "train")
    assert len(dataset) == 1
    assert dataset.records[0].image_id == 1
    texts = sorted(str(problem) for problem in dataset.problems)
    assert "bad.xml: broken annotation" in texts[0]
    assert "gone.xml: missing annotation" in texts[1]


def test_size_that_differs_leaves_the_image_out(tmp_path):
    json_file = write_coco(
        tmp_path,
        [entry(1, "a.png"), entry(2, "b.png", 80, 60), entry(3, "c.png", None, 0)],
        [annotation(i, i, 3, [1, 1, 5, 5]) for i in (1, 2, 3)],
    )
    dataset = CocoDataset(json_file, tmp_path / "images")
    assert [record.image_id for record in dataset.records] == [1, 3]
    texts = [str(problem) for problem in dataset.problems]
    assert "b.png: size differs: the image is 40x30, the annotation says 80x60" in texts[0]
    assert "c.png: no usable size in the annotation" in texts[1]


def test_exif_orientation_that_explains_the_size(tmp_path):
    json_file = write_coco(tmp_path, [entry(1, "a.jpg", 30, 40)], [annotation(1, 1, 3, [1, 1, 5, 35])])
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "images" / "a.jpg", (40, 30), exif=exif)
    dataset = CocoDataset(json_file, tmp_path / "images")
    the_problem(dataset, "a.jpg", "EXIF orientation")
    image, target = dataset[0]
    assert image.shape == (3, 40, 30)
    assert target["orig_size"] == (40, 30)
    assert target["boxes"].tolist() == [[1, 1, 6, 36]]


def test_coco_duplicates_and_strays(tmp_path):
    same = annotation(1, 1, 3, [1, 1, 5, 5])
    json_file = write_coco(
        tmp_path,
        [entry(1, "a.png"), entry(1, "b.png"), entry(2, "a.png"), {"file_name": "c.png"}, {"id": 9}, "x"],
        [
            same,
            dict(same),
            annotation(1, 1, 7, [2, 2, 5, 5]),
            annotation(2, 99, 3, [1, 1, 5, 5]),
            annotation(3, 1, 42, [1, 1, 5, 5]),
            annotation(4, [1], 3, [1, 1, 5, 5]),
            "stray",
        ],
        categories=((7, "cat"), (3, "dog"), (3, "dog"), (8, "cat")),
    )
    dataset = CocoDataset(json_file, tmp_path / "images")
    texts = [str(problem).removeprefix(f"{json_file}: ") for problem in dataset.problems]
    assert texts == [
        "category 3 of the list: duplicate id: category 3 is there already; left out",
        "category 4 of the list: duplicate category name: 'cat' has the ids 7 and 8; merged into one class",
        "image 1: duplicate id: 'b.png' has the id of 'a.png'; left out",
        "image 2: duplicate file name: 'a.png' is image 1 too; both are kept",
        "image 4 of the list: broken image entry: no integer id in {'file_name': 'c.png'}",
        "image 9: broken image entry: it has no file_name",
        "image 6 of the list: broken image entry: no integer id in 'x'",
        "annotation 1: duplicate id: the same annotation again; left out",
        "annotation 1: duplicate id: another annotation has it too; both are kept",
        "annotation 2: unknown image: no image has the id 99; left out",
        "annotation 4: unknown image: no image has the id '[1]'; left out",
        "annotation 7 of the list: broken annotation: not an object",
        "annotation 3 (image a.png): unknown class: 'category id 42'; the object is left out",
    ]
    assert dataset[0][1]["boxes"].tolist() == [[1, 1, 6, 6], [2, 2, 7, 7]]
    assert len({a["id"] for a in dataset.to_coco()["annotations"]}) == 2


def test_voc_name_listed_twice(tmp_path):
    root = write_voc(tmp_path, {"a": [], "b": []}, listed=["a", "b", "a"])
    dataset = VocDataset(root, "train")
    assert len(dataset) == 2
    the_problem(dataset, "train.txt", "line 3", "duplicate id: 'a' is on line 1 too")


def test_voc_list_of_one_class(tmp_path):
    root = write_voc(tmp_path, {"a": [], "b": []}, listed=["a  1", "b -1"])
    assert [record.path.stem for record in VocDataset(root, "train").records] == ["a", "b"]


def test_grey_palette_and_alpha_images_become_rgb(tmp_path):
    root = write_voc(tmp_path, {name: [] for name in ("grey", "palette", "alpha", "deep")})
    folder = root / "JPEGImages"
    grey = np.arange(1200, dtype=np.uint8).reshape(30, 40)
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey).convert("P").save(folder / "palette.png")
    Image.fromarray(grey).convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    dataset = VocDataset(root, "train", class_names=["x"])
    for index in range(4):
        image = dataset[index][0]
        assert image.shape == (3, 30, 40)
        assert torch.allclose(image[0], torch.from_numpy(grey).float() / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a json file"),
        ("[]", "not a COCO data set: expected an object, got list"),
        ('{"images": [], "annotations": []}', 'it holds no list "categories"'),
        ('{"images": [], "annotations": [], "categories": []}', "no usable image"),
    ],
)
def test_coco_unusable_json(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        CocoDataset(tmp_path / "a.json", tmp_path)


def test_sets_that_are_not_there(tmp_path):
    root = write_voc(tmp_path / "voc", {"a": []})
    with pytest.raises(DatasetError, match=r"test\.txt: no such split; there are train"):
        open_dataset(root, "test")
    with pytest.raises(DatasetError, match="no such file or folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="not a data set: expected a COCO json file"):
        open_dataset(tmp_path)
    (root / "JPEGImages" / "a.png").unlink()
    with pytest.raises(DatasetError, match="no usable image") as caught:
        open_dataset(root, "train")
    assert "missing image" in str(caught.value)


def test_open_dataset_finds_each_form(tmp_path):
    voc = write_voc(tmp_path / "voc", {"a": []})
    assert isinstance(open_dataset(voc), VocDataset)
    (tmp_path / "coco").mkdir()
    json_file = write_coco(tmp_path / "coco", [entry(1, "a.png")], [])
    assert len(open_dataset(json_file)) == 1
    assert len(open_dataset(json_file, images=tmp_path / "coco" / "images")) == 1
    shapes = generate_shapes(tmp_path / "shapes", train_images=2, val_images=1, image_size=48)
    assert len(open_dataset(shapes)) == 2
    assert len(open_dataset(shapes, "val")) == 1


def test_summary_counts_kinds(tmp_path):
    root = write_voc(tmp_path, {"a": [("dog", (5, 5, 5, 9), False)] * 3 + [("dog", (0, 0, 90, 9), False)]})
    lines = summarise(VocDataset(root, "train").problems, examples=1)
    assert lines[0] == "3 x degenerate box"
    assert "object 1 (dog)" in lines[1]
    assert lines[2] == "1 x box partly outside the image"


def test_shapes_are_reproducible_and_clean(tmp_path):
    first = generate_shapes(tmp_path / "a", train_images=6, val_images=2, image_size=64, seed=3)
    second = generate_shapes(tmp_path / "b", train_images=6, val_images=2, image_size=64, seed=3)
    other = generate_shapes(tmp_path / "c", train_images=6, val_images=2, image_size=64, seed=4)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 10
    assert all((first / f).read_bytes() == (second / f).read_bytes() for f in files)
    assert any((first / f).read_bytes() != (other / f).read_bytes() for f in files)
    for split in ("train", "val"):
        dataset = open_dataset(first, split, verify="decode")
        assert dataset.problems == []
        for record in dataset.records:
            assert (record.boxes >= 0).all()
            assert (record.boxes <= 64).all()
    with pytest.raises(ValueError, match="image_size: expected at least 32 pixels, got 8"):
        generate_shapes(tmp_path / "d", image_size=8)
