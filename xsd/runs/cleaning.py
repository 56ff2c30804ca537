"""HTML of unknown origin, such as a notebook that somebody sent, made fit for a page
(docs/security.md)."""

import html
import re
from itertools import accumulate

import bleach
from bleach.css_sanitizer import CSSSanitizer

LARGEST_HTML, DEEPEST_HTML = 4_000_000, 200
"""Signs of one output, and tags inside each other: more take minutes to read."""
_words = re.compile(r"\S+").findall
_TAGS = frozenset(_words("a abbr b blockquote br caption code col colgroup dd del details div dl "
                         "dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i img kbd li ol p pre s "
                         "small span strong sub summary sup table tbody td tfoot th thead tr u ul"))
_ATTRIBUTES = frozenset(_words("align alt border class colspan id rowspan style title"))
_STYLES = frozenset(_words(
    "background-color border border-bottom border-collapse border-color border-radius color "
    "display font font-family font-size font-style font-weight line-height margin margin-left "
    "margin-right margin-top max-width min-height min-width overflow-x padding text-align "
    "text-decoration vertical-align white-space"))
"""None of them can name a file or an address, or lay itself over the page."""
_PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]+")
_LINK = re.compile(r"(?is)(https?://|mailto:).*|[^:&\\]*")


def _depth(text: str) -> int:
    """At most so many tags stand inside each other."""
    # what HTML closes by itself does not count
    tags = re.finditer(r"<(/?)(?!(?:p|br|hr|img|li|td|th|tr|dt|dd|col)\b)[a-zA-Z]", text)
    return max(accumulate(-1 if tag[1] else 1 for tag in tags), default=0)


def clean(text: str) -> str:
    """HTML of unknown origin without whatever could run, load or cover the page: the tags, the
    attributes and the styles that a page of words, tables and inline pictures needs stay."""
    def allowed(tag: str, name: str, value: str) -> bool:
        if (tag, name) in (("img", "src"), ("a", "href")):
            return bool((_PICTURE if tag == "img" else _LINK).fullmatch(value))
        return name in _ATTRIBUTES

    if len(text) > LARGEST_HTML or _depth(text) > DEEPEST_HTML:
        return f"<p>not shown: {len(text) / 1e6:.1f} MB of HTML, or nested too deep</p>"
    # Their text is no text to be read.
    text = re.sub(r"(?is)<(script|style|template|title)\b.*?(</\1\s*>|$)", "", str(text))
    return bleach.clean(text, tags=_TAGS, attributes=allowed, strip=True,
                        protocols={"http", "https", "mailto", "data"},
                        css_sanitizer=_Styles(allowed_css_properties=_STYLES))


class _Styles(CSSSanitizer):
    """bleach reads a style without decoding its entities, which a browser does."""

    def sanitize_css(self, style: str) -> str:
        style = html.unescape(style)
        return "" if "&" in style else super().sanitize_css(style)
