"""Previews for the page: what `preview` says, from a process that is given up when it does not come to an end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.services import previews
from app.services.previews import Previewer
from mole.config import RunConfig
from mole.core.errors import DataError, ModelError
from mole.preflight.preview import preview


@pytest.fixture(scope="module")
def previewer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Previewer]:
    """One process for all tests: it imports transformers for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(tmp_path_factory.mktemp("home")))
        previewer = Previewer()
        yield previewer
        previewer._child.kill()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Count to {number}.", "output": str(number)} for number in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(model: Path, data: Path) -> RunConfig:
    return RunConfig.from_dict({"model": {"name": str(model)}, "data": {"path": str(data)}})


def test_it_is_the_preview_itself(previewer: Previewer, tiny_folder: Path, data: Path) -> None:
    config = config_of(tiny_folder, data)
    assert previewer.preview(config, 3).to_dict() == preview(config, 3).to_dict()


def test_errors_keep_their_field_and_the_rejected_rows(previewer: Previewer, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "a", "output": null}\n{"instruction": "", "output": "b"}\n')
    with pytest.raises(DataError) as raised:
        previewer.preview(config_of(tiny_folder, path), 3)
    assert raised.value.field == "data.path" and [row.row for row in raised.value.rejected] == [1, 2]
    path.write_text('{"instruction": "a", "output": "b"}\n')
    with pytest.raises(ModelError):
        previewer.preview(config_of(tmp_path / "nowhere", path), 3)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 10 ** (10 ** 9) }}", "given up: it did not end within 3 s"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
    ],
)
def test_a_template_without_an_end_or_measure_is_given_up(
    previewer: Previewer, tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    template: str, message: str,
) -> None:  # fmt: skip
    previewer.preview(config_of(tiny_folder, data), 3)  # the process has its libraries
    monkeypatch.setattr(previews, "SECONDS", 3.0)
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(DataError, match=message):
        previewer.preview(config_of(model, data), 3)
    monkeypatch.setattr(previews, "SECONDS", 60.0)
    assert previewer.preview(config_of(tiny_folder, data), 3).used, "the next one is made"
