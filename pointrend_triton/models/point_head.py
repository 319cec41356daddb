"""The point head: an MLP over fine features and coarse logits at points (PointRend section 3.3)."""

from __future__ import annotations

from torch import Tensor, nn

from pointrend_triton import ops
from pointrend_triton.config import PointHeadConfig
from pointrend_triton.models.fpn import ConvModule
from pointrend_triton.models.init import init_predictor


class PointHead(nn.Module):
    """The MLP's parameters, under mmsegmentation's names; `ops` computes with them."""

    def __init__(self, in_channels: int, num_classes: int, config: PointHeadConfig):
        super().__init__()
        self.config = config
        again = num_classes if config.coarse_each_layer else 0
        width = in_channels + num_classes
        fcs = []
        for _ in range(config.num_layers):
            fcs.append(ConvModule(width, config.channels, 1, kind=nn.Conv1d))
            width = config.channels + again
        self.fcs = nn.ModuleList(fcs)
        self.fc_seg = nn.Conv1d(width, num_classes, 1)
        init_predictor(self.fc_seg, std=0.001)

    def layers(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Weights and biases, hidden layers first, the predictor last."""
        names = [f"fcs.{i}.conv" for i in range(len(self.fcs))] + ["fc_seg"]
        weights = [self.get_parameter(f"{name}.weight") for name in names]
        return weights, [self.get_parameter(f"{name}.bias") for name in names]

    def select(self, coarse: Tensor) -> Tensor:
        """Coarse logits [N, C, H, W] -> the coordinates [N, P, 2] of a training step."""
        return ops.select_uncertain_points(
            coarse,
            self.config.num_points,
            oversample_ratio=self.config.oversample_ratio,
            importance_sample_ratio=self.config.importance_sample_ratio,
        )

    def forward(self, fine_map: Tensor, coarse: Tensor, coords: Tensor) -> Tensor:
        """Features [N, F, H, W] and logits [N, C, H, W] at coords [N, P, 2] -> logits [N, C, P]."""
        weights, biases = self.layers()
        return ops.point_head(
            fine_map,
            coarse,
            coords,
            weights,
            biases,
            coarse_each_layer=self.config.coarse_each_layer,
        )

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
        """The adaptive subdivision of `ops.refine` with this head's parameters.

        `steps` and `num_points` are by default as configured.
        """
        weights, biases = self.layers()
        return ops.refine(
            coarse,
            fine_map,
            weights,
            biases,
            steps=self.config.subdivision_steps if steps is None else steps,
            num_points=self.config.subdivision_num_points if num_points is None else num_points,
            coarse_each_layer=self.config.coarse_each_layer,
            output=output,
            image_size=image_size,
            size=size,
        )
