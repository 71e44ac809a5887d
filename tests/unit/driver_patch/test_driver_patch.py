# SPDX-License-Identifier: Apache-2.0
"""The driver patch: found whatever the white space, one line changed, refused when anything else differs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from driver_source import CLIENT, ENUM, ESCAPES, VALIDATE, write_tree

PROGRAM = Path(__file__).parents[3] / "driver_patch" / "patch_driver.py"
CONDITION = "if (pClient->pOSInfo != pSecInfo->clientOSInfo)"
PATCHED = "if (pClient->pOSInfo != pSecInfo->clientOSInfo && pSecInfo->privLevel < RS_PRIV_LEVEL_USER_ROOT)"


def run(tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, tree, *options], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("branch", ["535", "550", "570", "580", "595"])
def test_the_diff_changes_one_line_and_no_file(tmp_path: Path, branch: str) -> None:
    done = run(write_tree(tmp_path, f"{branch}.10.02"))
    assert done.returncode == 0, done.stderr
    changed = [
        line for line in done.stdout.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert changed == ["-            " + CONDITION, "+            " + PATCHED]
    assert done.stdout.startswith(f"--- a/{CLIENT}\n+++ b/{CLIENT}\n@@ ")
    assert f"driver {branch}.10.02" in done.stderr
    assert "not applied" in done.stderr
    assert (tmp_path / CLIENT).read_text() == VALIDATE


def test_apply_and_apply_again(tmp_path: Path) -> None:
    write_tree(tmp_path)
    (tmp_path / CLIENT).chmod(0o640)
    assert run(tmp_path, "--apply").returncode == 0
    assert (tmp_path / CLIENT).read_text() == VALIDATE.replace(CONDITION, PATCHED)
    assert (tmp_path / CLIENT).stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in (tmp_path / CLIENT).parent.iterdir()) == ["client.c"]
    again = run(tmp_path, "--apply")
    assert (again.returncode, again.stdout) == (0, "")
    assert "is there already" in again.stderr
    assert (tmp_path / CLIENT).read_text() == VALIDATE.replace(CONDITION, PATCHED)


@pytest.mark.parametrize(
    ("what", "client"),
    [
        (
            "other white space",
            VALIDATE.replace(CONDITION, "if(pClient->pOSInfo\n  !=pSecInfo->clientOSInfo)"),
        ),
        ("other names of the parameters", VALIDATE.replace("pClient", "c").replace("pSecInfo", "who")),
        ("comments in between", VALIDATE.replace(CONDITION, CONDITION.replace("!=", "/* ) { */ != // )\n"))),
        ("the lines end as on Windows", VALIDATE.replace("\n", "\r\n")),
        ("more code before it", "int before(void) { return 1; }\n" * 50 + VALIDATE),
    ],
)
def test_found_by_structure(tmp_path: Path, what: str, client: str) -> None:
    done = run(write_tree(tmp_path, client=client), "--apply")
    assert done.returncode == 0, done.stderr
    with (tmp_path / CLIENT).open(newline="") as file:
        text = file.read()
    assert text.count("->privLevel < RS_PRIV_LEVEL_USER_ROOT)") == 1
    assert text.count("\r") == client.count("\r")
    assert len(text.splitlines()) == len(client.splitlines())


REFUSALS = [
    ("the comparison is inverted", "client", "pOSInfo !=", "pOSInfo ==", "compare"),
    ("no strict mode", "client", "_STRICT", "", "compare"),
    ("a condition was added", "client", CONDITION, CONDITION[:-1] + " && x)", "another way"),
    ("root passes already", "client", "< RS_PRIV_LEVEL_KERNEL", "< RS_PRIV_LEVEL_USER_ROOT", "another way"),
    ("another error", "client", "= NV_ERR_INVALID_CLIENT", "= NV_ERR_BUSY", "another way"),
    ("something follows", "client", "    return status;", "    log(); return status;", "another way"),
    ("compared twice", "client", "NV_OK;", "pClient->pOSInfo ? 1 : 0;", "compare"),
    ("conditional code", "client", "        else if", "#ifdef X\n        else if", "preprocessor"),
    ("another signature", "client", "    RmClient *pClient,", "    RmClient *pClient, int x,", "takes ("),
    ("no such function", "client", "rmclientValidate_IMPL\n", "rmclientValidate\n", "0 definitions"),
    ("two of them", "client", VALIDATE, VALIDATE + VALIDATE, "2 definitions"),
    ("cut off", "client", VALIDATE[VALIDATE.index("else if") :], "", "not closed"),
    ("not C", "client", "int other", "int @\x01\u00a7 'other", "not understood"),
    ("the level is a constant", "escape", "osIsAdministrator() ? ", "1 ? ", "osIsAdministrator"),
    ("the level is set again", "escape", "return", "secInfo.privLevel = 2; return", "osIsAdministrator"),
    ("another order of levels", "levels", ENUM[15:], "RS_PRIV_LEVEL_KERNEL, RS_PRIV_LEVEL_USER }", "levels"),
]
STOCK = {"client": VALIDATE, "escape": ESCAPES, "levels": ENUM}


@pytest.mark.parametrize(
    ("what", "file", "old", "new", "says"), REFUSALS, ids=[row[0].replace(" ", "-") for row in REFUSALS]
)
def test_refused(tmp_path: Path, what: str, file: str, old: str, new: str, says: str) -> None:
    assert old in STOCK[file], "the table is wrong: nothing would change"
    write_tree(tmp_path, **{file: STOCK[file].replace(old, new)})
    before = (tmp_path / CLIENT).read_bytes()
    done = run(tmp_path, "--apply")
    assert (done.returncode, done.stdout) == (2, ""), what
    assert done.stderr.startswith("patch_driver.py: refused: ")
    assert says in done.stderr
    assert (tmp_path / CLIENT).read_bytes() == before


def test_an_unknown_branch_is_refused(tmp_path: Path) -> None:
    done = run(write_tree(tmp_path, "610.20"))
    assert done.returncode == 2
    assert "never looked at (known: 535, 550, 570, 580, 595)" in done.stderr


def test_a_folder_that_is_no_driver(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    assert "must be the top of a tree" in done.stderr
