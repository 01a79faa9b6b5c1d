"""Protobuf's wire format, read strictly: enough to look into an ONNX file, and change it, without
`onnx`.

A message is a row of fields: a number and a wire type in one varint, then a varint, 4 or 8 bytes,
or a length and so many bytes (https://protobuf.dev/programming-guides/encoding). Two parsers that
understand the same bytes differently are a way around a check, so whatever is ambiguous is refused:
fields that the caller does not list, wire types that are not theirs, a second value of a field that
has one, groups, varints that are longer than they need to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Value = int | memoryview


@dataclass(frozen=True)
class Field:
    """How a field is written, and whether it may be there more than once."""

    wire: int
    repeated: bool = False


Message = dict[int, list[Value]]


def read_message(data: memoryview, known: Mapping[int, Field]) -> Message:
    """The fields of a message: number -> values in their order.

    A repeated varint may be packed: it then has one value of bytes, for `varints`.

    Raises:
        ValueError: it is damaged, ambiguous, or has fields that are not known.
    """
    found: Message = {}
    at, end = 0, len(data)
    while at < end:
        tag, at = read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        field = known.get(number)
        if field is None:
            raise ValueError(f"it has a field {number} that is not allowed")
        packed = wire == BYTES and field.wire == VARINT and field.repeated
        if wire != field.wire and not packed:
            raise ValueError(f"field {number} has the wire type {wire}")
        value: Value
        if wire == VARINT:
            value, at = read_varint(data, at)
        else:
            if wire == BYTES:
                size, at = read_varint(data, at)
            else:
                size = 8 if wire == FIXED64 else 4
            if size > end - at:
                raise ValueError(f"field {number} reaches beyond its message")
            value, at = data[at : at + size], at + size
        values = found.get(number)
        if values is None:
            found[number] = [value]
        elif field.repeated:
            values.append(value)
        else:
            raise ValueError(f"field {number} is there twice")
    return found


def write_message(message: Mapping[int, Sequence[Value | bytes]]) -> bytes:
    """The bytes of a message of varints and bytes, as `read_message` gives it."""
    found = bytearray()
    for number, values in message.items():
        for value in values:
            if isinstance(value, int):
                found += _varint(number << 3 | VARINT) + _varint(value)
            else:
                found += _varint(number << 3 | BYTES) + _varint(len(value)) + value
    return bytes(found)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """A whole number of at most 64 bits, and where the next byte is."""
    value = shift = 0
    end = len(data)
    while at < end:
        byte = data[at]
        at += 1
        if byte < 0x80:
            value |= byte << shift
            if value >> 64 or (shift and not byte):
                break
            return value, at
        value |= (byte & 0x7F) << shift
        shift += 7
        if shift > 63:
            break
    raise ValueError("a number in it is damaged")


def signed(value: int) -> int:
    """An int64 as its varint has it."""
    return value - (1 << 64) if value >> 63 else value


def varints(message: Message, number: int) -> list[int]:
    """The whole numbers of a repeated field, packed or not."""
    found: list[int] = []
    for value in message.get(number, ()):
        if isinstance(value, int):
            found.append(signed(value))
            continue
        at = 0
        while at < len(value):
            item, at = read_varint(value, at)
            found.append(signed(item))
    return found


def varint(message: Message, number: int, default: int = 0) -> int:
    """The whole number of a field."""
    value = message.get(number, [default])[0]
    if not isinstance(value, int):
        raise ValueError(f"field {number} is no number")
    return signed(value)


def parts(message: Message, number: int) -> list[memoryview]:
    """The bytes of a repeated field, or of one that is there at most once."""
    return [value for value in message.get(number, ()) if isinstance(value, memoryview)]


def text(message: Message, number: int) -> str:
    """The text of a field, "" where it has none.

    Raises:
        ValueError: it is not UTF-8.
    """
    found = parts(message, number)
    return str(found[0], "utf-8") if found else ""


def texts(message: Message, number: int) -> list[str]:
    """The texts of a repeated field."""
    return [str(value, "utf-8") for value in parts(message, number)]
