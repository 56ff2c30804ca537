"""Where the models' tests find their checkpoint, and a pair loaded once a session."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

from tiny_pair import make_tiny_pair

from xsd.models import loading

REFERENCE = Path(__file__).parent / "fixtures" / "eventgpt_tiny_random"
"""A checkpoint in the official layout with random weights, and what the official code computes from
it."""
CLIP = REFERENCE / "tiny_clip"


@lru_cache(maxsize=1)
def pair_folder() -> Path:
    """A tiny pair on disk; copy it before changing a file."""
    return make_tiny_pair(Path(mkdtemp(prefix="tiny-pair-")))


@lru_cache(maxsize=1)
def tiny_pair() -> loading.Pair:
    """That pair, loaded."""
    return loading.load_pair(pair_folder())


@lru_cache(maxsize=1)
def reference_drafter() -> loading.ModelHandle:
    """The reference checkpoint, loaded as a drafter."""
    return loading.load_drafter(REFERENCE, vision_tower=CLIP)
