// The focal loss of one block of memory on the CPU, chunk by chunk.
//
// Work is cut into chunks of a fixed number of places (rows, or elements of soft targets), whatever the number of
// threads, and each chunk's sum is added in order: the same bits for any thread count.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "focal_loss/focal_loss_blocks.h"

namespace retinanet_ext {

// What `work` asks for, against class indices and against soft targets; of tasks that sum, the sum. Each is a source
// file of its own, because they take long to compile.
template <FocalTask kTask, typename T>
double run_rows(const FocalWork<T>& work);
template <FocalTask kTask, typename T>
double run_soft(const FocalWork<T>& work);

template <typename Places, typename T>
struct ChunkBody {
  const FocalWork<T>& work;
  int64_t chunk_size;  // places
  int64_t total;
  double* partial_sums;

  RNX_HD void operator()(int64_t first, int64_t last) const {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * chunk_size;
      const double sum = Places::evaluate(work, begin, std::min(total, begin + chunk_size));
      if (sums(Places::kFocalTask)) partial_sums[chunk] = sum;
    }
  }
};

template <typename Places, typename T>
double run_chunks(const FocalWork<T>& work, int64_t total, int64_t chunk_size) {
  const int64_t chunks = (total + chunk_size - 1) / chunk_size;
  std::vector<double> partial_sums(sums(Places::kFocalTask) ? chunks : 0);
  const ChunkBody<Places, T> body{work, chunk_size, total, partial_sums.data()};
  parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    if constexpr (sizeof(T) == sizeof(float)) {
      run_on_best_isa(body, first, last);
    } else {
      run_baseline(body, first, last);
    }
    if (work.streams) stream_fence();
  });
  double sum = 0;
  for (const double partial : partial_sums) sum += partial;
  return sum;
}

// Smoothing and alpha by class take the general path, where gamma is general too; so there are three of each task.
template <template <FocalTask, Gamma, bool> class Places, FocalTask kTask, typename T>
double run_form(const FocalWork<T>& work, int64_t total, int64_t chunk_size) {
  if (work.class_alpha_negative != nullptr || work.half_smoothing != T(0)) {
    return run_chunks<Places<kTask, Gamma::kAny, true>>(work, total, chunk_size);
  }
  return work.gamma == T(2) ? run_chunks<Places<kTask, Gamma::kTwo, false>>(work, total, chunk_size)
                            : run_chunks<Places<kTask, Gamma::kAny, false>>(work, total, chunk_size);
}

}  // namespace retinanet_ext
