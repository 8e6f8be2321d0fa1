// Sorting of unique keys: a chunk in shared memory by one block, and the merging of sorted runs by their ranks.
#pragma once

#include <cstdint>

namespace retinanet_ext {

constexpr int kSortThreads = 512;
constexpr int kSortChunk = 2048;  // keys that are sorted in shared memory; a power of two

// Sorts keys[0, size) of shared memory; size is a power of two. Bitonic: size / 2 comparisons a step, log2(size)^2 / 2
// steps. The caller has a barrier before it; afterwards all threads may read.
template <typename Key>
__device__ void sort_chunk(Key* keys, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kSortThreads) {
        const int low = 2 * i - (i & (step - 1));
        const Key first = keys[low];
        const Key second = keys[low + step];
        const bool rising = (low & run) == 0;
        if ((second < first) == rising) {
          keys[low] = second;
          keys[low + step] = first;
        }
      }
      __syncthreads();  // the next step compares what other threads have moved
    }
  }
}

// The power of two that holds `count` keys, at most kSortChunk of them.
__device__ __forceinline__ int padded_size(int count) {
  int size = 1;
  while (size < count) size *= 2;
  return size;
}

// How many keys of a sorted run are below `key`.
template <typename Key>
__device__ __forceinline__ int64_t count_below(const Key* run, int64_t size, Key key) {
  int64_t first = 0;
  while (size > 0) {
    const int64_t half = size / 2;
    const bool below = run[first + half] < key;
    first += below ? half + 1 : 0;
    size = below ? size - half - 1 : half;
  }
  return first;
}

// Where the key at `position` goes when each two neighbouring sorted runs of keys[0, count) become one.
template <typename Key>
__device__ __forceinline__ int64_t merged_position(const Key* keys, int64_t count, int64_t run, int64_t position) {
  const int64_t start = position / (2 * run) * (2 * run);
  const int64_t middle = start + run < count ? start + run : count;
  const int64_t end = middle + run < count ? middle + run : count;
  const Key key = keys[position];
  return position < middle ? position + count_below(keys + middle, end - middle, key)
                           : position - run + count_below(keys + start, middle - start, key);
}

// Sorts any number of keys in global memory, by one block, with as many keys of `scratch` and a chunk of shared memory.
// The caller has a barrier before it, and one after it where threads then read what others have written.
template <typename Key>
__device__ void sort_keys(Key* keys, Key* scratch, int64_t count, Key* chunk) {
  for (int64_t first = 0; first < count; first += kSortChunk) {
    const int here = count - first < kSortChunk ? static_cast<int>(count - first) : kSortChunk;
    const int size = padded_size(here);
    for (int i = threadIdx.x; i < size; i += kSortThreads) chunk[i] = i < here ? keys[first + i] : ~Key(0);
    __syncthreads();  // the chunk is in shared memory
    sort_chunk(chunk, size);
    for (int i = threadIdx.x; i < here; i += kSortThreads) keys[first + i] = chunk[i];
    __syncthreads();  // the chunk has been read, and its keys are written
  }
  bool swapped = false;
  for (int64_t run = kSortChunk; run < count; run *= 2) {
    const Key* from = swapped ? scratch : keys;
    Key* to = swapped ? keys : scratch;
    for (int64_t i = threadIdx.x; i < count; i += kSortThreads) to[merged_position(from, count, run, i)] = from[i];
    __syncthreads();  // the longer runs are whole
    swapped = !swapped;
  }
  if (!swapped) return;
  for (int64_t i = threadIdx.x; i < count; i += kSortThreads) keys[i] = scratch[i];
}

}  // namespace retinanet_ext
