"""The public names of the library: programs import these, so they stay."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import mole

PUBLIC = {
    "mole": ["MoleConfig", "Routing", "auxiliary_loss", "build_router", "record_routing", "steer"],
    "mole.mixture": [
        "MoleConfig", "MoleLinear", "Routing", "Steering", "auxiliary_loss", "build_router", "record_routing", "steer",
    ],
}  # fmt: skip


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_these(package: str) -> None:
    assert sorted(importlib.import_module(package).__all__) == PUBLIC[package]


@pytest.mark.parametrize(("package", "name"), [(package, name) for package, names in PUBLIC.items() for name in names])
def test_a_public_name_can_be_imported_and_is_the_same_in_both_packages(package: str, name: str) -> None:
    found = getattr(importlib.import_module(package), name)
    assert callable(found) and getattr(mole, name, found) is found


@pytest.mark.parametrize("name", mole.__all__)
def test_a_public_name_can_be_the_first_thing_that_a_program_imports(name: str) -> None:
    """Importing PEFT imports the tuner: whichever module begins, none is met half-made."""
    code = f"from mole import {name}; assert {name}.__doc__"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Mixture'"):
        _ = mole.Mixture
    assert not hasattr(mole.mixture, "Mixture")
