// Blocks run one after another. The threads of a block are fibers: each runs until it waits for others (a shuffle, a barrier) or
// returns, in a new random order for every block, so that a missing barrier shows. Where CUDA leaves a case undefined this is
// strict: all 32 lanes of a warp must come to the same shuffle in the same line of code, and all threads of a block to the same
// barrier. Else the launch fails, and the error says where its threads hang.
#include <ucontext.h>

#include <algorithm>
#include <cstring>
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

using Jump = void*[5];  // of __builtin_setjmp, which makes no system call, unlike swapcontext

// Where a thread waits, and for how many others: its warp, or the block. `group` 0: it polls, for no particular ones.
struct Wait {
  const char* op;
  std::source_location at;
  unsigned group;

  bool operator==(const Wait& other) const {
    return group == other.group && at.line() == other.at.line() && !strcmp(op, other.op) &&
           !strcmp(at.file_name(), other.at.file_name());
  }
};

enum class State { ready, waits, polls, done };

struct Thread {
  std::unique_ptr<char[]> stack;
  Jump jump;
  bool begun = false;
  State state;
  Wait wait;
  uint64_t gives;
  const uint64_t* gets;  // what all that it waited for gave
};

constexpr size_t kStackBytes = 1 << 18;
constexpr unsigned kMaxThreads = 1024;
std::vector<Thread> threads;  // as many as the largest block had: the first blockDim.x take part
uint64_t of_warps[kMaxThreads], of_block[kMaxThreads];
Jump scheduler;
void (*kernel)(const void*);
const void* arguments;
cudaError_t last_error = cudaSuccess;
std::string failure;

// A sanitizer is not to take a switch for the end of all frames on the stack that is left.
#define SPAT_SWITCH __attribute__((noinline, no_sanitize("address")))

SPAT_SWITCH void leave(Thread& thread, State state) {
  thread.state = state;
  if (!__builtin_setjmp(thread.jump)) __builtin_longjmp(scheduler, 1);
}

void fiber() {
  for (;;) {  // the next block finds it here
    kernel(arguments);
    leave(threads[threadIdx.x], State::done);
  }
}

SPAT_SWITCH void begin(Thread& thread) {
  thread.stack = std::make_unique_for_overwrite<char[]>(kStackBytes), thread.begun = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack.get(), context.uc_stack.ss_size = kStackBytes, context.uc_link = nullptr;
  makecontext(&context, fiber, 0);
  setcontext(&context);
}

SPAT_SWITCH void resume(Thread& thread) {
  if (__builtin_setjmp(scheduler)) return;
  if (thread.begun) __builtin_longjmp(thread.jump, 1);
  begin(thread);
}

// If the `group` threads from `first` on wait for each other at one place, they may run again.
bool release(unsigned first, unsigned group, uint64_t* values) {
  if (first + group > blockDim.x) return false;
  const auto begin = threads.begin() + first, end = begin + group;
  if (begin->wait.group != group) return false;
  if (!std::all_of(begin, end, [&](const Thread& t) { return t.state == State::waits && t.wait == begin->wait; })) return false;
  for (auto t = begin; t != end; ++t) values[t - begin] = t->gives, t->gets = values, t->state = State::ready;
  return true;
}

constexpr int kPatience = 1000;  // rounds in which threads do nothing but poll

bool run_block(const std::vector<unsigned>& order) {
  for (unsigned i : order) threads[i].state = State::ready;
  bool polled = false;
  int idle = 0;
  for (bool released = true; released || (polled && idle < kPatience);) {
    ++idle, polled = released = false;
    for (unsigned i : order) {
      Thread& t = threads[i];
      if (t.state != State::ready && t.state != State::polls) continue;
      if (t.state == State::ready) idle = 0;
      threadIdx = dim3(i, 0, 0);
      resume(t);
      polled |= t.state == State::polls;
    }
    released = release(0, blockDim.x, of_block);
    for (unsigned first = 0; first < blockDim.x; first += kWarp) released |= release(first, kWarp, of_warps + first);
  }
  for (unsigned i = 0; i < blockDim.x; ++i) {
    const auto& [op, at, group] = threads[i].wait;
    if (threads[i].state == State::done) continue;
    failure += "thread " + std::to_string(i) + " hangs at " + op + ", line " + std::to_string(at.line()) + " of " + at.file_name() + "\n";
  }
  return failure.empty();
}

cudaError_t run_grid(dim3 grid, dim3 block) {
  const bool fits = grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z == 1 && block.x <= kMaxThreads && block.y == 1 && block.z == 1;
  if (!fits || grid.x == 0 || grid.y == 0 || block.x == 0) return cudaErrorInvalidConfiguration;
  if (threads.size() < block.x) threads.resize(block.x);
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
  me.wait = {what, at, 0};
  leave(me, State::polls);
}

const uint64_t* meet(const char* op, std::source_location at, unsigned group, uint64_t gives) {
  Thread& me = threads[threadIdx.x];
  me.wait = {op, at, group}, me.gives = gives;
  leave(me, State::waits);
  return me.gets;
}

}  // namespace cuda_on_cpu

cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : cuda_on_cpu::failure.c_str();
}
