"""A strict reader and a writer for protobuf's wire format, to inspect and edit ONNX files without
`onnx`.

A message is a sequence of fields: a varint with the field number and wire type, then a varint, 4 or
8 bytes, or a length and that many bytes (https://protobuf.dev/programming-guides/encoding). If two
parsers disagree about the same bytes, a check can be bypassed. So everything ambiguous is refused:
unlisted fields, unexpected wire types, a second value of a singular field, groups, and overlong
varints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Value = int | memoryview


@dataclass(frozen=True)
class Field:
    """A field's wire type, and whether it is repeated."""

    wire: int
    repeated: bool = False


Message = dict[int, list[Value]]


def read_message(data: memoryview, known: Mapping[int, Field]) -> Message:
    """Parses a message: field number -> values, in order.

    A packed repeated varint has one value of bytes; `varints` decodes it.

    Raises:
        ValueError: the message is malformed, ambiguous, or has unlisted fields.
    """
    message: Message = {}
    at, end = 0, len(data)
    while at < end:
        tag = data[at]
        if tag < 0x80:  # nearly all tags and lengths; a call would take half of the time
            at += 1
        else:
            tag, at = read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        field = known.get(number)
        if field is None:
            raise ValueError(f"field {number} is not allowed")
        packed = wire == BYTES and field.wire == VARINT and field.repeated
        if wire != field.wire and not packed:
            raise ValueError(f"field {number} has the wrong wire type {wire}")
        value: Value
        if wire == VARINT:
            value, at = read_varint(data, at)
        else:
            if wire == BYTES and at < end and data[at] < 0x80:
                size, at = data[at], at + 1
            elif wire == BYTES:
                size, at = read_varint(data, at)
            else:
                size = 8 if wire == FIXED64 else 4
            if size > end - at:
                raise ValueError(f"field {number} extends beyond its message")
            value, at = data[at : at + size], at + size
        values = message.get(number)
        if values is None:
            message[number] = [value]
        elif field.repeated:
            values.append(value)
        else:
            raise ValueError(f"duplicate field {number}")
    return message


def write_message(message: Mapping[int, Sequence[Value | bytes]]) -> bytes:
    """Serializes a message of varints and bytes, as returned by `read_message`."""
    data = bytearray()
    for number, values in message.items():
        for value in values:
            if isinstance(value, int):
                data += _varint(number << 3 | VARINT) + _varint(value)
            else:
                data += _varint(number << 3 | BYTES) + _varint(len(value)) + value
    return bytes(data)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """Decodes a varint of at most 64 bits; returns it and the index of the next byte."""
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
    raise ValueError("invalid varint")


def signed(value: int) -> int:
    """Converts the unsigned value of a varint to int64."""
    return value - (1 << 64) if value >> 63 else value


def varints(message: Message, number: int) -> list[int]:
    """Returns the integers of a repeated field, packed or not."""
    numbers: list[int] = []
    for value in message.get(number, ()):
        if isinstance(value, int):
            numbers.append(signed(value))
            continue
        at = 0
        while at < len(value):
            item, at = read_varint(value, at)
            numbers.append(signed(item))
    return numbers


def varint(message: Message, number: int, default: int = 0) -> int:
    """Returns the integer of a field."""
    value = message.get(number, [default])[0]
    if not isinstance(value, int):
        raise ValueError(f"field {number} is not an integer")
    return signed(value)


def parts(message: Message, number: int) -> list[memoryview]:
    """Returns the byte values of a field; none if it is missing."""
    return [value for value in message.get(number, ()) if isinstance(value, memoryview)]


def text(message: Message, number: int) -> str:
    """Returns the text of a field; "" if it is missing.

    Raises:
        ValueError: it is not UTF-8.
    """
    values = parts(message, number)
    return str(values[0], "utf-8") if values else ""


def texts(message: Message, number: int) -> list[str]:
    """Returns the texts of a repeated field."""
    return [str(value, "utf-8") for value in parts(message, number)]
