"""The page of ``xsd bench full-size``: what was aimed at, and all figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

GB = 1e9


def aims(found: Mapping[str, Any]) -> list[tuple[str, str, float | None, bool | None]]:
    """(what, aim, value, met) for each aim; value and met are None where a part of it is missing.
    found: the results' parts."""
    def least(*places: str) -> float:
        known = [value for place in places if (value := _at(found, place)) is not None]
        return min(known)

    def fastest() -> float:
        """The fastest greedy loop, ours or transformers', end to end."""
        return least("ladder/ar/total_ms", *theirs)

    theirs = [
        f"{part}/total_ms"
        for part in ("ladder/hf_generate", "ladder/hf_prompt_lookup", "static/hf_static")
    ]
    rates = "extraction/forced", "extraction/free/1"
    rows: list[tuple[str, str, float, Callable[[], float]]] = [
        ("own loop / fastest `generate`, end to end", "≤", 1.1,
         lambda: _at(found, "ladder/ar/total_ms") / least(*theirs)),
        ("a step / reading the weights once", "≤", 2.2,
         lambda: _at(found, "verification/ms/1") / _at(found, "load/floor_ms")),
        ("v(6), 16 bits", "≤", 1.2, lambda: _at(found, "verification/steps/6")),
        ("v(6), best of 4 bits", "≤", 1.4, lambda: least("int4/v/steps/6", "4bit/v/steps/6")),
        ("speed-up, 5 drafts of which 0.8 are right, ids identical", "≥", 2.0,
         lambda: fastest() / _identical(found, "dial/0.8 right, 5 drafts")),
        ("speed-up, one block of 8 of which 0.8 are right, ids identical", "≥", 2.5,
         lambda: fastest() / _identical(found, "dial/0.8 right, a block of 8")),
        ("teacher-forced pairs a second / free answers one at a time", "≥", 40,
         lambda: max(_at(found, rates[0]).values()) / _at(found, rates[1])),
        ("GB, both models in NF4 with a request", "≤", 24,
         lambda: _at(found, "two in 4bit/peak_bytes") / GB),
        ("GB, training L5F in batches of 16", "≤", 24,
         lambda: _at(found, "training/L5F/16/peak_bytes") / GB),
    ]
    made = []
    for what, sign, aim, value in rows:
        try:
            got = float(value())
        except (AttributeError, TypeError, ValueError):  # a part of it was not measured
            made.append((what, f"{sign} {aim:g}", None, None))
        else:
            made.append((what, f"{sign} {aim:g}", got, got <= aim if sign == "≤" else got >= aim))
    return made


def _at(found: Mapping[str, Any], place: str) -> Any:
    for name in place.split("/"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _identical(found: Mapping[str, Any], place: str) -> float:
    return _at(found, f"{place}/total_ms") if _at(found, f"{place}/identical") else float("nan")


def page(results: Mapping[str, Any]) -> str:
    """Markdown: the aims first, then every part as it is in the JSON."""
    found = results["parts"]
    made = results["provenance"]
    lines = [
        f"# Full size: {results['size']}, {results['device']}, {results['dtype']}", "",
        f"{_at(found, 'load/machine') or results['device']}; revision "
        f"{made['git_revision'][:7]}; `xsd bench full-size --size {results['size']}`. Random "
        "weights with margins: costs are those of any weights of these shapes, and every "
        "answer is the same in every number format. ms are medians.", "",
        "| what | aim | measured | met |", "|---|---|---|---|"
    ]
    for what, aim, value, met in aims(found):
        said = "not measured" if value is None else f"{value:.2f}"
        lines.append(f"| {what} | {aim} | {said} | {_MET[met]} |")
    for name, part in found.items():
        lines += [
            "", f"## {name}", "", "| what | |", "|---|---|",
            *(f"| {place} | {said} |" for place, said in _flat(part))
        ]
    return "\n".join(lines) + "\n"


_MET = {None: "", True: "yes", False: "**no**"}


def _flat(part: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in part.items():
        if isinstance(value, Mapping) and {"ms", "low", "high"} == set(value):
            yield above + name, "{ms:.2f} [{low:.2f}, {high:.2f}] ms".format(**value)
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}, ")
        elif name.endswith("_bytes"):
            yield above + name.removesuffix("_bytes"), f"{value / GB:.2f} GB"
        else:
            form = ".0f" if isinstance(value, float) and value >= 100 else ".3g"
            yield above + name, format(value, form) if isinstance(value, float) else str(value)
