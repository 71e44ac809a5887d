# SPDX-License-Identifier: Apache-2.0
"""stub"""

from typing import Any


async def valve_phase(*a: Any) -> Any:
    raise NotImplementedError
