"""``python -m xsd.cli``: the same command without the script, as torchrun and a supervised
extraction start it."""

import sys

from xsd.cli import app

sys.exit(app.run())
