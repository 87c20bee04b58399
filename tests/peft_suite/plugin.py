"""The pytest plug-in that runs PEFT's tests with MoLE in place of LoRA, once for each router.

What is not about LoRA, or about a variant of it such as DoRA, is not collected: cases with the config of another method
or with settings that only LoRA has, and tests that neither take configs nor make a `LoraConfig`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from itertools import chain
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from mole.config import ROUTERS
from mole.mixture.model import PEFT_TYPE
from peft_suite.hub import make_hub
from peft_suite.stand_in import StandIn, Tuner, only_lora
from peft_suite.tally import LEFT_OUT, router_of
from peft_suite.verdicts import not_applicable

pytest_plugins = ["peft_suite.tally"]


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


@pytest.fixture(autouse=True)
def router(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the configs that a test makes have its router."""
    StandIn.router_in_turn = getattr(request, "param", "dynmole")
    yield
