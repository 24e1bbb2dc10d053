"""Docstrings as the site shows them: mkdocstrings loads this for each object of the API page."""

from __future__ import annotations

import re
from inspect import cleandoc
from typing import Any

import griffe

#: A reference by its role; a ``~`` leaves the path of the name out.
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([\w.]+)`")
#: A formula, as Sphinx has it.
_FORMULA = re.compile(r"^\.\. math::\s*(\S.*(?:\n {2,}\S.*)*)", re.M)


class Docstrings(griffe.Extension):
    """Write references as names, and let an ``Example:`` be a section of examples."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring:
            text = _ROLE.sub(
                lambda found: f"`{found[2].rpartition('.')[2] if found[1] else found[2]}`", obj.docstring.value
            )
            text = _FORMULA.sub(lambda found: f"```latex\n{cleandoc(found[1])}\n```\n", text)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
