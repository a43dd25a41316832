#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# dracut's hook before the root is mounted.
[ ! -x /usr/lib/stasis-track-early ] || /usr/lib/stasis-track-early
