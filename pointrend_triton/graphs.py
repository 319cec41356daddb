"""CUDA graphs: a function's launches recorded once for each input size, then replayed as one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from pointrend_triton import ops

LIMIT = 16  # graphs: each keeps the memory of its inputs and outputs, and they share all else
WARM_UP = 3  # runs before the capture, in which kernels are compiled and tuned


class Graph:
    """One captured call.

    Args:
        function: images, *arguments -> tensors.
        images: as those to come; copied.
        pool, stream: shared with other graphs, of which one runs at a time. Memory is used again
            only on the stream that it was allocated for.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        images: Tensor,
        arguments: tuple[Any, ...],
        pool: Any,
        stream: torch.cuda.Stream,
    ) -> None:
        self.images = images.clone()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function(self.images, *arguments)
        self.graph = torch.cuda.CUDAGraph()
        # other threads, such as one that pins memory, do not disturb
        with torch.cuda.graph(
            self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        ):
            self.outputs = function(self.images, *arguments)

    def __call__(self, images: Tensor) -> Any:
        """The function's tensors for these images, which the next call overwrites."""
        self.images.copy_(images)
        self.graph.replay()
        return self.outputs


class Graphs:
    """A function captured anew for each input size, set of arguments and choice of `ops.backend`.

    The first call of each takes several times as long; of more than LIMIT, the least recently used
    is dropped and captured again when it is needed. To be called from one thread and stream.

    Args:
        function: images, *arguments -> tensors; waits for nothing and reads no values on the host.
        device: a CUDA device.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function = function
        self.device = device
        with torch.cuda.device(device):
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.graphs: OrderedDict[Hashable, Graph] = OrderedDict()

    def __call__(self, images: Tensor, *arguments: Hashable) -> Any:
        """What the function returns, valid until the next call."""
        key = (images.shape, arguments, ops.backend.current())
        with torch.cuda.device(self.device):
            graph = self.graphs.get(key)
            if graph is None:
                if len(self.graphs) >= LIMIT:
                    torch.cuda.synchronize()  # the one to be dropped may still be running
                    self.graphs.popitem(last=False)
                graph = Graph(self.function, images, arguments, self.pool, self.stream)
                self.graphs[key] = graph
            self.graphs.move_to_end(key)
            return graph(images)
