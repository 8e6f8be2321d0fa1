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
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "The compiled operators of retinanet_ext.", -1,
                                   nullptr,               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
