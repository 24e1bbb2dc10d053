"""Make a figure of matplotlib's fit to stand in a page among others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape
from xml.etree import ElementTree

#: What a group's id begins with whose marks show texts under the pointer: the texts follow, as a list in JSON.
HOVER = "hover:"
#: Stand-ins, replaced by the page's own colours.
INK, GRID = "#010203", "#040506"
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def fit_into_page(text: str, name: str) -> str:
    """Return the SVG with ids of its own, the page's colours and width, and what its marks show under the pointer.

    Args:
        text: as matplotlib saves it.
        name: that its ids begin with.
    """
    # A file of our own making, not of a stranger's.
    root = ElementTree.fromstring(text)  # noqa: S314
    for size in ("width", "height"):
        root.attrib.pop(size)
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    marked = 0
    for element in list(root.iter()):
        identity = element.get("id", "")
        if identity.startswith(HOVER):
            _give_titles(element, json.loads(identity.removeprefix(HOVER)))
            marked += 1
            identity = f"mark_{marked}"
        if identity:
            element.set("id", f"{name}-{identity}")
        for key, value in element.items():
            if key in ("href", f"{{{_LINK}}}href") and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    written = ElementTree.tostring(root, encoding="unicode")
    return re.sub(r"[ \n]*\n[ \n]*", "\n", written).replace(INK, "currentColor").replace(GRID, "var(--line)")


def named(svg: str, name: str) -> str:
    """Return a figure with a name for who cannot see it."""
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)


def standalone(svg: str) -> str:
    """Make a figure a file of its own: black on white, in no page's colours."""
    return (
        svg.replace("currentColor", "#000000")
        .replace("var(--line)", "#d9dce0")
        .replace("<svg", '<svg style="background: white"', 1)
    )


def _give_titles(group: ElementTree.Element, texts: list[str]) -> None:
    """Give one text to a whole group, or one to each of its marks."""
    marks = [group] if len(texts) == 1 else list(_marks(group))
    for mark, text in zip(marks, texts, strict=True):
        title = ElementTree.Element(f"{{{_SVG}}}title")
        title.text = text
        mark.insert(0, title)


def _marks(group: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """Yield what a group shows, without what it only defines."""
    for child in group:
        if child.tag in (f"{{{_SVG}}}use", f"{{{_SVG}}}path"):
            yield child
        elif child.tag == f"{{{_SVG}}}g":
            yield from _marks(child)
