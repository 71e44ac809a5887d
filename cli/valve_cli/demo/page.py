# SPDX-License-Identifier: Apache-2.0
"""stub"""

from typing import Any


def write_html(*a: Any) -> None: ...
