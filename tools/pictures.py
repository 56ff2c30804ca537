"""Small PNGs of a notebook's figures, which a page that runs no script (GitHub's) can show.

They stand in cells that nbval does not compare; running a cell again puts the interactive figure in
their place.
"""

from __future__ import annotations

import base64
import io
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image

from xsd.runs import doctor
from xsd.runs.report import PLOTLY_MIME

WIDTH = 760
"""Of a picture, in pixels."""
COLOURS = 96
_INLINE = re.compile(r'src="data:image/png;base64,([^"]+)"')


Output = nbformat.NotebookNode


def to_png(cells: Sequence[Sequence[Output]]) -> list[list[Output]]:
    """The pictures among the outputs of each cell, as small PNGs: plotly's figures (where a browser
    is installed), and the film strips inside HTML.

    Raises: RuntimeError, OSError or ValueError when the browser does not draw the figures.
    """
    found = [[data for output in outputs if (data := output.get("data"))] for outputs in cells]
    drawn = iter(_figures([data[PLOTLY_MIME] for cell in found for data in cell
                           if PLOTLY_MIME in data]))
    made = [[_picture(data, drawn) for data in cell] for cell in found]
    return [[nbformat.v4.new_output("display_data", {"image/png": _small(picture),
                                                     "text/plain": "<picture>"})
             for picture in cell if picture is not None] for cell in made]


def _picture(data: Mapping[str, Any], drawn: Iterator[Image.Image]) -> Image.Image | None:
    """The picture that one output shows. drawn: those of the figures, in order."""
    if PLOTLY_MIME in data:
        return next(drawn, None)
    if "image/png" in data:
        return _opened(data["image/png"])
    strips = _INLINE.findall("".join(data.get("text/html", "")))
    return _side_by_side([_opened(strip) for strip in strips]) if strips else None


def _opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def _figures(drawn: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    """Every figure drawn by one browser; none where no browser is installed."""
    if not drawn or doctor.browser_path() is None:
        return []
    from plotly import io as plotly_io

    heights = [figure["layout"].get("height") or 400 for figure in drawn]
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"{place}.png" for place in range(len(drawn))]
        plotly_io.write_images([dict(figure) for figure in drawn], files, width=WIDTH,
                               height=heights, validate=False)
        return [Image.open(io.BytesIO(file.read_bytes())) for file in files]


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures set as text is: left to right, then the next line."""
    places, x, y, line = [], 0, 0, 0
    for image in images:
        if x and x + image.width > WIDTH:
            x, y, line = 0, y + line + 4, 0
        places.append((x, y))
        x, line = x + image.width + 4, max(line, image.height)
    sheet = Image.new("RGB", (max(place[0] + image.width for place, image
                                  in zip(places, images, strict=True)), y + line), "white")
    for place, image in zip(places, images, strict=True):
        sheet.paste(image, place)
    return sheet


def _small(picture: Image.Image) -> str:
    """base64 of a PNG with few colours, at most WIDTH wide; one that has a palette stays as it
    is."""
    if picture.mode != "P":
        picture = picture.convert("RGB")
        picture.thumbnail((WIDTH, picture.height))
        picture = picture.quantize(COLOURS, dither=Image.Dither.NONE)
    held = io.BytesIO()
    picture.save(held, "PNG", optimize=True)
    return base64.b64encode(held.getvalue()).decode()
