"""Every picture of an evaluation, in one call."""

from pathlib import Path

from retinanet_ext.data import DetectionDataset

from .evaluate import Evaluation
from .matches import match_detections
from .plots_evaluation import plot_confusion_matrix, plot_precision_recall, plot_scores
from .sheets import SCORE, write_validation


def draw_evaluation(folder: Path, result: Evaluation, dataset: DetectionDataset) -> None:
    """PR_curve.png, confusion_matrix.png, scores.png and the sheets val_batch*_{labels,pred}.jpg in `folder`."""
    matches = match_detections(dataset.to_coco(result.image_ids), result.detections, score=SCORE)
    plot_precision_recall(result, folder / "PR_curve.png")
    plot_confusion_matrix(matches, folder / "confusion_matrix.png")
    plot_scores(matches, folder / "scores.png")
    write_validation(dataset, result.detections, folder)
