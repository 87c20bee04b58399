"""`python -m mole` is the command `mole`."""

import sys

from mole.cli import main

sys.exit(main())
