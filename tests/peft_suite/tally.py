"""The other half of the plug-in: the outcome of each test with its reason, and the tables at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from mole.core.errors import MoleError
from peft_suite.verdicts import REASONS, refusal

OUTCOMES = ("passed", "refused", "not applicable", "failed")
RESULTS: list[tuple[str, str, str]] = []
"""The router of each test that ran, its outcome, and the reason for the outcome."""
LEFT_OUT = Counter[str]()
"""How many cases are not collected."""


class Refused(pytest.skip.Exception):
    """MoLE refused on purpose what a test asks for."""


def router_of(item: pytest.Item) -> str:
    """The router that a test runs with; empty for none."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("router", "") if callspec else ""


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """Skip the rest of a test that is refused on purpose; as a failure, its traceback would take half a second."""
    try:
        return (yield)
    except MoleError as error:
        if what := refusal(error):
            raise Refused(what) from error
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note in the report of a test its router, its outcome and the reason, as in `RESULTS`."""
    report = yield
    outcome, reason = report.outcome, ""
    if report.skipped and call.excinfo:
        outcome = "refused" if isinstance(call.excinfo.value, Refused) else "not applicable"
        reason = str(call.excinfo.value)
    report.mole = (router_of(item), outcome, reason)
    return report


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or not report.passed:
        RESULTS.append(getattr(report, "mole", ("", report.outcome, "")))  # not there if the worker died


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    _, outcome, _ = getattr(report, "mole", ("", "", ""))
    return (outcome, outcome[0].upper(), outcome.upper()) if outcome in ("refused", "not applicable") else None


def unused_verdicts(config: pytest.Config) -> list[str]:
    """The reasons in `verdicts` that no test had, after a run of all tests."""
    return sorted(REASONS - {reason for _, _, reason in RESULTS}) if config.getoption("whole") else []


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = LEFT_OUT["cases"]
    if unused_verdicts(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    LEFT_OUT["cases"] = getattr(node, "workeroutput", {}).get("left_out", 0)  # all workers collect the same


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the counts by router, and the reasons."""
    terminalreporter.section("PEFT's tests with MoLE in place of LoRA")
    for line in [*table(), *reasons(), *(f"No test for: {reason}" for reason in unused_verdicts(config))]:
        terminalreporter.line(line)
    terminalreporter.line(f"{LEFT_OUT['cases']:7,} cases of other methods and of LoRA's variants are not collected.")


def table() -> Iterator[str]:
    """The results by router."""
    counts = Counter((router, outcome) for router, outcome, _ in RESULTS)
    counts.update(("all", outcome) for _, outcome, _ in RESULTS)
    yield f"{'router':12}" + "".join(f"{outcome:>16}" for outcome in OUTCOMES)
    for router in dict.fromkeys(router for router, _ in counts):
        yield f"{router:12}" + "".join(f"{counts[router, outcome]:16,}" for outcome in OUTCOMES)


def reasons() -> Iterator[str]:
    """How many tests there are for each reason."""
    counts = Counter((outcome, reason) for _, outcome, reason in RESULTS if reason)
    for (outcome, reason), number in sorted(counts.items(), key=lambda item: (item[0][0], -item[1])):
        yield f"{number:7,} {outcome}: {reason}"
