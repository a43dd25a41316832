# SPDX-License-Identifier: Apache-2.0
"""Answers about images by CRIU's own Python package, run by an interpreter that has it.

One JSON request per line on standard input, one JSON answer per line on standard output. `pycriu` and its protobuf
are loaded here only, not in the process that runs the tests.
"""

import importlib
import io
import json
import pkgutil
import sys
import warnings

warnings.simplefilter("ignore")

import pycriu.images  # noqa: E402  # the interpreter may print warnings while loading it
from pycriu.images import images, pb2dict  # noqa: E402


def _descriptors():
    for module in pkgutil.iter_modules(pycriu.images.__path__):
        if module.name.endswith("_pb2"):
            yield importlib.import_module("pycriu.images." + module.name)


CLASSES = {}
ENUMS = {}
for found in _descriptors():
    for name in found.DESCRIPTOR.message_types_by_name:
        CLASSES[name] = getattr(found, name)
        for field in CLASSES[name].DESCRIPTOR.fields:
            if field.enum_type is not None:
                ENUMS[field.enum_type.name] = {value.name: value.number for value in field.enum_type.values}


def _field(field):
    default = field.default_value if field.has_default_value else None
    of = field.message_type.name if field.message_type else field.enum_type.name if field.enum_type else None
    return [field.name, field.number, field.type, field.label, default, of]


def answer(request):
    """What the peer says to a request."""
    if request["ask"] == "schema":
        return {"messages": {name: [_field(field) for field in cls.DESCRIPTOR.fields] for name, cls in CLASSES.items()},
                "enums": ENUMS}  # fmt: skip
    if request["ask"] == "message":
        message = CLASSES[request["name"]]()
        message.ParseFromString(bytes.fromhex(request["bytes"]))
        return {"json": pb2dict.pb2dict(message, request["pretty"]), "bytes": message.SerializeToString().hex()}
    if request["ask"] == "load":
        return images.load(io.BytesIO(bytes.fromhex(request["bytes"])), request["pretty"])
    file = io.BytesIO()
    images.dump(request["image"], file)
    return file.getvalue().hex()


print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
