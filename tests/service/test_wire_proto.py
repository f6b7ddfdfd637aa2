"""wire_pb2.py is what protoc makes of wire.proto, whose numbers and types are those of the real SDK.

After a change of wire.proto, in the folder of the repository:

    python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. megatron_tiedlora/service/wire.proto

with grpcio-tools 1.62 (protoc 25): what later ones write runs with one or two major versions of protobuf only.
"""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from support.folders import ROOT

from megatron_tiedlora.service import wire_pb2

PROTO = ROOT / "megatron_tiedlora" / "service" / "wire.proto"
PYTHON = os.environ.get("TINKER_PYTHON", "")
Fields = dict[str, dict[str, tuple[int, str]]]  # by message and field: the number and the type

FIELD = re.compile(r"(repeated )?(?:map<string, (\w+)>|(\w+)) (\w+) = (\d+);")


def fields_of_text(text: str) -> Fields:
    """The fields of a .proto file."""
    found: Fields = {}
    for line in re.sub(r"//[^\n]*", "", text).splitlines():
        if opened := re.fullmatch(r"message (\w+) \{", line.strip()):
            found[opened[1]] = {}
            continue
        if field := FIELD.fullmatch(line.strip()):
            repeated, values, kind, name, number = field.groups()
            found[[*found][-1]][name] = (int(number), f"map {values}" if values else f"{repeated or ''}{kind}")
    return found


def fields_of_descriptor(file: FileDescriptorProto) -> Fields:
    """The fields of a descriptor, in the words of the file."""
    found: Fields = {}
    for message in file.message_type:
        entries = {entry.name: entry for entry in message.nested_type}
        found[message.name] = {}
        for field in message.field:
            kind = kind_of(field)
            if kind in entries:
                kind = f"map {kind_of(entries[kind].field[1])}"
            elif field.label == FieldDescriptorProto.LABEL_REPEATED:
                kind = f"repeated {kind}"
            found[message.name][field.name] = (field.number, kind)
    return found


def kind_of(field: FieldDescriptorProto) -> str:
    return field.type_name.split(".")[-1] or FieldDescriptorProto.Type.Name(field.type)[5:].lower()


def test_the_generated_code_is_that_of_the_file() -> None:
    file = FileDescriptorProto()
    wire_pb2.DESCRIPTOR.CopyToProto(file)
    text = fields_of_text(PROTO.read_text())
    assert len(text) == 12 and text["Datum"]["loss_fn_inputs"] == (2, "map Tensor")
    assert fields_of_descriptor(file) == text


@pytest.mark.tinker
def test_the_numbers_and_types_are_those_of_the_sdk() -> None:
    program = (
        "import sys; from tinker.proto import tinker_public_pb2 as public; from google.protobuf import descriptor_pb2\n"
        "file = descriptor_pb2.FileDescriptorProto(); public.DESCRIPTOR.CopyToProto(file)\n"
        "sys.stdout.write(file.SerializeToString().hex())"
    )
    printed = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, timeout=100, check=True).stdout
    theirs = fields_of_descriptor(FileDescriptorProto.FromString(bytes.fromhex(printed)))
    names = {"EncodedText": "EncodedTextChunk"}  # ours and theirs
    same_on_the_wire = {("int32", "DType"), ("int32", "StopReason"), ("bytes", "SparseCsr"), ("bytes", "ImageChunk"),
                        ("bytes", "DmelChunk"), ("EncodedText", "EncodedTextChunk"),
                        ("repeated bytes", "repeated Datum")}  # fmt: skip
    differences = [
        (message, name, number, kind)
        for message, fields in fields_of_text(PROTO.read_text()).items()
        for name, (number, kind) in fields.items()
        if (found := theirs[names.get(message, message)][name])[0] != number
        or (found[1] != kind and (kind, found[1]) not in same_on_the_wire)
    ]
    assert not differences, json.dumps(differences)
