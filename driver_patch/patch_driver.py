#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The optional one-line patch of NVIDIA's open kernel modules, found by structure.

    python3 driver_patch/patch_driver.py SOURCE            show the change as a diff for `git apply`
    python3 driver_patch/patch_driver.py SOURCE --apply    make it

Why it exists: a stock driver lets a process control a channel only through the open file that made it.
Valve's agent gets that file from the tenant (route `agent`), so most sites need no patch; README.md says
who does, and what the change relaxes. A patch file per release would be thirty files and still miss the
next one. This program reads the sources, checks every fact that the change relies on, and refuses when
one of them does not hold.

Standard library only; no threads; writes one file, and only with --apply. Called by an administrator.

Exit status: 0 the diff was printed, or applied, or is there already; 2 refused, with the reason.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import csource
from csource import SourceError, Token

BRANCHES = ("535", "550", "570", "580", "595")
"""Branches whose sources were read; each has the check in the same shape."""

VERSION = Path("version.mk")
CLIENT = Path("src/nvidia/src/kernel/rmapi/client.c")
ESCAPE = Path("src/nvidia/arch/nvalloc/unix/src/escape.c")
LEVELS = Path("src/common/sdk/nvidia/inc/nvsecurityinfo.h")
ROOT_LEVEL = "RS_PRIV_LEVEL_USER_ROOT"


class Refused(Exception):
    """The sources are not as expected; nothing was changed. The message says what differs."""


class Change(NamedTuple):
    version: str
    line: int
    before: str
    after: str

    @property
    def needed(self) -> bool:
        return self.before != self.after

    def diff(self) -> str:
        """A unified diff that `git apply` and `patch -p1` take. Empty when nothing is to be done."""
        return "".join(
            difflib.unified_diff(
                self.before.splitlines(keepends=True),
                self.after.splitlines(keepends=True),
                f"a/{CLIENT.as_posix()}",
                f"b/{CLIENT.as_posix()}",
            )
        )


def plan(source: Path) -> Change:
    """The change for one tree of the open kernel modules. Raises Refused."""
    version = _version(_read(source, VERSION))
    client = _read(source, CLIENT)
    try:
        _check_levels(csource.tokens(_read(source, LEVELS)))
        _check_caller_level(csource.tokens(_read(source, ESCAPE)))
        place, present = _find(csource.tokens(client))
    except SourceError as error:
        raise Refused(f"{source}: {error}") from error
    line = csource.line_of(client, place.at)
    if present:
        return Change(version, line, client, client)
    security = _security_name(csource.tokens(client))
    addition = f" && {security}->privLevel < {ROOT_LEVEL}"
    return Change(version, line, client, client[: place.at] + addition + client[place.at :])


def apply(source: Path, change: Change) -> None:
    """Write the changed file beside its place and rename it. Raises Refused if it changed since `plan`."""
    target = source / CLIENT
    if _read(source, CLIENT) != change.before:
        raise Refused(f"{target} changed while it was looked at: run again")
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".valve-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(change.after)
        os.chmod(name, target.stat().st_mode & 0o7777)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _read(source: Path, path: Path) -> str:
    try:
        with (source / path).open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(
            f"{source / path} cannot be read ({error}): SOURCE must be the top of a tree of NVIDIA's open "
            "GPU kernel modules, of exactly the installed driver's version"
        ) from error


def _version(text: str) -> str:
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "NVIDIA_VERSION":
            version = value.strip()
            if version.split(".")[0] in BRANCHES:
                return version
            raise Refused(
                f"driver {version}: its branch was never looked at (known: {', '.join(BRANCHES)}). "
                "The route `agent` needs no patch; see driver_patch/README.md"
            )
    raise Refused(f"{VERSION} names no NVIDIA_VERSION: is SOURCE the top of the tree?")


def _check_levels(tokens: Sequence[Token]) -> None:
    """USER < USER_ROOT < KERNEL, as an enumeration without values of its own."""
    order = ["RS_PRIV_LEVEL_USER", ",", ROOT_LEVEL, ",", "RS_PRIV_LEVEL_KERNEL"]
    if len(csource.find(tokens, order)) != 1:
        raise SourceError(f"{LEVELS}: the privilege levels are not USER < USER_ROOT < KERNEL")


def _check_caller_level(tokens: Sequence[Token]) -> None:
    """The level of an ioctl is its caller's: what makes the change safe for unprivileged processes."""
    line = ["secInfo", ".", "privLevel", "=", "osIsAdministrator", "(", ")", "?",
            ROOT_LEVEL, ":", "RS_PRIV_LEVEL_USER", ";"]  # fmt: skip
    _, body = csource.function(tokens, "RmIoctl")
    if len(csource.find(body, line)) != 1 or len(csource.find(body, ["privLevel", "="])) != 1:
        raise SourceError(f"{ESCAPE}: RmIoctl does not take the privilege level from osIsAdministrator()")


def _security_name(tokens: Sequence[Token]) -> str:
    parameters, _ = csource.function(tokens, "rmclientValidate_IMPL")
    return parameters[-1].text


def _find(tokens: Sequence[Token]) -> tuple[Token, bool]:
    """The bracket that closes the condition to change, and whether it is changed already.

    The function must be, declarations and white space apart:

        if (... VALIDATE_CLIENT_HANDLE ...) {
            if (... VALIDATE_CLIENT_HANDLE_STRICT ... && security->clientOSInfo != NULL) {
                if (client->pOSInfo != security->clientOSInfo) { status = NV_ERR_INVALID_CLIENT; }
            } else if (security->privLevel < RS_PRIV_LEVEL_KERNEL) { status = ...Check(client, security); }
        }
        return status;
    """
    parameters, body = csource.function(tokens, "rmclientValidate_IMPL")
    words = csource.texts(parameters)
    if len(words) != 8 or words[:2] + words[3:7] != [
        "RmClient", "*", ",", "const", "API_SECURITY_INFO", "*",
    ]:  # fmt: skip
        raise SourceError(f"rmclientValidate_IMPL takes ({' '.join(words)}): not as expected")
    client, security = words[2], words[7]
    if "#" in csource.texts(body):
        raise SourceError("rmclientValidate_IMPL contains preprocessor lines: not as expected")
    member = [security, "->", "clientOSInfo"]
    compared = [client, "->", "pOSInfo", "!=", *member]
    refuse = [")", "{", "status", "=", "NV_ERR_INVALID_CLIENT", ";", "}", "}", "else", "if", "(",
              security, "->", "privLevel", "<", "RS_PRIV_LEVEL_KERNEL", ")", "{", "status", "=",
              "_rmclientUserClientSecurityCheck", "(", client, ",", security, ")", ";", "}", "}",
              "return", "status", ";", "}"]  # fmt: skip
    before = [
        "PDB_PROP_SYS_VALIDATE_CLIENT_HANDLE_STRICT",
        ")",
        "&&",
        *member,
        "!=",
        "NULL",
        ")",
        "{",
        "if",
        "(",
        *compared,
    ]
    places = csource.find(body, before)
    if len(places) != 1 or len(csource.find(body, ["pOSInfo"])) != 1:
        raise SourceError(
            "rmclientValidate_IMPL does not compare the open file in the place that is expected"
        )
    end = places[0] + len(before)
    added = ["&&", security, "->", "privLevel", "<", ROOT_LEVEL]
    present = csource.texts(body[end : end + len(added)]) == added
    rest = csource.texts(body[end + (len(added) if present else 0) :])
    if rest != refuse:
        raise SourceError(
            "rmclientValidate_IMPL goes on in another way after it has compared the open file: "
            f"read {' '.join(rest[:12])} ..."
        )
    return body[end], present


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="patch_driver.py", description="The optional one-line patch of NVIDIA's open kernel modules."
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="top of the tree (has version.mk)")
    parser.add_argument("--apply", action="store_true", help="change the file; without it: print the diff")
    arguments = parser.parse_args(argv)
    try:
        change = plan(arguments.source)
        if change.needed and arguments.apply:
            apply(arguments.source, change)
    except Refused as error:
        print(f"patch_driver.py: refused: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(change.diff())
    done = (
        "is there already" if not change.needed else "applied" if arguments.apply else "not applied (--apply)"
    )
    print(f"driver {change.version}: {CLIENT}:{change.line}: {done}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
