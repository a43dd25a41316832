# SPDX-License-Identifier: Apache-2.0
"""`stasis process`: look at image sets of dumped process trees."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stasis.cli import checkpoint, output
from stasis.cli.options import add_command, add_group
from stasis.errors import NotFoundError, PermissionDeniedError, UsageError

if TYPE_CHECKING:
    from stasis.cli.options import Groups
    from stasis.process.images.summary import Summary, Task

__all__ = ["COMMANDS", "add"]


def add(groups: Groups, command: str = "") -> None:
    """Add the group and its commands, or one of them: all of them take longer than a small process's restore."""
    group = add_group(groups, "process", "Checkpoint process trees in CRIU's image format, and look at the images.")
    for add_one in [COMMANDS[command]] if command else COMMANDS.values():
        add_one(group)


def _add_show(group: Groups) -> None:
    command = add_command(group, "show", show, "Show the tasks, memory, files and sockets of an image set.", """
stasis process show images
stasis process show images --files --memory
""")
    command.add_argument("images", metavar="DIR", help="the image set's directory")
    command.add_argument("--files", action="store_true", help="list each task's descriptors, and its cwd and root")
    command.add_argument("--memory", action="store_true", help="list each task's mappings")


def _add_decode(group: Groups) -> None:
    command = add_command(group, "decode", decode, "Print an image as JSON, as crit decode does.", """
stasis process decode images/core-17.img --pretty
stasis process decode images/files.img --output files.json
""")
    command.add_argument("image", metavar="FILE", help="the image")
    command.add_argument("--output", metavar="FILE", help="the file to write; standard output if not given")
    command.add_argument("--pretty", action="store_true",
                         help="addresses in hexadecimal, flags and devices by name; encode reads both forms")


def _add_encode(group: Groups) -> None:
    command = add_command(group, "encode", encode, "Make an image out of the JSON that decode printed.", """
stasis process encode files.json --output images/files.img
""")
    command.add_argument("document", metavar="FILE", help="the JSON document; - for standard input")
    command.add_argument("--output", metavar="FILE", help="the image to write; standard output if not given")


COMMANDS = {**checkpoint.COMMANDS, "show": _add_show, "decode": _add_decode, "encode": _add_encode}


def decode(arguments: argparse.Namespace) -> None:
    """stasis process decode"""
    from stasis.process.images.container import ImageReader
    from stasis.process.images.documents import document_text

    with _open(ImageReader.open, arguments.image) as image:
        text = document_text(image, pretty=arguments.pretty)
        if arguments.output is None:
            sys.stdout.writelines(text)
        else:
            _write(arguments.output, (piece.encode() for piece in text))


def encode(arguments: argparse.Namespace) -> None:
    """stasis process encode"""
    from stasis.process.images.documents import encode_document

    if arguments.document == "-":
        text = sys.stdin.buffer.read()
    else:
        with _open(lambda path: open(path, "rb"), arguments.document) as file:
            text = file.read()
    image = encode_document(text, arguments.document)
    if arguments.output is not None:
        _write(arguments.output, iter([image]))
    elif sys.stdout.isatty():
        raise UsageError("an image is not for a terminal", hint="name a file with --output, or redirect it")
    else:
        sys.stdout.buffer.write(image)


def _open(opening: Any, path: str) -> Any:
    try:
        return opening(path)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist", hint="name a file") from error
    except PermissionError as error:
        raise PermissionDeniedError(f"{path} may not be read") from error


def _write(path: str, pieces: Iterator[bytes]) -> None:
    """A new file, or the old one where anything goes wrong on the way."""
    from stasis.process.images.documents import write_beside

    try:
        write_beside(path, pieces)
    except PermissionError as error:
        raise PermissionDeniedError(f"{path} may not be written") from error


def show(arguments: argparse.Namespace) -> None:
    """stasis process show"""
    from stasis.process.images.imageset import ImageSet
    from stasis.process.images.summary import summarize

    with ImageSet.open(arguments.images) as images:
        summary = summarize(images)
    if arguments.json:
        output.print_json(summary)
        return
    _print_summary(summary)
    for task in summary.tasks:
        if arguments.files or arguments.memory:
            print(f"\n{task.pid} {output.printable(task.command)}")
        if arguments.files:
            _print_files(task)
        if arguments.memory:
            _print_memory(task)


def _print_summary(summary: Summary) -> None:
    threads = sum(len(task.threads) for task in summary.tasks)
    output.print_fields([
        ("images", summary.path),
        ("tasks", f"{len(summary.tasks)}, with {threads} threads"),
        ("memory", output.size_text(summary.kept)),
        ("shared memory", output.size_text(summary.shared) if summary.shared else None),
        ("continues", "the set behind its link parent" if summary.continues_parent else None),
    ])
    if summary.tasks:
        print()
    depth: dict[int, int] = {}
    rows = []
    for task in summary.tasks:
        depth[task.pid] = depth.get(task.ppid, -1) + 1
        command = "  " * depth[task.pid] + output.printable(task.command)
        rows.append([task.pid, task.ppid, task.state, len(task.threads), task.uid, output.size_text(task.mapped),
                     output.size_text(task.kept), len(task.descriptors), command])
    output.print_table(["PID", "PPID", "STATE", "THREADS", "UID", "MAPPED", "KEPT", "FILES", "COMMAND"], rows)


def _print_files(task: Task) -> None:
    places = [("exe", task.exe), ("cwd", task.cwd), ("root", task.root)]
    output.print_fields([(name, None if path is None else output.printable(path)) for name, path in places])
    rows = [[entry.fd, entry.kind, "cloexec" if entry.close_on_exec else "", entry.id,
             output.printable(entry.what)]
            for entry in sorted(task.descriptors, key=lambda entry: entry.fd)]
    output.print_table(["FD", "KIND", "FLAGS", "ID", "WHAT"], rows)


def _print_memory(task: Task) -> None:
    rows = [[f"{mapping.start:x}-{mapping.end:x}", mapping.protection, output.size_text(mapping.end - mapping.start),
             output.size_text(mapping.kept), output.printable(mapping.what)] for mapping in task.mappings]
    output.print_table(["ADDRESSES", "ACCESS", "SIZE", "KEPT", "WHAT"], rows)
