"""Rows for further files of the training data: a file or hub id, its weight, its columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from app import settings
from app.ui.further_files import BLANK, FileRow, FurtherFiles
from app.ui.wiring import QUIET, on_change, run_or_warn
from app.views.status_line import status_line
from mole.data import FILE_SUFFIXES

ROWS = 5
Choices = list[tuple[str, str]]
Look = Callable[[Any, Any], list[Any]]
"""The path and the columns of a file → its columns as they are or are guessed, and the line about them."""


@dataclass
class FilesPanel:
    """The components; `shown` is the number of rows that are visible, `card` is around them."""

    further: FurtherFiles
    shown: gr.State
    card: gr.Column
    add: gr.Button
    lines: list[gr.Column] = field(default_factory=list)
    abouts: list[gr.HTML] = field(default_factory=list)
    uploads: list[gr.UploadButton] = field(default_factory=list)
    removals: list[gr.Button] = field(default_factory=list)

    @property
    def paths(self) -> list[Any]:
        """The fields of the paths."""
        return [row.path for row in self.further.rows]

    @property
    def visible(self) -> list[Any]:
        """The outputs of `visibility`."""
        return [self.shown, self.card, *self.lines, self.add]


def build_more_files(choices: Choices) -> FilesPanel:
    """The rows, all hidden at first, and the button that adds one, in the current layout block."""
    with gr.Column(visible=False, elem_id="more-files", elem_classes="own-fields") as card:
        first = weight_box(1, "Weight of the first file")
        add = gr.Button("Add another file", size="sm", elem_id="add-file", render=False)
        panel = FilesPanel(FurtherFiles(first), gr.State(0), card, add)
        for number in range(2, ROWS + 2):
            build_row(panel, number, choices)
    add.render()
    return panel


def build_row(panel: FilesPanel, number: int, choices: Choices) -> None:
    """One row, hidden."""
    name = f"field-data-path-{number}"
    with gr.Column(visible=False, elem_id=f"file-{number}") as line:
        path = gr.Dropdown(
            choices=choices, value="", label=f"File {number}", allow_custom_value=True, elem_id=name,
        )  # fmt: skip
        with gr.Row():
            weight = weight_box(number, "Weight")
            columns = gr.Textbox(
                value="", label="Columns", info="Where its names differ", placeholder="{prompt: question}",
                min_width=140, scale=2, elem_id=f"{name}-columns",
            )  # fmt: skip
        panel.abouts.append(status_line(elem_id=f"file-{number}-about"))
        with gr.Row(elem_classes="buttons"):
            panel.uploads.append(
                gr.UploadButton(
                    "Upload a file", size="sm", file_types=list(FILE_SUFFIXES), elem_id=f"file-{number}-upload"
                )
            )
            panel.removals.append(gr.Button("Remove", size="sm", elem_id=f"file-{number}-remove"))
    panel.further.rows.append(FileRow(path, weight, columns))
    panel.lines.append(line)


def weight_box(number: int, label: str) -> gr.Number:
    """The weight of one of the files."""
    return gr.Number(
        value=1, label=label, info="Times per epoch", step=0.5, min_width=140,
        elem_id=f"field-data-path-{number}-weight",
    )  # fmt: skip


def visibility(shown: int, *paths: str | None) -> list[Any]:
    """For `FilesPanel.visible`: at least so many rows, and those that name a file."""
    used = [number for number, path in enumerate(paths, start=1) if path]
    shown = min(max(shown, *used, 0), ROWS)
    lines = [gr.Column(visible=number <= shown) for number in range(1, ROWS + 1)]
    return [shown, gr.Column(visible=shown > 0), *lines, gr.Button(visible=shown < ROWS)]


def wire_more_files(panel: FilesPanel, look: Look, samples: Choices) -> None:
    """Rows come and go; each is looked into once it names a file, and after its columns were changed."""
    rows, inputs = panel.further.rows, panel.further.inputs[1:]
    given = [panel.shown, *panel.paths]
    panel.add.click(lambda shown, *paths: visibility(shown + 1, *paths), given, panel.visible, queue=False, **QUIET)
    on_change(panel.paths, visibility, given, panel.visible, queue=False)

    def keep(uploaded: str) -> Any:
        kept = run_or_warn(lambda: settings.keep_upload(uploaded))
        return gr.skip() if kept is None else gr.Dropdown([*samples, (kept.name, str(kept))], value=str(kept))

    for number, row in enumerate(rows):
        panel.uploads[number].upload(keep, panel.uploads[number], row.path, **QUIET)
        on_change([row.path, row.columns], look, [row.path, row.columns], [row.columns, panel.abouts[number]])
        panel.removals[number].click(
            remover(number), [panel.shown, *inputs], [*inputs, *panel.visible], queue=False, **QUIET
        )


def remover(number: int) -> Callable[..., list[Any]]:
    """What removes a row: those after it move up, with their choices."""

    def remove(shown: int, *values: Any) -> list[Any]:
        kept = [*values[: 3 * number], *values[3 * number + 3 :], *BLANK]
        return [*kept, *visibility(max(shown - 1, 0), *kept[::3])]

    return remove
