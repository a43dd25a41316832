# SPDX-License-Identifier: Apache-2.0
"""Profiles of the AWS command line, which obstore does not read: ~/.aws/credentials and ~/.aws/config.

Who has configured `aws` expects its profile to hold here too; keys in the environment come first, as there.
"""

from __future__ import annotations

import configparser
from collections.abc import Mapping
from pathlib import Path

__all__ = ["endpoint", "settings"]

_CREDENTIALS = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key",
                "aws_session_token": "session_token"}
_CONFIG = {"region": "region", "endpoint_url": "endpoint"}


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What the profile says and the environment does not, by obstore's names."""
    profile = environment.get("AWS_PROFILE", "default")
    home = Path(environment.get("HOME", "/"))
    credentials = environment.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws" / "credentials"
    config = environment.get("AWS_CONFIG_FILE") or home / ".aws" / "config"
    found: dict[str, str] = {}
    if "AWS_ACCESS_KEY_ID" not in environment:
        found |= _section(Path(credentials), profile, _CREDENTIALS)
    section = profile if profile == "default" else f"profile {profile}"
    known = _section(Path(config), section, _CONFIG)
    if "AWS_REGION" in environment or "AWS_DEFAULT_REGION" in environment:
        known.pop("region", None)
    if "AWS_ENDPOINT_URL" in environment or "AWS_ENDPOINT_URL_S3" in environment:
        known.pop("endpoint", None)
    return found | known


def endpoint(environment: Mapping[str, str], config: Mapping[str, str]) -> str:
    """The server that is not Amazon's, "" where none is named."""
    named = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    return named or config.get("endpoint", "")


def _section(path: Path, section: str, names: Mapping[str, str]) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(path.read_text())
    except (OSError, UnicodeDecodeError, configparser.Error):
        return {}  # no profile is no error: the credentials may come from the machine's role
    values = parser[section] if parser.has_section(section) else {}
    return {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
