"""How tests open a page: as an HTML parser and an XML parser see it."""

from html.parser import HTMLParser

VOID = ("meta", "link", "br", "img", "hr")


class Page(HTMLParser):
    """What of a page would be fetched from elsewhere, its pictures, and the tags left open."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.figures = [], [], 0

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        for name in ("src", "href", "xlink:href"):
            if not (found.get(name) or "#").startswith(("#", "data:")):
                self.fetched.append(found[name])
        if tag == "script":
            self.fetched.append("script")
        self.figures += tag == "svg"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def svgs(text):
    """The pictures of a page, each as XML."""
    return ["<svg" + part.split("</svg>")[0] + "</svg>" for part in text.split("<svg")[1:]]
