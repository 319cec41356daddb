"""PointRend: sharp semantic segmentation, refined point by point."""

from pointrend_triton.checkpoint import from_checkpoint, load_checkpoint
from pointrend_triton.models import build_model
from pointrend_triton.predictor import Predictor

__version__ = "0.1.0"
__all__ = ["Predictor", "build_model", "from_checkpoint", "load_checkpoint"]
