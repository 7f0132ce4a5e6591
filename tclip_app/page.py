"""Parts of a page of HTML. text() is the only way by which anything from outside comes onto the page."""

import base64
import html
import re


def text(value, limit=160):
    """A value from outside as harmless HTML, for text and attributes: one line, not endless, nothing invisible.

    Control characters and those that turn the direction of the text around them become U+FFFD. Place it in <bdi> where
    other text follows on the line.
    """
    line = " ".join(str(value).split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return html.escape(re.sub("[\0-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd", line))


def percent(share, digits=1):
    """A share as "12.3 %", or "?" for None. (With a space that does not break.)"""
    return "?" if share is None else f"{100 * share:.{digits}f}\xa0%"


def count(number, noun):
    """1 image, 1,437 images."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def arrow(values):
    """Before → after. A line breaks between them, not within, and the arrow goes with what comes after."""
    first, *rest = values
    return " ".join([f"<span>{first}</span>", *(f"<span>→ {value}</span>" for value in rest)])


def section(title, lead, *parts):
    """A section of the page. lead: what is to be seen, in a sentence or two."""
    return f"<section>\n<h2>{title}</h2>\n<p class=lead>{lead}</p>\n" + "\n".join(parts) + "\n</section>"


def folded(title, content):
    """Content that is shown on a click."""
    return f"<details><summary>{title}</summary>\n{content}\n</details>"


def table(rows):
    """Rows of (name, value), both from outside, as a table."""
    rows = [f"<tr><th scope=row><bdi>{text(a)}</bdi></th><td><bdi>{text(b)}</bdi></td></tr>" for a, b in rows]
    return "<table>" + "\n".join(rows) + "</table>"


def data_uri(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
