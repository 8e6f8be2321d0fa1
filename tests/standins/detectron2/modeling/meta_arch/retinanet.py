import torch
from fvcore.nn import sigmoid_focal_loss_jit
from torch.nn import functional as F

from ...layers import batched_nms, cat
from ...structures import Boxes, pairwise_iou
from ...utils.events import get_event_storage
from ..box_regression import _dense_box_regression_loss
from .dense_detector import DenseDetector


class RetinaNet(DenseDetector):
    def __init__(
        self,
        *,
        backbone,
        head,
        head_in_features,
        anchor_generator,
        box2box_transform,
        anchor_matcher,
        num_classes,
        focal_loss_alpha=0.25,
        focal_loss_gamma=2.0,
        smooth_l1_beta=0.0,
        box_reg_loss_type="smooth_l1",
        test_score_thresh=0.05,
        test_topk_candidates=1000,
        test_nms_thresh=0.5,
        max_detections_per_image=100,
        pixel_mean,
        pixel_std,
        vis_period=0,
        input_format="BGR",
    ):
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.anchor_matcher = anchor_matcher
        self.num_classes = num_classes
        self.focal_loss_alpha, self.focal_loss_gamma = focal_loss_alpha, focal_loss_gamma
        self.smooth_l1_beta, self.box_reg_loss_type = smooth_l1_beta, box_reg_loss_type
        self.test_score_thresh, self.test_nms_thresh = test_score_thresh, test_nms_thresh
        self.test_topk_candidates, self.max_detections_per_image = test_topk_candidates, max_detections_per_image
        self.vis_period, self.input_format = vis_period, input_format

    def forward_training(self, images, features, predictions, gt_instances):
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, gt_labels, deltas, gt_boxes)

    def losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes):
        labels = torch.stack(gt_labels)
        counted = labels >= 0  # -1 is left out
        foreground = counted & (labels != self.num_classes)
        count = foreground.sum().item()
        get_event_storage().put_scalar("num_pos_anchors", count / len(labels))
        normalizer = self._ema_update("loss_normalizer", max(count, 1), 100)
        one_hot = F.one_hot(labels[counted], self.num_classes + 1)[:, : self.num_classes]
        loss_cls = sigmoid_focal_loss_jit(
            cat(pred_logits, dim=1)[counted],
            one_hot.to(pred_logits[0].dtype),
            alpha=self.focal_loss_alpha,
            gamma=self.focal_loss_gamma,
            reduction="sum",
        )
        loss_box_reg = _dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            pred_anchor_deltas,
            gt_boxes,
            foreground,
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        return {"loss_cls": loss_cls / normalizer, "loss_box_reg": loss_box_reg / normalizer}

    @torch.no_grad()
    def label_anchors(self, anchors, gt_instances):
        all_anchors = Boxes.cat(anchors)
        gt_labels, matched_boxes = [], []
        for instances in gt_instances:
            matches, kinds = self.anchor_matcher(pairwise_iou(instances.gt_boxes, all_anchors))
            if len(instances) == 0:
                gt_labels.append(torch.full_like(matches, self.num_classes))
                matched_boxes.append(torch.zeros_like(all_anchors.tensor))
                continue
            labels = instances.gt_classes[matches]
            labels[kinds == 0] = self.num_classes
            labels[kinds == -1] = -1
            gt_labels.append(labels)
            matched_boxes.append(instances.gt_boxes.tensor[matches])
        return gt_labels, matched_boxes

    def forward_inference(self, images, features, predictions):
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        anchors = self.anchor_generator(features)
        results = []
        for index, size in enumerate(images.image_sizes):
            scores = [level[index].sigmoid() for level in logits]
            results.append(self.inference_single_image(anchors, scores, [level[index] for level in deltas], size))
        return results

    def inference_single_image(self, anchors, box_cls, box_delta, image_size):
        found = self._decode_multi_level_predictions(
            anchors, box_cls, box_delta, self.test_score_thresh, self.test_topk_candidates, image_size
        )
        keep = batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, self.test_nms_thresh)
        return found[keep[: self.max_detections_per_image]]
