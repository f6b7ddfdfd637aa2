"""The protobuf messages of `wire.proto`, made from that file when this module is imported.

Code that protoc generates runs with one or two major versions of the protobuf library. The descriptors here are made
through the library's own interface, which is the same in all versions from 5, and in a pool of their own, so that they
cannot clash with other messages of the process. The reader knows only the syntax that the file uses.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

_STATEMENT = re.compile(
    r'\s*(?:syntax = "proto3";|package (?P<package>\w+);|(?P<opens>message|oneof) (?P<name>\w+) \{|(?P<closes>\})'
    r"|(?P<repeated>repeated )?(?:map<string, (?P<values>\w+)>|(?P<kind>\w+)) (?P<field>\w+) = (?P<number>\d+);)\s*"
)
_SCALARS = ("bool", "bytes", "double", "int32", "int64", "string", "uint32")


def _statements(text: str) -> Iterator[re.Match[str]]:
    """Yield the statements of a .proto file. Raise ValueError at a syntax that this reader does not know."""
    text = re.sub(r"//[^\n]*", "", text)
    position = 0
    while position < len(text):
        found = _STATEMENT.match(text, position)
        if found is None:
            raise ValueError(f"wire.proto: unknown syntax: {text[position : position + 60].strip()!r}")
        yield found
        position = found.end()


def _add_field(message: DescriptorProto, name: str, number: int, kind: str) -> FieldDescriptorProto:
    """Add a field of a scalar or message type to a message, and return it."""
    field: FieldDescriptorProto = message.field.add(name=name, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL)
    if kind in _SCALARS:
        field.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    else:
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, kind
    return field


def _add_map(message: DescriptorProto, name: str, number: int, values: str) -> None:
    """Add a field map<string, values>. On the wire it is a repeated message of a key and a value."""
    entry = message.nested_type.add(name="".join(map(str.capitalize, name.split("_"))) + "Entry")
    entry.options.map_entry = True
    _add_field(entry, "key", 1, "string")
    _add_field(entry, "value", 2, values)
    _add_field(message, name, number, entry.name).label = FieldDescriptorProto.LABEL_REPEATED


def _described(text: str) -> FileDescriptorProto:
    """Return the descriptor of the .proto file with this text."""
    file = FileDescriptorProto(name="megatron_tiedlora/service/wire.proto", syntax="proto3")
    inside_oneof = False
    for found in _statements(text):
        if found["package"]:
            file.package = found["package"]
        elif found["opens"] == "message":
            message = file.message_type.add(name=found["name"])
        elif found["opens"]:
            message.oneof_decl.add(name=found["name"])
            inside_oneof = True
        elif found["closes"]:
            inside_oneof = False
        elif found["values"]:
            _add_map(message, found["field"], int(found["number"]), found["values"])
        elif found["field"]:
            field = _add_field(message, found["field"], int(found["number"]), found["kind"])
            if inside_oneof:
                field.oneof_index = len(message.oneof_decl) - 1
            elif found["repeated"]:
                field.label = FieldDescriptorProto.LABEL_REPEATED
    return file


_FILE = _described((Path(__file__).parent / "wire.proto").read_text(encoding="utf-8"))
_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(_FILE)


def _message(name: str) -> Any:
    """Return the class of a message."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_FILE.package}.{name}"))


ForwardBackwardRequest = _message("ForwardBackwardRequest")
ForwardBackwardOutput = _message("ForwardBackwardOutput")
SampleResponse = _message("SampleResponse")
