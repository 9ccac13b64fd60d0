"""A call as a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Captured:
    """``call`` recorded once and replayed at every call; its tensors stay where they were when it was recorded."""

    def __init__(self, call: Callable[[], object]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()  # what is allocated once and for all, and the choice of algorithms
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            call()

    def __call__(self) -> None:
        self.graph.replay()
