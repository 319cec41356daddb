"""Imported once by the process that compiles are forked from: what each would do anew."""

import torch  # noqa: F401
import tqdm  # noqa: F401
from triton.runtime.cache import triton_key

from pointrend_triton import library  # noqa: F401

triton_key()  # a hash of the whole of Triton, which takes longer than a small kernel
