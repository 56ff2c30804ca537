"""What somebody who wants to run something would call a question, a clip, a folder or a token, a
dataset made of it, and notebooks executed in this process."""

import ast
import contextlib
import io
from unittest import mock

import nbformat
import numpy as np
from IPython.core.formatters import DisplayFormatter
from nbformat.v4 import new_code_cell, new_notebook, new_output
from numpy.random import default_rng

from xsd.core import ROOT
from xsd.runs.report import PLOTLY_MIME
from xsd.sensors import events as event_files
from xsd.sensors import folder
from xsd.sensors.events import Events

PAYLOADS = {
    "img": "<img src=x onerror=pwned1=1>", "svg": '"><svg onload=pwned2=1>',
    "script": "</script><script>pwned3=1</script>", "tex": "$\\href{javascript:pwned4=1}{x}$",
    "template": "{{7*7}}", "markdown": "[x](javascript:pwned6=1)",
    "link": "<a href=javascript:pwned7=1>x</a>", "style": "<style>*{display:none}</style>",
    "comment": "<!--<script>", "hover": "%{x}<extra>on</extra>", "bold": "<b>&lt;b&gt;</b>",
    "attribute": "' autofocus onfocus=pwned8=1 x='", "address": "javascript:pwned9=1",
}
UNSEEN = "\x1b[31mred\x1b]8;;javascript:pwned10=1\x07link\u202edcba"
"""Colours and links of terminals, which a dataset may not hold but a token may; a mark that turns
the writing around."""
EVERYTHING = " ".join([*PAYLOADS.values(), UNSEEN])


def write_dataset(root, split, n_sequences, seed):
    """A dataset folder whose sequences, clips and questions are payloads."""
    names, draw = [text for text in PAYLOADS.values() if "/" not in text], default_rng(seed)
    with folder.FolderWriter(root, split, source=" ".join(PAYLOADS.values())) as writer:
        for place in range(n_sequences):
            sequence = f"{split}{place}{names[(seed + place) % len(names)]}{PAYLOADS['script']}"
            for clip in range(2):
                video = draw.integers(0, 256, (8, 36, 48, 3), dtype=np.uint8)
                events = Events(x=draw.integers(0, 48, 90).astype(np.uint16),
                                y=draw.integers(0, 36, 90).astype(np.uint16),
                                t_us=np.arange(0, 90_000, 1000), width=48, height=36,
                                p=draw.integers(0, 2, 90).astype(np.uint8))
                writer.add(sequence, f"{clip}{names[(seed - clip) % len(names)]}", events=events,
                           video=video)
    folder.write_questions(root / folder.QUESTIONS,
                           [(f"What is {text}\u202edcba?", 1) for text in PAYLOADS.values()])
    return root


def write_recording(path):
    """An event file of 0.6 s, called whatever the path says."""
    draw, n = default_rng(0), 600
    event_files.write_events(path, Events(
        x=draw.integers(0, 48, n).astype(np.uint16), y=draw.integers(0, 36, n).astype(np.uint16),
        t_us=np.arange(n) * 1000, p=draw.integers(0, 2, n).astype(np.uint8), width=48, height=36))


def notebook():
    """A notebook that tries everything: outputs of every kind, cells, metadata, attachments."""
    text = EVERYTHING
    mimes = {"text/html", "text/markdown", "application/javascript", "image/svg+xml", "text/latex",
             "image/png", "image/jpeg", "text/plain", "text/vnd.mermaid", "application/json",
             "application/vnd.jupyter.widget-view+json", "application/pdf", "unheard/of"}
    figure = {"data": [{"x": [1], "y": [text], "name": text, "hovertemplate": text}],
              "layout": {"title": {"text": text}, "images": [{"source": "https://x.test/a.png"}],
                         "annotations": [{"text": f"<a href='javascript:pwned12=1'>{text}</a>"}]}}
    loud = text + (
        "<script src=//x.test/a.js></script><iframe srcdoc='<script>parent.pwned13=1</script>'>"
        "</iframe><form action=javascript:pwned14=1><button autofocus onfocus=pwned15=1>x</button>"
        "</form><base href=//x.test/><object data=x></object><div style='background:url(//x.test/b)"
        ";position:fixed'>x</div><meta http-equiv=refresh content='0;url=javascript:pwned16=1'>"
        "<link rel=stylesheet href=//x.test><math><mtext><table><mglyph><style><img src "
        "onerror=pwned17=1></style><a href='&#106;avascript:pwned18=1'>y</a><img src=/etc/hostname>"
        "<a href='data:text/html,<script>pwned19=1</script>'>z</a>")
    about = {"width": "1 onload=pwned20=1"}
    outputs = [new_output("display_data", {mime: loud}, metadata={mime: about}) for mime in mimes]
    outputs += [new_output("display_data", {PLOTLY_MIME: figure}),
                new_output("stream", name=text, text=loud),
                new_output("error", ename=text, evalue=text, traceback=[loud])]
    cells = [new_code_cell(loud, outputs=outputs), {"cell_type": "markdown", "source": loud +
             "\n\n![p](/etc/passwd)\n\n[l](javascript:pwned21=1)\n\n```mermaid\n" + loud,
             "metadata": {}, "attachments": {"a.png": {"text/html": loud}}},
             {"cell_type": "raw", "source": loud, "metadata": {"raw_mimetype": "text/html"}}]
    return {"nbformat": 4, "nbformat_minor": 5, "cells": cells, "metadata": {
        "title": loud, "kernelspec": {"name": loud, "display_name": loud},
        "language_info": {"name": loud, "pygments_lexer": loud},
        "widgets": {"application/vnd.jupyter.widget-state+json": {"state": {"x": loud}}}}}


def executed(stem, **params):
    """One of the project's notebooks with its outputs, run here (a kernel takes seconds to
    start)."""
    formatter, outputs = DisplayFormatter(), []

    def display(*shown, raw=False, **_):
        for one in shown:
            data = one if raw else formatter.format(one)[0]
            if data:
                outputs.append(new_output("display_data", data))

    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", 4)
    names, cells = {"__name__": "__main__"}, []
    with mock.patch("IPython.display.display", display):
        for cell in notebook.cells:
            if cell.cell_type != "code":
                cells.append(cell)
                continue
            source = cell.source
            if "parameters" in cell.metadata.get("tags", []):
                source += "".join(f"\n{name} = {value!r}" for name, value in params.items())
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                _run(source, f"{stem}:{len(cells)}", names, display)
            stream = [new_output("stream", text=printed.getvalue())] if printed.getvalue() else []
            cells.append(new_code_cell(source, outputs=stream + outputs[:], execution_count=1))
            outputs.clear()
    return new_notebook(cells=cells)


def _run(source, name, names, display):
    """A cell, its last expression shown as a notebook shows it."""
    tree, last = ast.parse(source), None
    if isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, name, "exec"), names)
    if last is not None and (found := eval(compile(last, name, "eval"), names)) is not None:
        display(found)
