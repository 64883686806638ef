"""Plain text from the HTML of documentation generators, which is well formed."""

import html
import re

# Elements whose content is no text of the page.
_SKIPPED = re.compile(
    r"<!--.*?-->|<(script|style|head|nav|header|footer|svg|button)\b.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_PREFORMATTED = re.compile(r"<pre\b[^>]*>(.*?)</pre\s*>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?([a-zA-Z][a-zA-Z0-9]*)[^>]*>|<[!?][^>]*>")
# What takes the place of a tag; nothing for those not named.
_BREAKS = {
    **dict.fromkeys(("br", "dd", "li", "summary", "tr"), "\n"),
    **dict.fromkeys(("td", "th"), " "),
    **dict.fromkeys(
        (
            "article", "blockquote", "details", "div", "dl", "dt", "figure", "h1", "h2", "h3",
            "h4", "h5", "h6", "hr", "main", "ol", "p", "section", "table", "ul",
        ),
        "\n\n",
    ),
}  # fmt: skip


def html_to_text(page: str) -> str:
    """Returns the text of a page, with blank lines between blocks; `pre` keeps its white space."""
    parts = _PREFORMATTED.split(_SKIPPED.sub("", page))
    for i, part in enumerate(parts):
        # Every other part is the content of a `pre`.
        parts[i] = f"\n\n{_TAG.sub('', part)}\n\n" if i % 2 else _flow(part)
    lines = (line.rstrip() for line in html.unescape("".join(parts)).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _flow(part: str) -> str:
    """Returns the text outside of `pre`, where only tags break lines."""
    text = _TAG.sub(lambda tag: _BREAKS.get((tag[1] or "").lower(), ""), " ".join(part.split()))
    return re.sub(r" *\n *", "\n", text)
