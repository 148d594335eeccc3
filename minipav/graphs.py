"""CUDA graphs: the kernels of a step, recorded once and then launched together. A GPU would else wait for
Python, which starts them one by one."""
import functools

import torch

from minipav import kernels

LAST = []                           # the graph recorded last, whose memory the next one takes over


def forget():
    """Give back the memory of the last graph."""
    LAST.clear()
    torch.cuda.empty_cache()


def wanted(device):
    return kernels.there(device.type)               # without them a step would wait for the GPU within itself


class Recorded:
    """step(), a function whose every tensor stays where it is, of the same shape, from one call to the next:
    the first call runs it (what it needs is loaded), the second records it, later ones replay that. On a CPU
    every call runs it."""

    def __init__(self, step, device):
        self.step, self.on, self.calls = step, wanted(device), 0

    def __call__(self):
        if self.on and self.calls == 1:
            self.graph = record(self.step)
        if self.on and self.calls:
            self.graph.replay()
        else:
            self.step()
        self.calls += 1


@functools.cache
def recording_stream():
    return torch.cuda.Stream()


def record(step):
    graph, stream = torch.cuda.CUDAGraph(), recording_stream()
    free, total = torch.cuda.mem_get_info()
    if free < total // 8:           # a recording takes no memory from what is kept for reuse
        torch.cuda.empty_cache()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(*[g.pool() for g in LAST], capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    LAST[:] = [graph]
    return graph
