// Convolutions of 3x3 and stride 1 on CPUs with AVX-512, by Winograd's F(2x2, 3x3): 16 products where the sum has 36.
//
// A tile is 2x2 pixels of `out`, read from 4x4 pixels d of x:  out = A' [(G w G') * (B' d B)] A, with * element by element and summed
// over the channels: 16 products of matrices, tiles x channels x out_channels. A thread does up to kTiles tiles at once, whose
// transformed pixels stay in its L2. A sum runs over kDepth channels, then the next: its error grows with the root of that.
// Bits do not depend on the batch, on the threads, nor on the place of an image: each output has one order of sums.
#include <algorithm>
#include <memory>

#include "spat.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f")))
#define AVX512_INLINE __attribute__((target("avx512f"), always_inline)) inline

namespace spat {
namespace {

constexpr int64_t kLanes = 16, kPanel = 64;  // output channels of a register, and of a panel of weights
constexpr int64_t kTiles = 96, kDepth = 128;
constexpr int64_t kPad = kLanes;  // between rows, which would else fall on the same lines of the cache

typedef float V __attribute__((vector_size(4 * kLanes)));
AVX512_INLINE V load(const float* p) { return V(_mm512_loadu_ps(p)); }
AVX512_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, __m512(v)); }

// c [kRows, n] (+)= a [kRows, depth] b [depth, n], n = 16 kColumns.
template <int kRows, int kColumns>
AVX512_INLINE void multiply(const float* a, int64_t stride, const float* b, float* c, int64_t depth, bool first) {
  constexpr int64_t n = kLanes * kColumns;
  __m512 sum[kRows][kColumns];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) sum[i][j] = _mm512_setzero_ps();
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k) {
    __m512 w[kColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) w[j] = _mm512_loadu_ps(b + k * n + kLanes * j);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const __m512 v = _mm512_set1_ps(a[i * stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) sum[i][j] = _mm512_fmadd_ps(v, w[j], sum[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) {
      float* p = c + i * n + kLanes * j;
      store(p, first ? V(sum[i][j]) : load(p) + V(sum[i][j]));
    }
}

template <int kColumns>
AVX512 void multiply_rows(const float* a, int64_t rows, int64_t stride, const float* b, float* c, int64_t depth) {
  constexpr int64_t n = kLanes * kColumns;
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t some = std::min(kDepth, depth - k);
    int64_t i = 0;
    for (; i + 6 <= rows; i += 6) multiply<6, kColumns>(a + i * stride + k, stride, b + k * n, c + i * n, some, k == 0);
    for (; i + 2 <= rows; i += 2) multiply<2, kColumns>(a + i * stride + k, stride, b + k * n, c + i * n, some, k == 0);
    for (; i < rows; ++i) multiply<1, kColumns>(a + i * stride + k, stride, b + k * n, c + i * n, some, k == 0);
  }
}

struct Tile {
  int64_t sample, top, left;  // of its 2x2 pixels
};
AVX512_INLINE Tile tile_of(const Winograd& w, int64_t i) {
  const int64_t across = (w.width + 1) / 2, all = (w.height + 1) / 2 * across;
  return {i / all, i % all / across * 2, i % across * 2};
}

// B' d B of one tile: values[16][tiles][stride].
AVX512 void transform(const Winograd& w, const Tile& tile, float* values, int64_t between) {
  alignas(64) static constexpr float kZeros[kLanes] = {};
  const float* pixels[4][4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const int64_t y = tile.top + i - 1, x = tile.left + j - 1;
      const bool inside = y >= 0 && y < w.height && x >= 0 && x < w.width;
      pixels[i][j] = inside ? w.x + ((tile.sample * w.height + y) * w.width + x) * w.channels : nullptr;
    }
  for (int64_t c = 0; c < w.channels; c += kLanes) {
    V e[4][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      V d[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) d[i] = load(pixels[i][j] ? pixels[i][j] + c : kZeros);
      e[0][j] = d[0] - d[2], e[1][j] = d[1] + d[2], e[2][j] = d[2] - d[1], e[3][j] = d[1] - d[3];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* p = values + 4 * i * between + c;
      store(p, e[i][0] - e[i][2]), store(p + between, e[i][1] + e[i][2]);
      store(p + 2 * between, e[i][2] - e[i][1]), store(p + 3 * between, e[i][1] - e[i][3]);
    }
  }
}

// A' m A of one tile and a panel of `n` channels from `first` on: products[16][tiles][n].
AVX512 void transform_back(const Winograd& w, const Tile& tile, const float* products, int64_t between, int64_t first, int64_t n) {
  float* out = w.out + ((tile.sample * w.height + tile.top) * w.width + tile.left) * w.out_channels + first;
  const bool below = tile.top + 1 < w.height, right = tile.left + 1 < w.width;
  for (int64_t c = 0; c < n; c += kLanes) {
    V e[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const float* p = products + j * between + c;
      const V a = load(p), b = load(p + 4 * between), d = load(p + 8 * between), f = load(p + 12 * between);
      e[0][j] = a + b + d, e[1][j] = b - d - f;
    }
    for (int i = 0; i < 1 + below; ++i) {
      float* p = out + i * w.width * w.out_channels + c;
      store(p, e[i][0] + e[i][1] + e[i][2]);
      if (right) store(p + w.out_channels, e[i][1] - e[i][2] - e[i][3]);
    }
  }
}

}  // namespace

bool has_winograd() { return __builtin_cpu_supports("avx512f"); }

// Tiles [begin, end).
AVX512 void winograd_cpu(const Winograd& w, int64_t begin, int64_t end) {
  const int64_t parts = (end - begin + kTiles - 1) / kTiles, most = (end - begin + parts - 1) / parts, stride = w.channels + kPad;
  const std::unique_ptr<float[]> values(new float[16 * most * stride]), products(new float[16 * most * kPanel]);
  for (int64_t first = begin; first < end; first += most) {
    const int64_t tiles = std::min(most, end - first);
    for (int64_t t = 0; t < tiles; ++t) transform(w, tile_of(w, first + t), &values[t * stride], tiles * stride);
    for (int64_t k = 0; k < w.out_channels; k += kPanel) {
      const int64_t n = std::min(kPanel, w.out_channels - k);
      for (int64_t q = 0; q < 16; ++q) {
        const float* weight = w.weight + (q * w.out_channels + k) * w.channels;
        const auto rows = n == kPanel ? multiply_rows<4> : multiply_rows<2>;
        rows(&values[q * tiles * stride], tiles, stride, weight, &products[q * tiles * n], w.channels);
      }
      for (int64_t t = 0; t < tiles; ++t) transform_back(w, tile_of(w, first + t), &products[t * n], tiles * n, k, n);
    }
  }
}

// G w G' in panels [16][out_channels / 64][channels][64], of channels [16 begin, 16 end) that are read.
AVX512 void winograd_weights_cpu(const WinogradWeights& w, int64_t begin, int64_t end) {
  for (int64_t first = kLanes * begin; first < kLanes * end; first += kLanes)
    for (int64_t k = 0; k < w.out_channels; k += kLanes) {
      alignas(64) float taps[kLanes][9][kLanes];  // [channel][tap][output channel]
      for (int64_t i = 0; i < kLanes; ++i)
        for (int64_t tap = 0; tap < 9; ++tap)
          for (int64_t c = 0; c < kLanes; ++c) {
            if (w.turned) taps[i][tap][c] = w.weight[((first + i) * 9 + 8 - tap) * w.out_channels + k + c];
            else taps[c][tap][i] = w.weight[((k + i) * 9 + tap) * w.channels + first + c];
          }
      const int64_t panel = k / kPanel * kPanel, n = std::min(kPanel, w.out_channels - panel);
      for (int64_t c = 0; c < kLanes; ++c) {
        V e[4][3];
        for (int j = 0; j < 3; ++j) {
          const V a = load(taps[c][j]), b = load(taps[c][3 + j]), d = load(taps[c][6 + j]);
          e[0][j] = a, e[1][j] = 0.5f * (a + b + d), e[2][j] = 0.5f * (a - b + d), e[3][j] = d;
        }
        for (int i = 0; i < 4; ++i) {
          const V all[4] = {e[i][0], 0.5f * (e[i][0] + e[i][1] + e[i][2]), 0.5f * (e[i][0] - e[i][1] + e[i][2]), e[i][2]};
          for (int j = 0; j < 4; ++j)
            store(w.out + ((4 * i + j) * w.out_channels + panel) * w.channels + (first + c) * n + k - panel, all[j]);
        }
      }
    }
}

}  // namespace spat
#else
namespace spat {
bool has_winograd() { return false; }
void winograd_cpu(const Winograd&, int64_t, int64_t) {}
void winograd_weights_cpu(const WinogradWeights&, int64_t, int64_t) {}
}  // namespace spat
#endif
