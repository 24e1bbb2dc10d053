"""The files of a tokenizer, as they lie beside an adapter."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE_NAME = "chat_template.jinja"
#: What ``save_pretrained`` may write: names, and patterns of them.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    CHAT_TEMPLATE_NAME,
    "additional_chat_templates/*.jinja",
)


def tokenizer_files(tokenizer: PreTrainedTokenizerBase, *, chat_template: str | None = None) -> dict[str, bytes]:
    """Return the files from which ``AutoTokenizer`` makes a tokenizer, by their names in a folder.

    Args:
        tokenizer: which is left as it is.
        chat_template: in the place of its own. Default: its own, named ones too.
    """
    if chat_template is not None and chat_template != tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chat_template
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return read_tokenizer_files(Path(scratch))


def chat_template_file(folder: Path) -> Path | None:
    """Return the file of the chat template in a folder; None without one."""
    file = folder / CHAT_TEMPLATE_NAME
    return file if file.is_file() else None


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Read the files of a tokenizer that are in a folder."""
    found = sorted(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}
