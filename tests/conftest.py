"""What all tests share: where the repository is, one core for each worker, and that CI does not pass by skipping."""

import os
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ALLOWED_SKIPS = (
    "needs ../shared",
    "needs CUDA",
    "needs scripts/setup-vllm",
    "needs the right to mount",
    "needs Slurm's daemons and root",
)

LONGEST = "tests/e2e/"
TOGETHER = ("tests/e2e/", "tests/conf/", "tests/faults/")
"""Directories whose files share a fixture that takes long: they go to one worker, which makes it once."""
ALONE = tuple(
    f"tests/e2e/test_{name}.py"
    for name in ("bench", "chat", "detached", "litserve", "parity", "ranks", "ray", "slurm", "sweeps", "vllm")
)
"""Those that do not share it."""

os.environ |= {"COMET_DISABLE_AUTO_LOGGING": "1", "COMET_ERROR_TRACKING_ENABLE": "false"}  # TRL imports it too


def pytest_configure(config: pytest.Config) -> None:
    """Give each worker, with all the processes that it starts, a core of its own: threads that share one collapse."""
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker ends with it alone."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


class Together(LoadScopeScheduling):
    """A file's tests go to one worker, and those of a directory in `TOGETHER` too, but for files that are `ALONE`."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(ALONE):
            return nodeid.partition("::")[0]
        return next((place for place in TOGETHER if nodeid.startswith(place)), nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the tables of kills (tests/faults), here because this process loads no other conftest where workers run."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    calls = [report for report in reports if getattr(report, "when", None) == "call"]
    properties = [entry for report in calls for entry in report.user_properties]
    for lines in (value for name, value in properties if name == "kills"):
        terminalreporter.section("kills")
        terminalreporter.write("\n".join(lines) + "\n")
