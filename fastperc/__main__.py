"""``python -m fastperc``: the command line."""

import sys

from fastperc.cli import main

sys.exit(main())
