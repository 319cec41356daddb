"""A plugin of pytest for a machine that may be gone any moment: failures are written as they come.

python -m pytest -p benchmarks.watch --failed failed.txt --junitxml junit.xml tests

A test that fails is printed with its traceback at once and its name appended to `--failed`; the
JUnit file is written again every few seconds, as pytest itself does only at its end. A worker of
xdist whose GPU answers no more after a failed test ends, so that the next tests get a new one.
`--again` runs only the tests that such a list names.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

EVERY = 3  # seconds between two JUnit files
LENGTH = 6000  # characters of a traceback that are shown: its end says most


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("watch")
    group.addoption("--failed", type=Path, help="where names of failed tests are appended")
    group.addoption("--again", type=Path, help="a list of names: only these tests are run")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker())
    else:
        config.pluginmanager.register(Watch(config))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("again")
    if path is None:
        return
    names = set(path.read_text().splitlines())

    def is_listed(item: pytest.Item) -> bool:
        # a file that could not be read is listed as a whole
        return item.nodeid in names or item.nodeid.partition("::")[0] in names

    config.hook.pytest_deselected(items=[item for item in items if not is_listed(item)])
    items[:] = [item for item in items if is_listed(item)]


class Watch:
    """Where all reports arrive."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.failed: Path | None = config.getoption("failed")
        self.written = time.monotonic()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.pytest_collectreport(report)
        if time.monotonic() - self.written > EVERY:
            self.written = time.monotonic()
            self._write_junit()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line(f"\n____ {report.nodeid}, {report.when}")
            terminal.write_line(report.longreprtext[-LENGTH:])
            if self.failed is not None:
                with self.failed.open("a") as file:
                    file.write(f"{report.nodeid}\n")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self.config.option.tbstyle = "no"  # all tracebacks were shown

    def _write_junit(self) -> None:
        for plugin in self.config.pluginmanager.get_plugins():
            if type(plugin).__name__ == "LogXML":
                final = plugin.logfile
                plugin.logfile = f"{final}.new"
                plugin.pytest_sessionfinish()
                Path(plugin.logfile).replace(final)
                plugin.logfile = final


class Worker:
    """In a process of xdist, which makes a new one where one ends."""

    failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = report.failed or self.failed

    def pytest_runtest_logfinish(self) -> None:
        if self.failed and gpu_is_lost():
            os._exit(1)
        self.failed = False


def gpu_is_lost() -> bool:
    """Whether an earlier error, such as an illegal address, left the process without its GPU."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
