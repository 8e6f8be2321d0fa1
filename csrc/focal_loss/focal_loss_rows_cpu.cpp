// The focal loss against class indices on the CPU: neighbouring background rows are one long run; only a positive row is
// split around its class (focal_loss_blocks.h).
#include "focal_loss/focal_loss_chunks.h"

namespace retinanet_ext {
namespace {

// A place is a row.
template <FocalTask kTask, Gamma kGamma, bool kByColumn>
struct IndexRows {
  static constexpr FocalTask kFocalTask = kTask;

  template <typename T>
  RNX_HD static double evaluate(const FocalWork<T>& work, int64_t begin, int64_t end) {
    return index_rows<kTask, kGamma, kByColumn>(work, begin, end);
  }
};

}  // namespace

template <FocalTask kTask, typename T>
double run_rows(const FocalWork<T>& work) {
  if (work.num_rows == 0) return 0;
  return run_form<IndexRows, kTask>(work, work.num_rows,
                                    std::max<int64_t>(1, kFocalChunkElements / work.num_classes));
}

template double run_rows<FocalTask::kLoss>(const FocalWork<float>&);
template double run_rows<FocalTask::kSum>(const FocalWork<float>&);
template double run_rows<FocalTask::kGradient>(const FocalWork<float>&);
template double run_rows<FocalTask::kSumAndGradient>(const FocalWork<float>&);
template double run_rows<FocalTask::kLoss>(const FocalWork<double>&);
template double run_rows<FocalTask::kSum>(const FocalWork<double>&);
template double run_rows<FocalTask::kGradient>(const FocalWork<double>&);
template double run_rows<FocalTask::kSumAndGradient>(const FocalWork<double>&);

}  // namespace retinanet_ext
