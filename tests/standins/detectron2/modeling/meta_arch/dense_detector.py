import torch
from torch import nn

from ...structures import Boxes, ImageList, Instances
from ..postprocessing import detector_postprocess


class DenseDetector(nn.Module):
    def __init__(self, backbone, head, head_in_features=None, *, pixel_mean, pixel_std):
        super().__init__()
        self.backbone, self.head, self.head_in_features = backbone, head, head_in_features
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @property
    def device(self):
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs):
        images = [(item["image"].to(self.device) - self.pixel_mean) / self.pixel_std for item in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def forward(self, batched_inputs):
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.head_in_features]
        predictions = self.head(features)
        if self.training:
            gt_instances = [item["instances"].to(self.device) for item in batched_inputs]
            return self.forward_training(images, features, predictions, gt_instances)
        results = self.forward_inference(images, features, predictions)
        outputs = []
        for result, item, size in zip(results, batched_inputs, images.image_sizes, strict=True):
            output_size = item.get("height", size[0]), item.get("width", size[1])
            outputs.append({"instances": detector_postprocess(result, *output_size)})
        return outputs

    def _transpose_dense_predictions(self, predictions, dims_per_anchor):
        """Each level [B, A * K, H, W] as [B, H * W * A, K]."""
        return [
            [level.unflatten(1, (-1, columns)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in levels]
            for levels, columns in zip(predictions, dims_per_anchor, strict=True)
        ]

    def _ema_update(self, name, value, initial_value, momentum=0.9):
        updated = getattr(self, name, initial_value) * momentum + value * (1 - momentum)
        setattr(self, name, updated)
        return updated

    def _decode_per_level_predictions(
        self, anchors, pred_scores, pred_deltas, score_thresh, topk_candidates, image_size
    ):
        above = torch.nonzero(pred_scores > score_thresh)  # (anchor, class)
        scores = pred_scores[above[:, 0], above[:, 1]]
        scores, best = scores.topk(min(topk_candidates, len(scores)))
        rows, classes = above[best].unbind(dim=1)
        boxes = self.box2box_transform.apply_deltas(pred_deltas[rows], anchors.tensor[rows])
        return Instances(image_size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)

    def _decode_multi_level_predictions(
        self, anchors, pred_scores, pred_deltas, score_thresh, topk_candidates, image_size
    ):
        levels = [
            self._decode_per_level_predictions(*level, score_thresh, topk_candidates, image_size)
            for level in zip(anchors, pred_scores, pred_deltas, strict=True)
        ]
        return Instances(
            image_size,
            pred_boxes=Boxes.cat([level.pred_boxes for level in levels]),
            scores=torch.cat([level.scores for level in levels]),
            pred_classes=torch.cat([level.pred_classes for level in levels]),
        )
