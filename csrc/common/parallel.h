// Work shared out to torch's threads, in a forked process too.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>
#include <thread>

namespace retinanet_ext {

// Whether this thread is the one that lived on in a forked process. If it had shared out work before the fork, OpenMP
// still counts on threads that are no more, and waits for them without end.
inline thread_local bool outlived_fork = false;
inline const int watch_for_forks = pthread_atfork(nullptr, nullptr, [] { outlived_fork = true; });

// torch::stable::parallel_for. A thread that outlived a fork has a new one share out the work, which OpenMP has not met
// before and gives threads of its own.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  const auto share_out = [&] { torch::stable::parallel_for(begin, end, grain_size, f); };
  if (!outlived_fork || end - begin <= grain_size || torch::stable::get_num_threads() == 1) return share_out();
  std::exception_ptr error;
  std::thread([&] {
    try {
      share_out();
    } catch (...) {
      error = std::current_exception();
    }
  }).join();
  if (error) std::rethrow_exception(error);
}

}  // namespace retinanet_ext
