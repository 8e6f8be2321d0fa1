// Every operator schema of the library, and the empty Python module that makes `import retinanet_ext._C` load it.
#include <Python.h>

#include <torch/csrc/stable/library.h>

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
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "The compiled operators of retinanet_ext.", -1,
                                   nullptr,               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
