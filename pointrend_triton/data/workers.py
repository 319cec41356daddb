"""How the worker processes of a loader behave."""

from __future__ import annotations

import signal

import cv2
import torch


def one_thread(worker: int) -> None:
    """PyTorch's `worker_init_fn` for loaders of pictures."""
    # one process per worker is the parallelism; OpenCV's own threads would fight over the cores
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group; the main process decides when the workers end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
