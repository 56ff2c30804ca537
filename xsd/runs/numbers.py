"""Numbers on a page come from ``results.json`` and from nowhere else: lookup by path, formatting,
marking, and the check of a finished page.

A path walks the nested results with slashes, ``levels/L4/accept@0.90/value``; list items are
numbered from 0. A number is drawn as ``<span data-key="path" data-format=".2f">1.23</span>``, so
that a test (or a reader) can hold each one against the file.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from typing import Any

from xsd.core import XsdError


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


def lookup(results: Mapping[str, Any], path: str) -> Any:
    """The value at a path. Raises: ReportError naming the step that is missing and what stands
    there instead."""
    here: Any = results
    walked: list[str] = []
    for step in path.split("/"):
        try:
            here = here[int(step)] if isinstance(here, list) else here[step]
        except (KeyError, IndexError, ValueError, TypeError):
            there = ", ".join(map(str, here)) if isinstance(here, Mapping) else type(here).__name__
            raise ReportError(
                f"the results hold nothing at {path!r}: no {step!r} under "
                f"{'/'.join(walked) or 'the top'} (there: {there})"
            ) from None
        walked.append(step)
    return here


def written(value: Any, spec: str = "") -> str:
    """A value as it stands on the page. spec: Python's format, ``x`` after it for a ratio (``.2fx``
    → 1.07×); None and NaN become an en dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if spec.endswith("x"):
        return f"{value:{spec[:-1]}}×"
    return f"{value:{spec}}"


def kind_of(results: Mapping[str, Any], path: str) -> str:
    """measured, predicted or quoted: the ``kind`` nearest above the value, else measured."""
    steps = path.split("/")
    for length in range(len(steps) - 1, -1, -1):
        node = lookup(results, "/".join(steps[:length])) if length else results
        if isinstance(node, Mapping) and node.get("kind") in ("measured", "predicted", "quoted"):
            return str(node["kind"])
    return "measured"


def number(results: Mapping[str, Any], path: str, spec: str = "") -> str:
    """HTML of one number, marked with its path, format and kind. Raises: ReportError if it is not
    in the results."""
    value = lookup(results, path)
    if isinstance(value, (Mapping, list)):
        raise ReportError(
            f"{path!r} of the results is not one number but a {type(value).__name__}; name one "
            "inside it"
        )
    kind = kind_of(results, path)
    shown = html.escape(written(value, spec))
    key, form = html.escape(path, quote=True), html.escape(spec, quote=True)
    return f'<span class="number {kind}" data-key="{key}" data-format="{form}">{shown}</span>'


_FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")


def prose(results: Mapping[str, Any], text: str) -> str:
    """Escaped text in which ``{path:format}`` becomes a marked number; ``**bold**`` and `` `code`
    `` are honoured."""
    parts, end = [], 0
    for found in _FIELD.finditer(text):
        parts.append(html.escape(text[end:found.start()], quote=False))
        parts.append(number(results, found.group(1).strip(), found.group(2) or ""))
        end = found.end()
    parts.append(html.escape(text[end:], quote=False))
    joined = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", "".join(parts))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", joined)


_STRAY = re.compile(r"(?<![\w.@/-])[-+−]?\d+(?:[.,]\d+)*\s?[%×]?(?![\w-])")
_VOID = {"img", "br", "hr", "meta", "link", "input", "source", "col", "wbr"}


class _Page(HTMLParser):
    """Marked numbers with their text, and the text that stands outside marked numbers, scripts,
    code and plain regions."""
    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, bool]] = []
        self.marked: list[tuple[str, str, str]] = []
        self.loose: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            return
        given = dict(attrs)
        hidden = (tag in ("script", "style", "code", "title") or "data-plain" in given
                  or "data-key" in given or bool(self.open and self.open[-1][1]))
        self.open.append((tag, hidden))
        if "data-key" in given:
            self.marked.append((given["data-key"] or "", given.get("data-format") or "", ""))

    def handle_endtag(self, tag: str) -> None:
        for index in range(len(self.open) - 1, -1, -1):
            if self.open[index][0] == tag:
                del self.open[index:]
                return

    def handle_data(self, data: str) -> None:
        if not (self.open and self.open[-1][1]):
            self.loose.append(data)
        elif self.marked and self.open[-1][0] == "span" and not self.marked[-1][2]:
            key, spec, _ = self.marked[-1]
            self.marked[-1] = (key, spec, data)


def disagreements(page: str, results: Mapping[str, Any]) -> list[str]:
    """Every number of a page that is not what ``results`` say, and every number in running text
    that is not marked; empty when the page is true.

    Scripts (see :func:`picture_disagreements`), code, and regions marked ``data-plain`` (token
    texts, provenance) are left out.
    """
    parser = _Page()
    parser.feed(page)
    parser.close()
    found = []
    for key, spec, shown in parser.marked:
        expected = written(lookup(results, key), spec)
        if shown != expected:
            found.append(f"{key} is shown as {shown!r} but the results say {expected!r}")
    for text in parser.loose:
        found += [
            f"{stray.group(0)!r} in {text.strip()[:80]!r} is not taken from the results"
            for stray in _STRAY.finditer(text)
        ]
    return found


_PLOT = re.compile(r'Plotly\.newPlot\("([^"]+)",')


def _values(node: Any) -> Iterator[float]:
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _values(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _values(value)
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield float(node)


def picture_disagreements(page: str, results: Mapping[str, Any]) -> list[str]:
    """Every number drawn in a picture of a page that ``results`` do not hold; empty when the
    pictures are true.

    Looked at: x and y, a bar's start and end, the ends of error bars. Results in seconds may be
    drawn in milliseconds.
    """
    held = {f"{value * scale:.6g}" for value in _values(results) for scale in (1, 1e3)} | {"0"}
    found = []
    for plot in _PLOT.finditer(page):
        traces, _ = json.JSONDecoder().raw_decode(page[plot.end():].replace("<\\/", "</"))
        for trace in traces:
            along = "x" if trace.get("orientation") == "h" else "y"
            starts = trace.get("base") or []
            for axis in ("x", "y"):
                drawn = list(_values(trace.get(axis)))
                if starts and axis == along:
                    drawn = [
                        *starts,
                        *(start + length for start, length in zip(starts, drawn, strict=True))
                    ]
                errors = trace.get(f"error_{axis}", {})
                for name, sign in (("array", 1), ("arrayminus", -1)):
                    pairs = zip(trace[axis], errors.get(name) or [], strict=False)
                    drawn += [value + sign * error for value, error in pairs if error is not None]
                found += [
                    f"{plot.group(1)} draws {value:.6g} in {trace.get('name')!r}, which is not in "
                    "the results"
                    for value in drawn if f"{value:.6g}" not in held
                ]
    return found


_REQUEST = re.compile(
    r"""(?:src|href|action|poster|data)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?\s*(?:https?:)?//|@import""",
    re.IGNORECASE)


class _Requests(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._style = tag == "style"
        for name, value in attrs:
            value = (value or "").strip()
            loads = name in ("src", "srcset", "poster", "data",
                             "action") or (name == "href" and tag in ("link", "use", "image"))
            if (loads and re.match(r"(?:https?:)?//", value)) or (name == "style"
                                                                  and _REQUEST.search(value)):
                self.found.append(f"<{tag} {name}={value[:100]!r}>")

    def handle_endtag(self, tag: str) -> None:
        if tag == "style":
            self._style = False

    def handle_data(self, data: str) -> None:
        if self._style:
            self.found += [match.group(0) for match in _REQUEST.finditer(data)]


def external_requests(page: str) -> list[str]:
    """What an HTML page would load from elsewhere when opened (links that a reader may click do not
    count); empty for an offline page."""
    parser = _Requests()
    parser.feed(page)
    parser.close()
    return parser.found
