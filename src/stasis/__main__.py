# SPDX-License-Identifier: Apache-2.0
"""`python -m stasis` is the `stasis` command, for an environment whose scripts are not on PATH."""

import sys

from stasis.cli.start import stasis

if __name__ == "__main__":
    sys.exit(stasis())
