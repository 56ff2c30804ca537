"""A notebook that takes a second, for the tests of running one and of sweeping over it."""

from typing import ClassVar

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pydantic import Field

from xsd.runs import typed


class Toy(typed.NotebookParameters):
    notebook: ClassVar[str] = "toy"
    size: int = Field(2, ge=1, description="how many")


def write(path, *code, tags=()):
    cells = [
        new_markdown_cell("# Toy"),
        new_code_cell('run_dir: str = "runs/smoke"\nseed: int = 0\nsize: int = 2',
                      metadata={"tags": ["parameters"]}),
    ]
    cells += [new_code_cell(text, metadata={"tags": list(tags)} if tags else {}) for text in code]
    nbformat.write(new_notebook(cells=cells), path)
    return path
