// Every operator schema of the library, and the empty Python module that makes `import retinanet_ext._C` load it.
#include <Python.h>

#include <torch/csrc/stable/library.h>

// A C++ program may load the operators without Python: what only the module needs must not be in the way.
#pragma weak PyModule_Create2

STABLE_TORCH_LIBRARY(retinanet_ext, m) {
  // reduction: 0 none, 1 mean, 2 sum. class_alpha [K] replaces alpha where given.
  m.def(
      "sigmoid_focal_loss(Tensor inputs, Tensor targets, Tensor? weight, Tensor? class_alpha, float alpha, float gamma, "
      "float label_smoothing, int ignore_index, int reduction, bool float32_loss) -> Tensor");
  m.def(
      "sigmoid_focal_loss_backward(Tensor grad, Tensor inputs, Tensor targets, Tensor? weight, Tensor? class_alpha, "
      "float alpha, float gamma, float label_smoothing, int ignore_index, int reduction) -> Tensor");
  // Sum or mean together with its gradient for an upstream gradient of 1, in one pass over the logits.
  m.def(
      "sigmoid_focal_loss_with_grad(Tensor inputs, Tensor targets, Tensor? weight, Tensor? class_alpha, float alpha, "
      "float gamma, float label_smoothing, int ignore_index, int reduction) -> (Tensor, Tensor)");
  // The backward pass of a sum or mean into grad_inputs, which holds the gradient for an upstream gradient of 1 already
  // where `filled`, and is then left alone if that is what came. was_one: int32, host memory, notes whether it was.
  m.def(
      "sigmoid_focal_loss_refresh_grad(Tensor(a!) grad_inputs, Tensor(b!) was_one, Tensor grad, Tensor inputs, "
      "Tensor targets, Tensor? weight, Tensor? class_alpha, float alpha, float gamma, float label_smoothing, "
      "int ignore_index, int reduction, bool filled) -> ()");
  // logits: one [B, A*K, H, W] or [B, n, K] a pyramid level; targets [B, N]; normalizer: one number or [B].
  // The loss is scale * sum_b loss_b / normalizer_b.
  m.def(
      "multilevel_focal_loss(Tensor[] logits, Tensor targets, Tensor? normalizer, int num_classes, float alpha, "
      "float gamma, float scale) -> Tensor");
  m.def(
      "multilevel_focal_loss_backward(Tensor grad, Tensor[] logits, Tensor targets, Tensor? normalizer, "
      "int num_classes, float alpha, float gamma, float scale) -> Tensor[]");
  m.def(
      "multilevel_focal_loss_with_grad(Tensor[] logits, Tensor targets, Tensor? normalizer, int num_classes, "
      "float alpha, float gamma, float scale) -> (Tensor, Tensor[])");
  m.def(
      "multilevel_focal_loss_refresh_grad(Tensor(a!)[] grad_logits, Tensor(b!) was_one, Tensor grad, Tensor[] logits, "
      "Tensor targets, Tensor? normalizer, int num_classes, float alpha, float gamma, float scale, "
      "bool filled) -> ()");
  // gt_boxes, gt_labels, gt_ignore: one tensor an image, or one in all with gt_offsets [B + 1]; gt_ignore may hold none.
  // policy: 0 safe, 1 torchvision, 2 mmdet.
  m.def(
      "match_anchors(Tensor anchors, Tensor[] gt_boxes, Tensor[] gt_ignore, Tensor? gt_offsets, float fg_iou_thresh, "
      "float bg_iou_thresh, bool allow_low_quality_matches, int policy, float min_pos_iou) -> Tensor");
  // Returns labels [B, N], matched [B, N] and the number of foreground anchors [B].
  m.def(
      "assign_targets(Tensor anchors, Tensor[] gt_boxes, Tensor[] gt_labels, Tensor[] gt_ignore, Tensor? gt_offsets, "
      "float fg_iou_thresh, float bg_iou_thresh, bool allow_low_quality_matches, int policy, float min_pos_iou) -> "
      "(Tensor, Tensor, Tensor)");
  // boxes1 [..., N, 4], boxes2 [..., M, 4] -> [..., N, M]. fmt: 0 xyxy, 1 xywh, 2 cxcywh.
  m.def("box_iou(Tensor boxes1, Tensor boxes2, int fmt) -> Tensor");
  // grad [..., N, M] -> [..., N, 4] and [..., M, 4], batch dimensions broadcast. On the CPU alone.
  m.def("box_iou_backward(Tensor grad, Tensor boxes1, Tensor boxes2, int fmt) -> (Tensor, Tensor)");
  // [..., 4] each, leading dimensions broadcast; weights (wx, wy, ww, wh). The gradients have the result's shape, and
  // are [0] where they are not asked for.
  m.def("encode_boxes(Tensor gt_boxes, Tensor anchors, float wx, float wy, float ww, float wh) -> Tensor");
  m.def(
      "encode_boxes_backward(Tensor grad, Tensor gt_boxes, Tensor anchors, float wx, float wy, float ww, float wh, "
      "bool of_gt_boxes, bool of_anchors) -> (Tensor, Tensor)");
  m.def("decode_boxes(Tensor deltas, Tensor anchors, float wx, float wy, float ww, float wh, float clip) -> Tensor");
  m.def(
      "decode_boxes_backward(Tensor grad, Tensor deltas, Tensor anchors, float wx, float wy, float ww, float wh, "
      "float clip, bool of_deltas, bool of_anchors) -> (Tensor, Tensor)");
  // boxes [1, N, 4], scores [1, N], labels [1, N] or none: rows that are kept, best first.
  m.def("nms(Tensor boxes, Tensor scores, Tensor? labels, float iou_threshold) -> Tensor");
  // boxes [B, N, 4], scores [B, N], labels [B, N], num_valid [B] or none: indices [B, D], counts [B].
  m.def(
      "batched_nms_padded(Tensor boxes, Tensor scores, Tensor labels, Tensor? num_valid, float iou_threshold, "
      "int max_detections) -> (Tensor, Tensor)");
  // Levels as the heads leave them; image_sizes [B, 2], or in size_list: height, width, height, ... Returns boxes, scores,
  // labels, indices, counts.
  m.def(
      "detect(Tensor[] cls_logits, Tensor[] box_deltas, Tensor anchors, Tensor? image_sizes, float[] size_list, "
      "int num_classes, float score_thresh, int topk_per_level, float nms_thresh, int max_detections, "
      "bool clip_before_nms) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // deltas: one [B, 4*A, H, W] or [B, n, 4] a pyramid level; anchors [N, 4] or [B, N, 4]; gt_boxes: [M_i, 4] an image,
  // or one [capacity, 4] with gt_offsets [B + 1]; matched [B, N]. loss: 0 l1, 1 smooth_l1, 2 giou; wx, wy, ww, wh: the
  // box coder's. The loss is scale * sum_b loss_b / normalizer_b.
  m.def(
      "box_regression_loss(Tensor[] deltas, Tensor anchors, Tensor[] gt_boxes, Tensor? gt_offsets, Tensor matched, "
      "Tensor? normalizer, int loss, float beta, float wx, float wy, float ww, float wh, float scale) -> Tensor");
  m.def(
      "box_regression_loss_backward(Tensor grad, Tensor[] deltas, Tensor anchors, Tensor[] gt_boxes, "
      "Tensor? gt_offsets, Tensor matched, Tensor? normalizer, int loss, float beta, float wx, float wy, float ww, "
      "float wh, float scale) -> Tensor[]");
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "The compiled operators of retinanet_ext.", -1,
                                   nullptr,               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
