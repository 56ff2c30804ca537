"""What a finished page draws in its pictures, held against the results."""

import json
import re

_PLOT = re.compile(r'class="figure" data-at="([^"]+)">')


def _values(node):
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        return [value for one in node for value in _values(one)]
    return [float(node)] if isinstance(node, (int, float)) and not isinstance(node, bool) else []


def picture_disagreements(page, results):
    """Every number drawn in a picture of a page that ``results`` do not hold; empty when the
    pictures are true.

    Looked at: x and y, a bar's start and end, the ends of error bars. Results in seconds may be
    drawn in milliseconds.
    """
    held = {f"{value * scale:.6g}" for value in _values(results) for scale in (1, 1e3)} | {"0"}
    found = []
    for plot in _PLOT.finditer(page):
        drawn, _ = json.JSONDecoder().raw_decode(page[plot.end():])
        for trace in drawn["data"]:
            along = "x" if trace.get("orientation") == "h" else "y"
            starts = trace.get("base") or []
            for axis in ("x", "y"):
                drawn = _values(trace.get(axis))
                if starts and axis == along:
                    ends = [start + length for start, length in zip(starts, drawn, strict=True)]
                    drawn = [*starts, *ends]
                errors = trace.get(f"error_{axis}", {})
                for name, sign in (("array", 1), ("arrayminus", -1)):
                    pairs = zip(trace.get(axis, ()), errors.get(name) or [], strict=False)
                    drawn += [value + sign * error for value, error in pairs if error is not None]
                found += [f"{plot.group(1)} draws {value:.6g} in {trace.get('name')!r}, which is "
                          "not in the results" for value in drawn if f"{value:.6g}" not in held]
    return found
