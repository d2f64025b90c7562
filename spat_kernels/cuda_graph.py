"""One CUDA graph: captured so that a failure leaves CUDA usable, and replayed with fresh random numbers."""

import gc
from contextlib import contextmanager, suppress

import torch

from . import rng

# Graphs whose capture could not end. torch 2.11's allocator of pinned memory, which Python cannot tell of the end, goes on asking
# them whether they capture: they hold nothing, but must stay.
_undead: list = []


@contextmanager
def undisturbed():
    """Within: no random numbers drawn by other attacks, no garbage collected (which may free graphs and memory, and is no part of
    what is captured), no weights cast by autocast that outlive it."""
    collecting, caching = gc.isenabled(), torch.is_autocast_cache_enabled()
    with rng.rng_lock:
        gc.disable()
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(caching)
            if collecting:
                gc.enable()


class CudaGraph:
    """One capture, and the stream that it is replayed on.

    All that touches the tensors of a capture happens within `here()`, on its own stream. So uses from different streams follow
    one another, and memory that is freed is not used again before the last kernel on it is done.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph
        self._random: torch.Generator

    @contextmanager
    def here(self):
        """Within: on the stream of the capture, after all that the caller's stream was given, which later waits in turn."""
        caller = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            caller.wait_stream(self.stream)

    def capture(self, function) -> None:
        """Capture `function()`, which has run once within `here()`. Whatever it raises, CUDA and random numbers stay usable."""
        # The generator lends the graph a state of its own: a capture that fails leaves that in capture mode for good, and
        # replays on several streams would share its (seed, offset) on the device.
        generator = torch.cuda.default_generators[self.stream.device_index]
        state, lent = generator.graphsafe_get_state(), generator.clone_state()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        failures: list[BaseException] = []
        torch._C._cuda_clearCublasWorkspaces()  # it is to take its workspace from `pool`, where nobody else can free it
        generator.graphsafe_set_state(lent)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                try:
                    function()
                except Exception as error:
                    failures.append(error)
                    raise
        except BaseException as error:
            # If it is cudaStreamEndCapture that failed, torch's allocators do not know of the end. Else this is refused.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.stream.device_index, pool)
                torch._C._cuda_releasePool(self.stream.device_index, pool)
                _undead.append(graph)
            raise (failures or [error])[0] from None  # the cause, not that the capture could not end well
        finally:
            failures.clear()  # an exception knows this frame, and so the model
            generator.graphsafe_set_state(state)
            torch._C._cuda_clearCublasWorkspaces()
        self._graph, self._random = graph, lent

    def replay(self) -> None:
        generator = torch.cuda.default_generators[self.stream.device_index]
        self._random.set_state(generator.get_state())
        offset = self._random.get_offset()
        self._graph.replay()
        if self._random.get_offset() != offset:
            generator.set_offset(self._random.get_offset())
