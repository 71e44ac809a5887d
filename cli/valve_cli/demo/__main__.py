# SPDX-License-Identifier: Apache-2.0
"""`python -m valve_cli.demo`, the same as `valve demo`."""

import sys

from valve_cli.demo.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
