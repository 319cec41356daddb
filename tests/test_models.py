"""The network: sizes, initialisation, losses, modes and precisions."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pointrend_triton import build_model, ops
from pointrend_triton.config import Config, ModelConfig, PointHeadConfig
from pointrend_triton.models import PointRend
from pointrend_triton.models.coarse_head import CoarseHead
from pointrend_triton.models.fpn import FPN
from pointrend_triton.models.losses import accuracy, cross_entropy
from pointrend_triton.models.point_head import PointHead
from pointrend_triton.models.resnet import BasicBlock, Bottleneck

SMALL_HEAD = PointHeadConfig(channels=8, num_points=16, subdivision_num_points=30)


def small(classes=5, point_head=SMALL_HEAD, **fields):
    fields = {"depth": 18, "base_channels": 8, "fpn_channels": 8, "head_channels": 8, **fields}
    return PointRend(ModelConfig(num_classes=classes, point_head=point_head, **fields))


def lively(model):
    """As after training: blocks that are not the identity, logits that are not all but zero."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for name, parameter in model.named_parameters():
        if "seg.weight" in name:
            nn.init.normal_(parameter)
    return model


def draw(classes=5, size=(37, 50), batch=2):
    labels = torch.randint(0, max(classes, 2), (batch, *size))
    labels[:, :5] = 255
    return torch.randn(batch, 3, *size), labels


@pytest.mark.parametrize("size", [(1, 1), (32, 64), (37, 50)])
@torch.no_grad()
def test_sizes(size):
    model, images = small().eval(), torch.randn(2, 3, *size)
    for level, feature in enumerate(model.features(images)):
        stride = 4 * 2**level
        assert feature.shape == (2, 8, *(math.ceil(side / stride) for side in size))
    assert model.coarse(images).shape == (2, 5, *(math.ceil(side / 4) for side in size))
    assert model(images).shape == (2, 5, *size)
    assert model.predict(images).shape == (2, *size)
    assert model.predict(images, size=(9, 70)).shape == (2, 9, 70)


def close_to_normal(tensor, std):
    """The sample's deviation and mean, within five of their standard errors."""
    count = tensor.numel()
    assert tensor.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * count))
    assert abs(tensor.mean().item()) < 5 * std / math.sqrt(count)


def test_initialisation_of_the_heads():
    """As mmsegmentation 0.6.0 drew the published runs."""
    neck = FPN([256, 512, 1024, 2048])
    for conv in neck.lateral_convs:
        close_to_normal(conv.conv.weight, math.sqrt(2 / 256))
    assert neck.lateral_convs[3].conv.weight.std().item() == pytest.approx(0.088, abs=5e-4)
    for conv in neck.fpn_convs:
        close_to_normal(conv.conv.weight, math.sqrt(2 / (256 * 9)))
    coarse = CoarseHead(256, 128, 19)
    close_to_normal(coarse.conv_seg.weight, 0.01)
    close_to_normal(coarse.scale_heads[3][4].conv.weight, math.sqrt(2 / (128 * 9)))
    points = PointHead(256, 19, PointHeadConfig())
    close_to_normal(points.fc_seg.weight, 0.001)
    for fc in points.fcs:
        close_to_normal(fc.conv.weight, math.sqrt(2 / 256))
    for module in (neck, coarse, points):
        assert not any(value.any() for name, value in module.named_parameters() if "bias" in name)


@pytest.mark.parametrize(("depth", "kind"), [(18, BasicBlock), (50, Bottleneck)])
def test_initialisation_of_the_backbone(depth, kind):
    backbone = small(depth=depth, base_channels=16).backbone
    blocks = [module for module in backbone.modules() if isinstance(module, kind)]
    assert len(blocks) == {18: 8, 50: 16}[depth]
    last = {block.bn2 if kind is BasicBlock else block.bn3 for block in blocks}
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(0 if module in last else 1).all()
            assert not module.bias.any()
        elif isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            close_to_normal(module.weight, math.sqrt(2 / fan_out))


def test_build_model():
    config = Config(model=small().config)
    assert build_model(config).config == config.model
    assert build_model("shapes_r18").config.depth == 18
    mapping = {"model": {"depth": 18, "num_classes": 3, "base_channels": 8}}
    assert build_model(mapping).coarse_head.conv_seg.out_channels == 3


def test_without_point_head():
    model, (images, labels) = lively(small(point_head=None)), draw()
    assert model.point_head is None
    assert not any("decode_head.1" in name for name in model.state_dict())
    assert model.coarse_head.scale_heads[0][0].bn.momentum == 0.1
    losses = model(images, labels)
    assert set(losses) == {"loss", "loss_coarse", "acc_coarse"}
    assert torch.equal(losses["loss"], losses["loss_coarse"])
    model.eval()
    with torch.no_grad():
        expected = F.interpolate(model.coarse(images), (37, 50), mode="bilinear")
        assert torch.equal(model(images), expected)
        assert torch.equal(model.predict(images).long(), expected.argmax(1))
        trace = model.refine_trace(images)
    assert trace["points"] == []
    assert torch.equal(trace["refined"], expected)


def explicit_loss(logits, labels, average):
    """Pixel by pixel in fp64."""
    losses, valid = 0.0, 0
    for image, label in zip(logits.double().flatten(2), labels.flatten(1), strict=True):
        for pixel, wanted in zip(image.T, label.tolist(), strict=True):
            if wanted == 255:
                continue
            valid += 1
            if len(pixel) == 1:
                chance = 1 / (1 + math.exp(-pixel.item()))
                losses -= math.log(chance if wanted else 1 - chance)
            else:
                losses += (pixel.logsumexp(0) - pixel[wanted]).item()
    return losses / (labels.numel() if average == "all" else max(valid, 1))


@pytest.mark.parametrize("average", ["all", "valid"])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_cross_entropy(classes, average):
    logits, (_, labels) = torch.randn(2, classes, 7, 6), draw(classes, (7, 6))
    ours = cross_entropy(logits, labels, average)
    assert ours.item() == pytest.approx(explicit_loss(logits, labels, average), rel=1e-5)
    assert cross_entropy(logits.bfloat16(), labels, average).dtype == torch.float32
    points = cross_entropy(logits.flatten(2), labels.flatten(1), average)
    torch.testing.assert_close(points, ours)


@pytest.mark.parametrize("classes", [1, 4])
def test_half_ignored_is_half_the_mean(classes):
    logits, (_, labels) = torch.randn(2, classes, 8, 6), draw(classes, (8, 6))
    labels[:, :4], labels[:, 4:] = 255, labels[:, 4:] % max(classes, 2)
    if classes == 1:
        mean = F.binary_cross_entropy_with_logits(logits[:, 0, 4:], labels[:, 4:].float())
    else:
        mean = F.cross_entropy(logits, labels, ignore_index=255)
    assert cross_entropy(logits, labels, "all").item() == pytest.approx(mean.item() / 2, rel=1e-6)
    assert cross_entropy(logits, labels, "valid").item() == pytest.approx(mean.item(), rel=1e-6)


@pytest.mark.parametrize("average", ["all", "valid"])
@pytest.mark.parametrize("classes", [1, 4])
def test_nothing_valid(classes, average):
    logits = torch.randn(1, classes, 3, 3, requires_grad=True)
    labels = torch.full((1, 3, 3), 255)
    loss = cross_entropy(logits, labels, average)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
    assert accuracy(logits, labels).item() == 0


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_accuracy(classes):
    logits, (_, labels) = torch.randn(2, classes, 9, 6), draw(classes, (9, 6))
    predicted = (logits[:, 0] > 0).long() if classes == 1 else logits.argmax(1)
    valid = labels != 255
    expected = 100 * (predicted[valid] == labels[valid]).double().mean().item()
    assert accuracy(logits, labels).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("average", ["all", "valid"])
@pytest.mark.parametrize("classes", [1, 5])
def test_losses_of_a_step(classes, average):
    """Both losses from their definition, with the points that the same seed gives."""
    model = lively(small(classes, loss_average=average, coarse_bn_updates=1))
    images, labels = draw(classes)
    torch.manual_seed(1)
    losses = model(images, labels)
    assert torch.equal(losses["loss"], losses["loss_coarse"] + losses["loss_point"])
    pyramid = model.features(images)
    coarse = model.coarse_head(pyramid)
    torch.manual_seed(1)
    coords = ops.select_uncertain_points(coarse, 16)
    dense = F.interpolate(coarse, (37, 50), mode="bilinear")
    # labels at points: the pixel that the point falls into
    column, row = (coords * torch.tensor([50, 37])).long().unbind(2)
    point_labels = torch.stack([labels[i, row[i], column[i]] for i in range(2)])
    points = model.point_head(pyramid[0], coarse, coords)
    for name, logits, wanted in (("coarse", dense, labels), ("point", points, point_labels)):
        expected = explicit_loss(logits.detach(), wanted, average)
        assert losses[f"loss_{name}"].item() == pytest.approx(expected, rel=1e-5)
        assert losses[f"acc_{name}"].item() == pytest.approx(accuracy(logits, wanted).item())


def test_all_labels_ignored():
    losses = small(loss_average="valid")(draw()[0], torch.full((2, 37, 50), 255))
    losses["loss"].backward()
    assert losses["loss"].item() == 0


@pytest.mark.parametrize("part", ["loss_coarse", "loss_point"])
def test_gradients_reach_everything_before(part):
    """The point loss goes through the coarse logits; the coarse loss not through the points."""
    model = lively(small())
    model(*draw())[part].backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    # a convolution's weights, since a bias or a dead channel may have no gradient
    weights = {n for n, p in model.named_parameters() if p.dim() > 1}
    if part == "loss_coarse":
        weights = {name for name in weights if not name.startswith("decode_head.1.")}
        assert not any(name.startswith("decode_head.1.") for name in touched)
    assert weights <= touched


@torch.no_grad()
def test_double_update_is_running_the_head_twice():
    """In place of mmsegmentation's second pass of the coarse head."""
    twice = lively(small(coarse_bn_updates=1)).double()
    ours = small(coarse_bn_updates=2).double()
    ours.load_state_dict(twice.state_dict())
    images, labels = draw()
    for _ in range(2):  # the second time, the averages do not start from their first values
        ours(images.double(), labels)
        twice(images.double(), labels)
        backbone = copy.deepcopy(twice.backbone.state_dict())
        twice.coarse(images.double())
        twice.backbone.load_state_dict(backbone)
    assert ours.coarse_head.scale_heads[3][4].bn.num_batches_tracked == 4
    assert ours.backbone.stem[1].num_batches_tracked == 2
    expected = twice.state_dict()
    for name, value in ours.state_dict().items():
        assert (value - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name


def test_single_update():
    model = small(coarse_bn_updates=1)
    model(*draw())
    assert model.coarse_head.scale_heads[0][0].bn.num_batches_tracked == 1
    assert model.coarse_head.scale_heads[0][0].bn.momentum == pytest.approx(0.1)


def test_binary_model_learns():
    """One logit: bright pixels are the object."""
    head = PointHeadConfig(channels=8, num_points=64, subdivision_num_points=50)
    model = small(1, head)
    images = torch.randn(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    images = images.expand(-1, 3, -1, -1).contiguous()
    labels = (images[:, 0] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    history = []
    for _ in range(12):
        losses = model(images, labels)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append(losses["loss"].item())
    assert history[-1] < 0.8 * history[0]
    assert losses["acc_coarse"] > 70


@pytest.mark.parametrize("classes", [1, 5])
@torch.no_grad()
def test_predict_and_trace_agree_with_forward(classes):
    model, (images, _) = lively(small(classes)).eval(), draw(classes)
    logits = model(images)
    argmax = logits[:, 0] > 0 if classes == 1 else logits.argmax(1)
    labels = model.predict(images)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), argmax.long())
    resized = F.interpolate(logits, (20, 80), mode="bilinear")
    argmax = resized[:, 0] > 0 if classes == 1 else resized.argmax(1)
    assert torch.equal(model.predict(images, (20, 80)).long(), argmax.long())
    trace = model.refine_trace(images)
    assert torch.equal(trace["refined"], logits)
    assert torch.equal(trace["coarse"], model.coarse(images))
    assert [coords.shape for coords in trace["points"]] == [(2, 30, 2), (2, 30, 2)]
    for coords in trace["points"]:
        assert coords.min() > 0
        assert coords.max() < 1


@torch.no_grad()
def test_number_of_steps():
    for steps in (0, 3):
        head = PointHeadConfig(channels=8, subdivision_steps=steps, subdivision_num_points=30)
        model, (images, _) = lively(small(point_head=head)).eval(), draw()
        assert model(images).shape == (2, 5, 37, 50)
        assert len(model.refine_trace(images)["points"]) == steps
        if steps == 0:
            expected = F.interpolate(model.coarse(images), (37, 50), mode="bilinear")
            assert torch.equal(model(images), expected)


def test_what_forward_refuses():
    model, (images, labels) = small(), draw()
    with pytest.raises(ValueError, match="labels are needed in training mode"):
        model(images)
    wrong = [images.byte(), images[:, :1], images[0], images[None]]
    for bad in wrong:
        with pytest.raises(ValueError, match="images must be normalised floating point"):
            model(bad, labels)
    for bad in (labels.int(), labels[:1], labels[:, :4], labels.unsqueeze(1)):
        with pytest.raises(
            ValueError, match=r"labels must be int64 \(2, 37, 50\) for these images"
        ):
            model(images, bad)
    model.eval()
    with pytest.raises(ValueError, match="labels are for training mode only"):
        model(images, labels)
    for call in (model, model.predict, model.coarse, model.refine_trace):
        with pytest.raises(ValueError, match=r"not torch.uint8 \(2, 3, 37, 50\)"):
            call(images.byte())


def test_autocast_step():
    model, batch = lively(small()), draw()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*batch)
    for name in ("loss", "loss_coarse", "loss_point"):
        assert losses[name].dtype == torch.float32
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_model_in_another_precision(dtype):
    model, (images, _) = lively(small()).eval().to(dtype), draw()
    logits = model(images.to(dtype))
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    labels = model.predict(images.to(dtype))
    assert labels.dtype == torch.uint8
    assert labels.shape == (2, 37, 50)


@torch.no_grad()
def test_channels_last():
    """The same up to how sums are ordered: as far from fp64 as the plain layout, twice at most."""
    model, (images, _) = lively(small()).eval(), draw()
    exact = copy.deepcopy(model).double().coarse(images.double())
    plain = (model.coarse(images) - exact).abs().max()
    model = model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    assert (model.coarse(images) - exact).abs().max() <= 2 * plain + 1e-6 * exact.abs().max()
    labels, argmax = model.predict(images), model(images).argmax(1)
    assert torch.equal(labels.long(), argmax)


@pytest.mark.slow
def test_torch_export():
    model, (images, _) = lively(small()).eval(), draw()
    exported = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        assert torch.equal(exported(images), model(images))
