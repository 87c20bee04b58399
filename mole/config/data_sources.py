"""The training data of a run: the files and hub data sets that `data.path` names, with weights. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from mole.config.fields import build_settings, check_settings, setting, unknown_setting
from mole.config.yaml_loader import parse_yaml
from mole.core import limits
from mole.core.errors import ConfigError

SETTING = "data.path"
ALLOWED = "a path, a hub id, or a list of these and of {path, weight, columns, name, split}"


@dataclass(frozen=True)
class DataSource:
    """One file or hub data set of the training data."""

    path: str = setting("", "JSON, JSONL, CSV, Parquet or text file, or a hub id.")
    weight: float = setting(
        1.0,
        "How often each of its rows is seen per epoch: 2 is twice; 0.5 a random half of them, the same in each epoch.",
        gt=0,
        le=limits.WEIGHT,
    )
    columns: dict[str, str] = setting({}, "Its column names where they differ, e.g. {prompt: question}.")
    name: str | None = setting(None, "Configuration of a hub data set.")
    split: str | None = setting(None, "Split of a hub data set; train if empty.")
    field: str = dataclasses.field(default=SETTING, compare=False)
    """The setting that errors name: in a list with its place, e.g. `data.path.2`."""

    @property
    def label(self) -> str:
        """The path with the configuration and the split, as in `owner/name:config:split`."""
        parts = [self.path, self.name or "", self.split or ""]
        return ":".join(parts).rstrip(":")


def parse_sources(value: Any, field: str = SETTING) -> str | list[Any]:
    """`data.path` in its shortest form: a path, or a list whose entries are paths, or mappings of what is not default.

    Text that is a list or a mapping in YAML is read as one. Raises `ConfigError` or `InputError` naming the entry.
    """
    entries = entries_of(value, field)
    if isinstance(entries, str):
        return entries
    if not entries:
        raise ConfigError(field, value, ALLOWED)
    if len(entries) > limits.SOURCES:
        raise ConfigError(field, f"a list of {len(entries)}", f"a list of at most {limits.SOURCES} files and data sets")
    short = [shortest(entry, f"{field}.{number}") for number, entry in enumerate(entries, start=1)]
    return short[0] if len(short) == 1 and isinstance(short[0], str) else short


def entries_of(value: Any, field: str) -> str | list[Any]:
    """The entries of a list, also of one in YAML text and in its entries; or a path."""
    if isinstance(value, str) and (text := value.strip()).startswith(("[", "{")):
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            if text.endswith(("]", "}")):
                raise ConfigError(field, value, ALLOWED, "Mind the commas and brackets.") from None
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, (list, tuple)):
        inner = [entries_of(entry, field) if isinstance(entry, str) else [entry] for entry in value]
        return [entry for part in inner for entry in ([part] if isinstance(part, str) else part)]
    if not isinstance(value, str):
        raise ConfigError(field, value, ALLOWED)
    return value


def shortest(entry: Any, field: str) -> str | dict[str, Any]:
    """An entry of the list as a path, or as a mapping of the values that are not the defaults."""
    if not isinstance(entry, (str, Mapping)):
        raise ConfigError(field, entry, "a path, a hub id, or {path, weight, columns, name, split}")
    given = {"path": entry} if isinstance(entry, str) else dict(entry)
    known = [item.name for item in dataclasses.fields(DataSource) if item.name != "field"]
    for name in given:
        if name not in known:
            raise unknown_setting(field, name, {*known})
    source = build_settings(DataSource, given, field)
    check_settings(source, field)
    if not source.path.strip():
        raise ConfigError(f"{field}.path", source.path, "a file or a hub id")
    values = {key: value for key, value in dataclasses.asdict(source).items() if value != getattr(DataSource(), key)}
    if "columns" in given:  # none are none, and not those of data.columns
        values["columns"] = source.columns
    return (
        source.path if len(values) == 1 else {key: values[key] for key in dataclasses.asdict(source) if key in values}
    )
