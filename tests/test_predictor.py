"""The Predictor against the model: folded, padded, compiled, captured, in half precision."""

import copy
import functools
import gc
import itertools
import weakref

import pytest
import torch
from test_models import lively, small
from tolerance import assert_within
from torch import nn
from torch._dynamo.testing import CompileCounter

from pointrend_triton import Predictor, graphs, ops, predictor, reference
from pointrend_triton.config import PointHeadConfig
from pointrend_triton.padding import PaddedMaps, own_part, pad

ODD_SIZES = [(33, 65), (97, 130), (8, 8), (1, 1), (64, 96)]
ADE_SIZES = [(257, 513), (512, 683)]
ALL = 10**9  # points, so that which of them were chosen plays no part
ROUNDING = 2.0**-24


def network(classes=5, **fields):
    """Of random weights, with labels that vary and BatchNorms that do something."""
    model = lively(small(classes, **fields)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def draw(size, batch=2):
    return torch.randn(batch, 3, *size)


def margin(logits):
    """By how much the largest is above the second largest: [B, C, H, W] -> [B, H, W]."""
    return -reference.score(logits)[:, 0]


def assert_same_labels(labels, expected, logits, error):
    """Other labels only where two classes are closer than errors of both can move them.

    Args:
        logits: fp32 or fp64 [B, C, H, W], of which `expected` are the largest.
        error: the largest of any logit.
    """
    differ = labels != expected
    assert not (differ & (margin(logits) > 2 * error)).any()
    assert differ.float().mean() <= 0.01


@torch.no_grad()
def test_it_is_the_model():
    """Neither folded nor in another layout: the same arithmetic, so the same bits."""
    model, images = network(), draw((37, 50))
    plain = Predictor(model, fold=False, channels_last=False)
    assert torch.equal(plain(images), model.predict(images))
    assert torch.equal(plain.logits(images), model(images))
    how = {"steps": 1, "num_points": 7}
    assert torch.equal(plain(images, (20, 80), **how), model.predict(images, (20, 80), **how))
    assert torch.equal(plain.logits(images, **how), model(images, **how))
    coarse = reference.resample(model.coarse(images), (37, 50))
    assert torch.equal(plain.logits(images, refine=False), coarse)
    labels = plain(images, refine=False)
    assert torch.equal(labels.long(), coarse.argmax(1))
    assert not torch.equal(labels, plain(images))
    labels[0] = 3  # not a tensor that only inference may change


def test_the_model_is_left_alone():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    ready = Predictor(model, dtype=torch.bfloat16, bucket=32)
    ready(draw((37, 50)))
    assert model.training and model.backbone.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not ready.model.training
    assert not any(parameter.requires_grad for parameter in ready.model.parameters())


@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_folded_and_channels_last(depth):
    """As far from fp64 as the model itself is, twice at most."""
    model, images = network(depth=depth), draw((70, 97))
    ready = Predictor(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ready.model.modules())
    weight = ready.model.backbone.layer1[0].conv1.weight
    if depth == 18:
        assert weight.is_contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()
    for ours, theirs, truth in zip(
        ready.model.maps(images), model.maps(images), exact.maps(images.double()), strict=True
    ):
        assert_within(ours, theirs, truth)
    expected = exact(images.double(), num_points=ALL)
    logits = ready.logits(images, num_points=ALL)
    assert_within(logits, model(images, num_points=ALL), expected)
    error = (logits - expected).abs().max()
    assert_same_labels(ready(images, num_points=ALL), expected.argmax(1), expected, error)


def test_folding_alone():
    model = network(depth=50)
    folded = copy.deepcopy(model)
    predictor.fold_batch_norm(folded)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    left = [module for module in folded.modules() if isinstance(module, nn.Identity)]
    # all but those of the neck and the two that give logits
    assert len(left) == len(norms) == len(convs) - 9


@pytest.mark.parametrize("bucket", [32, 128])
@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_padded_maps_are_exact(depth, bucket):
    """In fp64 the padded network gives the unpadded one's maps: what differs is only rounding."""
    model = network(depth=depth).double()
    padded = PaddedMaps(copy.deepcopy(model))
    for size in ODD_SIZES:
        images = draw(size).double()
        padded.set_size(size)
        for ours, theirs in zip(padded.maps(pad(images, bucket)), model.maps(images), strict=True):
            ours = own_part(ours, size)
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() <= 1e-13 * theirs.abs().max()


@torch.no_grad()
def test_plain_padding_is_not():
    """Or else the test above could not fail."""
    model, images = network().double(), draw((33, 65)).double()
    for ours, theirs in zip(model.maps(pad(images, 32)), model.maps(images), strict=True):
        assert (own_part(ours, (33, 65)) - theirs).abs().max() > 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("size", ODD_SIZES + ADE_SIZES)
@torch.no_grad()
def test_padded_in_fp32(size):
    model, images = network(), draw(size)
    plain, padded = Predictor(model), Predictor(model, bucket=32)
    exact = copy.deepcopy(model).double()(images.double(), num_points=ALL)
    theirs, ours = (ready.logits(images, num_points=ALL) for ready in (plain, padded))
    assert_within(ours, theirs, exact)
    error = (ours - theirs).abs().max()
    for how in ({}, {"size": (2 * size[0] + 1, size[1] + 3)}):
        labels, expected = (ready(images, num_points=ALL, **how) for ready in (padded, plain))
        logits = reference.resample(theirs, how.get("size"))
        # the interpolation adds its own roundings, of sums of four and four products
        assert_same_labels(labels, expected, logits, error + 8 * ROUNDING * theirs.abs().max())
    # few points: another one may be chosen where two scores tie
    differ = padded(images) != plain(images)
    assert differ.float().mean() <= 1e-3


@torch.no_grad()
def test_padded_sizes_in_turn():
    """Nothing of an image is left when the next one comes, in a batch or without."""
    model = network()
    plain, padded = Predictor(model), Predictor(model, bucket=64)
    for size, batch in [((60, 60), 2), ((33, 65), 1), ((5, 9), 2), ((60, 60), 1)]:
        images = draw(size, batch)
        theirs = plain.logits(images, num_points=ALL)
        ours = padded.logits(images, num_points=ALL)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        for how in ({"refine": False}, {"steps": 0}):
            theirs, ours = plain.logits(images, **how), padded.logits(images, **how)
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(
    ("backend", "size", "targets"),
    [
        ("reference", (37, 50), [None, (48, 61), (74, 100), (11, 90)]),
        ("reference", (64, 64), [None, (128, 128)]),
        pytest.param("triton", (18, 25), [None, (11, 30)], marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_labels_are_those_of_the_logits(backend, size, targets):
    """The two ways round differently, each resampling by 3 roundings of sums and products.

    And each of a place, by half a unit in the last place of up to `side` cells, which moves a value
    by that share of the difference of neighbours. Two resamplings along two axes, two classes.
    """
    model = network()
    ready = Predictor(model)
    images = draw(size, 1)
    with ops.backend(backend):
        logits = ready.logits(images)
        for target in targets:
            labels = ready(images, target)
            resampled = reference.resample(logits, target)
            side = max(*size, *(target or ()))
            error = 4 * ROUNDING * (3 + 2 * side) * logits.abs().max()
            assert_same_labels(labels, resampled.argmax(1), resampled, error)


ADE_CASES = [((512, 683), (768, 1024)), ((513, 683), (600, 799)), ((33, 65), (41, 83))]


@pytest.mark.parametrize(("size", "target"), ADE_CASES)
@torch.no_grad()
def test_labels_are_those_of_the_logits_at_ade_sizes(size, target):
    """Plain PyTorch takes the same steps in both, so there is no tie to allow for."""
    ready, images = Predictor(network()), draw(size, 1)
    logits = reference.resample(ready.logits(images), target)
    assert torch.equal(ready(images, target).long(), logits.argmax(1))


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "target"), ADE_CASES)
@torch.no_grad()
def test_kernels_labels_are_those_of_the_logits_at_ade_sizes(size, target):
    ready, images = Predictor(on_gpu(classes=150)), draw(size, 1)
    logits = ready.logits(images)
    resampled = reference.resample(logits, target)
    error = 4 * ROUNDING * (3 + 2 * max(target)) * logits.abs().max()
    assert_same_labels(ready(images, target), resampled.argmax(1), resampled, error)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("bucket", [None, 32])
@torch.no_grad()
def test_half_precision(dtype, bound, bucket):
    """Coarse logits within some ten units in the last place, the labels by that."""
    model, images = network(), draw((70, 97))
    exact = Predictor(model).logits(images, refine=False)
    half = Predictor(model, dtype=dtype, bucket=bucket)
    logits = half.logits(images, refine=False)
    assert logits.dtype == dtype
    error = (logits.float() - exact).abs().max()
    assert error <= bound * exact.abs().max()
    labels = half(images, refine=False)
    assert not ((labels != exact.argmax(1)) & (margin(exact) > 2 * error)).any()
    refined = half(images)
    assert refined.dtype == torch.uint8
    assert (refined != Predictor(model)(images)).float().mean() <= 4 * bound


@torch.no_grad()
def test_half_precision_in_and_out():
    """Images in another type, a model in another type, and autocast around the call."""
    model, images = network(), draw((37, 50))
    ready = Predictor(model)
    assert ready.logits(images.half()).dtype == torch.float32
    assert torch.equal(ready.logits(images.double()), ready.logits(images))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = ready.logits(images)
    assert torch.equal(autocast, ready.logits(images))
    # folded in fp32, whatever type the weights come in
    rounded = copy.deepcopy(model).bfloat16()
    expected = Predictor(copy.deepcopy(rounded).float()).logits(images)
    assert torch.equal(Predictor(rounded).logits(images), expected)


@pytest.mark.parametrize("bucket", [None, 32])
@pytest.mark.parametrize("classes", [1, 300])
@torch.no_grad()
def test_few_and_many_classes(classes, bucket):
    model, images = network(classes), draw((33, 50), 3)
    labels = Predictor(model, bucket=bucket)(images, (40, 41), num_points=ALL)
    assert labels.shape == (3, 40, 41)
    assert labels.dtype == (torch.uint8 if classes == 1 else torch.int64)
    expected = model.predict(images, (40, 41), num_points=ALL)
    assert (labels != expected).float().mean() <= 1e-3
    assert len(labels.unique()) > 1


@pytest.mark.parametrize("bucket", [None, 32])
@torch.no_grad()
def test_without_refinement(bucket):
    """No point head, no steps, none wanted: the coarse logits enlarged."""
    model, images = network(), draw((37, 50))
    ready = Predictor(model, bucket=bucket)
    coarse = ready.logits(images, refine=False)
    assert torch.equal(ready.logits(images, steps=0), coarse)
    assert torch.equal(ready(images, steps=0), ready(images, refine=False))
    headless = network(point_head=None)
    headless.load_state_dict(model.state_dict(), strict=False)
    ready = Predictor(headless, bucket=bucket)
    assert torch.equal(ready.logits(images), coarse)
    assert torch.equal(ready.logits(images, refine=False), coarse)


@torch.no_grad()
def test_detectron2s_point_head():
    head = PointHeadConfig(channels=8, subdivision_num_points=30, coarse_each_layer=False)
    model, images = network(point_head=head), draw((33, 65))
    labels = Predictor(model, bucket=32)(images, num_points=ALL)
    assert (labels != model.predict(images, num_points=ALL)).float().mean() <= 1e-3


class Counted:
    """torch.compile by a backend that only counts, and runs eagerly."""

    def __init__(self, monkeypatch):
        torch._dynamo.reset()
        self.counter = CompileCounter()
        compile = functools.partial(torch.compile, backend=self.counter)
        monkeypatch.setattr(predictor.torch, "compile", compile)

    def sizes(self, ready, plain, sizes):
        """How often was compiled after each; the results are those without."""
        counts = []
        for size in sizes:
            images = draw(size, 1)
            logits = ready.logits(images)
            assert torch.equal(logits, plain.logits(images)), size
            counts.append(self.counter.frame_count)
        return counts


def large_enough():
    """For these sizes PyTorch on a CPU makes no difference between small and large maps."""
    return network(base_channels=16, fpn_channels=32, head_channels=32)


@pytest.mark.slow
def test_compiled_twice_for_all_padded_sizes(monkeypatch):
    counted = Counted(monkeypatch)
    model = large_enough()
    ready, plain = Predictor(model, compile=True, bucket=32), Predictor(model, bucket=32)
    sizes = [(512, 683), (510, 690), (683, 512), (512, 768), (513, 683), (512, 911), (600, 512)]
    # the second is of the same padded size, the third for any
    assert counted.sizes(ready, plain, sizes) == [1, 1, 2, 2, 2, 2, 2]
    assert counted.sizes(ready, plain, [(640, 512)]) == [2]  # points and results are not part of it
    ready(draw((512, 683), 1), (768, 1024), steps=1, num_points=5)
    assert counted.counter.frame_count == 2


@pytest.mark.slow
def test_compiled_without_bucket(monkeypatch):
    """Sizes that divide by 8, 16, 32 or not are compiled apart, each once."""
    counted = Counted(monkeypatch)
    model = large_enough()
    ready, plain = Predictor(model, compile=True), Predictor(model)
    sizes = [(512, 683), (683, 512), (513, 683), (515, 690), (512, 768), (576, 704)]
    counts = counted.sizes(ready, plain, sizes)
    assert counts[1] == 2 and counts[-1] <= 5  # 5 in PyTorch 2.11, later 4
    assert counted.sizes(ready, plain, sizes)[-1] == counts[-1]


@pytest.mark.slow
def test_a_compilation_too_many_is_an_error(monkeypatch):
    Counted(monkeypatch)
    monkeypatch.setattr(predictor, "COMPILATIONS", 1)
    ready = Predictor(network(), compile=True)
    ready(draw((64, 64), 1))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        ready(draw((37, 50), 1))


class FakeGraph:
    """Runs the function again, where a graph would launch what it recorded, into its own memory."""

    captured = []

    def __init__(self, function, images, arguments, pool, stream):
        self.function, self.arguments, self.pool = function, arguments, pool
        self.images = images.clone()
        self.outputs = function(self.images, *arguments)
        self.captured.append((tuple(images.shape), *arguments))

    def __call__(self, images):
        self.images.copy_(images)
        outputs = self.function(self.images, *self.arguments)
        for own, new in zip(_tensors(self.outputs), _tensors(outputs), strict=True):
            own.copy_(new)
        return self.outputs


def _tensors(outputs):
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs


@pytest.fixture
def fake_graphs(monkeypatch):
    """A predictor on a CPU that believes in graphs; gives what was captured."""

    class Nowhere:
        def __init__(self, device):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    handles = itertools.count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", Nowhere)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(graphs, "Graph", FakeGraph)
    monkeypatch.setattr(FakeGraph, "captured", [])
    monkeypatch.setattr(Predictor, "_check", lambda *arguments: None)
    return FakeGraph.captured


@torch.no_grad()
def test_graphs_by_size_and_arguments(fake_graphs):
    model = network()
    plain, ready = Predictor(model), Predictor(model, graphs=True)
    small, large = draw((33, 50)), draw((64, 64))
    calls = [(small, None), (large, None), (small, (20, 30)), (small, [20, 30])]
    kept = [(ready(images, size), plain(images, size)) for images, size in calls]
    kept.append((ready.logits(small, steps=1), plain.logits(small, steps=1)))
    kept.append((ready(-small), plain(-small)))
    assert len(fake_graphs) == 4
    assert fake_graphs[0] == ((2, 3, 33, 50), "labels", None, None, None, True)
    # still right after the calls that followed
    assert all(torch.equal(ours, theirs) for ours, theirs in kept)


@torch.no_grad()
def test_graphs_of_padded_sizes(fake_graphs):
    """One for all images of a padded size; the rest follows it."""
    model = network()
    plain, ready = Predictor(model, bucket=64), Predictor(model, bucket=64, graphs=True)
    kept = []
    for size in [(33, 50), (64, 64), (7, 60), (65, 20), (1, 1), (1, 1)]:
        images = draw(size)
        kept.append((ready(images, (9, 9)), plain(images, (9, 9))))
        kept.append((ready.logits(images, steps=0), plain.logits(images, steps=0)))
        kept.append((ready.logits(images, refine=False), plain.logits(images, refine=False)))
    assert fake_graphs == [((2, 3, 64, 64),), ((2, 3, 128, 64),)]
    assert all(torch.equal(ours, theirs) for ours, theirs in kept)


def test_a_graph_holds_for_one_backend(fake_graphs):
    ready, images = Predictor(network(), graphs=True), draw((33, 65))
    for backend in ("reference", "auto", "reference"):
        with ops.backend(backend):
            ready(images)
    assert len(fake_graphs) == 2


def test_the_least_recently_used_graph_is_dropped(fake_graphs, monkeypatch):
    monkeypatch.setattr(graphs, "LIMIT", 2)
    cache = graphs.Graphs(lambda images: images + 1, torch.device("cpu"))
    for side in (1, 2, 1, 3, 1, 2):
        assert torch.equal(cache(torch.full((side,), 5)), torch.full((side,), 6))
    assert [shape for (shape,) in fake_graphs] == [(1,), (2,), (3,), (2,)]
    assert len(cache.graphs) == 2
    assert {graph.pool for graph in cache.graphs.values()} == {cache.pool}


def test_a_failed_capture_leaves_nothing(fake_graphs):
    def fails(images):
        raise RuntimeError("out of memory")

    cache = graphs.Graphs(fails, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="out of memory"):
        cache(torch.zeros(1))
    assert not cache.graphs


@pytest.mark.parametrize("bucket", [None, 32])
@pytest.mark.parametrize("use_graphs", [False, True])
def test_inference_mode_around_it_or_not(bucket, use_graphs, fake_graphs):
    with torch.inference_mode():
        ready = Predictor(network(), bucket=bucket, graphs=use_graphs)
        images = draw((37, 50))
        first = ready(images)
    second = ready(images)
    second += 1  # an ordinary tensor
    with torch.inference_mode():
        assert torch.equal(ready(images), first)
    assert torch.equal(second, first + 1)


@pytest.mark.parametrize("bucket", [None, 32])
@pytest.mark.parametrize("use_graphs", [False, True])
def test_it_is_gone_when_the_last_name_is(bucket, use_graphs, fake_graphs):
    ready = Predictor(network(), bucket=bucket, graphs=use_graphs)
    ready(draw((37, 50)))
    model = weakref.ref(ready.model)
    gc.disable()
    try:
        del ready
        assert model() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("bucket", [None, 32])
def test_what_is_refused(bucket):
    ready = Predictor(network(), bucket=bucket)
    images = draw((37, 50))
    for bad in (images.byte(), images[:, :1], images[0], images[None]):
        with pytest.raises(ValueError, match="images must be normalised floating point"):
            ready(bad)
    with pytest.raises(ValueError, match="at least one pixel, not .2, 3, 0, 50"):
        ready.logits(images[:, :, :0])
    for size in ((0, 5), (5,), (5, 6, 7)):
        with pytest.raises(ValueError, match="size must be"):
            ready(images, size)
    with pytest.raises(ValueError, match="steps must be at least 0, not -1"):
        ready(images, steps=-1)
    with pytest.raises(ValueError, match="num_points must be at least 0, not -1"):
        ready(images, num_points=-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float64}, "dtype must be .*, not torch.float64"),
        ({"dtype": "bf16"}, "dtype must be .*, not bf16"),
        ({"bucket": 48}, "bucket must be a multiple of 32, not 48"),
        ({"bucket": 0}, "bucket must be a multiple of 32, not 0"),
        ({"bucket": -32}, "bucket must be a multiple of 32, not -32"),
        ({"bucket": 32.0}, "bucket must be a multiple of 32, not 32.0"),
        ({"graphs": True}, "graphs need the model on a CUDA device, not on cpu"),
    ],
)
def test_what_is_refused_at_once(arguments, message, monkeypatch):
    monkeypatch.setattr(copy, "deepcopy", lambda model: pytest.fail("work began"))
    with pytest.raises(ValueError, match=message):
        Predictor(small(), **arguments)


def on_gpu(classes=5):
    return network(classes).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("bucket", [None, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_graphs_replay_what_eager_computes(dtype, bucket):
    model = on_gpu()
    how = {"dtype": dtype, "bucket": bucket}
    plain, ready = Predictor(model, **how), Predictor(model, graphs=True, **how)
    kept = []
    for size in [(33, 65), (97, 130), (33, 65), (64, 64), (97, 130)]:
        images = draw(size)
        for target in (None, (50, 41)):
            kept.append((ready(images, target), plain(images, target)))
        kept.append((ready.logits(images).argmax(1), plain.logits(images).argmax(1)))
        kept.append((ready(images, refine=False), plain(images, refine=False)))
    for ours, theirs in kept:
        # cuDNN may choose another algorithm, so some ties may fall otherwise
        assert (ours != theirs).float().mean() <= (1e-3 if dtype == torch.float32 else 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("bucket", [None, 32])
def test_graphs_dropped_and_two_predictors(bucket, monkeypatch):
    monkeypatch.setattr(graphs, "LIMIT", 2)
    models = [on_gpu(), on_gpu(classes=3)]
    pairs = [
        (Predictor(model, bucket=bucket, graphs=True), Predictor(model, bucket=bucket))
        for model in models
    ]
    kept = []
    for size in [(33, 65), (97, 130), (160, 40), (33, 65), (160, 40)]:
        images = draw(size).pin_memory()
        for ready, plain in pairs:
            kept.append((ready(images), plain(images)))
    for ours, theirs in kept:
        assert (ours != theirs).float().mean() <= 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("bucket", [None, 32])
def test_graphs_share_their_memory(bucket):
    ready = Predictor(on_gpu(), bucket=bucket, graphs=True)
    ready(draw((512, 512)))  # what tuning and libraries keep is there from now on
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    ready(draw((512, 544)))
    torch.cuda.empty_cache()
    one = torch.cuda.memory_reserved() - before
    for width in (576, 608, 640, 672):
        ready(draw((512, width)))
    torch.cuda.empty_cache()
    # all five keep inputs and outputs of their own, and no activations
    assert torch.cuda.memory_reserved() - before < 2 * one + 2**26


@pytest.mark.gpu
@pytest.mark.parametrize("bucket", [None, 32])
@pytest.mark.parametrize("use_graphs", [False, True])
def test_nothing_waits_for_the_gpu(use_graphs, bucket):
    ready = Predictor(on_gpu(), graphs=use_graphs, bucket=bucket)
    images = draw((97, 130)).pin_memory()
    ready(images)
    ready.logits(images)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ready(images)
        ready.logits(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def worst(logits, exact):
    """The largest error of any logit."""
    return (logits.double() - exact).abs().max()


@torch.no_grad()
def assert_as_exact(ready, plain, exact, images, other=None):
    """Logits miss fp64 by twice what PyTorch misses it by; labels differ only where they may.

    cuDNN chooses its algorithm by size, and so do errors: PyTorch's is the larger of those on
    these and on `other` images.
    """
    size = tuple(images.shape[2:])

    def truth(images, **how):
        images = images.double().to(next(exact.parameters()).device)
        if how.get("refine", True):
            return exact(images, **how)
        return reference.resample(exact.coarse(images), tuple(images.shape[2:]))

    for how in ({"refine": False}, {"num_points": ALL}):
        expected, logits = truth(images, **how), ready.logits(images, **how)
        allowed = worst(plain.logits(images, **how), expected)
        if other is not None:
            allowed = allowed.maximum(worst(plain.logits(other, **how), truth(other, **how)))
        error = worst(logits, expected)
        assert error <= 2 * allowed + 1e-6 * expected.abs().max(), (size, how)
        # decoding rounds as test_labels_are_those_of_the_logits says
        error += 4 * ROUNDING * (3 + 2 * max(size)) * expected.abs().max()
        differ = ready(images, **how) != expected.argmax(1)
        assert not (differ & (margin(expected) > 2 * error)).any(), (size, how)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("bucket", [None, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_on_the_gpu(dtype, bucket):
    torch._dynamo.reset()
    model = on_gpu()
    exact = copy.deepcopy(model).double()
    plain = Predictor(model, dtype=dtype, bucket=bucket)
    ready = Predictor(model, dtype=dtype, bucket=bucket, compile=True, graphs=True)
    for size in [(33, 65), (97, 130)]:
        assert_as_exact(ready, plain, exact, draw(size))


@pytest.mark.gpu
def test_padded_on_the_gpu():
    model = on_gpu()
    exact = copy.deepcopy(model).double()
    plain, padded = Predictor(model), Predictor(model, bucket=32)
    for size in ODD_SIZES + ADE_SIZES:
        images = draw(size)
        assert_as_exact(padded, plain, exact, images, other=pad(images, 32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_held_to_fp64_on_the_gpu(dtype):
    """The comparison itself, on a CPU; a network whose weights are a little off does not pass."""
    model, images = network(), draw((33, 65))
    exact = copy.deepcopy(model).double()
    plain, ready = Predictor(model, dtype=dtype), Predictor(model, dtype=dtype, bucket=32)
    assert_as_exact(ready, plain, exact, images, other=pad(images, 32))
    off = copy.deepcopy(model)
    off.backbone.layer1[0].conv1.weight.data *= 1 + (1e-4 if dtype == torch.float32 else 0.1)
    with pytest.raises(AssertionError):
        assert_as_exact(Predictor(off, dtype=dtype), plain, exact, images)
