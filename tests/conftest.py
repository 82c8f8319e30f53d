"""What all tests share: where the repository is, one core for each worker, and that CI does not pass by skipping."""

import os
from pathlib import Path

import pytest

ALLOWED_SKIPS = ("needs ../shared", "needs CUDA")

FIRST = "tests/e2e"
"""Starts first because it takes longest, and stays with one worker because its files share a demo."""
SHARED = {"demo": FIRST, "runs": "runs", "undisturbed": "undisturbed"}
"""Fixtures that several files use: these files go to one worker, which makes them once."""

os.environ |= {"COMET_DISABLE_AUTO_LOGGING": "1", "COMET_ERROR_TRACKING_ENABLE": "false"}  # TRL imports it too


def pytest_configure(config: pytest.Config) -> None:
    """Give each worker, with all the processes that it starts, a core of its own: threads that share one collapse."""
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file stays together, so that its fixtures are made once; the longest comes first."""
    group = {item.nodeid.partition("::")[0]: item.nodeid.partition("::")[0] for item in items}
    for item in items:
        for fixture in SHARED.keys() & set(getattr(item, "fixturenames", ())):
            group[item.nodeid.partition("::")[0]] = SHARED[fixture]
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group[item.nodeid.partition("::")[0]]))
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parents[1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """In CI a skipped test is a failed one, except where it needs what CI may lack."""
    report = yield
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(ALLOWED_SKIPS):
            report.outcome, report.longrepr = "failed", f"skipped in CI: {reason}"
    return report
