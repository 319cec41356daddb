"""A test that does not end is named, whatever it is busy with, and one that fails fails soon."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TESTS = Path(__file__).resolve().parent
CONFTEST = """
import pytest
import time_limit

time_limit.SECONDS, time_limit.SLOW, time_limit.GRACE = 1.0, 60.0, 1.0


def pytest_addoption(parser):
    parser.addoption("--time-limit", type=float)


def pytest_configure(config):
    config.pluginmanager.register(time_limit)
    for mark in ("slow", "timeout"):
        config.addinivalue_line("markers", mark)


@pytest.fixture
def endless():
    while True:
        pass


@pytest.fixture
def endless_after():
    yield
    while True:
        pass
"""
SUITE = """
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def test_before():
    pass


def test_in_python():
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass


def test_setup(endless):
    pass


def test_teardown(endless_after):
    pass


@settings(deadline=None)
@given(st.integers())
def test_property(number):
    while True:
        pass


@pytest.mark.timeout(0.2)
def test_marked():
    time.sleep(30)


@pytest.mark.slow
def test_slow():
    time.sleep(1.1)


def test_after():
    time.sleep(0.01)
"""
IN_C = """
import itertools


def test_before():
    pass


def test_in_c():
    sum(itertools.repeat(0))


def test_behind():
    pass
"""


def run(folder, *arguments):
    """What pytest printed, and the names of tests by how they ended."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(TESTS), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    ends = re.findall(r"^(FAILED|ERROR|PASSED) \S+::(\w+)(?: - (.*))?$", ran.stdout, re.MULTILINE)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    return ran, {(how, name): why for how, name, why in ends}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_endless.py").write_text(SUITE)
    return tmp_path


@pytest.mark.slow
def test_what_does_not_end_is_named(folder):
    _, ends = run(folder)
    assert ends == {
        ("PASSED", "test_before"): "",
        ("FAILED", "test_in_python"): "time_limit.TimeIsUp: more than 1 s",
        ("ERROR", "test_setup"): "time_limit.TimeIsUp: more than 1 s",
        ("PASSED", "test_teardown"): "",
        ("ERROR", "test_teardown"): "time_limit.TimeIsUp: more than 1 s",
        ("FAILED", "test_property"): "time_limit.TimeIsUp: more than 1 s",
        ("FAILED", "test_marked"): "time_limit.TimeIsUp: more than 0.2 s",
        ("PASSED", "test_slow"): "",
        ("PASSED", "test_after"): "",
    }


@pytest.mark.slow
def test_one_limit_for_all(folder):
    _, ends = run(folder, "--time-limit", "0.5", "-k", "slow or marked or after")
    assert set(ends) == {
        ("FAILED", "test_marked"), ("FAILED", "test_slow"), ("PASSED", "test_after")
    }  # fmt: skip
    assert set(ends.values()) == {"time_limit.TimeIsUp: more than 0.5 s", ""}


@pytest.mark.slow
def test_a_loop_in_c_ends_the_process_and_is_named(folder):
    (folder / "test_endless.py").write_text(IN_C)
    ran, _ = run(folder)
    assert re.search(r'File ".*test_endless.py", line \d+ in test_in_c', ran.stderr), ran.stderr
    ran, ends = run(folder, "-n", "2", "--dist", "loadfile")
    assert set(ends) == {
        ("PASSED", "test_before"), ("FAILED", "test_in_c"), ("PASSED", "test_behind")
    }  # fmt: skip
    assert "crashed while running 'test_endless.py::test_in_c'" in ran.stdout
    assert "it ended the process that ran it" in ran.stdout
    assert "1 failed, 2 passed, 1 skipped" in ran.stdout


@pytest.mark.parametrize("profile", ["pointrend", "shrink"])
def test_only_the_profile_that_says_so_shrinks(profile):
    found = []

    @settings(settings.get_profile(profile), database=None)
    @given(st.lists(st.integers(0, 100), min_size=9))
    def fails(numbers):
        if sum(numbers) > 50:
            found.append(numbers)
            raise AssertionError

    with pytest.raises(AssertionError):
        fails()
    assert len(found) == 2 if profile == "pointrend" else len(found) > 10  # found, and run again
