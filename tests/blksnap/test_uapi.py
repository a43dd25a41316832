# SPDX-License-Identifier: Apache-2.0
"""A kernel module finds every field where it looks for it, and every request under the number it knows.

Twice over: against a C compiler's view of declarations written by hand (uapi.h), and against the numbers that the
modules are documented with, for a machine without a compiler.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from stasis.blksnap import uapi
from stasis.blksnap.uapi import common, current, dattobd, v2, v5, v7, val7

MODULES: list[ModuleType] = [common, current, v7, v5, v2, val7, dattobd]
HEADER = Path(__file__).with_name("uapi.h")


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _structures() -> dict[str, type[ctypes.Structure]]:
    """Every structure under its prefix, where it is defined."""
    return {
        f"{_name(module)}_{name}": value
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, ctypes.Structure) and value.__module__ == module.__name__
    }


def _requests() -> dict[str, int]:
    return {
        f"{_name(module)}.{name}": getattr(module, name)
        for module in MODULES
        for name in module.__all__
        if name.startswith(("IOCTL_", "BLKFILTER_", "BDEVFILTER_")) and not name.endswith("_LENGTH")
    }


def _program() -> str:
    lines = [f'#include "{HEADER}"', "#include <stddef.h>", "#include <stdio.h>", "int main(void) {"]
    for name, structure in _structures().items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        for field in structure._fields_:
            lines.append(f'printf("{name}.{field[0]} %zu\\n", offsetof(struct {name}, {field[0]}));')
    lines.append('#define X(module, name, number) printf(#module "." #name " %zu\\n", (size_t)(number));')
    return "\n".join([*lines, "REQUESTS(X)", "return 0; }"])


@pytest.mark.tool("gcc")
def test_layouts_and_numbers_are_those_of_a_c_compiler(tmp_path: Path) -> None:
    source, program = tmp_path / "uapi.c", tmp_path / "uapi"
    source.write_text(_program())
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", program, source], check=True, timeout=60)
    told = dict(line.split() for line in subprocess.check_output([program], text=True).splitlines())
    ours = {**_requests()}
    for name, structure in _structures().items():
        ours[name] = ctypes.sizeof(structure)
        for field in structure._fields_:
            ours[f"{name}.{field[0]}"] = getattr(structure, field[0]).offset
    assert ours == {name: int(value) for name, value in told.items()}
    assert len(_requests()) == 51


@pytest.mark.parametrize(
    ("request_number", "documented"),
    [
        (current.BLKFILTER_ATTACH, 3224375950),
        (current.BLKFILTER_DETACH, 3223327375),
        (current.BLKFILTER_CTL, 3224375952),
        (current.IOCTL_BLKSNAP_VERSION, 2148029952),
        (current.IOCTL_BLKSNAP_SNAPSHOT_CREATE, 3223344641),
        (current.IOCTL_BLKSNAP_SNAPSHOT_DESTROY, 1074812418),
        (current.IOCTL_BLKSNAP_SNAPSHOT_TAKE, 1074812419),
        (current.IOCTL_BLKSNAP_SNAPSHOT_COLLECT, 2148554244),
        (current.IOCTL_BLKSNAP_SNAPSHOT_WAIT_EVENT, 2415941125),
        (v7.BLKFILTER_ATTACH, 0xC020128C),
        (v7.BLKFILTER_DETACH, 0xC020128D),
        (v7.BLKFILTER_CTL, 0xC030128E),
        (v5.IOCTL_BLKSNAP_VERSION, 0x40085600),
        (v5.IOCTL_BLKSNAP_SNAPSHOT_APPEND_STORAGE, 0x40285603),
        (v5.IOCTL_BLKSNAP_SNAPSHOT_WAIT_EVENT, 0x50005606),
        (v2.IOCTL_BLK_SNAP_TRACKER_READ_CBT_MAP, 0x80185603),
        (v2.IOCTL_BLK_SNAP_SNAPSHOT_CREATE, 0x40205605),
        (v2.IOCTL_BLK_SNAP_SNAPSHOT_COLLECT_IMAGES, 0x4020560A),
        (val7.BDEVFILTER_CTL, 0xC038468E),
        (dattobd.IOCTL_SETUP_SNAP, 1076400385),
        (dattobd.IOCTL_TRANSITION_INC, 1074041093),
        (dattobd.IOCTL_TRANSITION_SNAP, 0x40189106),
        (dattobd.IOCTL_DATTOBD_INFO, 0xA0509108),
        (dattobd.IOCTL_RECONFIGURE_AUTO_EXPAND, 0x4018910B),
    ],
)
def test_numbers_are_the_documented_ones(request_number: int, documented: int) -> None:
    assert request_number == documented


def test_ctl_of_v7_and_attach_of_today_cannot_be_told_apart() -> None:
    assert v7.BLKFILTER_CTL == current.BLKFILTER_ATTACH
    assert ctypes.sizeof(common.FilterCtl) == ctypes.sizeof(current.FilterAttach)


def test_a_uuid_is_stored_in_the_order_of_its_text() -> None:
    text = "00112233-4455-6677-8899-aabbccddeeff"
    stored = common.Uuid.of(text)
    assert bytes(stored) == bytes.fromhex(text.replace("-", ""))
    assert str(stored) == text
    with pytest.raises(ValueError):
        common.Uuid.of("garbage")


def test_every_module_is_reached_through_the_package() -> None:
    assert {getattr(uapi, name) for name in uapi.__all__} == set(MODULES)
