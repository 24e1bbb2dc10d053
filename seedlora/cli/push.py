"""The command ``push``: an adapter to the model hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seedlora.adapters.adapter import CONFIG_NAME
from seedlora.adapters.hub_card import hub_card, licence_of, run_facts
from seedlora.adapters.model_card import CARD_NAME
from seedlora.adapters.public_base import UploadError, public_base
from seedlora.adapters.reading import base_model_of
from seedlora.adapters.upload import Privacy, check_folder, public_files
from seedlora.cli.command_parser import CommandParser, run_command
from seedlora.cli.terminal import number_table, print_json
from seedlora.utils.places import expanded
from seedlora.utils.progress import plain_console


@dataclass(frozen=True)
class _Push:
    """Hold what goes up, and where.

    Args:
        repo: ``owner/name``.
        files: by name in the repository, the card among them: a file as it is, or its content.
    """

    repo: str
    files: Mapping[str, bytes | Path]

    @property
    def sizes(self) -> dict[str, int]:
        """Return the sizes in bytes by name."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }

    @property
    def card(self) -> str:
        """Return the text of the card."""
        content = self.files[CARD_NAME]
        assert isinstance(content, bytes)
        return content.decode()


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), argv, run_push)


def make_parser() -> CommandParser:
    """Make the parser of the command."""
    parser = CommandParser("push", "Send an adapter to the model hub, with a card that it accepts.")
    add = parser.add_argument
    add("adapter", help="the folder of an adapter")
    add("repo", metavar="USER/NAME", help="the repository on the hub; it is made if it is not there")
    add("--private", action="store_true", help="make the repository for you alone")
    add("--revision", metavar="BRANCH", help="a branch, which is made if it is not there; default: main")
    add(
        "--base", metavar="OWNER/NAME", help="the base model's hub id; default: as the adapter names it, if that is one"
    )
    add("--dry_run", action="store_true", help="send nothing; print the files and the card")
    add("--json", action="store_true", help="print what was sent as JSON")
    return parser


def run_push(arguments: Mapping[str, Any]) -> None:
    """Send an adapter to the hub, with a card that the hub accepts and without any path of this machine.

    Raises:
        ValueError: for a folder or a name that is refused; nothing is sent then.
        OSError: if the hub does not take it.
    """
    prepared = _prepare(expanded(arguments["adapter"]), arguments["repo"], arguments["base"])
    told: dict[str, Any] = {"repo": prepared.repo, "files": prepared.sizes}
    if arguments["dry_run"]:
        told |= {"card": prepared.card}
    else:
        told |= {"url": _send(prepared, private=arguments["private"], revision=arguments["revision"])}
    if arguments["json"]:
        print_json(told)
        return
    console = plain_console()
    table = number_table("file", "bytes")
    for name, size in told["files"].items():
        table.add_row(name, f"{size:,}")
    console.print(table)
    if arguments["dry_run"]:
        print(prepared.card)  # noqa: T201 - as it would be sent
        console.print(f"Nothing was sent to {prepared.repo}.", highlight=False)
    else:
        console.print(f"pushed: {told['url']}", soft_wrap=True, highlight=False)


def _prepare(folder: Path, repo: str, given_base: str | None) -> _Push:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise UploadError(f"'{repo}' is no repository; give USER/NAME")
    names = check_folder(folder)
    if not (named := base_model_of(folder)) and given_base is None:
        raise UploadError(f"{folder} names no base model; give --base OWNER/NAME")
    base, run = public_base(named, given_base), run_facts(folder)
    privacy = Privacy(folder, base, run.settings)
    files = public_files(folder, names, privacy, base)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    card = hub_card(folder, repo, base=base, run=run, licence=licence_of(base), config=config)
    card = privacy.public(card)
    privacy.check(CARD_NAME, card)
    return _Push(repo, {CARD_NAME: card.encode(), **files})


def _send(push: _Push, *, private: bool, revision: str | None) -> str:
    """Send it as one commit; its address comes back."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise UploadError("no token of the hub is on this machine: hf auth login, or set HF_TOKEN")
    api = HfApi()
    with _hub_errors(push.repo):
        api.create_repo(push.repo, private=private or None, exist_ok=True)
        if private and not api.model_info(push.repo).private:
            raise UploadError(f"{push.repo} is there already and is public, which --private does not change")
        if revision is not None:
            api.create_branch(push.repo, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in push.files.items()]
        message = "Upload adapter with seedlora"
        commit = api.create_commit(push.repo, operations, commit_message=message, revision=revision)
    return str(commit.commit_url)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Say what the hub says in one sentence in the place of a page."""
    try:
        yield
    except UploadError:
        raise
    except Exception as error:  # the hub's libraries raise errors of many kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = [line for line in lines if not line.startswith("For more information")] or [type(error).__name__]
        raise OSError(f"{repo} was not pushed: {' '.join(told)}") from None
