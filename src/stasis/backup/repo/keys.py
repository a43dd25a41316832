# SPDX-License-Identifier: Apache-2.0
"""Who may open a repository: passphrases and key files, and the slots that wrap the repository key for each of them.

The repository key is random and never changes. A slot holds it encrypted by a key that scrypt makes from a secret, so
that secrets can be added and removed without touching any other object.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets as random_
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stasis.errors import PassphraseError, UsageError

__all__ = ["KEY_BYTES", "KeySlot", "Secret", "Secrets", "describe_slot", "open_slot", "seal_slot"]

KEY_BYTES = 32
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 16, 8, 1  # 64 MiB of memory; RFC 7914 section 2 explains the numbers
MOST_MEMORY = 128 << 20  # what a slot may ask for; more comes from somebody who wants to harm
MOST_P = 16
LARGEST_SECRET = 1 << 20

Prompt = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Secret:
    """What opens a repository. kind: "passphrase" or "key-file"."""

    value: bytes
    kind: str = "passphrase"

    def __repr__(self) -> str:
        return f"Secret({self.kind})"


@dataclass(frozen=True, slots=True)
class KeySlot:
    """One way into a repository, as `stasis key list` shows it."""

    id: str
    kind: str
    created: str
    host: str
    label: str


class Secrets:
    """Where secrets come from. Nothing is read, run or asked before it is needed, and then once."""

    def __init__(self, load: Callable[[], Secret] | None, *, prompt: Prompt | None = None) -> None:
        self._load = load
        self._prompt = prompt
        self._loaded: Secret | None = None

    @classmethod
    def none(cls) -> Secrets:
        """No secret: opens repositories without encryption only."""
        return cls(None)

    @classmethod
    def of(cls, secret: Secret | None) -> Secrets:
        """This secret and no other; None as `none`."""
        return cls(None if secret is None else lambda: secret)

    @classmethod
    def from_environment(cls, key_file: str | None = None, prompt: Prompt | None = None,
                         environment: Mapping[str, str] | None = None) -> Secrets:
        """A key file if one is named, else the first of STASIS_PASSPHRASE, STASIS_PASSPHRASE_FILE and
        STASIS_PASSPHRASE_COMMAND that is set, else what `prompt` answers."""
        known = os.environ if environment is None else environment
        if key_file is not None:
            return cls(lambda: Secret(_read(key_file), "key-file"), prompt=prompt)
        if (text := known.get("STASIS_PASSPHRASE")) is not None:
            return cls(lambda: _passphrase(text.encode(), "STASIS_PASSPHRASE"), prompt=prompt)
        if path := known.get("STASIS_PASSPHRASE_FILE"):
            return cls(lambda: _passphrase(_first_line(_read(path)), path), prompt=prompt)
        if command := known.get("STASIS_PASSPHRASE_COMMAND"):
            return cls(lambda: _passphrase(_first_line(_output(command)), "STASIS_PASSPHRASE_COMMAND"), prompt=prompt)
        return cls(None, prompt=prompt)

    @property
    def given(self) -> bool:
        """Whether the user named a secret, as opposed to being asked for one."""
        return self._load is not None

    def get(self, where: str) -> Secret:
        """The secret for the repository `where`. Raises PassphraseError when there is none."""
        if self._loaded is None:
            self._loaded = self._load() if self._load else self._ask(f"Passphrase of {where}: ", where)
        return self._loaded

    def get_new(self, where: str) -> Secret:
        """A secret for a new slot; one that is typed is asked for twice. Raises PassphraseError."""
        if self._load is not None:
            return self.get(where)
        secret = self._ask(f"New passphrase for {where}: ", where)
        if self._ask("The same once more: ", where) != secret:
            raise PassphraseError("the two passphrases differ", hint="type the same one twice")
        return secret

    def _ask(self, text: str, where: str) -> Secret:
        if self._prompt is None:
            raise PassphraseError(
                f"no passphrase for the repository {where}",
                hint="set STASIS_PASSPHRASE_FILE, STASIS_PASSPHRASE_COMMAND or STASIS_PASSPHRASE, or use --key-file")
        return _passphrase(self._prompt(text).encode(), "the terminal")


def seal_slot(repository_key: bytes, secret: Secret, *, name: str, label: str, created: str, host: str) -> bytes:
    """The content of a key slot that is stored under `name`."""
    salt, nonce = random_.token_bytes(32), random_.token_bytes(12)
    fields: dict[str, Any] = {
        "kind": secret.kind, "label": label, "created": created, "host": host, "kdf": "scrypt",
        "n": SCRYPT_N, "r": SCRYPT_R, "p": SCRYPT_P, "salt": salt.hex(), "nonce": nonce.hex(),
    }
    wrapping = AESGCM(_scrypt(secret, salt, SCRYPT_N, SCRYPT_R, SCRYPT_P))
    fields["wrapped"] = wrapping.encrypt(nonce, repository_key, _bound(name, fields)).hex()
    return json.dumps(fields, sort_keys=True).encode()


def open_slot(content: bytes, secret: Secret, *, name: str) -> bytes | None:
    """The repository key, None when the secret is not this slot's. Raises ValueError when it is no key slot."""
    fields = _fields(content)
    n, r, p = (_number(fields, key) for key in "nrp")
    if fields["kdf"] != "scrypt" or 128 * n * r > MOST_MEMORY or p > MOST_P or n & (n - 1):
        raise ValueError("its key derivation is not one of ours")
    if fields["kind"] != secret.kind:
        return None
    wrapped, nonce, salt = (bytes.fromhex(fields[key]) for key in ("wrapped", "nonce", "salt"))
    if len(nonce) != 12 or len(wrapped) != KEY_BYTES + 16:
        raise ValueError("its lengths are wrong")
    try:
        return AESGCM(_scrypt(secret, salt, n, r, p)).decrypt(nonce, wrapped, _bound(name, fields))
    except InvalidTag:
        return None


def describe_slot(content: bytes, name: str) -> KeySlot:
    """What can be shown of a slot. Raises ValueError when it is no key slot."""
    fields = _fields(content)
    return KeySlot(name.rpartition("/")[2], *(fields[key] for key in ("kind", "created", "host", "label")))


def _fields(content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except RecursionError as error:  # anybody who can write to the store can make such a slot
        raise ValueError("it is no key slot") from error
    texts = ("kind", "label", "created", "host", "kdf", "salt", "nonce", "wrapped")
    if not isinstance(fields, dict) or not all(isinstance(fields.get(key), str) for key in texts):
        raise ValueError("it is no key slot")
    return fields


def _number(fields: dict[str, Any], key: str) -> int:
    value = fields.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"its {key} is no number")
    return value


def _bound(name: str, fields: Mapping[str, Any]) -> bytes:
    """What the wrapping vouches for besides the key: where the slot lies and all that it says."""
    shown = {key: value for key, value in fields.items() if key != "wrapped"}
    return name.encode() + b"\0" + json.dumps(shown, sort_keys=True).encode()


def _scrypt(secret: Secret, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(secret.value, salt=salt, n=n, r=r, p=p, maxmem=MOST_MEMORY + (1 << 20), dklen=KEY_BYTES)


def _passphrase(value: bytes, source: str) -> Secret:
    if not value:
        raise PassphraseError(f"the passphrase from {source} is empty", hint="an empty passphrase protects nothing")
    return Secret(value)


def _first_line(text: bytes) -> bytes:
    return text.split(b"\n", 1)[0].rstrip(b"\r")


def _read(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            value = file.read(LARGEST_SECRET + 1)
    except OSError as error:
        raise PassphraseError(f"{path}: {error.strerror}", hint="the file must exist and be readable") from error
    if not value or len(value) > LARGEST_SECRET:
        raise PassphraseError(f"{path} is empty or larger than 1 MiB", hint="a key file holds 32 random bytes or more")
    return value


def _output(command: str) -> bytes:
    """What a command prints; it is not run by a shell."""
    try:
        arguments = shlex.split(command)
        return subprocess.run(arguments, stdout=subprocess.PIPE, check=True).stdout
    except (ValueError, IndexError) as error:
        raise UsageError("STASIS_PASSPHRASE_COMMAND cannot be split into words", hint="check its quotes") from error
    except (OSError, subprocess.CalledProcessError) as error:
        how = error.strerror if isinstance(error, OSError) else f"status {error.returncode}"
        raise PassphraseError(f"STASIS_PASSPHRASE_COMMAND failed: {arguments[0]}: {how}",
                              hint="run it by hand; it must print the passphrase") from error

