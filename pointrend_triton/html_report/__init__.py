"""The report of an evaluation: one HTML page that needs no other file and no network."""

from pointrend_triton.html_report.examples import Example, collect
from pointrend_triton.html_report.page import write_report

__all__ = ["Example", "collect", "write_report"]
