"""What nbval compares, and a tolerance for floats that it does not have itself (integers and words
stay exact)."""

import math
import re

FLOAT = re.compile(r"(?<![\w.])[-+]?(?:\d+\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|nan|inf)")
RELATIVE, ABSOLUTE = 1e-3, 1e-6
NEVER_COMPARED = (
    "text/html",
    "application/javascript",
    "application/vnd.plotly.v1+json",
    "application/vnd.jupyter.widget-view+json",
    "stderr",
)


class Close(str):
    """Text that equals another when the words agree and the floats are within 0.1 %."""

    __slots__ = ()

    def __eq__(self, other):
        if not isinstance(other, str):
            return NotImplemented
        if str.__eq__(self, other):
            return True
        ours, theirs = FLOAT.findall(self), FLOAT.findall(other)
        if _frame(self) != _frame(other) or len(ours) != len(theirs):
            return False
        return all(a == b or math.isclose(float(a), float(b), rel_tol=RELATIVE, abs_tol=ABSOLUTE)
                   for a, b in zip(ours, theirs, strict=True))

    def __ne__(self, other):
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    __hash__ = str.__hash__


def _frame(text):
    return re.sub(r"\s+", " ", FLOAT.sub("#", text))


def pytest_collectstart(collector):
    """Outputs that differ between equal runs are executed but not compared."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += NEVER_COMPARED


def pytest_itemcollected(item):
    """Give every notebook cell the tolerance (nbval 0.11 compares what ``sanitize`` returns)."""
    if type(item).__name__ == "IPyNbCell":
        exact = item.sanitize
        item.sanitize = lambda text: Close(exact(text)) if isinstance(text, str) else exact(text)
