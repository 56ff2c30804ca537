"""Numbers on a page come from ``results.json`` alone. A path walks the nested results with slashes,
``levels/L4/accept@0.90/value`` (list items by number); a number is drawn as ``<span data-key="path"
data-format=".2f">1.23</span>``, so that each can be held against the file."""

import math
import re
from collections.abc import Mapping
from typing import Any

from bs4 import BeautifulSoup
from markupsafe import Markup

from xsd.core import XsdError, printable


class ReportError(XsdError):
    """A report asks for a number that the results do not hold, or shows one that is not theirs."""


def plain(values: Any) -> Any:
    """Nested results as JSON can hold them: arrays as lists, numpy scalars as numbers, NaN and
    infinities as null, keys as texts."""
    if isinstance(values, Mapping):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    if hasattr(values, "tolist"):
        return plain(values.tolist())
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    return values if values is None or isinstance(values, (str, int, bool)) else str(values)


def _walk(results: Mapping[str, Any], path: str) -> list[Any]:
    """What stands along a path, the results first, the value last."""
    nodes, steps, depth = [results], path.split("/"), 0
    while depth < len(steps):
        here, step = nodes[-1], steps[depth]
        if isinstance(here, Mapping):  # an adapter's path is a name with slashes
            longer = ("/".join(steps[depth:end]) for end in range(len(steps), depth, -1))
            step = next((name for name in longer if name in here), step)
        try:
            nodes.append(here[int(step)] if isinstance(here, list) else here[step])
            depth += 1 + step.count("/")
        except (KeyError, IndexError, ValueError, TypeError):
            there = ", ".join(map(str, here)) if isinstance(here, Mapping) else type(here).__name__
            raise ReportError(f"the results hold nothing at {path!r}: no {step!r} under "
                              f"{'/'.join(steps[:depth]) or 'the top'} (there: {there})") from None
    return nodes


def lookup(results: Mapping[str, Any], path: str) -> Any:
    """The value at a path. Raises: ReportError naming the missing step and what stands there."""
    return _walk(results, path)[-1]


def written(value: Any, form: str = "") -> str:
    """A value as it stands on the page, None as an en dash. form: Python's format, ``x`` after it
    for a ratio (``.2fx`` → 1.07×)."""
    if value is None:
        return "–"
    return printable(f"{value:{form[:-1]}}×" if form.endswith("x") else f"{value:{form}}")


def number(results: Mapping[str, Any], path: str, form: str = "") -> Markup:
    """HTML of one number, marked with its path, format and kind: measured, predicted or quoted, as
    the ``kind`` nearest above it says, else measured. Raises: ReportError."""
    *above, value = _walk(results, path)
    kinds = ["measured", *(node.get("kind") for node in above if isinstance(node, Mapping))]
    kind = [one for one in kinds if one in ("measured", "predicted", "quoted")][-1]
    if isinstance(value, (Mapping, list)):
        raise ReportError(f"{path!r} of the results is not one number but a "
                          f"{type(value).__name__}; name one inside it")
    return Markup('<span class="number {}" data-key="{}" data-format="{}">{}</span>').format(
        kind, path, form, written(value, form))


def cell(results: Mapping[str, Any], path: str, form: str = "") -> Markup:
    """HTML of a number in a table: its interval where there is one, a dash where it is absent."""
    try:
        node = lookup(results, path)
    except ReportError:
        return Markup("–")
    if not isinstance(node, Mapping):
        return number(results, path, form)
    shown = number(results, f"{path}/value", form)
    if node["value"] is None or node.get("low") is None or node.get("high") is None:
        return shown
    low, high = (number(results, f"{path}/{end}", form) for end in ("low", "high"))
    return shown + Markup(" <small>[{}, {}]</small>").format(low, high)


# --- the check of a finished page

_STRAY = re.compile(r"(?<![\w.@/-])[-+−]?\d+(?:[.,]\d+)*\s?[%×]?(?![\w-])")
_ELSEWHERE = re.compile(r"""url\(\s*["']?\s*(?:https?:)?//|@import""", re.IGNORECASE)
_LOADING = ("src", "srcset", "poster", "data", "action")


def disagreements(page: str, results: Mapping[str, Any]) -> list[str]:
    """Every number of a page that is not what ``results`` say, and every number in running text
    that is not marked; empty when the page is true. Scripts, code, and regions marked
    ``data-plain`` (token texts, provenance) are left out."""
    read = BeautifulSoup(page, "html.parser")
    marked, found = read.select("[data-key]"), []
    for one in marked:
        expected = written(lookup(results, one["data-key"]), one["data-format"])
        if (shown := one.get_text()) != expected:
            found.append(f"{one['data-key']} is shown as {shown!r} but the results say "
                         f"{expected!r}")
    for quiet in (*marked, *read.select("script, style, code, title, [data-plain]")):
        quiet.extract()
    return found + [f"{stray.group(0)!r} in {text.strip()[:80]!r} is not taken from the results"
                    for text in read.strings for stray in _STRAY.finditer(text)]


def external_requests(page: str) -> list[str]:
    """What an HTML page would load from elsewhere when opened (links that a reader may click do not
    count); empty for an offline page."""
    read, loads = BeautifulSoup(page, "html.parser", multi_valued_attributes=None), []
    for tag in read.find_all(True):
        for name, value in tag.attrs.items():
            loading = name in _LOADING or (name == "href" and tag.name in ("link", "use", "image"))
            if (loading and re.match(r"\s*(?:https?:)?//", value)) or (
                    name == "style" and _ELSEWHERE.search(value)):
                loads.append(f"<{tag.name} {name}={value[:100]!r}>")
    return loads + [match.group(0) for style in read.find_all("style")
                    for match in _ELSEWHERE.finditer(style.get_text())]
