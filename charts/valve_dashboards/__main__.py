# SPDX-License-Identifier: Apache-2.0
"""`python -m valve_dashboards`: write charts/valve/dashboards/*.json.

A test compares what is committed with what this would write. Threading model: none.
"""

from __future__ import annotations

import sys
from pathlib import Path

from valve_dashboards.boards import BOARDS
from valve_dashboards.grafana import to_json

FOLDER = Path(__file__).resolve().parents[1] / "valve" / "dashboards"


def files() -> dict[Path, str]:
    """Path -> contents of everything that is generated."""
    return {FOLDER / f"{board.uid}.json": to_json(board) for board in BOARDS}


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
