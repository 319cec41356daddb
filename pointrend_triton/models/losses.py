"""Cross entropy and accuracy over pixels or points, in the two published conventions."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255


def cross_entropy(logits: Tensor, labels: Tensor, average: str) -> Tensor:
    """Mean cross entropy in fp32; for C = 1, of the sigmoid against labels 0 and 1.

    Args:
        logits: [N, C, ...].
        labels: int64 [N, ...], 255 ignored.
        average: "all" divides by the number of all pixels (mmsegmentation), "valid" by that of the
            pixels not ignored (detectron2; zero where there is none).

    In a process group the mean of this over ranks, and so of its gradients, is that of the joined
    batch: under "all" if every rank has as many pixels, under "valid" always, and there every rank
    has to call it.
    """
    valid = labels != IGNORE
    if logits.shape[1] == 1:
        target = labels.clamp(max=1).float()
        losses = F.binary_cross_entropy_with_logits(logits[:, 0].float(), target, reduction="none")
        losses = losses.masked_fill(~valid, 0)
    else:
        losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    count = labels.numel() if average == "all" else _valid_per_rank(valid)
    return losses.sum() / count


def _valid_per_rank(valid: Tensor) -> Tensor:
    """The number of true elements, at least 1; in a process group the mean of it over ranks."""
    count = valid.sum()
    if not dist.is_initialized():
        return count.clamp(min=1)
    dist.all_reduce(count)
    return count.clamp(min=1) / dist.get_world_size()


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The percentage of pixels not ignored whose class is right (or ties); 0 of none."""
    valid = labels != IGNORE
    if logits.shape[1] == 1:
        right = (logits[:, 0] > 0) == labels
    else:  # amax and gather: argmax over classes is many times slower on a CPU
        target = labels.masked_fill(~valid, 0).unsqueeze(1)
        right = logits.gather(1, target)[:, 0] == logits.amax(dim=1)
    return 100 * (right & valid).sum() / valid.sum().clamp(min=1)
