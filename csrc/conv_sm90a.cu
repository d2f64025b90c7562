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

template <int N>
struct alignas(1024) Stage {
  uint16_t pixels[kRows * kDepth], weights[N * kDepth];
};
template <int N>
constexpr int kStages = N == 64 ? 4 : 3;  // of which two blocks fit into the shared memory of a multiprocessor

// What one thread knows about the copies: where the next one is from, and where it goes. In shared memory, for the registers' sake.
struct Copies {
  int tile, x, y, sample, column;  // of the tile's first window
  int down, right, channel, stage;
  uint32_t parity;
};

template <int N>
struct Shared {
  Stage<N> stages[kStages<N>];
  Barrier full[kStages<N>], empty[kStages<N>];
  Copies copies;
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

// Goes to a tile, if there is one.
template <int N>
__device__ __forceinline__ void go_to(Copies& copies, const Conv& c, int tile) {
  const Tiles<N> tiles(c);
  copies.tile = tile;
  if (tile >= tiles.count) return;
  const int pixels = c.out_height * c.out_width, row = tiles.row(tile);
  const int sample = row / pixels, pixel = row - sample * pixels, out_y = pixel / c.out_width;
  copies.sample = sample, copies.column = tiles.column(tile);
  copies.y = out_y * c.stride - c.pad_height, copies.x = (pixel - out_y * c.out_width) * c.stride - c.pad_width;
  copies.down = copies.right = copies.channel = 0;
}

// Starts to copy the next stage, 64 channels under one weight of the window, as soon as everybody has read what was there.
template <int N>
__device__ __forceinline__ void copy_next(Shared<N>& shared, const TensorMap& images, const TensorMap& weights, const Conv& c) {
  Copies& now = shared.copies;
  if (now.tile >= Tiles<N>(c).count) return;
  Stage<N>& stage = shared.stages[now.stage];
  Barrier& full = shared.full[now.stage];
  wait(shared.empty[now.stage], now.parity ^ 1);
  arrive_and_expect(full, sizeof(stage));
  copy_pixels(stage.pixels, images, full, now.channel, now.x, now.y, now.sample, now.right, now.down);
  copy_weights(stage.weights, weights, full, now.channel, now.down * c.kernel_width + now.right, now.column);
  if (++now.stage == kStages<N>) now.stage = 0, now.parity ^= 1;
  if ((now.channel += kDepth) < c.channels) return;
  now.channel = 0;
  if (++now.right < c.kernel_width) return;
  now.right = 0;
  if (++now.down == c.kernel_height) go_to<N>(now, c, now.tile + gridDim.x);
}

// The products of a block, by all its threads. Where one thread does something for all of its warp, it is `elected`.
template <class T, int N>
struct Products {
  Shared<N>& shared;
  const TensorMap &images, &weights;
  const Conv& c;
  int warp;  // known to be the same in all of its threads
  int stage = 0;
  uint32_t parity = 0;

  // sums += the next stage, of which COLUMNS are not zeros. The stage before is free then.
  template <int COLUMNS>
  __device__ __forceinline__ void add(Sums<N>& sums, bool first) {
    const Stage<N>& now = shared.stages[stage];
    wait(shared.full[stage], parity);
    hand_over<N>(sums);
#pragma unroll
    for (int column = 0; column < COLUMNS; column += 16)
      multiply<T, N>(sums, operand(now.pixels + warp / 4 * 64 * kDepth, column), operand(now.weights, column));
    commit();
    if (!first) release(stage == 0 ? kStages<N> - 1 : stage - 1);
    if (++stage == kStages<N>) stage = 0, parity ^= 1;
  }

  __device__ __forceinline__ void release(int done) {
    const bool one = elected();
    if (one) arrive(shared.empty[done]);
    if (warp == 0 && one) copy_next(shared, images, weights, c);
    __syncwarp();
  }

  // HALF: the last stage under each weight holds 32 channels or fewer.
  template <bool HALF>
  __device__ __forceinline__ void add_all(Sums<N>& sums) {
    bool first = true;
    for (int tap = 0; tap < c.kernel_height * c.kernel_width; ++tap) {
      for (int channel = HALF ? kDepth / 2 : 0; channel < c.channels; channel += kDepth, first = false) add<kDepth>(sums, first);
      if constexpr (HALF) add<kDepth / 2>(sums, first), first = false;
    }
    take_back<N>(sums);
    release(stage == 0 ? kStages<N> - 1 : stage - 1);
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
  constexpr int kGroups = N / 32, kAtOnce = std::is_same_v<Pass, ScaleShiftRelu> ? 2 : 2;
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

template <class T, int N, bool HALF, class Pass>
__global__ void __launch_bounds__(kBlock, 2)
    conv_kernel(const __grid_constant__ TensorMap images, const __grid_constant__ TensorMap weights, const Conv c, const Pass args) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Shared<N>& shared = launched_shared<Shared<N>>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages<N>; ++i) init(shared.full[i], 1), init(shared.empty[i], kBlock / kWarp);
    barriers_are_ready();
    shared.copies.stage = 0, shared.copies.parity = 0;
    go_to<N>(shared.copies, c, blockIdx.x);
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 0; i < kStages<N>; ++i) copy_next(shared, images, weights, c);
  __syncwarp();
  Products<T, N> products{shared, images, weights, c, __shfl_sync(kAllLanes, int(threadIdx.x) / kWarp, 0)};
  const Tiles<N> tiles(c);
  for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    prefetch_images<N>(args, c, tiles.row(tile), tiles.column(tile));
    Sums<N> sums = {};
    products.template add_all<HALF>(sums);
    write_sums<T, N>(sums, c, args, tiles.row(tile), tiles.column(tile));
  }
#endif
}

template <class T, int N, class Pass>
int launch(const Conv& c, const Pass& args, void* stream) {
  TensorMap images, weights;
  const int64_t shape[] = {c.samples, c.height, c.width, c.channels};
  const int64_t weight_shape[] = {c.out_channels, int64_t(c.kernel_height) * c.kernel_width, c.channels};
  const int kernel_size[] = {c.kernel_height, c.kernel_width}, padding[] = {c.pad_height, c.pad_width};
  if (const int error = map_pixels<T>(images, c.x, shape, kernel_size, c.stride, padding, kRows)) return error;
  if (const int error = map_weights<T>(weights, c.weight, weight_shape, N)) return error;
  const bool half = (c.channels - 1) % kDepth < kDepth / 2;
  const auto kernel = half ? conv_kernel<T, N, true, Pass> : conv_kernel<T, N, false, Pass>;
  const int bytes = sizeof(Shared<N>);
  if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  const int blocks = std::min(Tiles<N>(c).count, 2 * multiprocessors());
  kernel<<<blocks, kBlock, bytes, cudaStream_t(stream)>>>(images, weights, c, args);
  return cudaGetLastError();
}

template <class Pass>
int launch_conv(const Conv& c, const Pass& args, void* stream) {
  const auto tiled = [&](auto t) {
    using T = decltype(t);
    return c.tile == 64 ? launch<T, 64>(c, args, stream) : c.tile == 128 ? launch<T, 128>(c, args, stream) : launch<T, 160>(c, args, stream);
  };
  return args.shape.dtype == DType::f16 ? tiled(half{}) : tiled(bfloat16{});
}

}  // namespace

int launch_conv_scale_shift_relu(const ConvScaleShiftRelu& args, void* stream) { return launch_conv(args.conv, args.pass, stream); }
int launch_conv_scale_shift_relu_grad(const ConvScaleShiftReluGrad& args, void* stream) {
  return launch_conv(args.conv, args.pass, stream);
}

}  // namespace spat
