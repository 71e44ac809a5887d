# SPDX-License-Identifier: Apache-2.0
"""`python -m valve_operator`."""

import sys

from valve_operator.main import main

sys.exit(main())
