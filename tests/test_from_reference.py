"""docs/from_reference.md keeps its word: every verb, option, parameter, function, file and key that
its middle column names is there."""

import importlib
import re

import pytest
import typer

from xsd.cli.app import app
from xsd.core import ROOT
from xsd.runs import parameters

PAGE = ROOT / "docs" / "from_reference.md"
SOURCES = "\n".join(path.read_text(encoding="utf-8") for room in ("xsd", "studies")
                    for path in (ROOT / room).rglob("*.py"))


def lines():
    """(the reference's, ours, what differs) of every row of the page's tables."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] != "the reference"]


NAMED = sorted({name for row in lines() for name in re.findall(r"`([^`]+)`", row[1])})


def test_every_line_has_the_references_side_and_ours():
    assert len(lines()) > 60
    wrong = [row for row in lines() if len(row) != 3 or not row[0] or "`" not in row[1]]
    assert not wrong, f"three columns, ours not empty: {wrong}"


def verb(text):
    command, words = typer.main.get_command(app), text.split()[1:]
    for word in [word for word in words if not word.startswith("-")]:
        assert word in getattr(command, "commands", {}), f"xsd has no verb {text!r}"
        command = command.commands[word]
    known = {option for one in command.params for option in one.opts}
    missing = [word for word in words if word.startswith("-") and word not in known]
    assert not missing, f"{text}: no option {', '.join(missing)}"


def parameter(notebook, names):
    fields = parameters.model_of(notebook).model_fields
    missing = [name for name in names.split(", ") if name not in fields]
    assert not missing, f"notebook {notebook} has no parameter {', '.join(missing)}"


def thing(dotted):
    """A function, class, method or constant: of xsd, or of what stands beside it."""
    name = dotted if dotted.startswith(("xsd.", "studies.")) else f"xsd.{dotted}"
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            assert hasattr(found, part), f"there is no {dotted}"
            found = getattr(found, part)
        return
    pytest.fail(f"there is no {dotted}")


def file(text):
    """A file of a run folder, and a key in it: both are written somewhere by these names."""
    path, _, key = text.partition(": ")
    name = path.rsplit("/", 1)[-1]
    stem = name.rsplit(".", 1)[0].split("_<")[0]
    written = (name, f'"{stem}"', f"/{stem}")
    assert any(one in SOURCES for one in written), f"nothing writes {path}"
    assert not key or f'"{key}"' in SOURCES, f"nothing writes {key} into {path}"


@pytest.mark.parametrize("name", NAMED)
def test_what_the_page_names_is_there(name):
    if name.startswith("xsd "):
        verb(name)
    elif found := re.fullmatch(r"(\d\d): ([\w, ]+)", name):
        parameter(*found.groups())
    elif re.search(r"/|\.(json|jsonl|txt|csv|safetensors|parquet|png)\b", name):
        file(name)
    elif re.fullmatch(r"\w+(\.\w+)+", name):
        thing(name)
    else:
        pytest.fail(f"{name!r} is no verb, parameter, function or file; write values without "
                    "backticks")


@pytest.mark.parametrize("wrong", ["xsd data nothing", "xsd plan --nothing", "02: nothing",
                                   "evaluate.metrics.nothing", "evaluate.nothing",
                                   "results/no_file.json", "results/live.json: no_key", "0.90"])
def test_what_is_not_there_is_noticed(wrong):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_what_the_page_names_is_there(wrong)
