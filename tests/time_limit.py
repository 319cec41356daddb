"""A time limit for every test: one that exceeds it fails by its name, and the others go on.

pytest-timeout is not used because a machine with a GPU, where an endless loop costs most, may have
no way to install it.
"""

import faulthandler
import os
import signal
import sys
import tempfile
from collections.abc import Generator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

SECONDS, SLOW = 120.0, 600.0  # tests marked slow take SLOW; both leave room for a busy machine
GRACE = 15.0

_stderr = pytest.StashKey[int]()
_started = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


class TimeIsUp(BaseException):
    """No Exception: tests, what they test, and hypothesis catch those, and would go on."""


def pytest_configure(config: pytest.Config) -> None:
    assert sys.__stderr__ is not None
    config.stash[_stderr] = os.dup(sys.__stderr__.fileno())  # the real one: capture comes later


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[_stderr])
    if _started in config.stash:
        config.stash[_started].cleanup()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Of pytest-xdist: gives a worker the folder where all of them note what they started."""
    folder = node.config.stash.setdefault(_started, tempfile.TemporaryDirectory())
    node.workerinput["started"] = folder.name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """xdist gives the next worker the rest of a file, with the test that ended the last one."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    name = sha256(item.nodeid.encode()).hexdigest()
    note = Path(item.config.workerinput["started"]) / name
    if note.exists():
        item.add_marker(pytest.mark.skip(reason="it ended the process that ran it"))
    note.touch()
    result = yield
    note.unlink()
    return result


def seconds(item: pytest.Item) -> float:
    """Of setup, call and teardown each: --time-limit, else what `timeout` says, else the mark."""
    marker = item.get_closest_marker("timeout")
    own = marker.args[0] if marker else SLOW if item.get_closest_marker("slow") else SECONDS
    return float(item.config.getoption("time_limit") or own)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _limited(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _limited(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    return (yield from _limited(item))


def _limited(item: pytest.Item) -> Generator[None, object, object]:
    if item.config.getoption("usepdb"):
        return (yield)
    limit = seconds(item)

    def stop(*_: object) -> None:
        raise TimeIsUp(f"more than {limit:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    # again after a while: where nothing can be raised, as in __del__, the first one is lost
    signal.setitimer(signal.ITIMER_REAL, limit, GRACE / 2)
    # a loop in C, or a GPU that is waited for, hears no signal: end the process, say where it was
    faulthandler.dump_traceback_later(limit + GRACE, exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
