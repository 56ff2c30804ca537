"""``xsd doctor``: what of this machine and installation is in order, what is not, and what to do
about it. A pair of models is looked at by :mod:`xsd.steps.plan`."""

import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from xsd.core import ROOT

NEEDED = ("torch", "transformers", "safetensors", "numpy", "pandas", "pyarrow", "plotly",
          "ipywidgets", "anywidget", "papermill", "nbconvert", "pydantic")
HELPFUL = {"bitsandbytes": "4-bit and 8-bit models", "peft": "level L6", "nbval": "make test",
           "playwright": "the browser test"}
LEAST_GB = 5


@dataclass(frozen=True)
class Finding:
    """One line. state: ok, note (works without) or bad (will not work)."""

    state: Literal["ok", "note", "bad"]
    what: str
    advice: str = ""

    def __str__(self) -> str:
        return f"[{self.state:4}] {self.what}" + (f": {self.advice}" if self.advice else "")


def examine(*, pair: str = "") -> list[Finding]:
    """Python, packages, disk, processors, GPU, browser. ``pair`` only changes the closing hint."""
    machine = f"{os.cpu_count()} processor cores, {platform.system()} {platform.machine()}"
    path = browser_path()
    browser = Finding("ok", f"browser {path}") if path else Finding(
        "note", "no Chromium", "only pictures as PNG and the browser test need one (BROWSER_PATH)")
    hint = Finding("note", "models not looked at",
                   "xsd doctor --pair embedded loads the shipped pair")
    return [Finding("ok", f"Python {platform.python_version()} at {sys.executable}"), *packages(),
            disk(ROOT), Finding("ok", machine), gpu(), browser, *([] if pair else [hint])]


def packages() -> list[Finding]:
    """Versions of what is installed; what is missing, with what it is for."""
    here, missing = [], []
    for name in (*NEEDED, *HELPFUL):
        try:
            here.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            state, advice = (("note", f"only needed for {HELPFUL[name]}") if name in HELPFUL else
                             ("bad", "run make demo or pip install -e ."))
            missing.append(Finding(state, f"package {name} is missing", advice))
    return [Finding("ok", f"packages {', '.join(here)}"), *missing]


def disk(folder: Path) -> Finding:
    """Free space where runs are written, if they can be."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        return Finding("bad", f"{folder} cannot be written ({error.strerror})", "runs and reports "
                       "are written there: mount it writable, or copy the checkout elsewhere")
    if free < LEAST_GB:
        return Finding("bad", f"{free:.1f} GB free at {folder}", f"{LEAST_GB} GB are needed for "
                       "the installation and a demo run; free some space")
    return Finding("ok", f"{free:.0f} GB free at {folder}")


def gpu() -> Finding:
    """CUDA devices as torch sees them."""
    try:
        import torch
    except ImportError:
        return Finding("bad", "torch cannot be imported", "install it first")
    if not torch.cuda.is_available():
        return Finding("note", "no GPU", "the embedded pair needs none; 7B checkpoints do")
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{card.name} ({card.total_memory / 1e9:.0f} GB)" for card in cards)
    return Finding("ok", f"GPU {names}, CUDA {torch.version.cuda}")


def browser_path() -> str | None:
    """A Chromium for PNG export and the browser test: BROWSER_PATH, else the usual names."""
    named = os.environ.get("BROWSER_PATH")
    if named and Path(named).is_file():
        return named
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)
