"""Offer what mkdocs calls while it builds the site; ``mkdocs.yml`` names this file.

- A comment ``<!-- filled in: KIND NAME -->`` in a page is replaced by what is made of the code:
  :mod:`docs.hooks.filled_in`.
- ``README.md`` is the front page.
- A file outside ``docs/`` that a page links to becomes a page too: :mod:`docs.hooks.repository_files`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

# The command mkdocs does not look for modules in the folder that it is started in.
sys.path.insert(0, str(Path(__file__).parents[2]))

from docs.hooks.filled_in import filled_in
from docs.hooks.repository_files import linked_files, page_text, place_in_repository, place_on_site, with_site_links

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page and the files of the repository that pages link to."""
    for path in ("README.md", *linked_files()):
        text = page_text(path)
        place = place_on_site(path)
        if text is None:
            files.append(File.generated(config, place, abs_src_path=str(Path(path).resolve())))
        else:
            files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Fill in what is made of the code, and turn links to files of the repository into links to their pages."""
    text = filled_in(markdown)
    return with_site_links(text, place_in_repository(page.file.src_uri))
