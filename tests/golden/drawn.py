"""Weights, images, labels and points that anyone can draw again from a seed, so that none has to be
stored.

NumPy's legacy RandomState is used throughout: its streams are frozen, on every platform and in
every version.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def rng(name: str, seed: int) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode()))


def draw_state(state: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A state_dict of the same names and shapes, BatchNorm statistics too; logits of order 1."""
    # where a residual branch ends: small there, so that depth does not make activations explode
    ends = {name for name in state if name.endswith("bn3.weight")}
    ends |= {n for n in state if n.endswith("bn2.weight") and n.replace("bn2", "bn3") not in state}
    return {name: _draw_tensor(name, tensor, seed, name in ends) for name, tensor in state.items()}


def _draw_tensor(name: str, like: Tensor, seed: int, ends_branch: bool) -> Tensor:
    random, shape = rng(name, seed), tuple(like.shape)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    if name.endswith("running_var"):
        values = random.uniform(0.8, 1.2, shape)
    elif name.endswith(("running_mean", ".bias")):
        values = 0.1 * random.standard_normal(shape)
    elif len(shape) == 1:  # BatchNorm weight
        values = random.uniform(0.6, 1.4, shape) * (0.1 if ends_branch else 1.0)
    else:
        gain = 0.1 if "_seg" in name else 1.0 if "neck" in name else 2.0
        values = random.standard_normal(shape) * (gain / np.prod(shape[1:])) ** 0.5
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def draw_images(batch: int, size: tuple[int, int], seed: int) -> Tensor:
    """Normalised images [B, 3, H, W]: smooth patterns with noise, so that there are regions."""
    random, (height, width) = rng("images", seed), size
    small = random.uniform(-2, 2, (batch, 3, max(height // 16, 2), max(width // 16, 2)))
    smooth = torch.nn.functional.interpolate(
        torch.from_numpy(small), size=size, mode="bilinear", align_corners=False
    )
    return (smooth + torch.from_numpy(random.uniform(-0.3, 0.3, smooth.shape))).float()


def draw_labels(batch: int, size: tuple[int, int], num_classes: int, seed: int) -> Tensor:
    """Blocks of classes, int64 [B, H, W]; one block in ten is to be ignored (255)."""
    random, (height, width) = rng("labels", seed), size
    blocks = random.randint(0, num_classes, (batch, -(-height // 12), -(-width // 12)))
    blocks[random.uniform(size=blocks.shape) < 0.1] = 255
    return torch.from_numpy(
        blocks.repeat(12, axis=1).repeat(12, axis=2)[:, :height, :width].copy()
    ).long()


def draw_points(batch: int, counts: tuple[int, ...], seed: int) -> list[Tensor]:
    """The draws of one training step in their order, fp32 [B, count, 2] in [0, 1)."""
    random = rng("points", seed)
    return [
        torch.from_numpy(random.random_sample((batch, count, 2)).astype(np.float32))
        for count in counts
    ]
