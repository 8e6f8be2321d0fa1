// box_math.h over NumPy arrays, a row a box, compiled with the flags of the CPU kernels and run under any instruction
// set they choose from.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "common/box_math.h"
#include "common/cpu_dispatch.h"

namespace py = pybind11;
using namespace retinanet_ext;

namespace {

// Lambdas that a kernel body may call: compiled anew for each instruction set.
#define INLINE_BODY __attribute__((always_inline))

template <typename T>
using Rows = py::array_t<T, py::array::c_style | py::array::forcecast>;  // [n, 4]

template <typename F>
struct RowBody {
  const F& f;
  RNX_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) f(i);
  }
};

template <typename F>
void for_rows(const std::string& isa, int64_t count, const F& f) {
  const RowBody<F> body{f};
  if (isa == "baseline") return run_baseline(body, 0, count);
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx2" && avx2) return run_avx2(body, 0, count);
  if (isa == "avx512" && avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return run_avx512(body, 0, count);
  }
#endif
  throw std::invalid_argument("no instruction set " + isa + " here");
}

template <typename Row, typename T>
const Row* rows_of(const Rows<T>& array, py::ssize_t count) {
  if (array.ndim() != 2 || array.shape(0) != count || array.shape(1) != 4) {
    throw std::invalid_argument("every array must have shape [n, 4]");
  }
  return reinterpret_cast<const Row*>(array.data());
}

template <typename T>
py::array_t<T> empty_rows(py::ssize_t count) {
  return py::array_t<T>(std::array<py::ssize_t, 2>{count, 4});
}

template <typename T>
CoderWeights<T> weights_of(const std::array<double, 4>& weights) {
  return {static_cast<T>(weights[0]), static_cast<T>(weights[1]), static_cast<T>(weights[2]),
          static_cast<T>(weights[3])};
}

// NumPy aligns its arrays to 16 bytes, which is less than Box<double> asks for.
template <typename Row>
RNX_HD Row read(const Row* rows, int64_t i) {
  Row row;
  __builtin_memcpy(&row, reinterpret_cast<const char*>(rows) + i * sizeof(Row), sizeof(Row));
  return row;
}

template <typename T, typename Row>
RNX_HD void write(T* rows, int64_t i, const Row& row) {
  __builtin_memcpy(rows + 4 * i, &row, sizeof(Row));
}

template <typename T>
using Numbers = py::array_t<T, py::array::c_style | py::array::forcecast>;  // [n]

template <typename T>
void define_functions(py::module_ m) {
  using Weights = std::array<double, 4>;
  m.def("exp", [](const Numbers<T>& numbers, const std::string& isa) {
    py::array_t<T> result(numbers.size());
    const T* in = numbers.data();
    T* out = result.mutable_data();
    for_rows(isa, numbers.size(), [=](int64_t i) INLINE_BODY { out[i] = accurate_exp(in[i]); });
    return result;
  });
  m.def("log", [](const Numbers<T>& numbers, const std::string& isa) {
    py::array_t<T> result(numbers.size());
    const T* in = numbers.data();
    T* out = result.mutable_data();
    for_rows(isa, numbers.size(), [=](int64_t i) INLINE_BODY { out[i] = accurate_log(in[i]); });
    return result;
  });
  m.def("encode", [](const Rows<T>& gt, const Rows<T>& anchors, const Weights& w, const std::string& isa) {
    const py::ssize_t count = gt.shape(0);
    const auto* g = rows_of<Box<T>>(gt, count);
    const auto* a = rows_of<Box<T>>(anchors, count);
    const CoderWeights<T> weights = weights_of<T>(w);
    py::array_t<T> result = empty_rows<T>(count);
    T* out = result.mutable_data();
    for_rows(isa, count, [=](int64_t i) INLINE_BODY { write(out, i, encode_box(read(g, i), read(a, i), weights)); });
    return result;
  });
  m.def("encode_gradient", [](const Rows<T>& upstream, const Rows<T>& gt, const Rows<T>& anchors, const Weights& w,
                              const std::string& isa) {
    const py::ssize_t count = gt.shape(0);
    const auto* u = rows_of<Deltas<T>>(upstream, count);
    const auto* g = rows_of<Box<T>>(gt, count);
    const auto* a = rows_of<Box<T>>(anchors, count);
    const CoderWeights<T> weights = weights_of<T>(w);
    py::array_t<T> by_gt = empty_rows<T>(count);
    py::array_t<T> by_anchor = empty_rows<T>(count);
    T* out_gt = by_gt.mutable_data();
    T* out_anchor = by_anchor.mutable_data();
    for_rows(isa, count, [=](int64_t i) INLINE_BODY {
      const EncodeGradient<T> gradient = encode_box_gradient(read(u, i), read(g, i), read(a, i), weights);
      write(out_gt, i, gradient.gt);
      write(out_anchor, i, gradient.anchor);
    });
    return py::make_tuple(by_gt, by_anchor);
  });
  m.def("decode", [](const Rows<T>& deltas, const Rows<T>& anchors, const Weights& w, double clip,
                     const std::string& isa) {
    const py::ssize_t count = deltas.shape(0);
    const auto* d = rows_of<Deltas<T>>(deltas, count);
    const auto* a = rows_of<Box<T>>(anchors, count);
    const CoderWeights<T> weights = weights_of<T>(w);
    py::array_t<T> result = empty_rows<T>(count);
    T* out = result.mutable_data();
    for_rows(isa, count, [=](int64_t i) INLINE_BODY {
      write(out, i, decode_box(read(d, i), read(a, i), weights, static_cast<T>(clip)));
    });
    return result;
  });
  m.def("decode_gradient", [](const Rows<T>& upstream, const Rows<T>& deltas, const Rows<T>& anchors, const Weights& w,
                              double clip, const std::string& isa) {
    const py::ssize_t count = deltas.shape(0);
    const auto* u = rows_of<Box<T>>(upstream, count);
    const auto* d = rows_of<Deltas<T>>(deltas, count);
    const auto* a = rows_of<Box<T>>(anchors, count);
    const CoderWeights<T> weights = weights_of<T>(w);
    py::array_t<T> by_deltas = empty_rows<T>(count);
    py::array_t<T> by_anchor = empty_rows<T>(count);
    T* out_deltas = by_deltas.mutable_data();
    T* out_anchor = by_anchor.mutable_data();
    for_rows(isa, count, [=](int64_t i) INLINE_BODY {
      const DecodeGradient<T> gradient =
          decode_box_gradient(read(u, i), read(d, i), read(a, i), weights, static_cast<T>(clip));
      write(out_deltas, i, gradient.deltas);
      write(out_anchor, i, gradient.anchor);
    });
    return py::make_tuple(by_deltas, by_anchor);
  });
  m.def("giou_loss", [](const Rows<T>& predicted, const Rows<T>& gt, const std::string& isa) {
    const py::ssize_t count = gt.shape(0);
    const auto* p = rows_of<Box<T>>(predicted, count);
    const auto* g = rows_of<Box<T>>(gt, count);
    py::array_t<T> result(count);
    T* out = result.mutable_data();
    for_rows(isa, count, [=](int64_t i) INLINE_BODY { out[i] = giou_loss(read(p, i), read(g, i)); });
    return result;
  });
  m.def("giou_loss_gradient", [](const Rows<T>& predicted, const Rows<T>& gt, const std::string& isa) {
    const py::ssize_t count = gt.shape(0);
    const auto* p = rows_of<Box<T>>(predicted, count);
    const auto* g = rows_of<Box<T>>(gt, count);
    py::array_t<T> result = empty_rows<T>(count);
    T* out = result.mutable_data();
    for_rows(isa, count, [=](int64_t i) INLINE_BODY { write(out, i, giou_loss_gradient(read(p, i), read(g, i))); });
    return result;
  });
}

bool supported(const std::string& isa) {
  try {
    for_rows(isa, 0, [](int64_t) INLINE_BODY {});
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

}  // namespace

PYBIND11_MODULE(_box_math, m) {
  m.attr("delta_clip") = kDeltaClip;
  m.def("supported", &supported);
  define_functions<float>(m.def_submodule("float32"));
  define_functions<double>(m.def_submodule("float64"));
}
