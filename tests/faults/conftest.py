"""What the tests of faults have reached, told in one table at the end: `pytest tests/faults -m "slow or not slow"`."""

from collections import Counter
from collections.abc import Callable

import pytest


@pytest.fixture
def figure(record_property) -> Callable[..., None]:
    """figure(what, count) adds to a line of the table, if the test passes."""
    return lambda what, count=1: record_property("figure", [what, count])


def pytest_terminal_summary(terminalreporter) -> None:
    totals: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        if report.when == "call":
            for what, count in (value for name, value in report.user_properties if name == "figure"):
                totals[what] += count
    if totals:
        terminalreporter.section("figures of the faults")
        for what, count in sorted(totals.items()):
            terminalreporter.write_line(f"{count:>6}  {what}")
