# SPDX-License-Identifier: Apache-2.0
# To be sourced.  install_missing WHO " PACKAGE ...": as root on Debian or Ubuntu installs the packages;
# elsewhere says what WHO needs and ends.
install_missing() {
    [ -n "$2" ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "installing$2"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $2 >/dev/null
    else
        echo "$1 needs:$2" >&2
        echo "Install them (Debian, Ubuntu: apt-get install$2) and run make again." >&2
        exit 1
    fi
}
