"""HTML, read to see that it is whole."""

from html.parser import HTMLParser


class Reader(HTMLParser):
    """Notes elements, and whether every one that is opened is closed."""

    VOID = ("meta", "link", "img", "path", "circle", "br")

    def __init__(self, html):
        super().__init__()
        self.open, self.found, self.titled = [], [], 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.titled += tag == "title" and self.open[-1] == "svg"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]
