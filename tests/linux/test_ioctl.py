# SPDX-License-Identifier: Apache-2.0
"""Request numbers against those that the kernel's headers give; errors that say what was asked of what."""

import errno

import pytest

from stasis.linux import ioctl


@pytest.mark.parametrize(
    ("request_number", "expected"),
    [
        (ioctl.IO(0x12, 104), 0x1268),  # BLKSSZGET
        (ioctl.IOR(0x12, 114, 8), 0x80081272),  # BLKGETSIZE64
        (ioctl.IOWR("X", 119, 4), 0xC0045877),  # FIFREEZE
        (ioctl.IOW("$", 8, 4), 0x40042408),  # PERF_EVENT_IOC_SET_BPF
    ],
)
def test_numbers_are_those_of_the_headers(request_number: int, expected: int) -> None:
    assert request_number == expected


def test_error_names_request_and_file(tmp_path) -> None:
    path = tmp_path / "plain"
    with path.open("w") as file, pytest.raises(OSError, match="BLKSSZGET") as caught:
        ioctl.get(file.fileno(), "BLKSSZGET", ioctl.IO(0x12, 104), 4)
    assert caught.value.errno == errno.ENOTTY
    assert caught.value.filename == str(path)
