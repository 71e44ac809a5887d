#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What the test cluster needs from the system: runc, CNI plugins, a static busybox, debootstrap, iproute2, openssl.
# As root on Debian or Ubuntu it installs what is missing; elsewhere it says what to install.
set -eu
. "$(dirname "$0")/install-missing.sh"
missing=
need() {  # need COMMAND PACKAGE
    PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need runc runc
need busybox busybox-static
need debootstrap debootstrap
need ip iproute2
need nsenter util-linux
need openssl openssl
need cc "gcc libc6-dev"
[ -x /usr/lib/cni/bridge ] || [ -x /opt/cni/bin/bridge ] || missing="$missing containernetworking-plugins"
install_missing "The test cluster" "$missing"
