// What Hopper (sm_90a) has for matrix products and PTX alone can say: copies by the tensor memory accelerator (TMA), barriers that count
// their bytes, and products of a warpgroup, four warps, from shared memory (wgmma). tests/cuda_on_cpu has a stand-in for the CPU.
//
// A tile in shared memory has rows of 64 16-bit values: 128 bytes, in which the 16-byte chunk c of row r lies at c ^ r % 8, so that no
// two rows meet in a bank. Tiles begin at multiples of 1024 bytes.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "dtypes.h"

namespace spat::hopper {

constexpr int kDepth = 64;  // values in a row of a tile
constexpr int kWarpgroup = 128;

using TensorMap = CUtensorMap;  // where TMA copies from, made on the host

struct Barrier {
  uint64_t word;
};

// ---- host ------------------------------------------------------------------------------------------------------------------

template <class T>
constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
template <>
inline constexpr CUtensorMapDataType kType<bfloat16> = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// A function of the driver, so that nothing links to it and the extension loads where there is none.
template <class F>
F driver(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  return reinterpret_cast<F>(found);
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Images [samples, height, width, channels]: copies take 64 channels of `pixels` output pixels, each at the place of the image that
// meets the first weight of its window. `padding` is on each side, `kernel` is height and width of the window.
template <class T>
int map_pixels(TensorMap& map, const void* images, const int64_t (&shape)[4], const int (&kernel)[2], int stride,
               const int (&padding)[2], int pixels) {
  static const auto encode = driver<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  const cuuint64_t channels = shape[3], width = shape[2], height = shape[1], samples = shape[0], row = sizeof(T) * channels;
  const cuuint64_t sizes[] = {channels, width, height, samples}, strides[] = {row, row * width, row * width * height};
  const int lower[] = {-padding[1], -padding[0]}, upper[] = {padding[1] + 1 - kernel[1], padding[0] + 1 - kernel[0]};
  const cuuint32_t steps[] = {1, cuuint32_t(stride), cuuint32_t(stride), 1};
  if (!encode) return cudaErrorNotSupported;
  return encode(&map, kType<T>, 4, const_cast<void*>(images), sizes, strides, lower, upper, kDepth, pixels, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
             ? cudaErrorInvalidValue
             : cudaSuccess;
}

// The same images: copies take 64 channels of `rows` whole rows of `count` images, zeros where the image ends.
template <class T>
int map_rows(TensorMap& map, const void* images, const int64_t (&shape)[4], int rows, int count) {
  static const auto encode = driver<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const cuuint64_t channels = shape[3], width = shape[2], height = shape[1], samples = shape[0], row = sizeof(T) * channels;
  const cuuint64_t sizes[] = {channels, width, height, samples}, strides[] = {row, row * width, row * width * height};
  const cuuint32_t box[] = {kDepth, cuuint32_t(width), cuuint32_t(rows), cuuint32_t(count)}, steps[] = {1, 1, 1, 1};
  if (!encode) return cudaErrorNotSupported;
  return encode(&map, kType<T>, 4, const_cast<void*>(images), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
             ? cudaErrorInvalidValue
             : cudaSuccess;
}

// Weights [rows, taps, channels]: copies take 64 channels of one tap of `count` rows.
template <class T>
int map_weights(TensorMap& map, const void* weights, const int64_t (&shape)[3], int count) {
  static const auto encode = driver<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const cuuint64_t channels = shape[2], taps = shape[1], rows = shape[0], row = sizeof(T) * channels;
  const cuuint64_t sizes[] = {channels, taps, rows}, strides[] = {row, row * taps};
  const cuuint32_t box[] = {kDepth, 1, cuuint32_t(count)}, steps[] = {1, 1, 1};
  if (!encode) return cudaErrorNotSupported;
  return encode(&map, kType<T>, 3, const_cast<void*>(weights), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
             ? cudaErrorInvalidValue
             : cudaSuccess;
}

// ---- device ----------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// The shared memory that the launch asks for.
template <class Shared>
__device__ __forceinline__ Shared& launched_shared() {
  extern __shared__ __align__(1024) uint8_t bytes[];
  return *reinterpret_cast<Shared*>(bytes);
}

// Is this the one lane of its warp, which is whole, that is to do something alone? ptxas knows it as such.
__device__ __forceinline__ bool elected() {
  uint32_t is = 0;
  asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(is));
  return is;
}

// One thread; then `barriers_are_ready`, and __syncthreads.
__device__ __forceinline__ void init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barriers_are_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives, and the phase also waits for that many bytes.
__device__ __forceinline__ void arrive_and_expect(Barrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes) : "memory");
}
// Until the phase of this parity is complete; the one before a barrier's first counts as complete.
__device__ __forceinline__ void wait(Barrier& barrier, uint32_t parity) {
  uint32_t complete = 0;
  while (!complete)
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(complete)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
}

// Pixels from (sample, y, x) on, moved by (down, right) within their windows, and their channels from `channel` on.
__device__ __forceinline__ void copy_pixels(uint16_t* tile, const TensorMap& map, Barrier& barrier, int channel, int x, int y,
                                            int sample, int right, int down) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2], "
      "{%7, %8};" ::"r"(shared_address(tile)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(channel), "r"(x), "r"(y), "r"(sample), "h"(uint16_t(right)),
      "h"(uint16_t(down))
      : "memory");
}
// Rows from y on, each from x on, of the samples from `sample` on.
__device__ __forceinline__ void copy_rows(uint16_t* tile, const TensorMap& map, Barrier& barrier, int channel, int x, int y,
                                          int sample) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          shared_address(tile)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(channel), "r"(x), "r"(y), "r"(sample)
      : "memory");
}
__device__ __forceinline__ void copy_weights(uint16_t* tile, const TensorMap& map, Barrier& barrier, int channel, int tap, int row) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(tile)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(channel), "r"(tap), "r"(row)
      : "memory");
}

// Asks for the 128 bytes around p, to have them in L2 soon.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p))); }

// Sixteen columns of a tile, as wgmma reads them: address, 1024 bytes from eight rows to the next, and the order of chunks.
struct Operand {
  uint64_t descriptor;
};
__device__ __forceinline__ Operand operand(const uint16_t* tile, int column) {
  const uint64_t address = shared_address(tile) + uint32_t(sizeof(uint16_t)) * column;
  return {(address & 0x3ffff) >> 4 | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62};
}

// sums[4 j + 2 h + i] of a thread is row 16 (warp % 4) + lane / 4 + 8 h, column 8 j + 2 (lane % 4) + i of [64, N].
template <int N>
using Sums = float[N / 2];

// Between these two the sums belong to the tensor cores.
template <int N>
__device__ __forceinline__ void hand_over(Sums<N>& sums) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void take_back(Sums<N>& sums) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Ends a group of products; then all but the latest group are done.
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 1;" ::: "memory");
}

#define SPAT_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SPAT_F16(d, i) SPAT_F4(d, i), SPAT_F4(d, i + 4), SPAT_F4(d, i + 8), SPAT_F4(d, i + 12)
#define SPAT_D32                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "               \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SPAT_D64                                                                         \
  SPAT_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SPAT_D80 SPAT_D64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define SPAT_WGMMA(N, type, D, a, b, one, ...)                                                                              \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " one ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type \
               " {" D "}, " a ", " b ", p, 1, 1, 0, 0;\n\t}"                                                                \
               : __VA_ARGS__                                                                                                \
               : "l"(x.descriptor), "l"(w.descriptor), "r"(1))

// sums += x [64, 16] times the transpose of w [N, 16]
template <class T, int N>
__device__ __forceinline__ void multiply(Sums<N>& sums, Operand x, Operand w) {
  static_assert(N == 64 || N == 128 || N == 160);
  constexpr bool kHalf = sizeof(T) == 2 && !std::is_same_v<T, bfloat16>;
#define SPAT_F32(d, i) SPAT_F16(d, i), SPAT_F16(d, i + 16)
  if constexpr (N == 64 && kHalf) SPAT_WGMMA(64, "f16", SPAT_D32, "%32", "%33", "%34", SPAT_F32(sums, 0));
  if constexpr (N == 64 && !kHalf) SPAT_WGMMA(64, "bf16", SPAT_D32, "%32", "%33", "%34", SPAT_F32(sums, 0));
  if constexpr (N == 128 && kHalf)
    SPAT_WGMMA(128, "f16", SPAT_D64, "%64", "%65", "%66", SPAT_F32(sums, 0), SPAT_F32(sums, 32));
  if constexpr (N == 128 && !kHalf)
    SPAT_WGMMA(128, "bf16", SPAT_D64, "%64", "%65", "%66", SPAT_F32(sums, 0), SPAT_F32(sums, 32));
  if constexpr (N == 160 && kHalf)
    SPAT_WGMMA(160, "f16", SPAT_D80, "%80", "%81", "%82", SPAT_F32(sums, 0), SPAT_F32(sums, 32), SPAT_F16(sums, 64));
  if constexpr (N == 160 && !kHalf)
    SPAT_WGMMA(160, "bf16", SPAT_D80, "%80", "%81", "%82", SPAT_F32(sums, 0), SPAT_F32(sums, 32), SPAT_F16(sums, 64));
}

#undef SPAT_F4
#undef SPAT_F16
#undef SPAT_F32
#undef SPAT_D32
#undef SPAT_D64
#undef SPAT_D80
#undef SPAT_WGMMA

}  // namespace spat::hopper
