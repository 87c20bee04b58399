"""The files of a run's data beyond the first, as components of its form, and `data.path` as a list of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from gradio.components import Component

from mole.config import RunConfig, parse_sources

BLANK = ("", 1.0, "")
"""A row's values when it is not used: path, weight and columns."""


def flow_text(value: Any) -> str:
    """A list or mapping as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10_000)
    return text.strip()


@dataclass(frozen=True)
class FileRow:
    """The components of one further file."""

    path: Component
    weight: Component
    columns: Component


@dataclass
class FurtherFiles:
    """The components, of which the first file's weight counts only beside others."""

    first_weight: Component
    rows: list[FileRow] = field(default_factory=list)

    @property
    def inputs(self) -> list[Component]:
        """All components, in the order of `values` and `texts`."""
        return [self.first_weight, *(made for row in self.rows for made in (row.path, row.weight, row.columns))]

    def join(self, data: Mapping[str, Any], values: Sequence[Any]) -> dict[str, Any]:
        """The section `data` of a form, whose `path` is the first file, with those of `inputs` that name one."""
        weight, rest = values[0], [values[at : at + 3] for at in range(1, len(values), 3)]
        rows = [
            (path.strip(), weight, (columns or "").strip()) for path, weight, columns in rest if (path or "").strip()
        ]
        if not rows:
            return dict(data)
        first: Any = data["path"]
        own = {name: data[name] for name in ("name", "split") if data.get(name)}
        if own or weight != 1:
            first = {"path": first, "weight": weight, **own}
        mapped = bool(data.get("columns"))  # which are those of the first file, and not of the others
        entries = [
            {"path": path, "weight": weight, **({"columns": columns or {}} if columns or mapped else {})}
            for path, weight, columns in rows
        ]
        return {**data, "path": [first, *entries], "name": None, "split": None}

    def split(self, config: RunConfig) -> tuple[dict[str, Any], list[Any]]:
        """The settings of `data` that show the first file, and the values of `inputs`.

        Where the rows cannot show all files, they are blank, and the path is the whole list as text.
        """
        blank = [1.0, *BLANK * len(self.rows)]
        data = config.data
        if isinstance(data.path, str):
            return {}, blank
        first, *others = data.sources
        values = [first.weight, *(v for one in others for v in (one.path, one.weight, flow_columns(one.columns)))]
        shown = {"path": first.path, "name": first.name, "split": first.split}
        if len(values) <= len(blank):
            values += blank[len(values) :]
            section = {"columns": data.columns, **shown}
            if same_path(self.join(section, values)["path"], data.path):
                return shown, values
        return {"path": flow_text(data.path)}, blank

    def element_of(self, dotted: str, values: Sequence[Any]) -> str:
        """The element id of what an error names, e.g. `data.path.2.weight`, in a form with these `values`."""
        number, name = (*dotted.split("."), "path")[2:4]
        if number == "1":
            return str(self.first_weight.elem_id) if name == "weight" else ""
        used = [row for row, path in zip(self.rows, values[1::3], strict=True) if (path or "").strip()]
        place = int(number) - 2 if number.isdecimal() else -1
        made = getattr(used[place], name, None) if 0 <= place < len(used) else None
        return str(made.elem_id) if made else ""


def flow_columns(columns: Mapping[str, str]) -> str:
    """A mapping of columns as text; empty for none."""
    return flow_text(dict(columns)) if columns else ""


def same_path(one: Any, other: Any) -> bool:
    """Whether two values of `data.path` are the same list."""
    return bool(parse_sources(one) == parse_sources(other))
