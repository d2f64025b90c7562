// Convolutions in half precision with their pass in the epilogue (octet.cuh), for Hopper: what they give goes to device memory once,
// after residual, scale, shift and ReLU, and their gradients after mask, scale and residual.
//
// An implicit matrix product: rows are output pixels, columns output channels, the inner dimension runs over the weights of a window
// and the channels, 64 at a time. A block does kRows x N of it, each of its two warpgroups 64 rows. TMA copies stages of both factors,
// in its im2col mode: pixels at their places in the image, zeros outside. Blocks go from tile to tile, and copies run ahead into the
// next one. Two blocks share a multiprocessor, so that one multiplies while the other does its epilogue. 160 columns fit the 160, 320
// and 640 channels of a WRN-34-10 exactly.
//
// The gradient of a convolution of stride 1 is a convolution, too, of the gradients with the weights turned round (fused_conv/hopper.py).
#include "hopper.cuh"
#include "octet.cuh"

namespace spat {
namespace {

using namespace hopper;

constexpr int kRows = 128;
constexpr int kBlock = kRows / 64 * kWarpgroup;
constexpr int kMaxPixels = 192;  // of a tile with the rows above and below

// What one thread knows about the copies that it starts: where the next one is from, and where it goes. In shared memory, for the
// registers' sake, and read and written as a whole.
struct alignas(16) Copies {
  int down, right, channel, stage;
  uint32_t parity;
  int tile, x, y;  // of the tile's first pixel; -1: there is no tile left
  int sample, column, unused[2];
};

// Before the rings of buffers: pixels, then weights. `full` counts what copies bring, `empty` the warps that have read it.
constexpr int kMaxStages = 8;
struct alignas(1024) Shared {
  Barrier pixels_full[kMaxStages], pixels_empty[kMaxStages], weights_full[kMaxStages], weights_empty[kMaxStages];
  Copies next_pixels, next_weights;

  __device__ __forceinline__ uint16_t* pixels(const Conv& c, int stage) {
    return reinterpret_cast<uint16_t*>(this + 1) + stage * c.tile_pixels * kDepth;
  }
  template <int N>
  __device__ __forceinline__ uint16_t* weights(const Conv& c, int stage) {
    return pixels(c, c.pixel_stages) + stage * N * kDepth;
  }
};

// The tiles of the matrix product, those with the same pixels next to each other. A block does one of every gridDim.x.
template <int N>
struct Tiles {
  int columns, count;
  __host__ __device__ __forceinline__ explicit Tiles(const Conv& c) : columns((c.out_channels + N - 1) / N) {
    count = (c.samples * c.out_height * c.out_width + kRows - 1) / kRows * columns;
  }
  __device__ __forceinline__ int row(int tile) const { return tile / columns * kRows; }
  __device__ __forceinline__ int column(int tile) const { return tile % columns * N; }
};

template <int N>
__device__ __forceinline__ void go_to(Copies& copies, const Conv& c, int tile) {
  const Tiles<N> tiles(c);
  const int area = c.out_height * c.out_width, row = tiles.row(tile), sample = row / area, pixel = row - sample * area;
  const int y = pixel / c.out_width, x = pixel - y * c.out_width;
  copies.tile = tile < tiles.count ? tile : -1;
  copies.sample = sample, copies.column = tiles.column(tile);
  copies.y = y * c.stride - c.pad_height, copies.x = x * c.stride - c.pad_width;
}

// The order of copies: `channel` of the image, 64 at a time, under the weight (down, right) of the window. ROWS: all weights of a
// column of the window, one after the other, use the same pixels.
template <int N, bool ROWS>
__device__ __forceinline__ void advance(Copies& now, const Conv& c, bool weights, int stages) {
  if (++now.stage == stages) now.stage = 0, now.parity ^= 1;
  if (ROWS && weights) {
    if (++now.down < c.kernel_height) return;
    now.down = 0;
  }
  if ((now.channel += kDepth) < c.channels) return;
  now.channel = 0;
  if (!ROWS) {
    if (++now.down < c.kernel_height) return;
    now.down = 0;
  }
  if (++now.right < c.kernel_width) return;
  now.right = 0;
  go_to<N>(now, c, now.tile + int(gridDim.x));
}

// Each starts the next copy, as soon as everybody has read what was there. One thread does all copies: two that wait in different
// warpgroups wait for each other.
template <int N, bool ROWS>
__device__ __forceinline__ void copy_next_pixels(Shared& shared, const TensorMap& images, const Conv& c) {
  Copies now = shared.next_pixels;
  if (now.tile < 0) return;
  uint16_t* target = shared.pixels(c, now.stage);
  Barrier& full = shared.pixels_full[now.stage];
  wait(shared.pixels_empty[now.stage], now.parity ^ 1);
  arrive_and_expect(full, c.tile_pixels * kDepth * int(sizeof(uint16_t)));
  if constexpr (ROWS)
    copy_rows(target, images, full, now.channel, now.right - c.pad_width, now.y, now.sample);
  else
    copy_pixels(target, images, full, now.channel, now.x, now.y, now.sample, now.right, now.down);
  advance<N, ROWS>(now, c, false, c.pixel_stages);
  shared.next_pixels = now;
}
template <int N, bool ROWS>
__device__ __forceinline__ void copy_next_weights(Shared& shared, const TensorMap& weights, const Conv& c) {
  Copies now = shared.next_weights;
  if (now.tile < 0) return;
  Barrier& full = shared.weights_full[now.stage];
  wait(shared.weights_empty[now.stage], now.parity ^ 1);
  arrive_and_expect(full, N * kDepth * int(sizeof(uint16_t)));
  const int tap = now.down * c.kernel_width + now.right;
  copy_weights(shared.template weights<N>(c, now.stage), weights, full, now.channel, tap, now.column);
  advance<N, ROWS>(now, c, true, c.weight_stages);
  shared.next_weights = now;
}

// A place in a ring of buffers.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next(int count) {
    if (++stage == count) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ int before(int count) const { return (stage == 0 ? count : stage) - 1; }
};

// The products of a block, by all its threads. Where one thread does something for all of its warp, it is `elected`.
template <class T, int N, bool ROWS>
struct Products {
  Shared& shared;
  const TensorMap &images, &weights;
  const Conv& c;
  Turn pixels, weights_by_row;
  int warp;  // known to be the same in all of its threads; found for each tile, not to be kept while sums are written

  // Of the weights. But for ROWS they go with the pixels, which saves registers.
  __device__ __forceinline__ Turn& filter() { return ROWS ? weights_by_row : pixels; }

  // sums += the next pixels, `rows` further down, times the next weights, of which COLUMNS channels are not zeros.
  template <int COLUMNS>
  __device__ __forceinline__ void add(Sums<N>& sums, int rows) {
    const int first = warp / (kWarpgroup / kWarp) * c.half_tile + rows * c.out_width;
    const uint16_t *x = shared.pixels(c, pixels.stage) + first * kDepth, *w = shared.template weights<N>(c, filter().stage);
    wait(shared.weights_full[filter().stage], filter().parity);
    hand_over<N>(sums);
#pragma unroll
    for (int column = 0; column < COLUMNS; column += 16) multiply<T, N>(sums, operand(x, column), operand(w, column));
    commit();  // what came before has been read now
  }

  __device__ __forceinline__ void release_weights() {
    const bool one = elected();
    if (one) arrive(shared.weights_empty[filter().before(c.weight_stages)]);
    if (warp == 0 && one) copy_next_weights<N, ROWS>(shared, weights, c);
    __syncwarp();
  }
  __device__ __forceinline__ void release_pixels() {
    const bool one = elected();
    if (one) arrive(shared.pixels_empty[pixels.before(c.pixel_stages)]);
    if (warp == 0 && one) copy_next_pixels<N, ROWS>(shared, images, c);
    __syncwarp();
  }

  template <int COLUMNS>
  __device__ __forceinline__ void add_stage(Sums<N>& sums, bool begins) {
    wait(shared.pixels_full[pixels.stage], pixels.parity);
    for (int down = 0; down < (ROWS ? c.kernel_height : 1); ++down) {
      add<COLUMNS>(sums, down);
      if (!begins || down > 0) release_weights();
      if (!begins && down == 0) release_pixels();
      if (ROWS) weights_by_row.next(c.weight_stages);
    }
    pixels.next(c.pixel_stages);
  }

  // HALF: the last stage under each weight holds 32 channels or fewer.
  template <bool HALF>
  __device__ __forceinline__ void add_all(Sums<N>& sums) {
    warp = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarp, 0);
    bool begins = true;
    for (int i = 0; i < (ROWS ? 1 : c.kernel_height) * c.kernel_width; ++i) {
      for (int channel = HALF ? kDepth / 2 : 0; channel < c.channels; channel += kDepth, begins = false)
        add_stage<kDepth>(sums, begins);
      if constexpr (HALF) add_stage<kDepth / 2>(sums, begins), begins = false;
    }
    take_back<N>(sums);
    release_weights();
    release_pixels();
  }
};

// A thread's sums are pairs of columns; the four threads of a row exchange them, so that each has eight columns side by side.
__device__ __forceinline__ void exchange(float (&pairs)[4][2]) {
  const int mine = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(i & bit))
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float &low = pairs[i][j], &high = pairs[i + bit][j];
          const float other = __shfl_xor_sync(kAllLanes, mine & bit ? low : high, bit);
          low = mine & bit ? other : low, high = mine & bit ? high : other;
        }
}

// Two threads a row ask for what the pass will read of an image.
template <int N>
__device__ __forceinline__ void prefetch_image(const void* image, const Conv& c, int row, int column) {
  const int r = row + int(threadIdx.x) / 2, last = column + N < c.out_channels ? column + N : c.out_channels;
  if (!image || r >= c.samples * c.out_height * c.out_width) return;
  const uint16_t* from = static_cast<const uint16_t*>(image) + int64_t(r) * c.out_channels;
  for (int channel = column + int(threadIdx.x) % 2 * 64; channel < last; channel += 128) prefetch(from + channel);
}
template <int N>
__device__ __forceinline__ void prefetch_images(const ScaleShiftRelu& s, const Conv& c, int row, int column) {
  prefetch_image<N>(s.b, c, row, column);
}
template <int N>
__device__ __forceinline__ void prefetch_images(const ScaleShiftReluGrad& s, const Conv& c, int row, int column) {
  prefetch_image<N>(s.grad2, c, row, column);
  prefetch_image<N>(s.residual, c, row, column);
}

// The pass over a thread's sums. The loads of a few octets are on their way before the first is needed.
template <class T, int N, class Pass>
__device__ __forceinline__ void write_sums(const Sums<N>& sums, const Conv& c, const Pass& args, int row, int column) {
  constexpr int kGroups = N / 32, kAtOnce = N == 160 ? 1 : 2;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + 16 * warp + lane / 4 + 8 * h, first = column + 8 * (lane % 4);
    const int64_t octets = int64_t(r) * (c.out_channels / kOctet) + first / kOctet;  // before group 0 of this row
    const auto octet = [&](int group) {
      return Octet{(octets + 4 * group) * kOctet, first + 32 * group, kOctet, octets + 4 * group};
    };
    const auto exists = [&](int group) { return r < args.shape.rows && first + 32 * group < c.out_channels; };
#pragma unroll
    for (int begin = 0; begin < kGroups; begin += kAtOnce) {
      Reads<T> reads[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (begin + i < kGroups && exists(begin + i)) read_ahead<true>(args, octet(begin + i), reads[i]);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int group = begin + i;
        if (group >= kGroups) continue;
        float pairs[4][2], v[kOctet];
#pragma unroll
        for (int j = 0; j < kOctet; ++j) pairs[j / 2][j % 2] = sums[16 * group + 4 * (j / 2) + 2 * h + j % 2];
        exchange(pairs);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) v[j] = pairs[j / 2][j % 2];
        if (exists(group)) pass<true, T>(args, octet(group), reads[i], v);
      }
    }
  }
}

template <class T, int N, bool ROWS, bool HALF, class Pass>
__global__ void __launch_bounds__(kBlock, 2)
    conv_kernel(const __grid_constant__ TensorMap images, const __grid_constant__ TensorMap weights, const Conv c, const Pass args) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Shared& shared = launched_shared<Shared>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxStages; ++i) {
      init(shared.pixels_full[i], 1), init(shared.pixels_empty[i], kBlock / kWarp);
      init(shared.weights_full[i], 1), init(shared.weights_empty[i], kBlock / kWarp);
    }
    barriers_are_ready();
    Copies first = {};
    go_to<N>(first, c, blockIdx.x);
    shared.next_pixels = shared.next_weights = first;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < c.pixel_stages; ++i) copy_next_pixels<N, ROWS>(shared, images, c);
    for (int i = 0; i < c.weight_stages; ++i) copy_next_weights<N, ROWS>(shared, weights, c);
  }
  __syncwarp();
  Products<T, N, ROWS> products{shared, images, weights, c};
  const Tiles<N> tiles(c);
  for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    prefetch_images<N>(args, c, tiles.row(tile), tiles.column(tile));
    Sums<N> sums = {};
    products.template add_all<HALF>(sums);
    write_sums<T, N>(sums, c, args, tiles.row(tile), tiles.column(tile));
  }
#endif
}

constexpr int kMost = 227 * 1024;  // bytes of shared memory a block; each launch allows them, since threads share that setting

// As many buffers as fit, for two blocks on a multiprocessor, or for one where there is none for a second; returns their bytes.
template <int N, bool ROWS>
int fill_shared_memory(Conv& c, bool alone) {
  constexpr int kHalf = 113 * 1024;
  const int bytes = (alone ? kMost : kHalf) - int(sizeof(Shared)), pixels = c.tile_pixels * 2 * kDepth, weights = N * 2 * kDepth;
  c.pixel_stages = ROWS ? (alone ? 4 : 2) : std::min(bytes / (pixels + weights), kMaxStages);
  c.weight_stages = ROWS ? std::min((bytes - c.pixel_stages * pixels) / weights, kMaxStages) : c.pixel_stages;
  return int(sizeof(Shared)) + c.pixel_stages * pixels + c.weight_stages * weights;
}

template <class T, int N, bool ROWS, class Pass>
int launch(Conv c, const Pass& args, void* stream) {
  const int images_in_tile = ROWS && c.out_height * c.out_width == 64 ? 2 : 1, blocks = Tiles<N>(c).count;
  c.tile_pixels = ROWS ? pixels_in_rows(c) : kRows;
  c.half_tile = images_in_tile == 2 ? c.tile_pixels / 2 : 64;
  const int bytes = fill_shared_memory<N, ROWS>(c, blocks <= multiprocessors());
  TensorMap images, weights;
  const int64_t shape[] = {c.samples, c.height, c.width, c.channels};
  const int64_t weight_shape[] = {c.out_channels, int64_t(c.kernel_height) * c.kernel_width, c.channels};
  const int kernel_size[] = {c.kernel_height, c.kernel_width}, padding[] = {c.pad_height, c.pad_width};
  const int error = ROWS ? map_rows<T>(images, c.x, shape, c.tile_pixels / images_in_tile / c.width, images_in_tile)
                         : map_pixels<T>(images, c.x, shape, kernel_size, c.stride, padding, kRows);
  if (error) return error;
  if (const int error = map_weights<T>(weights, c.weight, weight_shape, N)) return error;
  const bool half = (c.channels - 1) % kDepth < kDepth / 2;
  const auto kernel = half ? conv_kernel<T, N, ROWS, true, Pass> : conv_kernel<T, N, ROWS, false, Pass>;
  if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost)) return error;
  const int count = std::min(blocks, 2 * multiprocessors());
  kernel<<<count, kBlock, bytes, cudaStream_t(stream)>>>(images, weights, c, args);
  return cudaGetLastError();
}

template <int N, class T, class Pass>
int launch_tile(const Conv& c, const Pass& args, void* stream) {
  return c.rows ? launch<T, N, true>(c, args, stream) : launch<T, N, false>(c, args, stream);
}

template <class T, class Pass>
int launch_dtype(const Conv& c, const Pass& args, void* stream) {
  return c.tile == 64 ? launch_tile<64, T>(c, args, stream)
                      : c.tile == 128 ? launch_tile<128, T>(c, args, stream) : launch_tile<160, T>(c, args, stream);
}

template <class Pass>
int launch_conv(const Conv& c, const Pass& args, void* stream) {
  return args.shape.dtype == DType::f16 ? launch_dtype<half>(c, args, stream) : launch_dtype<bfloat16>(c, args, stream);
}

}  // namespace

int pixels_in_rows(const Conv& c) {
  const int64_t area = int64_t(c.out_height) * c.out_width, images = area == 64 ? 2 : 1;
  const bool same = c.stride == 1 && c.height == c.out_height && c.width == c.out_width;
  if (!same || c.width % 8 || 64 % c.width || area * images % kRows) return 0;
  const int64_t pixels = kRows + images * (c.kernel_height - 1) * c.width;
  return pixels <= kMaxPixels ? int(pixels) : 0;
}

int launch_conv_scale_shift_relu(const ConvScaleShiftRelu& args, void* stream) { return launch_conv(args.conv, args.pass, stream); }
int launch_conv_scale_shift_relu_grad(const ConvScaleShiftReluGrad& args, void* stream) {
  return launch_conv(args.conv, args.pass, stream);
}

}  // namespace spat
