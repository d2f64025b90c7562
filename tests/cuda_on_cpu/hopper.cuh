// In the place of csrc/hopper.cuh: what TMA, its barriers and wgmma do, as PTX describes them, thread by thread.
#pragma once
#include <cuda_runtime.h>

#include "dtypes.h"

#define __grid_constant__
#define SPAT_HARDWARE __attribute__((no_sanitize("undefined")))  // what is no kernel's code need not be slow

namespace spat::hopper {

constexpr int kDepth = 64, kWarpgroup = 128, kRowBytes = 128, kChunkBytes = 16, kSwizzle = 8;

// Where value `column` of row `row` lies in a tile.
SPAT_HARDWARE inline int place(int row, int column) {
  const int chunk = column / 8 ^ row % kSwizzle;
  return row * kDepth + chunk * 8 + column % 8;
}

struct TensorMap {
  const uint16_t* data;
  int64_t shape[4];  // [samples, height, width, channels], or [1, rows, taps, channels]
  int kernel[2], stride, padding[2], count;
};

struct Barrier {
  int arrivals, pending;
  int64_t bytes;
  uint32_t parity;  // of the phase that is not complete yet

  void check() {
    if (pending == 0 && bytes == 0) pending = arrivals, parity ^= 1;
  }
};

inline int multiprocessors() { return 1; }

template <class T>
int map_pixels(TensorMap& map, const void* images, const int64_t (&shape)[4], const int (&kernel)[2], int stride,
               const int (&padding)[2], int pixels) {
  map = {static_cast<const uint16_t*>(images), {shape[0], shape[1], shape[2], shape[3]}, {kernel[0], kernel[1]}, stride,
         {padding[0], padding[1]}, pixels};
  return cudaSuccess;
}
template <class T>
int map_rows(TensorMap& map, const void* images, const int64_t (&shape)[4], int rows, int count) {
  map = {static_cast<const uint16_t*>(images), {shape[0], shape[1], shape[2], shape[3]}, {rows, 0}, 1, {}, count};
  return cudaSuccess;
}
template <class T>
int map_weights(TensorMap& map, const void* weights, const int64_t (&shape)[3], int count) {
  map = {static_cast<const uint16_t*>(weights), {1, shape[0], shape[1], shape[2]}, {}, 1, {}, count};
  return cudaSuccess;
}

// Row `i` of a tile: kDepth channels from `channel` on of one pixel, 0 where there are none.
SPAT_HARDWARE inline void copy_row(uint16_t* tile, int i, const TensorMap& map, int64_t n, int64_t y, int64_t x, int64_t channel) {
  const auto& shape = map.shape;
  const bool inside = n >= 0 && n < shape[0] && y >= 0 && y < shape[1] && x >= 0 && x < shape[2];
  const int64_t row = ((n * shape[1] + y) * shape[2] + x) * shape[3], some = inside ? shape[3] - channel : 0;
  for (int j = 0; j < kDepth; ++j) tile[place(i, j)] = j < some ? map.data[row + channel + j] : 0;
}

template <class Shared>
Shared& launched_shared() {
  alignas(1024) static unsigned char bytes[227 * 1024];
  return *reinterpret_cast<Shared*>(bytes);
}

inline bool elected() { return threadIdx.x % cuda_on_cpu::kWarp == 0; }
inline void init(Barrier& barrier, int arrivals) { barrier = {arrivals, arrivals, 0, 0}; }
inline void barriers_are_ready() {}
inline void arrive(Barrier& barrier) { --barrier.pending, barrier.check(); }
inline void arrive_and_expect(Barrier& barrier, uint32_t bytes) { barrier.bytes += bytes, arrive(barrier); }
inline void wait(Barrier& barrier, uint32_t parity, std::source_location at = std::source_location::current()) {
  while (barrier.parity == (parity & 1)) cuda_on_cpu::poll("a barrier", at);
}

inline void received(Barrier& barrier, int64_t bytes) { barrier.bytes -= bytes, barrier.check(); }

inline void copy_pixels(uint16_t* tile, const TensorMap& map, Barrier& barrier, int channel, int x, int y, int sample, int right,
                        int down) {
  const int64_t last_x = map.shape[2] - 1 + map.padding[1] + 1 - map.kernel[1];
  const int64_t last_y = map.shape[1] - 1 + map.padding[0] + 1 - map.kernel[0];
  for (int i = 0; i < map.count; ++i) {
    copy_row(tile, i, map, sample, y + down, x + right, channel);
    if ((x += map.stride) > last_x) x = -map.padding[1], y += map.stride;
    if (y > last_y) y = -map.padding[0], ++sample;
  }
  received(barrier, int64_t(map.count) * kRowBytes);
}
inline void copy_rows(uint16_t* tile, const TensorMap& map, Barrier& barrier, int channel, int x, int y, int sample) {
  const int width = int(map.shape[2]), rows = map.kernel[0];
  for (int i = 0; i < map.count * rows * width; ++i)
    copy_row(tile, i, map, sample + i / width / rows, y + i / width % rows, x + i % width, channel);
  received(barrier, int64_t(map.count) * rows * width * kRowBytes);
}
inline void copy_weights(uint16_t* tile, const TensorMap& map, Barrier& barrier, int channel, int tap, int row) {
  for (int i = 0; i < map.count; ++i) copy_row(tile, i, map, 0, row + i, tap, channel);
  received(barrier, int64_t(map.count) * kRowBytes);
}

inline void prefetch(const void* p) { (void)*static_cast<const volatile char*>(p); }

struct Operand {
  const uint16_t* tile;
  int column;
};
inline Operand operand(const uint16_t* tile, int column) { return {tile, column}; }

template <int N>
using Sums = float[N / 2];
template <int N>
void hand_over(Sums<N>&) {}
template <int N>
void take_back(Sums<N>&) {}
// The lanes of a warp do their products as one.
inline void commit(std::source_location at = std::source_location::current()) {
  cuda_on_cpu::meet("wgmma", at, cuda_on_cpu::kWarp, 0);
}

template <class T, int K>
SPAT_HARDWARE void values(float (&into)[K], Operand from, int row) {
  for (int k = 0; k < K; k += 8) {  // a chunk
    const uint16_t* chunk = from.tile + place(row, from.column + k);
    for (int i = 0; i < 8; ++i) into[k + i] = to_acc(T{chunk[i]});
  }
}

// Each thread has the same two columns of every eight, of two rows.
template <class T, int N>
SPAT_HARDWARE void multiply(Sums<N>& sums, Operand x, Operand w) {
  constexpr int kProducts = 16;
  const int lane = threadIdx.x % cuda_on_cpu::kWarp, warp = threadIdx.x % kWarpgroup / cuda_on_cpu::kWarp;
  float rows[2][kProducts], column[kProducts];
  for (int i = 0; i < 2; ++i) values<T>(rows[i], x, 16 * warp + lane / 4 + 8 * i);
  for (int i = 0; i < N / 4; ++i) {  // sums: [N / 8][row][column]
    values<T>(column, w, i / 2 * 8 + lane % 4 * 2 + i % 2);
    for (int row = 0; row < 2; ++row) {
      float& sum = sums[i / 2 * 4 + row * 2 + i % 2];
      for (int k = 0; k < kProducts; ++k) sum += rows[row][k] * column[k];
    }
  }
}

}  // namespace spat::hopper
