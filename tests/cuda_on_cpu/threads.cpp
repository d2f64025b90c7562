// Blocks run one after another. The threads of a block are fibers: each runs until it waits for others (a shuffle, a barrier) or
// returns, in a new random order for every block, so that a missing barrier shows. Where CUDA leaves a case undefined this is
// strict: all 32 lanes of a warp must come to the same shuffle in the same line of code, and all threads of a block to the same
// barrier. Else the launch fails, and the error says where its threads hang.
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_on_cpu {
namespace {

using Values = std::vector<uint64_t>;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
  std::string waits_at;  // "" while it can run
  bool polls;            // it waits for others, but for no particular ones
  unsigned group;        // how many threads it waits for: its warp, or the block
  uint64_t gives;
  std::shared_ptr<const Values> gets;  // what all of them gave
};

constexpr size_t kStackBytes = 1 << 18;
std::vector<Thread> threads;
ucontext_t scheduler;
void (*kernel)(const void*);
const void* arguments;
cudaError_t last_error = cudaSuccess;
std::string failure;

void leave(Thread& thread) { swapcontext(&thread.context, &scheduler); }

void fiber() {
  for (;;) {  // the next block finds it here
    kernel(arguments);
    Thread& me = threads[threadIdx.x];
    me.done = true;
    leave(me);
  }
}

void make_threads(unsigned count) {
  threads = std::vector<Thread>(count);
  for (Thread& t : threads) {
    t.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStackBytes;
    makecontext(&t.context, fiber, 0);
  }
}

bool polls(const Thread& t) { return t.polls; }

// If the `group` threads from `first` on wait for each other at one place, they may run again.
bool release(unsigned first, unsigned group) {
  if (first + group > threads.size()) return false;
  const auto begin = threads.begin() + first, end = begin + group;
  if (begin->waits_at.empty() || begin->group != group || std::any_of(begin, end, polls)) return false;
  if (!std::all_of(begin, end, [&](const Thread& t) { return t.waits_at == begin->waits_at; })) return false;
  const auto values = std::make_shared<Values>();
  for (auto t = begin; t != end; ++t) values->push_back(t->gives);
  for (auto t = begin; t != end; ++t) t->gets = values, t->waits_at.clear();
  return true;
}

constexpr int kPatience = 1000;  // rounds in which threads do nothing but poll

bool run_block(const std::vector<unsigned>& order) {
  for (Thread& t : threads) t.done = t.polls = false;
  int idle = 0;
  for (bool released = true; released || (std::any_of(threads.begin(), threads.end(), polls) && idle < kPatience);) {
    ++idle;
    for (unsigned i : order) {
      if (threads[i].done || !(threads[i].waits_at.empty() || threads[i].polls)) continue;
      if (!std::exchange(threads[i].polls, false)) idle = 0;
      threadIdx = dim3(i, 0, 0);
      swapcontext(&scheduler, &threads[i].context);
    }
    released = release(0, threads.size());
    for (unsigned first = 0; first < threads.size(); first += kWarp) released |= release(first, kWarp);
  }
  for (unsigned i = 0; i < threads.size(); ++i)
    if (!threads[i].done) failure += "thread " + std::to_string(i) + " hangs at " + threads[i].waits_at + "\n";
  return failure.empty();
}

cudaError_t run_grid(dim3 grid, dim3 block) {
  const bool fits = grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z == 1 && block.x <= 1024 && block.y == 1 && block.z == 1;
  if (!fits || grid.x == 0 || grid.y == 0 || block.x == 0) return cudaErrorInvalidConfiguration;
  if (threads.size() != block.x) make_threads(block.x);
  gridDim = grid, blockDim = block;
  static std::minstd_rand random;
  std::vector<unsigned> order(block.x);
  std::iota(order.begin(), order.end(), 0);
  failure.clear();
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      std::shuffle(order.begin(), order.end(), random);
      if (run_block(order)) continue;
      threads.clear();
      return cudaErrorLaunchFailure;
    }
  return cudaSuccess;
}

}  // namespace

void run(dim3 grid, dim3 block, void (*kernel_)(const void*), const void* arguments_) {
  kernel = kernel_, arguments = arguments_;
  if (const cudaError_t error = run_grid(grid, block)) last_error = error;
}

void poll(const char* what, std::source_location at) {
  Thread& me = threads[threadIdx.x];
  me.waits_at = std::string(what) + ", line " + std::to_string(at.line()) + " of " + at.file_name();
  me.polls = true, me.group = 0;
  leave(me);
  me.waits_at.clear();
}

const uint64_t* meet(const char* op, std::source_location at, unsigned group, uint64_t gives) {
  Thread& me = threads[threadIdx.x];
  me.waits_at = std::string(op) + ", line " + std::to_string(at.line()) + " of " + at.file_name();
  me.group = group, me.gives = gives;
  leave(me);
  return me.gets->data();
}

}  // namespace cuda_on_cpu

cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : cuda_on_cpu::failure.c_str();
}
