"""Data for the page: what the library says, from a process that is given up when it does not come to an end."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from mole.config import RunConfig
from mole.core.errors import DataError, ModelError
from mole.data import read_columns
from mole.preflight import data_process
from mole.preflight.data_process import check_inputs, columns_of, preview_of
from mole.preflight.preview import preview


@pytest.fixture(scope="module", autouse=True)
def one_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For all tests, so that they share the processes, one of which imports transformers for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(tmp_path_factory.mktemp("home")))
        yield
        data_process.PREVIEWS.end()
        data_process.COLUMNS.end()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Count to {number}.", "output": str(number)} for number in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hostile_model(model: Path, folder: Path, template: str) -> Path:
    """A copy of a model with another chat template."""
    shutil.copytree(model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def config_of(model: Path, data: Path) -> RunConfig:
    return RunConfig.from_dict({"model": {"name": str(model)}, "data": {"path": str(data)}})


def test_it_is_the_preview_itself(tiny_folder: Path, data: Path) -> None:
    config = config_of(tiny_folder, data)
    assert preview_of(config, 3).to_dict() == preview(config, 3).to_dict()


def test_errors_keep_their_field_and_the_rejected_rows(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "a", "output": null}\n{"instruction": "", "output": "b"}\n')
    with pytest.raises(DataError) as raised:
        preview_of(config_of(tiny_folder, path), 3)
    assert raised.value.field == "data.path" and [row.row for row in raised.value.rejected] == [1, 2]
    path.write_text('{"instruction": "a", "output": "b"}\n')
    with pytest.raises(ModelError):
        preview_of(config_of(tmp_path / "nowhere", path), 3)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 10 ** (10 ** 9) }}", "given up: it did not end within 3 s"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
    ],
)
def test_a_template_without_an_end_or_measure_is_given_up(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    template: str, message: str,
) -> None:  # fmt: skip
    preview_of(config_of(tiny_folder, data), 3)  # the process has its libraries
    monkeypatch.setattr(data_process, "PREVIEW_SECONDS", 3.0)
    model = hostile_model(tiny_folder, tmp_path / "model", template)
    with pytest.raises(DataError, match=message):
        preview_of(config_of(model, data), 3)
    monkeypatch.setattr(data_process, "PREVIEW_SECONDS", 60.0)
    assert preview_of(config_of(tiny_folder, data), 3).used, "the next one is made"


def test_columns_come_while_a_preview_hangs(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    assert columns_of(str(data)) == read_columns(str(data)) == ("instruction", "output")
    with pytest.raises(DataError, match="columns; the maximum is"):
        wide = tmp_path / "wide.csv"
        wide.write_text(",".join(f"c{number}" for number in range(10_000)) + "\n")
        columns_of(str(wide))
    model = hostile_model(tiny_folder, tmp_path / "model", "{{ 10 ** (10 ** 9) }}")

    def hang() -> None:
        with pytest.raises(DataError):
            preview_of(config_of(model, data), 3)

    hanging = Thread(target=hang)
    hanging.start()
    assert columns_of(str(data)) == ("instruction", "output")
    deadline = time.monotonic() + 60
    while hanging.is_alive() and time.monotonic() < deadline:
        data_process.PREVIEWS.end()  # the thread may not have started its process yet: again
        hanging.join(0.5)
    assert not hanging.is_alive()


def test_a_run_is_checked_by_reading_all_of_its_data(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"instruction": "Count.", "output": "1"}) + "\n"
    path.write_text(row * 5_000)
    check_inputs(config_of(tiny_folder, path))
    path.write_text(row * 5_000 + "{")
    with pytest.raises(DataError, match="line 5001"):
        check_inputs(config_of(tiny_folder, path))
    with pytest.raises(ModelError):
        check_inputs(config_of(tmp_path / "nowhere", path))
