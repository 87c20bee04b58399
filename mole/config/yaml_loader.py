"""Reading settings from YAML: plain values, bounded in length and depth, no aliases and no repeated names. No torch."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import yaml

from mole.core import files
from mole.core.errors import InputError

MAX_YAML_LENGTH = 1 << 16
"""Longest YAML text that is read, in characters; a complete run takes about two thousand."""
MAX_YAML_DEPTH = 20
"""Deepest nesting of mappings and lists that is read."""


class SettingsLoader(yaml.SafeLoader):
    """A safe YAML loader that also rejects repeated names, deep nesting, and aliases (which expand without bound)."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.line + 1}: aliases (*{event.anchor}) are not allowed; repeat the value")
        if self.depth == MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"line {self.line + 1}: nested too deeply")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set[str]()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(f"{key.value} is given twice")
            seen.update([key.value] if isinstance(key, yaml.ScalarNode) else [])
        return super().construct_mapping(node, deep)


class TextLoader(SettingsLoader):
    """A `SettingsLoader` that leaves every scalar as text."""


TextLoader.yaml_implicit_resolvers = {}


def parse_yaml(text: str, loader: type[SettingsLoader] = SettingsLoader) -> Any:
    """The value of YAML text. Raises `yaml.YAMLError` for any malformed text."""
    if len(text) > MAX_YAML_LENGTH:
        raise yaml.YAMLError(f"longer than {MAX_YAML_LENGTH:,} characters")
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # impossible dates and numbers, deep nesting: PyYAML raises many types
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `InputError` when it cannot be read or is not a mapping."""
    try:
        with open(path, encoding="utf-8", opener=files.regular) as file:
            values = parse_yaml(file.read(MAX_YAML_LENGTH + 1))
    except FileNotFoundError:
        raise InputError(f"The config file {path} does not exist.") from None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ELOOP:
            raise InputError(f"The config file {path} is not a regular file.") from None
        raise InputError(f"The config file {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise InputError(f"The config file {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise InputError(
            f"The config file {path} contains no settings (expected sections: model, data, adapter, training)."
        )
    return values
