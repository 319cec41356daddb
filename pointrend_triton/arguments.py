"""What the commands share in reading their arguments."""

from __future__ import annotations

import argparse


class UsageError(ValueError):
    """Arguments that do not fit each other or the files they name."""


def positive(text: str) -> int:
    """A type of `argparse`: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)
