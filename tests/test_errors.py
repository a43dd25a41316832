# SPDX-License-Identifier: Apache-2.0
"""An error crosses from worker to daemon to command line unchanged."""

import errno

import pytest

import stasis.errors
from stasis.errors import ExitCode, StasisError

KINDS = [
    kind
    for kind in vars(stasis.errors).values()
    if isinstance(kind, type) and issubclass(kind, StasisError) and kind is not StasisError
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_survives_the_way_through_a_dictionary(kind: type[StasisError]) -> None:
    error = kind("disk0 is busy", hint="Detach it first.")
    copy = StasisError.from_dict(error.as_dict())
    assert type(copy) is kind
    assert copy.as_dict() == error.as_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_own_exit_code_and_errno(kind: type[StasisError]) -> None:
    error = kind("failed")
    assert error.exit_code not in (ExitCode.OK, ExitCode.FAILURE)
    assert error.errno in errno.errorcode
    assert [other for other in KINDS if other.default_exit_code is error.exit_code] == [kind]


def test_one_error_can_carry_another_errno_and_code() -> None:
    error = StasisError("failed", errno=errno.ENODEV, exit_code=ExitCode.NOT_FOUND)
    copy = StasisError.from_dict(error.as_dict())
    assert (copy.errno, copy.exit_code) == (errno.ENODEV, ExitCode.NOT_FOUND)


def test_an_error_of_a_newer_version_is_still_a_failure() -> None:
    error = StasisError.from_dict({"error": "MoonPhaseError", "message": "full moon", "exit_code": 99})
    assert (str(error), error.exit_code) == ("full moon", ExitCode.FAILURE)


def test_every_kind_is_public() -> None:
    assert {kind.__name__ for kind in KINDS} < set(stasis.errors.__all__)
