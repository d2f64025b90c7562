// Kernels that a GPU would hang on, or refuse to start, or let read what is not there yet: cuda_on_cpu must report it.
#include <cuda_runtime.h>

#include <cstdio>

__global__ void half_a_warp_shuffles(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void two_places(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(0xffffffffu, 1, 1)
                                     : __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void one_thread_misses_the_barrier(int*) {
  if (threadIdx.x != 7) __syncthreads();
}
__global__ void nothing(int*) {}
__global__ void reads_too_early(int* out) {
  __shared__ int from[256];
  from[threadIdx.x] = out[threadIdx.x] = blockIdx.x;
  out[threadIdx.x] = from[255 - threadIdx.x];
}
__global__ void reads_in_time(int* out) {
  __shared__ int from[256];
  __syncthreads();
  from[threadIdx.x] = blockIdx.x;
  __syncthreads();
  out[threadIdx.x] = from[255 - threadIdx.x];
}

int main() {
  int out[256];
  const auto error = [&](auto kernel, dim3 grid, unsigned threads) {
    kernel<<<grid, threads, 0, nullptr>>>(out);
    return cudaGetLastError();
  };
  const auto stale = [&](auto kernel) {
    int count = error(kernel, 3, 256) != cudaSuccess;
    for (int value : out) count += value != 2;
    return count;
  };
  const cudaError_t hangs = cudaErrorLaunchFailure, refused = cudaErrorInvalidConfiguration;
  const bool seen = error(half_a_warp_shuffles, 1, 64) == hangs && error(two_places, 1, 32) == hangs &&
                    error(one_thread_misses_the_barrier, 1, 64) == hangs && error(nothing, 0, 32) == refused &&
                    error(nothing, 1, 1025) == refused && error(nothing, dim3(1, 65536), 32) == refused &&
                    error(nothing, 1, 32) == cudaSuccess;
  std::printf("misuse seen: %d, stale values: %d, with barriers: %d\n", seen, stale(reads_too_early), stale(reads_in_time));
  return !(seen && stale(reads_too_early) && !stale(reads_in_time));
}
