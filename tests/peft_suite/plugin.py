"""The pytest plug-in that runs PEFT's tests with MoLE in place of LoRA, once for each router, and counts the results.

What is not about LoRA, or about a variant of it such as DoRA, is not collected: cases with the config of another method
or with settings that only LoRA has, and tests that neither take configs nor make a `LoraConfig`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from importlib.machinery import ModuleSpec
from itertools import chain
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from mole.config import ROUTERS
from mole.core.errors import MoleError
from mole.mixture.model import PEFT_TYPE
from peft_suite.hub import make_hub
from peft_suite.stand_in import StandIn, Tuner, only_lora
from peft_suite.verdicts import REASONS, not_applicable, refusal

OUTCOMES = ("passed", "refused", "not applicable", "failed")
RESULTS: list[tuple[str, str, str]] = []
"""The router of each test that ran, its outcome, and the reason for the outcome."""
LEFT_OUT = Counter[str]()
"""How many cases are not collected."""


class Refused(pytest.skip.Exception):
    """MoLE refused on purpose what a test asks for."""


class Everything(dict[str, int]):
    """Every model counts as loaded before, so that the tests' `hub_online_once` does not go online."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--routers", default=",".join(ROUTERS), help="the routers to run the tests with")
    parser.addoption("--whole", action="store_true", help="fail if there is a verdict that no test needs")
    parser.addoption("--only", default="", help="a pattern of the names of the cases to run")


def pytest_configure(config: pytest.Config) -> None:
    """Put `StandIn` in place of LoRA before the tests are imported, and a stub in place of diffusers."""
    diffusers = ModuleType("diffusers")
    diffusers.__spec__ = ModuleSpec("diffusers", None)
    diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules["diffusers"] = diffusers
    peft.LoraConfig = StandIn
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = Tuner
    if not hasattr(config, "workerinput"):
        make_hub(Path(os.environ["HF_HUB_CACHE"]))
    importlib.import_module("peft_tests.testing_utils")._HUB_MODEL_ACCESSES = Everything()


def is_config(value: Any) -> bool:
    return isinstance(value, peft.PeftConfig) or (inspect.isclass(value) and issubclass(value, peft.PeftConfig))


def values_of(row: Any) -> tuple[Any, ...]:
    """The values of one case of a parametrised test."""
    return tuple(getattr(row, "values", row if isinstance(row, (tuple, list)) else (row,)))


def is_ours(value: Any) -> bool:
    """Whether a value in a case is neither the config of another method nor asks for a variant of LoRA."""
    if isinstance(value, StandIn):
        return not value.only_lora
    if isinstance(value, dict):
        return not only_lora(value)
    return value is StandIn or not is_config(value)


def names_used(code: CodeType) -> Iterator[str]:
    """The names that a function uses, functions inside it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_used(constant)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Leave out the cases of other methods and of LoRA's variants, and run those that stay once for each router."""
    marks = metafunc.definition.own_markers
    about_us = "LoraConfig" in names_used(metafunc.function.__code__)
    cases = kept_cases = 1
    for place, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        names, rows, *others = mark.args
        rows = list(rows)
        kept = [row for row in rows if all(map(is_ours, values_of(row)))]
        about_us = about_us or any(map(is_config, chain.from_iterable(map(values_of, kept))))
        cases, kept_cases = cases * len(rows), kept_cases * len(kept)
        marks[place] = pytest.mark.parametrize(names, kept, *others, **mark.kwargs).mark
    LEFT_OUT["cases"] += cases - kept_cases if about_us else cases
    if about_us and kept_cases:
        metafunc.parametrize("router", metafunc.config.getoption("routers").split(","), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that have no router, and mark those that do not apply."""
    only = re.compile(config.getoption("only"))
    chosen = [item for item in items if router_of(item) and only.search(item.name)]
    items[:] = chosen
    for item in chosen:
        if reason := not_applicable(item.nodeid):
            item.add_marker(pytest.mark.skip(reason=reason))


def router_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("router", "") if callspec else ""


@pytest.fixture(autouse=True)
def router(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the configs that a test makes have its router."""
    StandIn.router_in_turn = getattr(request, "param", "dynmole")
    yield


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
