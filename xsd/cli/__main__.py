"""``python -m xsd.cli``: the same command without the script, as torchrun and a supervised
extraction start it."""

import sys

from xsd.cli import door

if __name__ == "__main__":  # not in the processes of a sweep
    sys.exit(door.main())
