// Runs CUDA kernels on the CPU, to test them without a GPU.
//
// A kernel header (*_kernel.cuh) is compiled by g++ with the names below in place of CUDA's. Every CUDA thread is a fiber.
// A fiber runs until it meets a barrier, a warp function or an atomic, and then the scheduler picks another at random
// (or in order, or in reverse), across all blocks that are alive. A result that depends on the order, as it does where
// a barrier is missing, differs between schedules. Shared memory is allocated per block, of exact size and filled with
// a pattern, so that AddressSanitizer sees an index too far and a value never written is conspicuous.
//
// Reported as errors: threads of a block at different barriers, a thread that has left the kernel while others wait for
// it, a warp function that not every thread of its mask reaches. Not seen: missing fences and weak memory order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "stack_switch.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

constexpr int kWarpSize = 32;
constexpr unsigned char kPoison = 0xa5;

// The order in which fibers run. Every order is a possible one on a GPU.
enum class Order { kForward, kBackward, kRandom };

struct Schedule {
  Order order = Order::kForward;
  std::uint64_t seed = 0;
  int live_blocks = 1;  // blocks that run interleaved
};

class EmulationError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Wait { kNone, kBarrier, kWarp, kDone };

struct Block;

struct Fiber {
  Turn turn;
  Stack stack;
  Block* block = nullptr;
  dim3 thread;
  int index = 0;  // in the block
  Wait wait = Wait::kNone;
  int site = 0;             // source line of the barrier or warp function it waits at
  int vote = 0;             // __syncthreads_or, _and, _count
  unsigned mask = 0;        // of a warp function
  std::uint64_t value = 0;  // exchanged by a warp function
};

struct SharedArray {
  std::unique_ptr<char[]> bytes;
  std::size_t size;
};

struct Block {
  dim3 index;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::uint64_t> runnable;  // a bit for each fiber
  std::map<int, SharedArray> shared;
  int votes_or = 0;
  int votes_and = 1;
  int votes_count = 0;
  int unfinished = 0;
  int at_barrier = 0;    // fibers that wait there
  int barrier_site = 0;  // of the first of them

  int size() const {
    return static_cast<int>(fibers.size());
  }
  void set_runnable(int fiber) {
    fibers[fiber]->wait = Wait::kNone;
    runnable[fiber / 64] |= std::uint64_t{1} << fiber % 64;
  }
  void set_waiting(int fiber, Wait wait) {
    fibers[fiber]->wait = wait;
    runnable[fiber / 64] &= ~(std::uint64_t{1} << fiber % 64);
  }
};

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  void run(dim3 grid, dim3 block, const Schedule& schedule, const std::function<void()>& kernel) {
    grid_ = grid;
    block_size_ = block;
    schedule_ = schedule;
    kernel_ = &kernel;
    random_.seed(schedule.seed);
    error_ = nullptr;
    std::vector<int> waiting;
    const int blocks = static_cast<int>(grid.x * grid.y * grid.z);
    for (int i = 0; i < blocks; ++i) waiting.push_back(schedule.order == Order::kForward ? blocks - 1 - i : i);
    if (schedule.order == Order::kRandom) std::shuffle(waiting.begin(), waiting.end(), random_);
    live_.clear();
    while (!waiting.empty() || !live_.empty()) {
      while (!waiting.empty() && static_cast<int>(live_.size()) < std::max(1, schedule.live_blocks)) {
        live_.push_back(start_block(waiting.back()));
        waiting.pop_back();
      }
      Fiber* fiber = pick();
      if (fiber == nullptr) {
        const std::string stuck = describe_deadlock();
        live_.clear();
        throw EmulationError(stuck);
      }
      current_ = fiber;
      main_.give_to(fiber->turn);
      current_ = nullptr;
      if (error_) {
        live_.clear();
        std::rethrow_exception(error_);
      }
      settle(*fiber);
      if (fiber->block->unfinished == 0) retire(fiber->block);
    }
  }

  Fiber& current() {
    return *current_;
  }
  dim3 grid() const {
    return grid_;
  }
  dim3 block_size() const {
    return block_size_;
  }

  // Lets others run; this fiber goes on when it is picked again and `wait` has been satisfied.
  void yield(Wait wait, int site) {
    Fiber* fiber = current_;
    if (wait != Wait::kNone) fiber->block->set_waiting(fiber->index, wait);
    fiber->site = site;
    fiber->turn.give_to(main_);
  }

  template <typename T>
  T* shared_array(int key, std::size_t count) {
    Block& block = *current().block;
    auto found = block.shared.find(key);
    if (found == block.shared.end()) {
      SharedArray array{std::unique_ptr<char[]>(new char[count * sizeof(T)]), count * sizeof(T)};
      std::memset(array.bytes.get(), kPoison, array.size);
      found = block.shared.emplace(key, std::move(array)).first;
    }
    return reinterpret_cast<T*>(found->second.bytes.get());
  }

 private:
  static void trampoline() {
    Machine& machine = get();
    try {
      (*machine.kernel_)();
    } catch (...) {
      machine.error_ = std::current_exception();
    }
    Fiber* fiber = machine.current_;
    fiber->block->set_waiting(fiber->index, Wait::kDone);
    --fiber->block->unfinished;
    fiber->turn.give_to(machine.main_);
  }

  std::unique_ptr<Block> start_block(int linear) {
    auto block = std::make_unique<Block>();
    block->index = dim3(linear % grid_.x, linear / grid_.x % grid_.y, linear / grid_.x / grid_.y);
    const int threads = static_cast<int>(block_size_.x * block_size_.y * block_size_.z);
    block->unfinished = threads;
    block->runnable.resize((threads + 63) / 64);
    for (int i = 0; i < threads; ++i) {
      auto fiber = std::make_unique<Fiber>();
      fiber->block = block.get();
      fiber->index = i;
      fiber->thread = dim3(i % block_size_.x, i / block_size_.x % block_size_.y, i / block_size_.x / block_size_.y);
      if (free_stacks_.empty()) {
        fiber->stack = make_stack();
      } else {
        fiber->stack = std::move(free_stacks_.back());
        free_stacks_.pop_back();
      }
      fiber->turn.begin(fiber->stack.get(), &Machine::trampoline);
      block->fibers.push_back(std::move(fiber));
      block->set_runnable(i);
    }
    return block;
  }

  void retire(Block* block) {
    for (auto& fiber : block->fibers) free_stacks_.push_back(std::move(fiber->stack));
    for (std::size_t i = 0; i < live_.size(); ++i) {
      if (live_[i].get() == block) {
        live_.erase(live_.begin() + static_cast<std::ptrdiff_t>(i));
        return;
      }
    }
  }

  // The first, the last or any one of the fibers that can run, in the order of blocks and threads; null if none can.
  Fiber* pick() {
    int skip = 0;
    if (schedule_.order != Order::kForward) {
      int runnable = 0;
      for (auto& block : live_) {
        for (const std::uint64_t bits : block->runnable) runnable += __builtin_popcountll(bits);
      }
      if (runnable == 0) return nullptr;
      skip = schedule_.order == Order::kBackward ? runnable - 1 : std::uniform_int_distribution<int>(0, runnable - 1)(random_);
    }
    for (auto& block : live_) {
      for (std::size_t word = 0; word < block->runnable.size(); ++word) {
        std::uint64_t bits = block->runnable[word];
        if (__builtin_popcountll(bits) <= skip) {
          skip -= __builtin_popcountll(bits);
          continue;
        }
        for (; skip > 0; --skip) bits &= bits - 1;
        return block->fibers[word * 64 + static_cast<std::size_t>(__builtin_ctzll(bits))].get();
      }
    }
    return nullptr;
  }

  // After a fiber's turn: releases the barrier or the warp function that all its threads have reached.
  void settle(Fiber& fiber) {
    Block& block = *fiber.block;
    if (fiber.wait == Wait::kBarrier) {
      if (block.at_barrier++ == 0) block.barrier_site = fiber.site;
      if (fiber.site != block.barrier_site) {
        throw EmulationError("threads of a block wait at different barriers: lines " + std::to_string(block.barrier_site) +
                             " and " + std::to_string(fiber.site));
      }
    }
    if (block.at_barrier > 0 && block.unfinished < block.size()) {
      throw EmulationError("a thread has left the kernel while others wait at the barrier in line " +
                           std::to_string(block.barrier_site));
    }
    if (block.at_barrier == block.size()) release_barrier(block);
    if (fiber.wait == Wait::kWarp || fiber.wait == Wait::kDone) settle_warp(block, fiber);
  }

  static void release_barrier(Block& block) {
    block.at_barrier = 0;
    block.votes_or = 0;
    block.votes_and = 1;
    block.votes_count = 0;
    for (int i = 0; i < block.size(); ++i) {
      const int vote = block.fibers[i]->vote;
      block.votes_or |= vote != 0;
      block.votes_and &= vote != 0;
      block.votes_count += vote != 0;
      block.set_runnable(i);
    }
  }

  // `fiber` has reached a warp function, or left the kernel.
  static void settle_warp(Block& block, const Fiber& fiber) {
    const int first = fiber.index / kWarpSize * kWarpSize;
    const int count = std::min(kWarpSize, block.size() - first);
    const auto is_in = [first](int index, unsigned mask) { return (mask >> (index - first) & 1u) != 0; };
    unsigned arrived = 0;
    for (int i = first; i < first + count; ++i) {
      const Fiber& other = *block.fibers[i];
      const bool waits = other.wait == Wait::kWarp;
      if (fiber.wait == Wait::kDone ? waits && is_in(fiber.index, other.mask)
                                    : other.wait == Wait::kDone && is_in(i, fiber.mask)) {
        throw EmulationError("a thread has left the kernel and is in the mask of the warp function in line " +
                             std::to_string(waits ? other.site : fiber.site));
      }
      if (waits && other.site == fiber.site && other.mask == fiber.mask) arrived |= 1u << (i - first);
    }
    if (fiber.wait == Wait::kDone) return;
    const unsigned present = count == kWarpSize ? 0xffffffffu : (1u << count) - 1;
    if ((fiber.mask & ~present) != 0) {
      throw EmulationError("the warp function in line " + std::to_string(fiber.site) + " names threads that the block lacks");
    }
    const unsigned mask = fiber.mask;
    if ((arrived & mask) != mask) return;
    for (int i = first; i < first + count; ++i) {
      if (is_in(i, mask)) block.set_runnable(i);
    }
  }

  std::string describe_deadlock() const {
    for (const auto& block : live_) {
      for (const auto& fiber : block->fibers) {
        if (fiber->wait == Wait::kBarrier || fiber->wait == Wait::kWarp) {
          return "deadlock: thread " + std::to_string(fiber->index) + " waits for ever at line " + std::to_string(fiber->site);
        }
      }
    }
    return "deadlock";
  }

  Turn main_;
  Fiber* current_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  dim3 grid_;
  dim3 block_size_;
  Schedule schedule_;
  std::mt19937_64 random_;
  std::exception_ptr error_;
  std::vector<std::unique_ptr<Block>> live_;
  std::vector<Stack> free_stacks_;
};

template <typename T>
T* shared_array(int key, std::size_t count) {
  return Machine::get().shared_array<T>(key, count);
}

inline void barrier(int vote, int site) {
  Machine::get().current().vote = vote;
  Machine::get().yield(Wait::kBarrier, site);
}

inline int barrier_or(int vote, int site) {
  barrier(vote, site);
  return Machine::get().current().block->votes_or;
}

// Every thread of `mask` brings a value and takes that of thread `source(lane)`; its own where that is not a lane.
// Two rendezvous: all have brought their values, all have taken one.
template <typename T, typename Source>
T exchange(unsigned mask, T value, const Source& source, int site) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  Machine& machine = Machine::get();
  Fiber& self = machine.current();
  self.mask = mask;
  std::memcpy(&self.value, &value, sizeof(T));
  machine.yield(Wait::kWarp, site);
  const int lane = self.index % kWarpSize;
  const int from = source(lane);
  const std::size_t other = static_cast<std::size_t>(self.index - lane + (from >= 0 && from < kWarpSize ? from : lane));
  T result;
  std::memcpy(&result, &self.block->fibers[other]->value, sizeof(T));
  machine.yield(Wait::kWarp, -site);
  return result;
}

inline unsigned ballot(unsigned mask, int predicate, int site) {
  unsigned bits = 0;
  Machine& machine = Machine::get();
  Fiber& self = machine.current();
  self.mask = mask;
  self.value = predicate != 0;
  machine.yield(Wait::kWarp, site);
  const std::size_t first = static_cast<std::size_t>(self.index / kWarpSize * kWarpSize);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1u) != 0 && self.block->fibers[first + static_cast<std::size_t>(lane)]->value != 0) bits |= 1u << lane;
  }
  machine.yield(Wait::kWarp, -site);
  return bits;
}

// Other threads may run just before.
template <typename T, typename U, typename Update>
T atomic(T* address, U value, const Update& update) {
  Machine::get().yield(Wait::kNone, 0);
  const T before = *address;
  *address = update(before, static_cast<T>(value));
  return before;
}

}  // namespace emulator

#define threadIdx (emulator::Machine::get().current().thread)
#define blockIdx (emulator::Machine::get().current().block->index)
#define blockDim (emulator::Machine::get().block_size())
#define gridDim (emulator::Machine::get().grid())

#define __syncthreads() emulator::barrier(0, __LINE__)
#define __syncthreads_or(vote) emulator::barrier_or(vote, __LINE__)
#define __syncwarp(mask) emulator::exchange(mask, 0, [](int lane) { return lane; }, __LINE__)
#define __ballot_sync(mask, predicate) emulator::ballot(mask, predicate, __LINE__)
#define __shfl_sync(mask, value, source) \
  emulator::exchange(mask, value, [source_lane = (source)](int) { return source_lane; }, __LINE__)
#define __shfl_down_sync(mask, value, delta) \
  emulator::exchange(mask, value, [distance = (delta)](int lane) { return lane + static_cast<int>(distance); }, __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
  emulator::exchange(mask, value, [flip = (bits)](int lane) { return lane ^ static_cast<int>(flip); }, __LINE__)

// Bits: the lowest that is set, from 1 on, or 0; how many are set; how many zeros stand before the highest.
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __ffsll(long long bits) {
  return __builtin_ffsll(bits);
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __popcll(unsigned long long bits) {
  return __builtin_popcountll(bits);
}
inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}

template <typename T, typename U>
T atomicAdd(T* address, U value) {
  return emulator::atomic(address, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <typename T, typename U>
T atomicMax(T* address, U value) {
  return emulator::atomic(address, value, [](T a, T b) { return a > b ? a : b; });
}
template <typename T, typename U>
T atomicOr(T* address, U value) {
  return emulator::atomic(address, value, [](T a, T b) { return static_cast<T>(a | b); });
}
