"""Event frames and video frames as inline pictures, so that a page needs no file beside it."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from xsd.core import Sample, VideoError
from xsd.views import theme
from xsd.views.safe import Html


def png_uri(image: np.ndarray, *, max_side: int = 320, enlarge: bool = True) -> str:
    """uint8 [H, W, 3] or [H, W] as ``data:image/png;base64,…``; larger pictures are scaled down,
    small ones up by whole factors (``enlarge``). Raises: VideoError when the array is no
    picture."""
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape or (
            array.ndim == 3 and array.shape[2] != 3):
        raise VideoError("a picture is uint8 [H, W, 3] or [H, W] with at least one pixel; this "
                         f"array is {array.dtype} {list(array.shape)}")
    picture = Image.fromarray(array)
    if max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.BILINEAR)
    elif enlarge and max(picture.size) * 2 <= max_side:
        factor = max_side // max(picture.size)
        picture = picture.resize((picture.width * factor, picture.height * factor),
                                 Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=6 if enlarge else 1)  # quick: one of many
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def filmstrip(images: Sequence[np.ndarray], *, label: str = "", colour: str = theme.SOFT_INK,
              side: int = 128, large: int = 0) -> Html:
    """A row of small pictures with a label in the sensor's colour; side: the longer one, pixels.
    large: the longer one after a click (or Enter), where they shall grow; of a page that takes no
    style sheet they stay small."""
    cell = Html('<img alt="{} {}" src="{}" '
                'style="margin:2px;border-radius:3px;border:1px solid #ddd;max-width:100%">')
    if large:
        cell = Html('<details style="display:inline-block;vertical-align:top"><summary style="list-'
                    'style:none;cursor:zoom-in"><img alt="{} {}, larger on a click" src="{}" style='
                    '"margin:2px;border-radius:3px;border:1px solid #ddd;max-width:100%;width:{}px;'
                    'image-rendering:pixelated"></summary></details>')
    cells = [Html("<style>.filmstrip details[open] img{{width:min(92vw,{}px)!important}}"
                  "</style>").format(large)] if large else []
    for index, image in enumerate(images):
        uri = png_uri(image, max_side=large or side, enlarge=not large)
        shown = round(side * min(1, image.shape[1] / image.shape[0]))
        cells.append(cell.format(label, index, uri, shown))
    style = f"font:13px {theme.FONT};color:{colour};font-weight:600"
    head = Html('<div style="{}">{}</div>').format(style, label) if label else ""
    return Html('<div class="filmstrip" data-plain="1">{}{}</div>').format(head, Html().join(cells))


def sensors(sample: Sample, *, side: int = 128, n_video: int = 8, large: int = 0) -> Html:
    """What both models saw: event frames above video frames, with the question. large: as in
    :func:`filmstrip`."""
    question = Html(
        '<div style="font:14px {};margin:4px 0"><b>{}</b> <span style="opacity:.75">{} / {}</span>'
        "</div>").format(theme.FONT, sample.question, sample.sequence, sample.clip)
    events = filmstrip(sample.event_frames, label="event frames: the drafter's eyes",
                       colour=theme.DRAFTER, side=side, large=large)
    video = filmstrip(list(sample.video[:n_video]), label="video frames: the verifier's eyes",
                      colour=theme.VERIFIER, side=side, large=large)
    return Html('<div class="sensors" data-plain="1">{}{}{}</div>').format(question, events, video)
