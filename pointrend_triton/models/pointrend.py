"""PointRend for semantic segmentation (arXiv 1912.08193), equal to mmsegmentation's models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointrend_triton import ops, reference
from pointrend_triton.config import ModelConfig
from pointrend_triton.models.coarse_head import CoarseHead
from pointrend_triton.models.fpn import FPN
from pointrend_triton.models.losses import accuracy, cross_entropy
from pointrend_triton.models.point_head import PointHead
from pointrend_triton.models.resnet import ResNetV1c


class PointRend(nn.Module):
    """Backbone, FPN, coarse head and point head; without point head it is Semantic FPN.

    Parameters carry mmsegmentation's names. Images are normalised float [B, 3, H, W] of any size.

    Attributes:
        config: the ModelConfig it was built from.
        classes, palette: names and RGB colours of the classes, where a checkpoint or data set gave
            them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.classes: tuple[str, ...] | None = None
        self.palette: list[list[int]] | None = None
        self.backbone = ResNetV1c(config.depth, config.base_channels)
        self.neck = FPN(self.backbone.out_channels, config.fpn_channels)
        bn_updates = 1 if config.point_head is None else config.coarse_bn_updates
        coarse_head = CoarseHead(
            config.fpn_channels, config.head_channels, config.num_classes, bn_updates
        )
        heads: list[nn.Module] = [coarse_head]
        if config.point_head is not None:
            heads.append(PointHead(config.fpn_channels, config.num_classes, config.point_head))
        self.decode_head = nn.ModuleList(heads)

    @property
    def coarse_head(self) -> CoarseHead:
        return self.decode_head[0]  # type: ignore[return-value]

    @property
    def point_head(self) -> PointHead | None:
        return self.decode_head[1] if len(self.decode_head) > 1 else None  # type: ignore[return-value]

    def features(self, images: Tensor) -> list[Tensor]:
        """Images -> the pyramid, four maps at strides 4, 8, 16, 32."""
        _check_images(images)
        return self.neck(self.backbone(images))

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        steps: int | None = None,
        num_points: int | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Training mode: losses of images and labels; evaluation mode: refined logits of images.

        Args:
            images: [B, 3, H, W].
            labels: int64 [B, H, W], 255 ignored; in training mode only.
            steps, num_points: as in `predict`; in evaluation mode only.

        Returns:
            training: scalars "loss" (the total), "loss_coarse", "loss_point", and the accuracies in
            percent "acc_coarse", "acc_point"; evaluation: logits [B, C, H, W].
        """
        if self.training:
            if labels is None:
                raise ValueError(
                    "labels are needed in training mode; call model.eval() for predictions"
                )
            if steps is not None or num_points is not None:
                raise ValueError("steps and num_points are for evaluation mode only")
            return self._losses(images, labels)
        if labels is not None:
            raise ValueError("labels are for training mode only; call model.train() for losses")
        fine_map, coarse = self.maps(images)
        return self.refine(
            fine_map, coarse, "logits", _size(images), steps=steps, num_points=num_points
        )

    def coarse(self, images: Tensor) -> Tensor:
        """The coarse logits [B, C, ceil(H / 4), ceil(W / 4)]."""
        return self.coarse_head(self.features(images))

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the refinement reads: features [B, F, h, w] and coarse logits [B, C, h, w].

        Both at stride 4: h = ceil(H / 4), w = ceil(W / 4).
        """
        pyramid = self.features(images)
        return pyramid[0], self.coarse_head(pyramid)

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        size: tuple[int, int] | None = None,
        *,
        steps: int | None = None,
        num_points: int | None = None,
    ) -> Tensor:
        """Class indices [B, h, w] at `size`, by default the input's.

        They are uint8 up to 256 classes, else int64; with one class, 1 where its logit is positive.
        `Predictor` does the same faster.

        Args:
            images: [B, 3, H, W].
            size: (height, width) of the result.
            steps: of subdivision; 0 enlarges the coarse logits without refining them. By default
                as configured.
            num_points: how many cells each step computes again; by default as configured.
        """
        fine_map, coarse = self.maps(images)
        return self.refine(
            fine_map, coarse, "labels", _size(images), size, steps=steps, num_points=num_points
        )

    @torch.no_grad()
    def refine_trace(
        self, images: Tensor, *, steps: int | None = None, num_points: int | None = None
    ) -> dict[str, Tensor | list[Tensor]]:
        """What the refinement did, for pictures; `steps` and `num_points` as in `predict`.

        Returns:
            "coarse" [B, C, h, w], "refined" logits at the input size, and "points": for each step
            the coordinates [B, k, 2] of the cells that were computed again.
        """
        fine_map, coarse = self.maps(images)
        refined, points = coarse, []
        if self.point_head is not None:
            weights, biases = self.point_head.layers()
            config = self.point_head.config
            for _ in range(config.subdivision_steps if steps is None else steps):
                refined, coords = reference.refine_step(
                    refined,
                    coarse,
                    fine_map,
                    weights,
                    biases,
                    num_points=config.subdivision_num_points if num_points is None else num_points,
                    coarse_each_layer=config.coarse_each_layer,
                )
                points.append(coords)
        return {
            "coarse": coarse,
            "refined": reference.resample(refined, _size(images)),
            "points": points,
        }

    def refine(
        self,
        fine_map: Tensor,
        coarse: Tensor,
        output: str,
        image_size: tuple[int, int],
        size: tuple[int, int] | None = None,
        *,
        steps: int | None = None,
        num_points: int | None = None,
    ) -> Tensor:
        """`maps` -> refined logits or labels: see `ops.refine`. No point head: enlarged only."""
        if self.point_head is not None:
            return self.point_head.refine(
                fine_map, coarse, output, image_size, size, steps=steps, num_points=num_points
            )
        if output == "labels":
            return ops.decode(coarse, image_size=image_size, size=size)
        return reference.resample(reference.resample(coarse, image_size), size)

    def _losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        _check_images(images)
        if labels.dtype != torch.int64 or labels.shape != (images.shape[0], *images.shape[2:]):
            raise ValueError(
                f"labels must be int64 {(images.shape[0], *images.shape[2:])} for these images, "
                f"not {labels.dtype} {tuple(labels.shape)}"
            )
        average = self.config.loss_average
        pyramid = self.features(images)
        coarse = self.coarse_head(pyramid)
        dense = F.interpolate(
            coarse.float(), size=labels.shape[1:], mode="bilinear", align_corners=False
        )
        losses = {
            "loss_coarse": cross_entropy(dense, labels, average),
            "acc_coarse": accuracy(dense, labels),
        }
        if self.point_head is not None:
            coords = self.point_head.select(coarse.detach())
            point_logits = self.point_head(pyramid[0], coarse, coords)
            point_labels = ops.point_sample(labels.unsqueeze(1), coords, mode="nearest")[:, 0]
            losses["loss_point"] = cross_entropy(point_logits, point_labels, average)
            losses["acc_point"] = accuracy(point_logits, point_labels)
        terms = [value for name, value in losses.items() if name.startswith("loss")]
        losses["loss"] = torch.stack(terms).sum()
        return losses


def _check_images(images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            "images must be normalised floating point [B, 3, H, W], "
            f"not {images.dtype} {tuple(images.shape)}"
        )


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]
