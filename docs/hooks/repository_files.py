"""Files outside ``docs/`` on the site: whatever a page links to is shown there, so that no link leaves the site."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: A link or a picture of Markdown, unless it is an address with a scheme.
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)\s#]*)(#[^)\s]*)?(?=\))")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "sh"}
_FENCED = re.compile(r"^```.*?^```$", re.M | re.S)


def linked_files() -> list[str]:
    """Return the paths of all files outside ``docs/`` that a page links to, or a page that is linked to."""
    waiting = ["README.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]
    found: dict[str, None] = {}
    while waiting:
        page = waiting.pop()
        for target, _ in links(read_text(page)):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            if target and path not in found and not path.startswith("docs/") and (ROOT / path).is_file():
                found[path] = None
                waiting += [path] if path.endswith(".md") else []
    return [path for path in found if path != "README.md"]


def links(markdown: str) -> list[tuple[str, str]]:
    """Return target and anchor of the relative links of a page, its blocks of code left out.

    >>> links("[a](b.md#c), [d](#e), [f](https://g)")
    [('b.md', '#c'), ('', '#e')]
    """
    return [(found[1], found[2] or "") for found in LINK.finditer(_FENCED.sub("", markdown))]


def place_on_site(path: str) -> str:
    """Return where the site has a file of the repository.

    >>> place_on_site("README.md"), place_on_site("docs/data.md"), place_on_site("examples/own_datamodule.py")
    ('index.md', 'data.md', 'repository/examples/own_datamodule.py.md')
    """
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    as_page = Path(path).suffix in {*_LANGUAGES, ".ipynb"}
    return f"repository/{path}.md" if as_page else f"repository/{path}"


def place_in_repository(page: str) -> str:
    """Return the path of what a page of the site was made of, the other way round."""
    if page == "index.md":
        return "README.md"
    if not page.startswith("repository/"):
        return f"docs/{page}"
    path = page.removeprefix("repository/")
    return path.removesuffix(".md") if Path(path.removesuffix(".md")).suffix in {*_LANGUAGES, ".ipynb"} else path


def with_site_links(markdown: str, path: str) -> str:
    """Return the text of a file of the repository with links to where the site has what they name."""
    here = posixpath.dirname(place_on_site(path))

    def on_site(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if not target:
            return anchor
        place = place_on_site(posixpath.normpath(posixpath.join(posixpath.dirname(path), target)))
        return posixpath.relpath(place, here or ".") + anchor

    return "".join(
        part if part.startswith("```") else LINK.sub(on_site, part)
        for part in re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    )


def page_text(path: str) -> str | None:
    """Return the Markdown that shows a file; None for one that is no text to read."""
    suffix = Path(path).suffix
    if suffix == ".md":
        return read_text(path)
    if suffix == ".ipynb":
        return notebook_text(read_text(path))
    if suffix in _LANGUAGES:
        return f"# {path}\n\n````{_LANGUAGES[suffix]}\n{read_text(path)}````\n"
    return None


def notebook_text(notebook: str) -> str:
    """Return the cells of a notebook as Markdown."""
    cells = json.loads(notebook)["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
    return "\n\n".join(f"```python\n{text}\n```" if code else text for text, code in texts) + "\n"


def read_text(path: str) -> str:
    """Return the text of a file of the repository."""
    return (ROOT / path).read_text(encoding="utf-8")
