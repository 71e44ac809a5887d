# SPDX-License-Identifier: Apache-2.0
"""The cgroups that a node's pods live in, in every hierarchy of the machine (v1: one each; v2: one).

The supervisor's janitor removes them (supervisor.remove_cgroups).
"""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def create(name: str) -> None:
    """Make the cgroup `name` at the top of every hierarchy, ready to have children with every controller."""
    for top in hierarchies():
        folder = top / name
        folder.mkdir(exist_ok=True)
        for setting in ("cpuset.mems", "cpuset.cpus"):  # v1: empty in a new cgroup, and nothing may enter it
            if (folder / setting).exists() and (top / "cgroup.controllers").exists() is False:
                (folder / setting).write_text((top / setting).read_text())
        if (top / "cgroup.controllers").exists() and (top / "cgroup.controllers").read_text().strip():
            for group in (top, folder):
                wanted = (group / "cgroup.controllers").read_text().split()
                (group / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in wanted))


def hierarchies() -> list[Path]:
    """The top folders: /sys/fs/cgroup itself with v2 alone, else one folder per controller set."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return sorted(path for path in CGROUPS.iterdir() if path.is_dir() and not path.is_symlink())
