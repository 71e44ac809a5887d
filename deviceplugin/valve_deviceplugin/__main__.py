# SPDX-License-Identifier: Apache-2.0
"""`python -m valve_deviceplugin`."""

import sys

from valve_deviceplugin.main import main

sys.exit(main())
