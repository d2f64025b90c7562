// Convolutions in half precision with their pass in the epilogue (octet.cuh), for Hopper: what they give goes to device memory once,
// after residual, scale, shift and ReLU, and their gradients after mask, scale and residual.
//
// An implicit matrix product: rows are output pixels, columns output channels, the inner dimension runs over the weights of a window
// and the channels, 64 at a time. A block does kRows x N of it, each of its two warpgroups 64 rows. TMA copies stages of both factors,
// in its im2col mode: pixels at their places in the image, zeros outside. Two blocks share a multiprocessor, so that one multiplies
// while the other does its epilogue. 160 columns fit the 160, 320 and 640 channels of a WRN-34-10 exactly.
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
template <int N>
struct Shared {
  Stage<N> stages[kStages<N>];
  Barrier full[kStages<N>], empty[kStages<N>];
};

// The copies of a block, by one thread: a stage is 64 channels under one weight of the window.
template <int N>
struct Copies {
  const TensorMap &images, &weights;
  const Conv& c;
  int x, y, sample, column;
  int down = 0, right = 0, channel = 0, next = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ Copies(const TensorMap& images, const TensorMap& weights, const Conv& c, int64_t row, int column)
      : images(images), weights(weights), c(c), column(column) {
    const int64_t pixels = int64_t(c.out_height) * c.out_width;
    sample = int(row / pixels);
    const int pixel = int(row - sample * pixels), out_y = pixel / c.out_width, out_x = pixel - out_y * c.out_width;
    y = out_y * c.stride - c.pad_height, x = out_x * c.stride - c.pad_width;
  }

  // The next stage, as soon as everybody has read what it held.
  __device__ __forceinline__ void start(Shared<N>& shared) {
    if (down == c.kernel_height) return;
    Stage<N>& stage = shared.stages[next];
    Barrier& full = shared.full[next];
    wait(shared.empty[next], parity ^ 1);
    arrive_and_expect(full, sizeof(stage));
    copy_pixels(stage.pixels, images, full, channel, x, y, sample, right, down);
    copy_weights(stage.weights, weights, full, channel, down * c.kernel_width + right, column);
    if ((channel += kDepth) >= c.channels) channel = 0, ++right;
    if (right == c.kernel_width) right = 0, ++down;
    if (++next == kStages<N>) next = 0, parity ^= 1;
  }
};

// The products of a block, by all threads. What each warp needs to say to the others goes through one lane.
template <class T, int N>
struct Products {
  Shared<N>& shared;
  Copies<N>& copies;
  Sums<N>& sums;
  int warp, first;
  int stage = 0, before = -1;
  uint32_t parity = 0;

  __device__ __forceinline__ Products(Shared<N>& shared, Copies<N>& copies, Sums<N>& sums)
      : shared(shared), copies(copies), sums(sums), warp(__shfl_sync(kAllLanes, int(threadIdx.x) / kWarp, 0)) {
    first = warp / 4 * 64 * kDepth;
    if (warp == 0 && elected())
      for (int i = 0; i < kStages<N>; ++i) copies.start(shared);
    __syncwarp();
  }

  // The next stage, of which so many columns are not zeros.
  template <int COLUMNS>
  __device__ __forceinline__ void add() {
    const Stage<N>& now = shared.stages[stage];
    wait(shared.full[stage], parity);
    hand_over<N>(sums);
#pragma unroll
    for (int column = 0; column < COLUMNS; column += 16)
      multiply<T, N>(sums, operand(now.pixels + first, column), operand(now.weights, column));
    commit();
    if (before >= 0) {
      const bool one = elected();
      if (one) arrive(shared.empty[before]);
      if (warp == 0 && one) copies.start(shared);
      __syncwarp();
    }
    before = stage;
    if (++stage == kStages<N>) stage = 0, parity ^= 1;
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

// HALF: the last stage of each tap holds 32 channels or fewer.
template <class T, int N, bool HALF, class Pass>
__global__ void __launch_bounds__(kBlock, 2)
    conv_kernel(const __grid_constant__ TensorMap images, const __grid_constant__ TensorMap weights, const Conv c, const Pass args) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Shared<N>& shared = launched_shared<Shared<N>>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages<N>; ++i) init(shared.full[i], 1), init(shared.empty[i], kBlock / kWarp);
    barriers_are_ready();
  }
  __syncthreads();
  const int columns = (c.out_channels + N - 1) / N;
  const int64_t row = int64_t(blockIdx.x) / columns * kRows;
  const int column = int(blockIdx.x) % columns * N;
  Copies<N> copies(images, weights, c, row, column);
  Sums<N> sums = {};
  Products<T, N> products(shared, copies, sums);
  for (int tap = 0; tap < c.kernel_height * c.kernel_width; ++tap) {
    for (int channel = HALF ? kDepth / 2 : 0; channel < c.channels; channel += kDepth) products.template add<kDepth>();
    if constexpr (HALF) products.template add<kDepth / 2>();
  }
  take_back<N>(sums);

  const int64_t rows = args.shape.rows, octets = args.shape.octets;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int group = 0; group < N / 32; ++group)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float pairs[4][2], v[kOctet];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) pairs[i][j] = sums[16 * group + 4 * i + 2 * h + j];
      exchange(pairs);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) v[j] = pairs[j / 2][j % 2];
      const int64_t r = row + 16 * warp + lane / 4 + 8 * h, channel = column + 32 * group + 8 * (lane % 4);
      if (r < rows && channel < c.out_channels)
        pass<true, T>(args, Octet{r * c.out_channels + channel, channel, kOctet, r * octets + channel / kOctet}, v);
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
  const int64_t blocks = ceil_div(args.shape.rows, kRows) * ceil_div(c.out_channels, N);
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
