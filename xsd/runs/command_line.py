"""Parameters as a command line writes them: each read as its own type asks."""

import re
import types
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import yaml

from xsd.core import ParameterError
from xsd.runs import typed

WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
MOST_YAML = 100_000
NOTHING = ("", "none", "null", "~")
WHOLE = r"[+-]?\d+(_\d+)*"
NUMBER = r"[+-]?(\d+(_\d+)*(\.\d*)?|\.\d+)([eE][+-]?\d+)?"
QUOTED = r"""\s*(?:"(?:[^"\\]|\\.)*"|'[^']*')\s*"""
BRACKETS = r'\[(?:"(?:[^"\\]|\\.)*"|[^\[\]"])*\]'


def read_values(pairs: list[str], model: type[typed.NotebookParameters]) -> dict[str, Any]:
    """``["levels=L1,L4", "seed=3"]`` as values, each read as its parameter's type asks (the table
    in docs/architecture.md). Raises: ParameterError."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not (name and sign):
            raise ParameterError(f"a parameter is written name=value, not {typed.shortened(pair)}")
        if name in values:
            raise ParameterError(f"the parameter {name} is given twice; give it once (a list is "
                                 f"written {name}=a,b)")
        values[name] = _value(name, text, model)
    return values


def read_grid(axes: list[str], model: type[typed.NotebookParameters]) -> dict[str, list[Any]]:
    """``["seed=0,1", "levels=L1|L4,B1"]`` as typed axes of a grid, split at | where there is one,
    else at commas outside brackets (``levels=[L1,L4],[L2]``); ``level``: ``levels`` with one each.
    Raises: ParameterError."""
    grid: dict[str, list[Any]] = {}
    for axis in axes:
        name, sign, text = axis.partition("=")
        if not sign:
            raise ParameterError("a grid axis is written name=value,value, not "
                                 f"{typed.shortened(axis)}")
        name = "levels" if name == "level" and "levels" in model.model_fields else name
        if name in grid:
            raise ParameterError(f"the axis {name} is given twice; write {name}=a,b,c")
        listed = get_origin(model.field(name).annotation) is list
        parts = _parts(text, "|" if "|" in text else ",", partial(model.refusal, name, text))
        grid[name] = [_value(name, one if listed else _unquoted(one), model) for one in parts]
    return grid


def _value(name: str, text: str, model: type[typed.NotebookParameters]) -> Any:
    return _read(text, model.field(name).annotation, partial(model.refusal, name, text))


def _read(text: str, kind: Any, refusal: Callable[[str], ParameterError]) -> Any:
    """A text as a value of this type; texts stand as they are."""
    if get_origin(kind) is Annotated:
        return _read(text, get_args(kind)[0], refusal)
    if get_origin(kind) is list:
        inside = re.fullmatch(r"\s*\[(.*)\]\s*", text)
        parts = _parts(text, ",", refusal)
        if inside and parts == [text.strip()]:
            parts = _parts(inside[1], ",", refusal)
        return [_read(_unquoted(one), get_args(kind)[0], refusal) for one in parts]
    kinds = list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]
    if len(kinds) > 1 and get_origin(kinds[-1]) is Literal:  # a number, or a word
        return text if text in get_args(kinds[-1]) else _read(text, kinds[0], refusal)
    if type(None) in kinds:
        kinds.remove(type(None))
        return None if text.strip().lower() in NOTHING else _read(text, kinds[0], refusal)
    if get_origin(kinds[-1]) is dict and (len(kinds) == 1 or text.lstrip().startswith("{")):
        return read_mapping(text, refusal)
    if kind is bool:
        if text.strip().lower() not in WORDS:
            raise refusal("expected true or false")
        return WORDS[text.strip().lower()]
    if kind in (int, float):
        form, said = (WHOLE, "a whole number, such as 3") if kind is int else (
            NUMBER, "a number, such as 0.5 or 1e-3")
        if not re.fullmatch(form, text.strip(), re.ASCII) or len(text) > 400:
            raise refusal(f"expected {said}")
        return kind(text)
    return text


def _parts(text: str, sign: str, refusal: Callable[[str], ParameterError]) -> list[str]:
    """What stands between commas (or bars) that are outside quotes and brackets."""
    plain = rf"(?:{BRACKETS}|[^\[\]{sign}])*"
    form, place, found = re.compile(rf"({QUOTED}|{plain})(?:{re.escape(sign)}|$)"), 0, []
    while place < len(text):
        part = form.match(text, place)
        one = part[1].strip() if part else ""
        if not part or (one.startswith('"') and not re.fullmatch(QUOTED, one)):
            raise refusal("its quotes or brackets cannot be read; a list is written a,b or [a, b], "
                          'an entry with a comma "a, b"')
        if not one:
            raise refusal("there is nothing between two commas")
        found.append(one)
        place = part.end()
    return found


def _unquoted(text: str) -> str:
    if not re.fullmatch(QUOTED, text):
        return text
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if text[0] == '"' else text[1:-1]


class _Plain(yaml.SafeLoader):
    """YAML whose values are what JSON has: no dates, octals or sexagesimals, no tags, no aliases
    (which a few lines can blow up with)."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            raise yaml.YAMLError("it holds a tag or an alias")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value]
            if len(set(map(str, names))) < len(names):
                raise yaml.YAMLError("a name stands in it twice")
        return node


for _kind, _form in (("null", "null|~|"), ("bool", "true|false"),
                     ("int", r"[+-]?(0|[1-9]\d{0,17})"),
                     ("float", r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")):
    _Plain.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_form})$"), None)


def read_mapping(text: str, refusal: Callable[[str], ParameterError]) -> dict[str, Any]:
    """``{dropout: 0.2, L5: {layers: 2}}``, with or without the outer braces, JSON too. Raises: what
    ``refusal`` makes of a reason."""
    if why := typed.unusual(text):
        raise refusal(why)
    return read_yaml(text if text.lstrip().startswith("{") else f"{{{text}}}", refusal)


def read_yaml(text: str, refusal: Callable[[str], ParameterError]) -> dict[str, Any]:
    """Names and values of a YAML text, {} where there are none. Raises: as read_mapping."""
    wanted = "expected names and values, such as {dropout: 0.2, L5: {layers: 2}}"
    if len(text) > MOST_YAML:
        raise refusal(f"it has {len(text)} characters, and {MOST_YAML} are read")
    try:
        found = yaml.load(text, _Plain)
        found = {} if found is None else found
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise refusal(wanted) from error
    if not isinstance(found, dict) or (why := typed.unusual(found)):
        raise refusal(why if isinstance(found, dict) else wanted)
    return found
