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
// registers' sake.
struct alignas(16) Copies {
  int tile, down, right, channel, stage;
  uint32_t parity;
};


// ROWS: a tile is whole rows of images, whose pixels are copied with the rows above and below, once for all weights of a column of
// the window: it moves down by whole rows. Else each weight has a copy of its own (im2col), and any geometry goes.
template <int N, bool ROWS>
struct Shared {
  static constexpr int kPixels = ROWS ? 2 : 3, kWeights = N == 64 ? 6 : 3;  // two blocks fit into a multiprocessor's shared memory
  struct alignas(1024) {
    uint16_t values[(ROWS ? kMaxPixels : kRows) * kDepth];
  } pixels[kPixels];
  struct alignas(1024) {
    uint16_t values[N * kDepth];
  } weights[kWeights];
  Barrier pixels_full[kPixels], pixels_empty[kPixels], weights_full[kWeights], weights_empty[kWeights];
  Copies next_pixels, next_weights;
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

// The order of the copies: `channel` of the image under the weight (down, right) of the window, 64 channels at a time.
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
  now.right = 0, now.tile += int(gridDim.x);
}

// Each starts the next copy, as soon as everybody has read what was there. One thread does pixels, another one weights.
template <int N, bool ROWS>
__device__ __forceinline__ void copy_next_pixels(Shared<N, ROWS>& shared, const TensorMap& images, const Conv& c) {
  Copies now = shared.next_pixels;
  const Tiles<N> tiles(c);
  if (now.tile >= tiles.count) return;
  auto& target = shared.pixels[now.stage];
  Barrier& full = shared.pixels_full[now.stage];
  const int area = c.out_height * c.out_width, row = tiles.row(now.tile), sample = row / area, pixel = row - sample * area;
  const int y = pixel / c.out_width, x = pixel - y * c.out_width;
  wait(shared.pixels_empty[now.stage], now.parity ^ 1);
  if constexpr (ROWS) {
    arrive_and_expect(full, c.tile_pixels * kDepth * sizeof(uint16_t));
    copy_rows(target.values, images, full, now.channel, now.right - c.pad_width, y - c.pad_height, sample);
  } else {
    arrive_and_expect(full, sizeof(target));
    copy_pixels(target.values, images, full, now.channel, x * c.stride - c.pad_width, y * c.stride - c.pad_height, sample,
                now.right, now.down);
  }
  advance<N, ROWS>(now, c, false, Shared<N, ROWS>::kPixels);
  shared.next_pixels = now;
}
template <int N, bool ROWS>
__device__ __forceinline__ void copy_next_weights(Shared<N, ROWS>& shared, const TensorMap& weights, const Conv& c) {
  Copies now = shared.next_weights;
  const Tiles<N> tiles(c);
  if (now.tile >= tiles.count) return;
  auto& target = shared.weights[now.stage];
  Barrier& full = shared.weights_full[now.stage];
  wait(shared.weights_empty[now.stage], now.parity ^ 1);
  arrive_and_expect(full, sizeof(target));
  copy_weights(target.values, weights, full, now.channel, now.down * c.kernel_width + now.right, tiles.column(now.tile));
  advance<N, ROWS>(now, c, true, Shared<N, ROWS>::kWeights);
  shared.next_weights = now;
}

// A place in a ring of buffers.
template <int COUNT>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == COUNT) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ int before() const { return stage == 0 ? COUNT - 1 : stage - 1; }
};

// The products of a block, by all its threads. Where one thread does something for all of its warp, it is `elected`.
template <class T, int N, bool ROWS>
struct Products {
  Shared<N, ROWS>& shared;
  const TensorMap &images, &weights;
  const Conv& c;
  int warp;  // known to be the same in all of its threads
  Turn<Shared<N, ROWS>::kPixels> pixels;
  Turn<Shared<N, ROWS>::kWeights> filter;

  // sums += the next pixels, `rows` further down, times the next weights, of which COLUMNS channels are not zeros.
  template <int COLUMNS>
  __device__ __forceinline__ void add(Sums<N>& sums, int rows) {
    const int first = warp / (kWarpgroup / kWarp) * c.half_tile + rows * c.out_width;
    const uint16_t *x = shared.pixels[pixels.stage].values + first * kDepth, *w = shared.weights[filter.stage].values;
    wait(shared.weights_full[filter.stage], filter.parity);
    hand_over<N>(sums);
#pragma unroll
    for (int column = 0; column < COLUMNS; column += 16) multiply<T, N>(sums, operand(x, column), operand(w, column));
    commit();  // of the product before all is read
  }

  __device__ __forceinline__ void release_weights(int stage) {
    const bool one = elected();
    if (one) arrive(shared.weights_empty[stage]);
    if (warp == 0 && one) copy_next_weights(shared, weights, c);
    __syncwarp();
  }
  __device__ __forceinline__ void release_pixels(int stage) {
    const bool one = elected();
    if (one) arrive(shared.pixels_empty[stage]);
    if (warp == kWarpgroup / kWarp && one) copy_next_pixels(shared, images, c);
    __syncwarp();
  }

  template <int COLUMNS>
  __device__ __forceinline__ void add_stage(Sums<N>& sums, bool begins) {
    wait(shared.pixels_full[pixels.stage], pixels.parity);
    for (int down = 0; down < (ROWS ? c.kernel_height : 1); ++down) {
      add<COLUMNS>(sums, down);
      if (!begins || down > 0) release_weights(filter.before());
      if (!begins && down == 0) release_pixels(pixels.before());
      filter.next();
    }
    pixels.next();
  }

  // HALF: the last stage under each weight holds 32 channels or fewer.
  template <bool HALF>
  __device__ __forceinline__ void add_all(Sums<N>& sums) {
    bool begins = true;
    for (int i = 0; i < (ROWS ? 1 : c.kernel_height) * c.kernel_width; ++i) {
      for (int channel = HALF ? kDepth / 2 : 0; channel < c.channels; channel += kDepth, begins = false)
        add_stage<kDepth>(sums, begins);
      if constexpr (HALF) add_stage<kDepth / 2>(sums, begins), begins = false;
    }
    take_back<N>(sums);
    release_weights(filter.before());
    release_pixels(pixels.before());
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
    const int64_t octets = int64_t(r) * (c.out_channels / kOctet) + first / kOctet;  // from the first to the group 0 of this row
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
  auto& shared = launched_shared<Shared<N, ROWS>>();
  constexpr int kPixels = Shared<N, ROWS>::kPixels, kWeights = Shared<N, ROWS>::kWeights;
  const int warp = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarp, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPixels; ++i) init(shared.pixels_full[i], 1), init(shared.pixels_empty[i], kBlock / kWarp);
    for (int i = 0; i < kWeights; ++i) init(shared.weights_full[i], 1), init(shared.weights_empty[i], kBlock / kWarp);
    barriers_are_ready();
    shared.next_pixels = shared.next_weights = {int(blockIdx.x), 0, 0, 0, 0, 0};
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 0; i < kWeights; ++i) copy_next_weights(shared, weights, c);
  if (threadIdx.x == kWarpgroup)
    for (int i = 0; i < kPixels; ++i) copy_next_pixels(shared, images, c);
  __syncwarp();
  Products<T, N, ROWS> products{shared, images, weights, c, warp, {}, {}};
  const Tiles<N> tiles(c);
  for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    prefetch_images<N>(args, c, tiles.row(tile), tiles.column(tile));
    Sums<N> sums = {};
    products.template add_all<HALF>(sums);
    write_sums<T, N>(sums, c, args, tiles.row(tile), tiles.column(tile));
  }
#endif
}

template <class T, int N, bool ROWS, class Pass>
int launch(const Conv& c, const Pass& args, void* stream) {
  TensorMap images, weights;
  const int64_t shape[] = {c.samples, c.height, c.width, c.channels};
  const int64_t weight_shape[] = {c.out_channels, int64_t(c.kernel_height) * c.kernel_width, c.channels};
  const int kernel_size[] = {c.kernel_height, c.kernel_width}, padding[] = {c.pad_height, c.pad_width};
  const int samples = c.out_height * c.out_width == 64 ? 2 : 1;
  const int error = ROWS ? map_rows<T>(images, c.x, shape, c.tile_pixels / samples / c.width, samples)
                         : map_pixels<T>(images, c.x, shape, kernel_size, c.stride, padding, kRows);
  if (error) return error;
  if (const int error = map_weights<T>(weights, c.weight, weight_shape, N)) return error;
  const bool half = (c.channels - 1) % kDepth < kDepth / 2;
  const auto kernel = half ? conv_kernel<T, N, ROWS, true, Pass> : conv_kernel<T, N, ROWS, false, Pass>;
  const int bytes = sizeof(Shared<N, ROWS>);
  if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  const int blocks = std::min(Tiles<N>(c).count, 2 * multiprocessors());
  kernel<<<blocks, kBlock, bytes, cudaStream_t(stream)>>>(images, weights, c, args);
  return cudaGetLastError();
}

// Pixels of a tile with the rows around them, 0 where a tile is not whole rows of one image, or two images.
int pixels_in_rows(const Conv& c) {
  const int area = c.out_height * c.out_width, images = area == 64 ? 2 : 1;
  const bool same = c.stride == 1 && c.height == c.out_height && c.width == c.out_width;
  if (!same || c.width % 8 || 64 % c.width || area * images % kRows) return 0;
  const int pixels = kRows + images * (c.kernel_height - 1) * c.width;
  return pixels <= kMaxPixels ? pixels : 0;
}

template <int N, class T, class Pass>
int launch_tile(Conv c, const Pass& args, void* stream) {
  c.tile_pixels = pixels_in_rows(c);
  c.half_tile = c.tile_pixels && c.height * c.width == 64 ? c.tile_pixels / 2 : 64;
  return c.tile_pixels ? launch<T, N, true>(c, args, stream) : launch<T, N, false>(c, args, stream);
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

int launch_conv_scale_shift_relu(const ConvScaleShiftRelu& args, void* stream) { return launch_conv(args.conv, args.pass, stream); }
int launch_conv_scale_shift_relu_grad(const ConvScaleShiftReluGrad& args, void* stream) {
  return launch_conv(args.conv, args.pass, stream);
}

}  // namespace spat
