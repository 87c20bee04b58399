"""Declaring and checking settings: a dataclass field with bounds, choices and help, conversion from text, errors.

No torch.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Union

import yaml

from mole.config.yaml_loader import parse_yaml
from mole.core.errors import ConfigError, InputError, brief

MAX_INTEGER = 2**63 - 1
"""Largest whole number accepted: torch and the file formats use 64-bit signed integers."""


@dataclass(frozen=True)
class Spec:
    """The bounds, choices and help of a setting, stored in its dataclass field's metadata under `"spec"`.

    Attributes:
        help: one sentence with the unit, shown by `--help` and under the form's field.
        ge: smallest allowed value.
        gt: exclusive lower bound.
        le: largest allowed value.
        choices: the allowed texts; None when any is allowed.
        label: name in the form; None derives it from the field's name.
        flag: short command-line flag, e.g. `--rank`; every setting is also reachable as `--set section.name=`.
        from_paper: whether the default is the paper's (or its authors' code's); the form then says so.
        steerable: whether it only affects how a trained router selects experts: Chat then offers it as a routing
            override.
        parse: converts a value of this setting, of which it gets the name too, instead of `coerce`.
    """

    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    choices: tuple[str, ...] | None = None
    label: str | None = None
    flag: str | None = None
    from_paper: bool = False
    steerable: bool = False
    parse: Callable[[Any, str], Any] | None = None

    def range_text(self) -> str:
        """The allowed range in words, e.g. `"greater than 0 and at most 1"`; empty without bounds."""
        parts = [
            f"greater than {self.gt:g}" if self.gt is not None else "",
            f"at least {self.ge:g}" if self.ge is not None else "",
            f"at most {self.le:g}" if self.le is not None else "",
        ]
        return " and ".join(part for part in parts if part)


def setting(default: Any, help: str, **spec: Any) -> Any:
    """A dataclass field with its bounds and help text; the arguments are those of `Spec`."""
    metadata = {"spec": Spec(help=help, **spec), "help": help}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def spec_of(item: dataclasses.Field[Any]) -> Spec:
    """The `Spec` of a field made by `setting`."""
    return typing.cast(Spec, item.metadata["spec"])


def unknown_setting(section: str, key: Any, known: set[str]) -> InputError:
    """The error for an unknown setting, listing the known ones; `section` is "" at the top level."""
    name = key if isinstance(key, str) else brief(key)
    dotted = f"{section}.{name}" if section else name
    shown = dotted if len(dotted) <= 80 else f"{dotted[:79]}…"
    return InputError(f"{shown or repr(shown)} is not a setting; known: {', '.join(sorted(known))}.", field=dotted)


def build_settings(section_class: Any, values: Mapping[str, Any], section: str) -> Any:
    """An instance of a settings dataclass from a mapping; text is converted to each field's type.

    Raises `InputError` for an unknown name, `ConfigError` for a value that is not allowed.
    """
    hints = typing.get_type_hints(section_class)
    known = {item.name: item for item in fields(section_class)}
    for key in values:
        if key not in known:
            raise unknown_setting(section, key, {*known})
    dotted = {key: f"{section}.{key}" if section else key for key in values}
    return section_class(
        **{key: converted(known[key], hints[key], value, dotted[key]) for key, value in values.items()}
    )


def converted(item: dataclasses.Field[Any], hint: Any, value: Any, name: str) -> Any:
    """The value of a setting as its own `Spec.parse` converts it, or else `coerce`. Raises `ConfigError`."""
    parse = spec_of(item).parse if "spec" in item.metadata else None
    return parse(value, name) if parse else coerce(hint, value, name)


def check_settings(section: Any, prefix: str = "") -> None:
    """Convert every setting of a section to its type and check its bounds and choices. Raises `ConfigError`."""
    hints = typing.get_type_hints(type(section))
    for item in fields(section):
        if "spec" not in item.metadata:
            continue
        spec, name = spec_of(item), f"{prefix}.{item.name}" if prefix else item.name
        value = converted(item, hints[item.name], getattr(section, item.name), name)
        object.__setattr__(section, item.name, value)  # also of a frozen one
        if spec.choices and value not in spec.choices:
            raise ConfigError(name, value, f"one of: {', '.join(spec.choices)}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            outside = (
                (spec.ge is not None and value < spec.ge)
                or (spec.gt is not None and value <= spec.gt)
                or (spec.le is not None and value > spec.le)
            )
            if outside:
                raise ConfigError(name, value, f"{type_text(hints[item.name])} {spec.range_text()}")


TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def type_text(hint: Any) -> str:
    """A type hint in words for error messages, e.g. `"a whole number or a list"`."""
    options = [option for option in union_members(hint) if option is not type(None)]
    words = [TYPE_WORDS.get(typing.get_origin(option) or option, "a value") for option in options]
    return " or ".join(words) + (" or empty" if len(options) < len(union_members(hint)) else "")


def union_members(hint: Any) -> tuple[Any, ...]:
    """The members of a union type, or the type itself as a 1-tuple."""
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def coerce(hint: Any, value: Any, name: str) -> Any:
    """`value` converted to the type `hint`: text from a command line or a form becomes a number, list or boolean.

    Raises `ConfigError` with the setting `name` when it cannot be converted, or is not a finite number.
    """
    options = union_members(hint)
    if value is None or (value == "" and str not in options):
        if type(None) in options:
            return None
        raise ConfigError(name, value, type_text(hint))
    if isinstance(value, str) and ({bool, int, float} & set(options) or any(map(typing.get_origin, options))):
        value = parse_text(value, options)
    # The first member of the union that fits wins. bool is a subclass of int, so it is excluded from the numbers.
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            if abs(value) <= sys.float_info.max:
                return float(value)
        elif origin is int and isinstance(value, (int, float)):
            if not isinstance(value, bool) and abs(value) <= MAX_INTEGER and value == int(value):
                return int(value)
        elif origin is list and isinstance(value, (list, tuple)):
            (inner,) = typing.get_args(option)
            return [coerce(inner, entry, name) for entry in value]
        elif origin is dict and isinstance(value, Mapping):
            _, inner = typing.get_args(option)
            return {str(coerce(str, key, name)): coerce(inner, entry, name) for key, entry in value.items()}
        elif isinstance(origin, type) and isinstance(value, origin):
            if isinstance(value, str) and not value.isascii():
                check_characters(value, name)
            return value
    raise ConfigError(name, value, type_text(hint))


def check_characters(text: str, name: str) -> None:
    """Raise `ConfigError` for text with a lone surrogate, which cannot be encoded (an undecodable file name's)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(name, text, "valid Unicode", "If this is a file name, rename the file.") from None


def parse_text(text: str, options: tuple[Any, ...]) -> Any:
    """Text parsed as the number, boolean, list or mapping that `options` allow; returned as it is if it is none."""
    stripped = text.strip()
    if float in options or int in options:
        try:
            return float(stripped) if float in options else int(stripped)
        except ValueError:
            pass
    origins = {typing.get_origin(option) for option in options}
    is_list = list in origins and not {str, int, float, bool} & set(options)  # then one entry is a list of one
    if list in origins and ("," in stripped or is_list) and not stripped.startswith(("[", "{")):
        return [part.strip() for part in stripped.split(",") if part.strip()]
    if stripped.startswith(("[", "{")) or bool in options:
        try:
            return parse_yaml(stripped)
        except yaml.YAMLError:
            return text
    return text
