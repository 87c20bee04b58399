"""Reading a structure of Thrift's compact protocol, in which Parquet writes the headers of its pages. No torch."""

from __future__ import annotations

from typing import Any

TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
DEEPEST = 8


def read_struct(data: bytes) -> tuple[dict[int, Any], int]:
    """The fields of the structure at the start of `data` by number, and its length in bytes.

    Numbers and structures only; other fields are skipped. Raises `ValueError` when it is broken or cut off.
    """
    try:
        return _struct(data, 0, 0)
    except IndexError:
        raise ValueError("a page's header is cut off") from None


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    if depth > DEEPEST:
        raise ValueError("a page's header is nested too deeply")
    found: dict[int, Any] = {}
    number = 0
    while (start := data[at]) != 0:
        at += 1
        kind = start & 0x0F
        if start >> 4:  # the distance from the number of the field before
            number += start >> 4
        else:
            number, at = _integer(data, at)
        found[number], at = _value(data, at, kind, depth)
    return found, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (TRUE, FALSE):
        return kind == TRUE, at
    if kind in (BYTE, DOUBLE):
        return None, at + (1 if kind == BYTE else 8)
    if kind < DOUBLE:
        return _integer(data, at)
    if kind == BINARY:
        length, at = _unsigned(data, at)
        return None, at + length
    if kind == STRUCT:
        return _struct(data, at, depth + 1)
    raise ValueError("a page's header has a field of an unknown type")  # lists and maps do not occur in it


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a page's header has a number that is too long")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at
