"""From images to labels and scores, in the protocols of the published numbers.

Single scale: the image fitted into the base scale, one pass, logits resampled to the image's own
size. Multi-scale and flip: the base scale times six ratios, each also mirrored, twelve passes; the
mean of their probabilities decides (mmsegmentation 0.x, where the published numbers come from).
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from pointrend_triton import ops, reference, visualize
from pointrend_triton.data import TestTransform, multi_scale_sizes
from pointrend_triton.metrics import SegmentationMetrics

if TYPE_CHECKING:
    from pointrend_triton.distributed import World
    from pointrend_triton.models.pointrend import PointRend

Image = npt.NDArray[np.uint8]
Transform = Callable[[Image], Tensor]
Scale = tuple[int, int]
Item = TypeVar("Item")
Result = TypeVar("Result")

# the published speeds leave out this many images: the first ones pay for allocation and tuning
WARMUP_IMAGES = 5
# probabilities made at a time: a few kernels per map on a GPU, whose L2 holds what they hand over
STRIP_BYTES = 2**24


class Dataset(Protocol):
    """What evaluation needs of a data set."""

    @property
    def classes(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def load(self, index: int, /) -> tuple[Image, Image]: ...


class Speed(TypedDict):
    """Batch 1, from the normalised image on the host to labels at its own size on the host."""

    images_per_second: float
    median_ms: float
    images: int
    skipped: int
    peak_memory_mib: float
    peak_memory_of: str


def predict(
    model: PointRend,
    image: Image,
    transform: Transform,
    *,
    size: tuple[int, int] | None = None,
    coarse: bool = False,
    amp: bool = False,
) -> Tensor:
    """One pass over one image.

    Args:
        model: in evaluation mode.
        image: uint8 BGR [H,W,3].
        transform: the test pipeline, image -> normalised float32 [3,h,w].
        size: (height, width) of the result; the image's own by default.
        coarse: stop before the refinement and enlarge the coarse logits instead.
        amp: run the network in bfloat16 where autocast allows it.

    Returns:
        labels [H,W] on the model's device: uint8 up to 256 classes, else int64.
    """
    return _predict(model, transform(image)[None], size or image.shape[:2], coarse, amp)


def predict_multi_scale(
    model: PointRend,
    image: Image,
    transforms: Iterable[Transform],
    *,
    flip: bool = True,
    size: tuple[int, int] | None = None,
    coarse: bool = False,
    amp: bool = False,
) -> Tensor:
    """Labels [H,W] by the mean probability over the transforms, each also mirrored if `flip`.

    The other arguments and the result are `predict`'s.
    """
    mean = mean_probabilities(
        model, image, transforms, flip=flip, size=size, coarse=coarse, amp=amp
    )[0]
    if len(mean) == 1:
        return (mean[0] > 0.5).to(torch.uint8)
    return mean.argmax(dim=0).to(torch.uint8 if len(mean) <= 256 else torch.int64)


@torch.no_grad()
def mean_probabilities(
    model: PointRend,
    image: Image,
    transforms: Iterable[Transform],
    *,
    flip: bool = True,
    size: tuple[int, int] | None = None,
    coarse: bool = False,
    amp: bool = False,
) -> Tensor:
    """Mean over passes of softmax (one class: sigmoid) of the logits at `size`: float32 [1,C,H,W].

    Beside a pass's own memory, two such maps are held, the sum and the resampled logits. The result
    is that of whole maps within the rounding of fp32, as a strip may round its softmax otherwise.

    The arguments are `predict_multi_scale`'s. Raises ValueError without any transform.
    """
    height, width = size or image.shape[:2]
    total: Tensor | None = None
    passes = 0
    for transform, mirrored in itertools.product(transforms, (False, True) if flip else (False,)):
        images = transform(image)[None].to(_device(model))
        logits = _logits(model, images.flip(3) if mirrored else images, coarse, amp)
        logits = reference.resample(logits, (height, width))
        if total is None:
            total = torch.zeros_like(logits)
        _add_probabilities(total, logits, mirrored)
        del logits  # or the next pass would run beside them
        passes += 1
    if total is None:
        raise ValueError("transforms must hold at least one transform")
    return total.div_(passes)


def evaluate_dataset(
    model: PointRend,
    dataset: Dataset,
    scale: Scale | None,
    *,
    coarse: bool = False,
    multi_scale: bool = False,
    amp: bool = False,
    boundary: bool = True,
    indices: Sequence[int] | None = None,
    limit: int | None = None,
    workers: int = 2,
    progress: bool = True,
    on_prediction: Callable[[int, Image], None] | None = None,
    on_score: Callable[[int, SegmentationMetrics], None] | None = None,
    world: World | None = None,
) -> SegmentationMetrics:
    """The metrics of a model on a data set, every image judged at its own size.

    Args:
        model: its mode is restored afterwards.
        dataset: `load(i)` gives an image uint8 BGR [H,W,3] and a label uint8 [H,W].
        scale: the base scale (longer, shorter side) to fit images into; None keeps their size.
        coarse: without refinement.
        multi_scale: the twelve passes instead of one.
        amp: bfloat16 where autocast allows it.
        boundary: count the border measures too.
        indices: which images; all by default.
        limit: only the first so many of them.
        workers: threads that load and score while the model runs.
        progress: show a progress bar, if standard error is a terminal.
        on_prediction: called in order with each image's index and labels [H,W].
        on_score: called in order with each image's index and the metrics of it alone.
        world: share the images out over its ranks, which must all call this; each predicts its own
            and gets the metrics of all.

    Raises ValueError for a `limit` below 1 and where there is no image to evaluate.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    chosen = list(range(len(dataset)) if indices is None else indices)[:limit]
    if not chosen:
        raise ValueError("there is no image to evaluate")
    if world is not None:
        chosen = chosen[world.rank :: world.size]
        progress = progress and world.is_main
    num_classes = max(2, model.config.num_classes)
    metrics = SegmentationMetrics(num_classes, boundary)
    scoring: deque[tuple[int, Future[SegmentationMetrics]]] = deque()

    def score(prediction: Image, label: Image) -> SegmentationMetrics:
        counts = SegmentationMetrics(num_classes, boundary)
        counts.update(prediction, label)
        return counts

    def count_next() -> None:
        index, scored = scoring.popleft()
        metrics.merge(scored.result())
        if on_score is not None:
            on_score(index, scored.result())

    def prepare(index: int) -> tuple[Image, Image, Tensor | None]:
        image, label = dataset.load(index)
        # the single pass has its input made here, beside the network; six would only fill memory
        inputs = None if multi_scale else _transforms(scale, image, False)[0](image)
        return image, label, inputs

    workers = max(1, workers)
    bar = tqdm(total=len(chosen), unit="image", leave=False, disable=None if progress else True)
    with bar, evaluation_mode(model), ThreadPoolExecutor(workers) as pool:
        samples = ahead(pool, prepare, chosen, workers)
        for index, sample in zip(chosen, samples, strict=True):
            image, label, inputs = sample.result()
            if inputs is None:
                transforms = _transforms(scale, image, True)
                labels = predict_multi_scale(model, image, transforms, coarse=coarse, amp=amp)
            else:
                labels = _predict(model, inputs[None], image.shape[:2], coarse, amp)
            prediction = labels.cpu().numpy()
            scoring.append((index, pool.submit(score, prediction, label)))
            if on_prediction is not None:
                on_prediction(index, prediction)
            if len(scoring) > workers:
                count_next()
            bar.update()
        while scoring:
            count_next()
    if world is not None:
        metrics.all_reduce()
    return metrics


def example_picture(
    model: PointRend, image: Image, label: Image, scale: Scale | None, palette: Image
) -> Image:
    """What the model made of one image, and where it looked twice: `visualize.example_panel`.

    image uint8 BGR [H,W,3], label uint8 [H,W], palette RGB [C,3] -> RGB [h,w,3]. The points are
    those of the last subdivision step. The model's mode is restored.
    """
    inputs = _transforms(scale, image, multi_scale=False)[0](image)[None].to(_device(model))
    height, width = inputs.shape[2:]
    with evaluation_mode(model):
        trace: Any = model.refine_trace(inputs)
    coarse, refined = (
        ops.decode(trace[name], image_size=(height, width), size=label.shape)[0].cpu().numpy()
        for name in ("coarse", "refined")
    )
    steps = trace["points"]
    coords = steps[-1][0].float().cpu().numpy() if len(steps) else np.zeros((0, 2))
    uncertainty = reference.score(trace["coarse"].float())[0, 0].cpu().numpy()
    return visualize.example_panel(
        image[..., ::-1], label, coarse, refined, coords, uncertainty, palette
    )


def measure_speed(
    model: PointRend,
    dataset: Dataset,
    scale: Scale | None,
    *,
    images: int = 200,
    coarse: bool = False,
    amp: bool = False,
    progress: bool = True,
) -> Speed:
    """Speed as the model zoo measures it: batch 1, the first 5 of `images` not counted.

    Timed: copy to the device, network, refinement, resampling to the image's own size, argmax, copy
    to the host. Not timed: loading and the test transform. A data set with fewer images is gone
    through again. The model's mode is restored. Raises ValueError if `images` leaves none to time.
    """
    if images <= WARMUP_IMAGES:
        raise ValueError(f"images must be more than the {WARMUP_IMAGES} skipped, not {images}")
    if not len(dataset):
        raise ValueError("there is no image to measure with")
    device = _device(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    with evaluation_mode(model):
        for turn in tqdm(
            range(images), unit="image", leave=False, disable=None if progress else True
        ):
            image, _ = dataset.load(turn % len(dataset))
            inputs = _transforms(scale, image, multi_scale=False)[0](image)[None]
            _synchronize(device)
            start = time.perf_counter()
            _predict(model, inputs, image.shape[:2], coarse, amp).cpu()
            _synchronize(device)
            seconds.append(time.perf_counter() - start)
    timed = seconds[WARMUP_IMAGES:]
    memory, memory_of = peak_memory(device)
    return Speed(
        images_per_second=len(timed) / sum(timed),
        median_ms=1e3 * statistics.median(timed),
        images=len(timed),
        skipped=WARMUP_IMAGES,
        peak_memory_mib=memory,
        peak_memory_of=memory_of,
    )


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first CUDA GPU or else the CPU.

    Raises ValueError if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        # the first sentence: PyTorch may go on to list all of its backends
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{name!r} is no device here: {reason}") from None
    return device


def peak_memory(device: torch.device) -> tuple[float, str]:
    """Peak memory in MiB and whose: a GPU's tensors since its last reset, or else this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20, "tensors on the GPU"
    if sys.platform == "win32":
        return float("nan"), "unknown on this system"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB
    return peak / (2**20 if sys.platform == "darwin" else 2**10), "whole process since its start"


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Iterator[Future[Result]]:
    """`function` of each item, in order; up to `count` of them run ahead of their use."""
    remaining = iter(items)
    running = deque(pool.submit(function, item) for item in itertools.islice(remaining, count))
    while running:
        future = running.popleft()
        running.extend(pool.submit(function, item) for item in itertools.islice(remaining, 1))
        yield future


@torch.no_grad()
def _predict(
    model: PointRend, images: Tensor, size: tuple[int, int], coarse: bool, amp: bool
) -> Tensor:
    """Labels [H,W] at `size` of one normalised image [1,3,h,w]."""
    images = images.to(_device(model))
    with _autocast(images.device, amp):
        if coarse:
            height, width = images.shape[2:]
            return ops.decode(model.coarse(images), image_size=(height, width), size=size)[0]
        return model.predict(images, size=size)[0]


def _logits(model: PointRend, images: Tensor, coarse: bool, amp: bool) -> Tensor:
    """float32 logits [1,C,h,w] at the size of the network's input."""
    with _autocast(images.device, amp):
        logits = model.coarse(images) if coarse else model(images)
    height, width = images.shape[2:]
    return reference.resample(logits.float(), (height, width))


def _add_probabilities(total: Tensor, logits: Tensor, mirrored: bool) -> None:
    """Adds the probabilities of logits [1,C,H,W] to their sum, a strip of rows at a time."""
    rows = max(1, STRIP_BYTES * logits.shape[2] // logits.nbytes)
    for strip, sums in zip(logits.split(rows, dim=2), total.split(rows, dim=2), strict=True):
        strip = strip.flip(3) if mirrored else strip
        sums += strip.sigmoid() if strip.shape[1] == 1 else strip.softmax(dim=1)


def _transforms(scale: Scale | None, image: Image, multi_scale: bool) -> list[Transform]:
    """The test transform, or the six of multi-scale testing, whose ratios are of `scale`."""
    if not multi_scale:
        return [TestTransform(scale)]
    height, width = image.shape[:2]
    base = scale or (max(height, width), min(height, width))
    return [TestTransform(enlarged) for enlarged in multi_scale_sizes(base)]


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _autocast(device: torch.device, enabled: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
