// In the place of torch's parallel_for: threads that sanitizers know of (OpenMP's barriers they do not), and parts that end
// anywhere, as they may on machines of many cores, however few the items are.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <thread>
#include <vector>

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc function, void* context) {
  constexpr int64_t kParts = 3;
  std::vector<std::thread> threads;
  for (int64_t part = 0, first = begin; part < kParts && first < end; ++part) {
    const int64_t last = part + 1 == kParts ? end : std::min(end, first + (end - begin) / kParts + 1 + part);
    threads.emplace_back(function, first, last, context);
    first = last;
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
