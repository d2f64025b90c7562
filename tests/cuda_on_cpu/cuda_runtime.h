// CUDA's runtime on one CPU thread, as far as csrc/*.cu uses it: the language's words here, blocks and threads in threads.cpp.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>

#define __global__
#define __host__
#define __device__
#define __shared__ static  // one block runs at a time
#define __forceinline__ inline
#define __launch_bounds__(...)
#define always_inline  // g++ cannot inline what math.h and losses.h hand over as a function pointer

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 gridDim, blockDim, blockIdx, threadIdx;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;

void run(dim3 grid, dim3 block, void (*kernel)(const void*), const void* arguments);

// Waits until `group` threads, a warp or the block, are at this place in the code; what each of them gave.
const uint64_t* meet(const char* op, std::source_location at, unsigned group, uint64_t gives);

// Lets the other threads run, one that waits for `what` until it is so.
void poll(const char* what, std::source_location at);

// kernel<<<grid, block, shared, stream>>>(arguments) is Launch(kernel, grid, block, shared, stream)(arguments) here.
template <class... Parameters>
struct Launch {
  void (*kernel)(Parameters...);
  dim3 grid, block;
  Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t, cudaStream_t) : kernel(kernel), grid(grid), block(block) {}
  void operator()(Parameters... arguments) const {
    const auto thread = [&] { kernel(arguments...); };
    run(grid, block, [](const void* f) { (*static_cast<const decltype(thread)*>(f))(); }, &thread);
  }
};

// st.global.v4.b32 [address], {a, b, c, d}
inline void store_16_bytes(size_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  struct alignas(16) Words {
    uint32_t words[4];
  };
  *reinterpret_cast<Words*>(address) = {a, b, c, d};
}

inline int any(const uint64_t* values, unsigned count) {
  for (unsigned i = 0; i < count; ++i)
    if (values[i]) return 1;
  return 0;
}

}  // namespace cuda_on_cpu

template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lane_mask, std::source_location at = std::source_location::current()) {
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(v));
  const char* op = mask == ~0u ? "__shfl_xor_sync" : "__shfl_xor_sync without all lanes";
  memcpy(&v, cuda_on_cpu::meet(op, at, cuda_on_cpu::kWarp, bits) + (threadIdx.x % cuda_on_cpu::kWarp ^ lane_mask), sizeof(v));
  return v;
}
template <class T>
T __shfl_sync(unsigned mask, T v, int lane, std::source_location at = std::source_location::current()) {
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(v));
  const char* op = mask == ~0u ? "__shfl_sync" : "__shfl_sync without all lanes";
  memcpy(&v, cuda_on_cpu::meet(op, at, cuda_on_cpu::kWarp, bits) + lane, sizeof(v));
  return v;
}
inline int __any_sync(unsigned mask, int v, std::source_location at = std::source_location::current()) {
  const char* op = mask == ~0u ? "__any_sync" : "__any_sync without all lanes";
  return cuda_on_cpu::any(cuda_on_cpu::meet(op, at, cuda_on_cpu::kWarp, v != 0), cuda_on_cpu::kWarp);
}
inline int __syncthreads_or(int v, std::source_location at = std::source_location::current()) {
  return cuda_on_cpu::any(cuda_on_cpu::meet("__syncthreads_or", at, blockDim.x, v != 0), blockDim.x);
}
inline void __syncthreads(std::source_location at = std::source_location::current()) {
  cuda_on_cpu::meet("__syncthreads", at, blockDim.x, 0);
}
inline void __syncwarp(std::source_location at = std::source_location::current()) {
  cuda_on_cpu::meet("__syncwarp", at, cuda_on_cpu::kWarp, 0);
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class F>
int cudaFuncSetAttribute(F, cudaFuncAttribute, int bytes) {
  return bytes > 227 * 1024;
}
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
template <class T>
size_t __cvta_generic_to_global(const T* p) {
  return reinterpret_cast<size_t>(p);
}
