"""The documents hold: their code runs, their commands and links exist, their messages are those of the program."""

from __future__ import annotations

import ast
import re
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, ROOT, Block, Reader, blocks, mole, mole_commands, prose

from mole.cli import parser
from mole.config import ROUTERS
from mole.core import checkpoint
from mole.mixture.routers import ROUTER_CLASSES
from mole.models import EMBEDDED

BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN = [block for block in BLOCKS if block.language in ("bash", "python") and not block.not_run]
PICTURES = sorted((ROOT / "assets" / "screenshots").glob("*.png"))
LINKED = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "RESULTS.md"]
TROUBLE = ROOT / "docs" / "troubleshooting.md"


# ---------------------------------------------------------------------------------------------------------
# Code


SAMPLES = {"skills_train.jsonl": 64, "skills_heldout.jsonl": 24}
"""The sample data, and how many of their rows a reader has while the model is tiny."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a reader stands: a folder with the sample data, as the root of the repository has it."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    return tmp_path


@pytest.fixture
def tiny_place(tmp_path: Path) -> Path:
    """A `place` with the first rows of the sample data."""
    (tmp_path / "assets" / "data").mkdir(parents=True)
    for name, count in SAMPLES.items():
        rows = (ROOT / "assets" / "data" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "assets" / "data" / name).write_text("".join(rows[:count]), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """The folder of a tiny model in the place of `smollm2-135m`; its tokenizer knows the words of the sample data."""
    from transformers import AutoModelForCausalLM

    lines = (ROOT / "assets" / "data" / "skills_train.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = tiny_tokenizer.train_new_from_iterator(lines, vocab_size=1200)
    config = tiny_model("llama", layers=1).config
    config.vocab_size = len(tokenizer)
    folder = tmp_path_factory.mktemp("models") / EMBEDDED
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / checkpoint.MANIFEST).write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def tiny_home(home: Path, stand_in: Path) -> Path:
    """A `home` where `smollm2-135m` is a tiny model: the same commands, in seconds."""
    (home / "models").mkdir()
    (home / "models" / EMBEDDED).symlink_to(stand_in, target_is_directory=True)
    return home


@pytest.fixture(autouse=True)
def no_more_routers() -> Iterator[None]:
    """A router that a page adds is gone afterwards."""
    before = [(table, dict(table)) for table in (ROUTERS, ROUTER_CLASSES)]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


def pages_of(found: list[Block]) -> list[str]:
    return list(dict.fromkeys(block.page for block in found))


@pytest.mark.parametrize("page", pages_of([block for block in RUN if not block.soak]))
def test_the_code_of_a_page_runs_from_top_to_bottom(page: str, tiny_home: Path, tiny_place: Path) -> None:
    reader = Reader(tiny_place)
    for block in RUN:
        if block.page == page and not block.soak:
            reader.run(block)


@pytest.mark.model
def test_the_python_example_of_the_readme_runs_with_the_embedded_model(embedded_home: Path, place: Path) -> None:
    example = next(block for block in RUN if block.page == "README.md" and "get_peft_model" in block.code)
    assert "torch.Size([" in Reader(place).run(example)
    assert (place / "my-adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.soak
@pytest.mark.model
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("page", pages_of(RUN))
def test_the_code_of_a_page_runs_with_the_embedded_model(page: str, embedded_home: Path, place: Path) -> None:
    reader = Reader(place)
    for block in RUN:
        if block.page == page:
            reader.run(block)


def test_a_block_that_fails_is_noticed(place: Path) -> None:
    reader = Reader(place)
    block = Block("docs/none.md", 1, "bash", "mole data check nowhere.jsonl\n", "", "")
    with pytest.raises(AssertionError, match="There is no file nowhere.jsonl"):
        reader.run(block)
    with pytest.raises(ZeroDivisionError):
        reader.run(block._replace(language="python", code="1 / 0"))


def test_code_is_marked_as_what_it_is() -> None:
    known = {"bash", "python", "text", "yaml", "jsonl", "bibtex", "json"}
    assert [f"{block.page}:{block.line}" for block in BLOCKS if block.language not in known] == []


@pytest.mark.parametrize(
    ("block", "words"),
    [(block, words) for block in BLOCKS if block.language == "bash" for words in mole_commands(block)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_documented_command_is_one(block: Block, words: list[str]) -> None:
    """Also those that are not run: the real parser takes their flags."""
    assert parser.build_parser().parse_args(words)


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.name)
def test_commands_within_sentences_exist(path: Path) -> None:
    for span in re.findall(r"`mole ([a-z][^`]*)`", prose(path)):
        words = re.match(r"(?:[a-z]+ ?)*", span)[0].split()[:2]  # type: ignore[index]
        answers = [mole([*words[:count], "--help"])[0] for count in range(len(words), 0, -1)]
        assert 0 in answers, f"{path.name}: mole {span}"
        known = mole([*words[: len(words) - answers.index(0)], "--help"])[1]
        for flag in re.findall(r"(?<!\S)--[a-z-]+", span):
            assert re.search(rf"{flag}\b", known), f"{path.name}: mole {span}"


# ---------------------------------------------------------------------------------------------------------
# Links and pictures


@cache
def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    texts = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.name)
def test_links_and_anchors_lead_somewhere(path: Path) -> None:
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"(?<![\w/])(assets/data/[\w.]+)", text):
        assert (ROOT / name).exists(), name


FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert pages - set(re.findall(r"\]\(([\w-]+\.md)", contents)) == set()


def test_every_screenshot_is_shown_and_has_words_for_those_who_do_not_see_it() -> None:
    shown = {}
    for path in PAGES:
        for words, link in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            shown[(path.parent / link).resolve()] = words
    assert set(PICTURES) - shown.keys() == set()
    assert [path.name for path, words in shown.items() if len(words.split()) < 5] == []


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_a_screenshot_is_small_and_as_wide_as_the_others(path: Path) -> None:
    head = path.read_bytes()[:24]
    assert path.stat().st_size <= 250_000
    assert struct.unpack(">I", head[16:20]) == (1280,)


# ---------------------------------------------------------------------------------------------------------
# Lengths


def test_the_readme_is_read_in_minutes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    assert len(text.split()) <= 1200


# ---------------------------------------------------------------------------------------------------------
# Messages


@cache
def messages() -> list[str]:
    """Every text in the program, with `…` in the place of each value."""
    found = []
    for path in [*ROOT.glob("mole/**/*.py"), *ROOT.glob("app/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted_messages() -> list[str]:
    """The messages that the page on troubleshooting quotes: the first cells of its tables."""
    return re.findall(r"^\| `([^`]+)` \|", TROUBLE.read_text(encoding="utf-8"), re.MULTILINE)


def is_said(quoted: str) -> bool:
    """Whether a text of the program has the quoted words, with anything in the places of `…`."""
    pattern = re.compile(".*".join(map(re.escape, quoted.split("…"))), re.DOTALL)
    return any(pattern.search(text) for text in messages())


@pytest.mark.parametrize("quoted", quoted_messages())
def test_a_quoted_message_is_one_of_the_program(quoted: str) -> None:
    words = quoted.replace("…", " ").split()
    assert len(words) > 2 and is_said(quoted)


def test_a_message_that_the_program_never_prints_is_noticed() -> None:
    assert not is_said("There is no fail …; give a … file or a hub id.")
