// fast_math.h, focal_math.h, half_convert.h and streaming.h over NumPy arrays, compiled with the flags of the CPU kernels and
// run under any instruction set they choose from.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_dispatch.h"
#include "common/focal_math.h"
#include "common/half_convert.h"
#include "common/streaming.h"

namespace py = pybind11;
using namespace retinanet_ext;

namespace {

// Lambdas that a kernel body may call: compiled anew for each instruction set.
#define INLINE_BODY __attribute__((always_inline))

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

bool supported(const std::string& isa) {
  if (isa == "baseline") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return false;
}

template <typename Body>
void run_on(const std::string& isa, const Body& body, int64_t count) {
  if (!supported(isa)) throw std::invalid_argument("no instruction set " + isa + " here");
#if defined(__x86_64__)
  if (isa == "avx512") return run_avx512(body, 0, count);
  if (isa == "avx2") return run_avx2(body, 0, count);
#endif
  run_baseline(body, 0, count);
}

template <typename Out, typename In, typename F>
struct MapBody {
  Out* result;
  const In* input;
  const F& f;
  RNX_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) result[i] = f(input[i]);
  }
};

template <typename Out, typename In, typename F>
py::array_t<Out> map(const std::string& isa, const Array<In>& input, const F& f) {
  py::array_t<Out> result(input.size());
  run_on(isa, MapBody<Out, In, F>{result.mutable_data(), input.data(), f}, input.size());
  return result;
}

// The functions of one element that float and double have both.
template <typename T>
void define_functions(py::module_& m) {
  m.def("exp2", [](Array<T> t, const std::string& isa) {
    return map<T, T>(isa, t, [](T v) INLINE_BODY { return exp2_fast(v); });
  });
  m.def("exp2_decay", [](Array<T> m, const std::string& isa) {
    return map<T, T>(isa, m, [](T v) INLINE_BODY { return exp2_decay(v); });
  });
  m.def("log2", [](Array<T> d, const std::string& isa) {
    return map<T, T>(isa, d, [](T v) INLINE_BODY { return log2_fast(v); });
  });
  m.def("log1p_unit", [](Array<T> u, const std::string& isa) {
    return map<T, T>(isa, u, [](T v) INLINE_BODY { return log1p_unit(v); });
  });
  m.def("hard_loss_two", [](Array<T> z, const std::string& isa) {
    return map<T, T>(isa, z, [](T v) INLINE_BODY { return hard_element<T, Gamma::kTwo>(v, T(2)).loss; });
  });
  m.def("hard_gradient_two", [](Array<T> z, const std::string& isa) {
    return map<T, T>(isa, z, [](T v) INLINE_BODY { return hard_element<T, Gamma::kTwo>(v, T(2)).gradient; });
  });
  m.def("hard_loss", [](Array<T> z, T gamma, const std::string& isa) {
    return map<T, T>(isa, z, [=](T v) INLINE_BODY { return hard_element<T, Gamma::kAny>(v, gamma).loss; });
  });
  m.def("hard_gradient", [](Array<T> z, T gamma, const std::string& isa) {
    return map<T, T>(isa, z, [=](T v) INLINE_BODY { return hard_element<T, Gamma::kAny>(v, gamma).gradient; });
  });
  m.def("smoothed_loss", [](Array<T> z, T gamma, T h, const std::string& isa) {
    return map<T, T>(isa, z, [=](T v) INLINE_BODY { return smoothed_element(v, gamma, h).loss; });
  });
  m.def("smoothed_gradient", [](Array<T> z, T gamma, T h, const std::string& isa) {
    return map<T, T>(isa, z, [=](T v) INLINE_BODY { return smoothed_element(v, gamma, h).gradient; });
  });
  // gamma = 2 by the product, anything else by the power. `positive`, `negative`: the two sides of alpha.
  m.def("soft_loss", [](Array<T> x, T target, T gamma, T positive, T negative, bool two, const std::string& isa) {
    if (two) {
      return map<T, T>(isa, x, [=](T v) INLINE_BODY {
        return soft_element<T, Gamma::kTwo>(v, target, gamma, positive, negative).loss;
      });
    }
    return map<T, T>(isa, x, [=](T v) INLINE_BODY {
      return soft_element<T, Gamma::kAny>(v, target, gamma, positive, negative).loss;
    });
  });
  m.def("soft_gradient", [](Array<T> x, T target, T gamma, T positive, T negative, bool two, const std::string& isa) {
    if (two) {
      return map<T, T>(isa, x, [=](T v) INLINE_BODY {
        return soft_element<T, Gamma::kTwo>(v, target, gamma, positive, negative).gradient;
      });
    }
    return map<T, T>(isa, x, [=](T v) INLINE_BODY {
      return soft_element<T, Gamma::kAny>(v, target, gamma, positive, negative).gradient;
    });
  });
}

CpuIsa isa_of(const std::string& name) {
  if (!supported(name)) throw std::invalid_argument("no instruction set " + name + " here");
  return name == "avx512" ? CpuIsa::kAvx512 : name == "avx2" ? CpuIsa::kAvx2 : CpuIsa::kBaseline;
}

// Memory from a cache line's boundary on, 0xA5 but for `count` elements of S from byte `start` on, streamed to it.
template <typename S>
py::array_t<uint8_t> streamed(const Array<uint8_t>& source, int64_t start, int64_t count, CpuIsa isa) {
  constexpr size_t kRoom = 512;
  alignas(64) uint8_t memory[kRoom];
  std::fill(memory, memory + kRoom, uint8_t{0xA5});
  std::vector<S> elements(static_cast<size_t>(count) + 1);
  std::memcpy(elements.data(), source.data(), static_cast<size_t>(count) * sizeof(S));
  stream_copy(reinterpret_cast<S*>(memory + start), elements.data(), count, isa);
  stream_fence();
  return py::array_t<uint8_t>(kRoom, memory);
}

}  // namespace

PYBIND11_MODULE(_focal_math, m) {
  m.def("log1p_ratio_degree6", [](Array<float> u, const std::string& isa) {
    return map<float, float>(isa, u, [](float v) INLINE_BODY { return log1p_ratio_degree6(v); });
  });
  m.def("log1p_ratio_degree7", [](Array<float> u, const std::string& isa) {
    return map<float, float>(isa, u, [](float v) INLINE_BODY { return log1p_ratio_degree7(v); });
  });
  m.def("supported", &supported);
  m.def("streamed", [](Array<uint8_t> source, int64_t size, int64_t start, int64_t count, const std::string& isa) {
    if (size == 2) return streamed<uint16_t>(source, start, count, isa_of(isa));
    if (size == 4) return streamed<uint32_t>(source, start, count, isa_of(isa));
    return streamed<uint64_t>(source, start, count, isa_of(isa));
  });
  py::module_ single = m.def_submodule("float32");
  py::module_ full = m.def_submodule("float64");
  define_functions<float>(single);
  define_functions<double>(full);
  m.def("float16_to_float", [](Array<uint16_t> bits, const std::string& isa) {
    return map<float, uint16_t>(isa, bits, [](uint16_t v) INLINE_BODY { return to_float(Float16{v}); });
  });
  m.def("bfloat16_to_float", [](Array<uint16_t> bits, const std::string& isa) {
    return map<float, uint16_t>(isa, bits, [](uint16_t v) INLINE_BODY { return to_float(BFloat16{v}); });
  });
  m.def("float_to_float16", [](Array<float> values, const std::string& isa) {
    return map<uint16_t, float>(isa, values, [](float v) INLINE_BODY { return to_float16(v).bits; });
  });
  m.def("float_to_bfloat16", [](Array<float> values, const std::string& isa) {
    return map<uint16_t, float>(isa, values, [](float v) INLINE_BODY { return to_bfloat16(v).bits; });
  });
}
