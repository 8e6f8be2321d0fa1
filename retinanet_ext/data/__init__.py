"""Data sets for detection: readers (COCO json, Pascal VOC folders, YOLO yaml), flips, scale jitter, loaders, and a
generated set of shapes."""

from .coco import CocoDataset
from .dataset import DatasetError, DetectionDataset, ImageRecord, Problem, UnreadableImageError, summarise
from .loader import Batch, EpochShuffle, SampleView, make_loader
from .open import find_splits, names_splits, open_dataset
from .shapes import generate_shapes
from .transforms import Compose, RandomHorizontalFlip, RandomVerticalFlip, ScaleJitter, Transform, sample_rng
from .voc import VocDataset
from .yolo import YoloDataset

__all__ = [
    "Batch",
    "CocoDataset",
    "Compose",
    "DatasetError",
    "DetectionDataset",
    "EpochShuffle",
    "ImageRecord",
    "Problem",
    "RandomHorizontalFlip",
    "RandomVerticalFlip",
    "SampleView",
    "ScaleJitter",
    "Transform",
    "UnreadableImageError",
    "VocDataset",
    "YoloDataset",
    "find_splits",
    "generate_shapes",
    "make_loader",
    "names_splits",
    "open_dataset",
    "sample_rng",
    "summarise",
]
