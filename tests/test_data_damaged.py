"""Annotations and images that are wrong in unusual ways: each is reported by file and object, none ends a run."""

import json
import struct

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

from retinanet_ext.data import CocoDataset, DatasetError, UnreadableImageError, VocDataset, make_loader  # noqa: E402
from retinanet_ext.data.dataset import read_image, to_tensor  # noqa: E402
from retinanet_ext.data.extras import MissingExtraError, require  # noqa: E402

HUGE = 10**400


@pytest.fixture
def coco(tmp_path):
    """Makes a COCO set of one image of 40 x 30 pixels from its annotations."""

    def make(*annotations, categories=((3, "dog"), (7, "cat")), class_names=None):
        Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
        content = {
            "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
            "annotations": [{"id": i, "image_id": 1, **more} for i, more in enumerate(annotations, start=1)],
            "categories": [{"id": i, "name": name} for i, name in categories],
        }
        (tmp_path / "a.json").write_text(json.dumps(content))
        return CocoDataset(tmp_path / "a.json", tmp_path, class_names=class_names)

    return make


@pytest.fixture
def voc(tmp_path):
    """Makes a VOC set of one image of 40 x 30 pixels from the text of each object's <difficult>."""

    def make(*difficult, listing="a\n"):
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / "a.png")
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        objects = "".join(
            f"<object><name>dog</name>{'' if text is None else f'<difficult>{text}</difficult>'}{box}</object>"
            for text in difficult
        )
        size = "<size><width>40</width><height>30</height></size>"
        (tmp_path / "Annotations" / "a.xml").write_text(f"<annotation>{size}{objects}</annotation>")
        (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes(
            listing if isinstance(listing, bytes) else listing.encode()
        )
        return VocDataset(tmp_path, "train", class_names=["dog"])

    return make


@pytest.mark.parametrize("class_names", [None, ["dog", "cat"]])
@pytest.mark.parametrize("categories", [((3, "dog"), (7, "cat"), (9, "dog")), ((9, "dog"), (7, "cat"), (3, "dog"))])
def test_two_categories_of_one_name_are_one_class(coco, categories, class_names):
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    from retinanet_ext.engine.evaluate import score_detections

    boxes = ([1, 1, 9, 9], [20, 1, 9, 9], [1, 15, 9, 9])
    annotations = [{"category_id": i, "bbox": box} for i, box in zip((3, 9, 7), boxes, strict=True)]
    dataset = coco(*annotations, categories=categories, class_names=class_names)
    assert dataset.class_names == ["dog", "cat"]
    assert dataset.category_ids == [3, 7]
    assert dataset[0][1]["labels"].tolist() == [0, 0, 1]
    (problem,) = dataset.problems
    assert problem.message.startswith("duplicate category name: 'dog' has the ids ")
    assert problem.message.endswith("merged into one class")
    truth = dataset.to_coco()
    detections = [{key: a[key] for key in ("image_id", "category_id", "bbox")} for a in truth["annotations"]]
    result = score_detections(truth, [{**detection, "score": 0.9} for detection in detections])
    assert [row["objects"] for row in result.per_class] == [2, 1]
    assert result.metrics["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("box", [[HUGE, 1, 5, 5], [1, 1, HUGE, 5], [1.5, 1, HUGE, 5], [1, -HUGE, 5, 5]], ids=range(4))
def test_a_huge_integer_in_a_box_is_reported(coco, box):
    dataset = coco({"category_id": 3, "bbox": box}, {"category_id": 3, "bbox": [1, 1, 5, 5]})
    (problem,) = dataset.problems
    assert "a.json: annotation 1 (image a.png): box is not finite" in str(problem)
    assert len(dataset[0][1]["boxes"]) == 1


def test_an_integer_of_more_digits_than_python_reads_names_the_file(coco, tmp_path):
    coco()
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text.replace('"width": 40', '"width": ' + "9" * 5000))
    with pytest.raises(DatasetError, match=r"a\.json: not a json file"):
        CocoDataset(tmp_path / "a.json", tmp_path)


@pytest.mark.parametrize(
    "area", [HUGE, float("inf"), float("nan"), -4, 0, "12", True, [3]], ids=lambda area: repr(area)[:12]
)
def test_an_area_that_is_no_positive_number_is_reported(coco, area):
    dataset = coco({"category_id": 3, "bbox": [1, 1, 5, 6], "area": area})
    assert dataset.records[0].area.tolist() == [30.0]
    (problem,) = dataset.problems
    assert "a.json: annotation 1 (image a.png): no usable area: " in str(problem)
    assert len(str(problem)) < 400


def test_an_area_that_is_not_given_is_no_problem(coco):
    dataset = coco({"category_id": 3, "bbox": [1, 1, 5, 6]}, {"category_id": 3, "bbox": [1, 1, 5, 6], "area": None})
    assert dataset.problems == []
    assert dataset.records[0].area.tolist() == [30.0, 30.0]


@pytest.mark.parametrize(("value", "crowd"), [(0, False), (1, True), (False, False), (True, True)])
def test_iscrowd(coco, value, crowd):
    dataset = coco({"category_id": 3, "bbox": [1, 1, 5, 6], "iscrowd": value})
    assert dataset.problems == []
    assert dataset[0][1]["ignore"].tolist() == [crowd]


@pytest.mark.parametrize("value", ["0", "1", 2, None, [], float("nan")])
def test_iscrowd_of_another_kind_is_reported(coco, value):
    dataset = coco({"category_id": 3, "bbox": [1, 1, 5, 6], "iscrowd": value})
    assert dataset[0][1]["ignore"].tolist() == [False]
    (problem,) = dataset.problems
    assert f"annotation 1 (image a.png): iscrowd is not 0 or 1: {value!r}; taken as 0" in str(problem)


def test_difficult_by_number_and_by_word(voc):
    dataset = voc("0", "1", "true", "False", " TRUE ", "", None)
    assert dataset.problems == []
    assert dataset[0][1]["ignore"].tolist() == [False, True, True, False, True, False, False]


def test_difficult_of_another_kind_is_reported(voc):
    dataset = voc("1", "yes", "2")
    assert dataset[0][1]["ignore"].tolist() == [True, False, False]
    assert len(dataset.problems) == 2
    assert "a.xml: object 2 (dog): difficult is not 0 or 1: 'yes'; taken as 0" in str(dataset.problems[0])


def test_a_byte_order_mark_is_no_part_of_a_list_or_a_json(voc, coco, tmp_path):
    dataset = voc("0", listing=b"\xef\xbb\xbfa\n")
    assert dataset.problems == []
    assert len(dataset) == 1
    coco()
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.json").read_bytes())
    assert len(CocoDataset(tmp_path / "a.json", tmp_path)) == 1


# What Pillow's decoders raise for damaged files, beside OSError.
RAISED = [
    TypeError("'<' not supported between instances of 'tuple' and 'int'"),
    struct.error("unpack requires a buffer of 4 bytes"),
    IndexError("list index out of range"),
    KeyError(258),
    ZeroDivisionError("division by zero"),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_the_decoder_raises_is_a_broken_image(coco, monkeypatch, error):
    dataset = coco()

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", fail)
        with pytest.raises(UnreadableImageError, match=r"a\.png: broken image: ") as caught:
            dataset[0]
        assert type(error).__name__ in str(caught.value) or str(error) in str(caught.value)
        (batch,) = make_loader(dataset, 1, train=False)
        assert len(batch.problems) == 1
        with pytest.raises(DatasetError, match=r"no usable image:\n.*broken image"):
            CocoDataset(dataset.name, dataset.records[0].path.parent, verify="decode")
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.open", fail)
        with pytest.raises(DatasetError, match=r"no usable image:\n.*broken image"):
            CocoDataset(dataset.name, dataset.records[0].path.parent)


def test_memory_errors_and_missing_packages_are_not_the_images_fault(coco, monkeypatch):
    dataset = coco()
    for error in (MemoryError("out of memory"), MissingExtraError("Pillow is needed")):

        def fail(*args, error=error, **kwargs):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("PIL.ImageFile.ImageFile.load", fail)
            with pytest.raises(type(error)):
                dataset[0]
            with pytest.raises(type(error)):
                CocoDataset(dataset.name, dataset.records[0].path.parent, verify="decode")


def test_a_jpeg_whose_exif_cannot_be_written_back(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x0102] = 6, 8
    path = tmp_path / "a.jpg"
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    content = path.read_bytes()
    order = ">" if content[content.index(b"Exif\0\0") + 6 :].startswith(b"MM") else "<"
    # The number of bits becomes a text; turning the image upright writes its tags anew, this one as a number.
    entry = content.index(struct.pack(f"{order}H", 0x0102)) + 2
    path.write_bytes(content[:entry] + struct.pack(f"{order}HL4s", 2, 4, b"text") + content[entry + 10 :])
    assert read_image(path).size == (40, 30)
    with pytest.raises(UnreadableImageError, match=r"a\.jpg: broken image: ") as caught:
        read_image(path, upright=True)
    assert isinstance(caught.value.__cause__, struct.error)


def test_integer_pixels_of_32_bits_hold_16(tmp_path):
    values = np.arange(12, dtype=np.int32).reshape(3, 4) * 5957 + 8  # to 65535
    for name, pixels in (("deep", values), ("more", values + 1), ("less", values - 9)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.tif")
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "short.tif")
    assert Image.open(tmp_path / "deep.tif").mode == "I"
    deep = to_tensor(read_image(tmp_path / "deep.tif"))
    assert torch.allclose(deep[0], torch.from_numpy(values / 65535.0).float(), atol=1e-6)
    assert torch.equal(deep, to_tensor(read_image(tmp_path / "short.tif")))
    for name in ("more", "less"):
        with pytest.raises(UnreadableImageError, match=rf"{name}\.tif: .*integer pixels from .* expected 0 to 65535"):
            read_image(tmp_path / f"{name}.tif")


@pytest.mark.parametrize("bad", [1.001, -0.5, float("nan"), float("inf")])
def test_float_pixels_are_0_to_1(tmp_path, bad):
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert torch.allclose(to_tensor(read_image(tmp_path / "a.tif"))[2], torch.from_numpy(values), atol=1e-6)
    values[1, 1] = bad
    Image.fromarray(values).save(tmp_path / "b.tif")
    with pytest.raises(UnreadableImageError, match=r"b\.tif: .*float pixels from .* expected 0 to 1"):
        read_image(tmp_path / "b.tif")


def test_pixels_out_of_range_are_found_when_the_set_is_decoded(coco, tmp_path):
    dataset = coco()
    Image.fromarray(np.full((30, 40), 200, np.float32)).save(tmp_path / "a.png", format="TIFF")
    with pytest.raises(DatasetError, match="float pixels from 200 to 200, expected 0 to 1"):
        CocoDataset(dataset.name, tmp_path, verify="decode")


def test_a_missing_extra_names_the_package_as_it_is_installed():
    with pytest.raises(MissingExtraError, match=r'pip install "retinanet_ext\[train\]"'):
        require("no_such_package_anywhere")
