"""What mkdocs calls while it builds the site; ``mkdocs.yml`` names this file.

- A comment ``<!-- filled in: KIND NAME -->`` in a page is replaced by what is made of the code: :data:`FILLED_IN`.
- ``README.md`` is the front page.
- A file outside ``docs/`` that a page links to becomes a page too: :mod:`docs.hooks.repository_files`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

# The command mkdocs does not look for modules in the folder that it is started in.
sys.path.insert(0, str(Path(__file__).parents[2]))

from docs.hooks.method_table import method_table
from docs.hooks.option_lists import command_options, data_options, train_options, trainer_options
from docs.hooks.record_tables import record_table
from docs.hooks.repository_files import linked_files, page_text, place_in_repository, place_on_site, with_site_links

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

#: What makes the text for each kind of comment; it gets the rest of the comment.
FILLED_IN: Mapping[str, Callable[[str], str]] = {
    "record": record_table,
    "options of train.py": lambda _: train_options(),
    "options of the Trainer": lambda _: trainer_options(),
    "options of data modules": lambda _: data_options(),
    "options of command": command_options,
    "merge rules": lambda _: method_table(),
}
_COMMENT = re.compile(rf"<!-- filled in: ({'|'.join(FILLED_IN)})(?: (.*?))? -->")
#: A reference of a docstring, as mkdocstrings leaves it.
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):<code>(~?)([\w.]+)</code>")


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


def on_page_content(html: str, **_: object) -> str:
    """Show references of docstrings as names."""
    return _ROLE.sub(lambda found: f"<code>{found[2].rpartition('.')[2] if found[1] else found[2]}</code>", html)


def filled_in(markdown: str) -> str:
    """Return a page with the text that its comments ask for."""
    return _COMMENT.sub(lambda found: FILLED_IN[found[1]](found[2] or ""), markdown)
