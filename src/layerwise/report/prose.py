"""Given HTML, reduced to plain prose: nothing that runs, loads or leaves the page."""

from html import escape
from html.parser import HTMLParser

KEPT = frozenset(("p", "em", "strong", "code", "pre", "ul", "ol", "li", "sub", "sup", "b", "i"))
SILENT = frozenset(("script", "style"))


class _Prose(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.open: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.silent += tag in SILENT
        if tag == "br" and not self.silent:
            self.parts.append("<br>")
        elif tag in KEPT and not self.silent:
            self.parts.append(f"<{tag}>")
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in SILENT and self.silent > 0
        while tag in self.open:
            self.parts.append(f"</{self.open[-1]}>")
            if self.open.pop() == tag:
                break

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(escape(data))


def prose(given: str) -> str:
    """Keep the tags of running text, without attributes, balanced; escape all else.

    Example:
        >>> prose("<p onclick=x>2 < 3 <b>bold")
        '<p>2 &lt; 3 <b>bold</b></p>'
    """
    parser = _Prose()
    parser.feed(given)
    parser.close()
    text = "".join(parser.parts) + "".join(f"</{tag}>" for tag in reversed(parser.open))
    return text if text.lstrip().startswith("<") else f"<p>{text}</p>"
