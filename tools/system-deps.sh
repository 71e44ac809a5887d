#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What Valve needs from the system: a C compiler with headers, Python >= 3.11 with venv, and libnuma for
# vLLM's CPU build (without it vLLM imports, and fails at the first kernel).
# As root on Debian or Ubuntu it installs what is missing; elsewhere it says what to install.
set -eu
. "$(dirname "$0")/install-missing.sh"
python=${1:-python3}
missing=
command -v cc >/dev/null 2>&1 || missing="$missing gcc libc6-dev"
command -v "$python" >/dev/null 2>&1 || missing="$missing python3"
PATH=$PATH:/sbin ldconfig -p 2>/dev/null | grep -q 'libnuma\.so\.1' || missing="$missing libnuma1"
"$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || missing="$missing python3-venv"
install_missing Valve "$missing"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Valve needs Python 3.11 or newer; $python is $("$python" -V). Run make PYTHON=/path/to/python3." >&2
    exit 1
}
