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

#include <ucontext.h>

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
constexpr std::size_t kStackBytes = 256 * 1024;
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
  ucontext_t context;
  std::unique_ptr<char[]> stack;
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
  std::map<int, SharedArray> shared;
  int votes_or = 0;
  int votes_and = 1;
  int votes_count = 0;
  int unfinished = 0;
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
      swapcontext(&main_, &fiber->context);
      current_ = nullptr;
      if (error_) {
        live_.clear();
        std::rethrow_exception(error_);
      }
      settle(*fiber->block);
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
    fiber->wait = wait;
    fiber->site = site;
    swapcontext(&fiber->context, &main_);
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
    fiber->wait = Wait::kDone;
    --fiber->block->unfinished;
    swapcontext(&fiber->context, &machine.main_);
  }

  std::unique_ptr<Block> start_block(int linear) {
    auto block = std::make_unique<Block>();
    block->index = dim3(linear % grid_.x, linear / grid_.x % grid_.y, linear / grid_.x / grid_.y);
    const int threads = static_cast<int>(block_size_.x * block_size_.y * block_size_.z);
    block->unfinished = threads;
    for (int i = 0; i < threads; ++i) {
      auto fiber = std::make_unique<Fiber>();
      fiber->block = block.get();
      fiber->index = i;
      fiber->thread = dim3(i % block_size_.x, i / block_size_.x % block_size_.y, i / block_size_.x / block_size_.y);
      if (free_stacks_.empty()) {
        fiber->stack.reset(new char[kStackBytes]);
      } else {
        fiber->stack = std::move(free_stacks_.back());
        free_stacks_.pop_back();
      }
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = fiber->stack.get();
      fiber->context.uc_stack.ss_size = kStackBytes;
      fiber->context.uc_link = nullptr;
      makecontext(&fiber->context, &Machine::trampoline, 0);
      block->fibers.push_back(std::move(fiber));
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

  Fiber* pick() {
    runnable_.clear();
    for (auto& block : live_) {
      for (auto& fiber : block->fibers) {
        if (fiber->wait == Wait::kNone) {
          if (schedule_.order == Order::kForward) return fiber.get();
          runnable_.push_back(fiber.get());
        }
      }
    }
    if (runnable_.empty()) return nullptr;
    if (schedule_.order == Order::kBackward) return runnable_.back();
    return runnable_[std::uniform_int_distribution<std::size_t>(0, runnable_.size() - 1)(random_)];
  }

  // Releases barriers and warp functions that all their threads have reached.
  void settle(Block& block) {
    int at_barrier = 0;
    int site = 0;
    for (auto& fiber : block.fibers) {
      if (fiber->wait == Wait::kBarrier) {
        if (at_barrier++ == 0) site = fiber->site;
        if (fiber->site != site) {
          throw EmulationError("threads of a block wait at different barriers: lines " + std::to_string(site) + " and " +
                               std::to_string(fiber->site));
        }
      }
    }
    if (at_barrier > 0 && block.unfinished < static_cast<int>(block.fibers.size())) {
      throw EmulationError("a thread has left the kernel while others wait at the barrier in line " +
                           std::to_string(site));
    }
    if (at_barrier == static_cast<int>(block.fibers.size())) {
      block.votes_or = 0;
      block.votes_and = 1;
      block.votes_count = 0;
      for (auto& fiber : block.fibers) {
        block.votes_or |= fiber->vote != 0;
        block.votes_and &= fiber->vote != 0;
        block.votes_count += fiber->vote != 0;
        fiber->wait = Wait::kNone;
      }
    }
    const int fibers = static_cast<int>(block.fibers.size());
    for (int first = 0; first < fibers; first += kWarpSize) settle_warp(block, first, std::min(first + kWarpSize, fibers));
  }

  void settle_warp(Block& block, int first, int last) {
    for (int i = first; i < last; ++i) {
      Fiber& leader = *block.fibers[i];
      if (leader.wait != Wait::kWarp) continue;
      unsigned arrived = 0;
      for (int j = first; j < last; ++j) {
        const Fiber& other = *block.fibers[j];
        if (other.wait == Wait::kWarp && other.site == leader.site && other.mask == leader.mask) arrived |= 1u << (j - first);
        if ((leader.mask >> (j - first) & 1u) != 0 && other.wait == Wait::kDone) {
          throw EmulationError("a thread has left the kernel and is in the mask of the warp function in line " +
                               std::to_string(leader.site));
        }
      }
      const unsigned present = last - first == kWarpSize ? 0xffffffffu : (1u << (last - first)) - 1;
      if ((leader.mask & ~present) != 0) {
        throw EmulationError("the warp function in line " + std::to_string(leader.site) + " names threads that the block lacks");
      }
      if ((arrived & leader.mask) != leader.mask) continue;
      for (int j = first; j < last; ++j) {
        if ((leader.mask >> (j - first) & 1u) != 0) block.fibers[j]->wait = Wait::kNone;
      }
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

  ucontext_t main_;
  Fiber* current_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  dim3 grid_;
  dim3 block_size_;
  Schedule schedule_;
  std::mt19937_64 random_;
  std::exception_ptr error_;
  std::vector<std::unique_ptr<Block>> live_;
  std::vector<Fiber*> runnable_;
  std::vector<std::unique_ptr<char[]>> free_stacks_;
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

template <typename T, typename U>
T atomicAdd(T* address, U value) {
  return emulator::atomic(address, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <typename T, typename U>
T atomicMax(T* address, U value) {
  return emulator::atomic(address, value, [](T a, T b) { return a > b ? a : b; });
}
