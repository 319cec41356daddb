"""A GPU that is not there: what `launch` asks of CUDA and of Triton, answered from a table."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
import triton

from pointrend_triton.kernels import launch, store


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    index = 0
    device = property(lambda self: torch.device("cuda", self.index))


class FakeFunction:
    """In place of a `@triton.jit` function: adds 1 to its counts, or fails where it is told to."""

    arg_names = ["counts", "values", "n", "SCALE", "BLOCK"]

    def __init__(self):
        self.launches = []
        self.counts = []  # before each launch
        self.errors = {}

    def __getitem__(self, programs):
        def run(counts, *arguments, **keywords):
            if keywords["BLOCK"] in self.errors:
                raise self.errors[keywords["BLOCK"]]
            self.launches.append((programs, keywords))
            for count in counts if isinstance(counts, tuple) else (counts,):
                self.counts.append(count.tolist())
                count.add_(1)

        return run

    @property
    def blocks(self):
        return [keywords["BLOCK"] for _, keywords in self.launches]


class FakeGpu:
    """Milliseconds by block size decide what is fastest."""

    def __init__(self, monkeypatch, folder):
        self.name, self.current, self.capturing = "Fake GPU 3000", 0, False
        self.shared = 100_000
        self.times = {64: 3.0, 128: 1.0, 256: 2.0}
        self.entered = []
        self.benched = 0

        @contextmanager
        def on(index):
            self.entered.append(index)
            yield

        monkeypatch.setattr(launch, "INTERPRETED", False)
        monkeypatch.setattr(launch, "KERNELS", {})
        monkeypatch.setattr(store, "SHIPPED", folder / "shipped")
        monkeypatch.setenv("POINTREND_CACHE", str(folder / "cache"))
        monkeypatch.delenv("POINTREND_AUTOTUNE", raising=False)
        for name, answer in {
            "is_available": lambda: True,
            "current_device": lambda: self.current,
            "device": on,
            "synchronize": lambda: None,
            "is_current_stream_capturing": lambda: self.capturing,
            "get_device_name": lambda index: self.name,
            "get_device_properties": lambda index: SimpleNamespace(
                shared_memory_per_block_optin=self.shared
            ),
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(triton.testing, "do_bench", self.bench)
        self.function = FakeFunction()
        self.forget()

    def bench(self, run, **how):
        run()
        run()
        self.benched += 1
        return self.times[self.function.blocks[-1]]

    def forget(self):
        """As a new process would start."""
        store._tables.cache_clear()
        for kernel in launch.KERNELS.values():
            kernel._chosen.clear()

    def kernel(self, name="toy.add", blocks=(64, 128, 256), **keywords):
        configs = [triton.Config({"BLOCK": block}) for block in blocks]
        return launch.Kernel(name, self.function, lambda constants: configs, **keywords)


def on_gpu(*shape, index=0, dtype=torch.float32):
    tensor = torch.zeros(*shape, dtype=dtype).as_subclass(OnGpu)
    tensor.index = index
    return tensor


def run(kernel, n=1000, *, counts=None, values=None, scale=2, size=None):
    kernel(
        lambda c: (triton.cdiv(n, c["BLOCK"]),),
        on_gpu(4) if counts is None else counts,
        on_gpu(n) if values is None else values,
        n,
        size=(n,) if size is None else size,
        SCALE=scale,
    )
