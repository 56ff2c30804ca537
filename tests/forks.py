"""A process that starts at once, with everything imported already: what the kill tests kill."""

import os


def forked(action):
    """Run ``action`` in a forked process; returns its process id."""
    child = os.fork()
    if not child:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return child
