"""``python -m fastperc``."""

import sys

from fastperc.cli import main

sys.exit(main())
