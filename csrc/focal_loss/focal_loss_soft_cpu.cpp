// The focal loss against soft targets, which have the layout of the logits, on the CPU.
#include "focal_loss/focal_loss_chunks.h"

namespace retinanet_ext {
namespace {

// A place is an element.
template <FocalTask kTask, Gamma kGamma, bool kByColumn>
struct SoftElements {
  static constexpr FocalTask kFocalTask = kTask;

  template <typename T>
  RNX_HD static double evaluate(const FocalWork<T>& work, int64_t begin, int64_t end) {
    T input_buffer[kFocalBlock];
    T target_buffer[kFocalBlock];
    T positive[kFocalBlock];
    T negative[kFocalBlock];
    FocalBlock<T> block;
    const T gamma = work.gamma;
    double sum = 0;
    for (int64_t start = begin; start < end; start += kFocalBlock) {
      const int64_t n = std::min(kFocalBlock, end - start);
      const int64_t evaluated = whole_vectors(n);
      const T* x = read_whole_vectors(work.inputs, work.input_type, start, n, input_buffer);
      const T* t = read_whole_vectors(work.targets, work.target_type, start, n, target_buffer);
      for (int64_t i = 0; i < evaluated; ++i) {
        const int64_t column = kByColumn ? (start + i) % work.num_classes : 0;
        positive[i] = kByColumn ? work.class_alpha_positive[column] : work.alpha_positive;
        negative[i] = kByColumn ? work.class_alpha_negative[column] : work.alpha_negative;
      }
      for (int64_t i = 0; i < evaluated; ++i) {
        const LossAndGradient<T> element = soft_element<T, kGamma>(x[i], t[i], gamma, positive[i], negative[i]);
        if (kTask != FocalTask::kGradient) block.losses[i] = element.loss;
        if (differentiates(kTask)) block.gradients[i] = element.gradient * work.grad_scale;
      }
      finish_block<kTask>(work, block, start, n, T(1), sum);
    }
    return sum;
  }
};

}  // namespace

template <FocalTask kTask, typename T>
double run_soft(const FocalWork<T>& work) {
  return run_form<SoftElements, kTask>(work, work.num_rows * work.num_classes, kFocalChunkElements);
}

template double run_soft<FocalTask::kLoss>(const FocalWork<float>&);
template double run_soft<FocalTask::kSum>(const FocalWork<float>&);
template double run_soft<FocalTask::kGradient>(const FocalWork<float>&);
template double run_soft<FocalTask::kLoss>(const FocalWork<double>&);
template double run_soft<FocalTask::kSum>(const FocalWork<double>&);
template double run_soft<FocalTask::kGradient>(const FocalWork<double>&);

}  // namespace retinanet_ext
