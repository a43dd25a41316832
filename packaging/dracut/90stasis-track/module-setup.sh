#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Puts into the initramfs what starts tracking before the root is mounted. See `man stasis-track`.

STASIS=${STASIS:-/usr/local/bin/stasis}
STATE=${STASIS_STATE_DIR:-/var/lib/stasis}

check() {
    [ -x "$STASIS" ] && [ -d "$STATE/live" ]
}

depends() {
    return 0
}

install() {
    local python list file
    python=$(sed -n '1s/^#![[:space:]]*//p' "$(readlink -f "$STASIS")")
    if ! list=$("$python" -m stasis.live.initramfs "$STATE"); then
        dwarn "stasis-track: tracking will not start in the initramfs"
        return 0
    fi
    while read -r file; do
        inst "$file"
        # dracut finds the libraries of what is executable, which Debian's modules of Python are not
        case $file in *.so) chmod 755 "$initdir$file" ;; esac
    done <<< "$list"
    "$python" -m stasis.live.initramfs --script "$STATE" > "$initdir/usr/lib/stasis-track-early"
    chmod 755 "$initdir/usr/lib/stasis-track-early"
    inst_hook pre-mount 10 "$moddir/stasis-track.sh"
}
