"""The command ``serve``: start vLLM's or llama.cpp's server for a run or an adapter, or say how."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seedlora.adapters.adapter import PROMPT_NAME, WEIGHTS_NAME, is_model
from seedlora.adapters.gguf import MODEL_SCRIPT, SERVER, find_tool
from seedlora.adapters.peft_config import read_config
from seedlora.adapters.reading import base_model_of
from seedlora.adapters.server_commands import (
    ServedAdapter,
    llama_cpp_command,
    shown,
    vllm_command,
    vllm_model_command,
)
from seedlora.adapters.servers import NOT_KNOWN, serving_problems
from seedlora.cli.adapter_choice import AdapterChoice, choose_adapters
from seedlora.cli.command_parser import NAMED_BASE_HELP, SOURCE_HELP, CommandParser, run_command
from seedlora.cli.export import export_adapter, named_base
from seedlora.cli.terminal import print_json
from seedlora.model.loading import resolve_base_model
from seedlora.model.tokenizer_files import chat_template_file
from seedlora.records.json_file import JSONFile
from seedlora.utils.places import expanded

VLLM, LLAMA_CPP = "vllm", "llama.cpp"

#: Stands in a command for a base model that has to be converted first.
_BASE_GGUF = "base.gguf"


@dataclass(frozen=True)
class _Start:
    """Describe how a server is started: commands that come before, the command, and what to know of it."""

    before: Sequence[Sequence[str]]
    command: Sequence[str]
    notes: Sequence[str]


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    own = list(argv[: argv.index("--options")]) if "--options" in argv else list(argv)
    for_server = list(argv[len(own) + 1 :])
    return run_command(make_parser(), own, lambda arguments: run_serve({**arguments, "options": for_server}))


def make_parser() -> CommandParser:
    """Make the parser of the command."""
    parser = CommandParser("serve", "Start vLLM or llama.cpp for a run or an adapter, or print the command.")
    add = parser.add_argument
    add("source", metavar="RUN_OR_ADAPTER", help=SOURCE_HELP)
    add("--server", choices=(VLLM, LLAMA_CPP), default=VLLM, help="default: vllm")
    add("--base", metavar="MODEL", help=NAMED_BASE_HELP)
    add("--base_gguf", metavar="FILE", help="the base model in GGUF, which llama.cpp serves")
    add("--llama_cpp", metavar="FOLDER", help=f"where llama.cpp is; default: {SERVER} among the commands")
    add("--dry_run", action="store_true", help="print the command and start nothing")
    add("--json", action="store_true", help="print the command as JSON and start nothing")
    add("--options", metavar="...", help="the rest of the line goes to the server as it is: --options --port 8001")
    return parser


def run_serve(arguments: Mapping[str, Any]) -> None:
    """Become the server, if it is on this machine; print the command that starts it otherwise.

    Raises:
        ValueError: if nothing of what is asked for can be served.
    """
    choice = choose_adapters(arguments["source"])
    start = _vllm(choice, arguments) if arguments["server"] == VLLM else _llama_cpp(choice, arguments)
    if arguments["json"]:
        told = {"before": [list(words) for words in start.before], "command": list(start.command)}
        print_json(told | {"notes": list(start.notes), "model": choice.first})
        return
    program = shutil.which(start.command[0])
    for note in start.notes:
        print(f"# {note}", file=sys.stderr)  # noqa: T201 - beside what is to be copied
    if arguments["dry_run"] or program is None:
        if program is None:
            print(f"# {start.command[0]} is not on this machine; where it is, run:", file=sys.stderr)  # noqa: T201
        for words in (*start.before, start.command):
            print(shown(words))  # noqa: T201 - to be copied
        return
    if arguments["server"] == LLAMA_CPP:
        _export_missing(choice, arguments)
    print(shown(start.command), file=sys.stderr, flush=True)  # noqa: T201 - what is started
    sys.stdout.flush()
    os.execvp(program, list(start.command))  # noqa: S606 - the server takes this process's place, and its signals


def _vllm(choice: AdapterChoice, arguments: Mapping[str, Any]) -> _Start:
    for name, instead in (("base_gguf", "--base"), ("llama_cpp", "the command vllm")):
        if arguments[name] is not None:
            raise ValueError(f"--{name} is for --server {LLAMA_CPP}; vLLM takes {instead}")
    template, more = _template(choice), arguments["options"]
    whole = choice.folders[choice.first]
    if is_model(whole):
        if arguments["base"] is not None:
            raise ValueError(f"--base is not used: {whole} is a whole model")
        notes = _notes(choice, [choice.first])
        command = vllm_model_command(whole.absolute(), choice.first, chat_template=template, more=more)
        return _Start([], command, notes)
    base = _base(choice, arguments["base"])
    adapters, left_out = _servable(choice, base, "vLLM")
    command = vllm_command(resolve_base_model(base), adapters, chat_template=template, more=more)
    return _Start([], command, [*_notes(choice, [adapter.name for adapter in adapters]), *left_out])


def _llama_cpp(choice: AdapterChoice, arguments: Mapping[str, Any]) -> _Start:
    llama_cpp = None if arguments["llama_cpp"] is None else expanded(arguments["llama_cpp"])
    server = find_tool(SERVER, llama_cpp) or SERVER
    template, more, given = _template(choice), arguments["options"], arguments["base_gguf"]
    whole = choice.folders[choice.first]
    if is_model(whole):
        raise ValueError(
            f"{whole} is a whole model: python -m seedlora export {shlex.quote(str(whole))} --gguf FILE, then "
            f"{SERVER} --model FILE"
        )
    base = _base(choice, arguments["base"])
    before, needed = [], expanded(given or _BASE_GGUF)
    if given is not None and not needed.is_file():
        raise ValueError(f"--base_gguf {given} is no file")
    if given is None:
        if shutil.which(server) is not None and not (arguments["dry_run"] or arguments["json"]):
            raise ValueError(f"llama.cpp serves a base model in GGUF: give --base_gguf FILE, made of {base}")
        script = find_tool(MODEL_SCRIPT, llama_cpp) or MODEL_SCRIPT
        before.append(["python", script, resolve_base_model(base), "--outfile", _BASE_GGUF])
    adapters, left_out = _servable(choice, base, LLAMA_CPP)
    for adapter in adapters:
        folder = choice.folders[adapter.name].absolute()
        if _is_stale(adapter.path, folder):
            words = ["python", "-m", "seedlora", "export", str(folder), "--gguf", str(adapter.path)]
            before.append([*words, *(["--base", arguments["base"]] if arguments["base"] else [])])
    command = llama_cpp_command(server, needed, adapters, chat_template=template, more=more)
    names = [adapter.name for adapter in adapters]
    notes = _notes(choice, names[:1])
    if len(names) > 1:
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        notes.append(f'for another adapter a request says "lora": [{{"id": N, "scale": 1}}], N of {listed}')
    return _Start(before, command, [*notes, *left_out])


def _export_missing(choice: AdapterChoice, arguments: Mapping[str, Any]) -> None:
    """Write the GGUF files of adapters that have none yet."""
    base = named_base(choice.folders[choice.first], arguments["base"])
    llama_cpp = None if arguments["llama_cpp"] is None else expanded(arguments["llama_cpp"])
    for name, folder in choice.folders.items():
        if _reasons(folder, base.name, LLAMA_CPP) == [] and _is_stale(file := _gguf(folder), folder):
            print(f"# writing {file} of {name}", file=sys.stderr)  # noqa: T201
            export_adapter(folder, base, file, llama_cpp=llama_cpp)


def _gguf(folder: Path) -> Path:
    """Return the place of an adapter's GGUF file: beside its folder, as ``merge --gguf`` has it."""
    return folder.absolute().with_name(f"{folder.absolute().name}.gguf")


def _is_stale(file: Path, folder: Path) -> bool:
    return not file.is_file() or file.stat().st_mtime < (folder / WEIGHTS_NAME).stat().st_mtime


def _base(choice: AdapterChoice, given: str | None) -> str:
    """Return the one base model of all.

    Raises:
        ValueError: if there is no one.
    """
    if given is not None:
        return given
    named = {name: base_model_of(folder) for name, folder in choice.folders.items()}
    if len({*named.values()}) > 1 or not named[choice.first]:
        told = "; ".join(f"{name}: {base or 'none'}" for name, base in named.items())
        raise ValueError(f"the adapters do not name one base model ({told}); give --base MODEL")
    return named[choice.first]


def _servable(choice: AdapterChoice, base: str, server: str) -> tuple[list[ServedAdapter], list[str]]:
    """Return the adapters that a server loads, and sentences about those that it does not.

    Raises:
        ValueError: if it loads none.
    """
    served, left_out = [], []
    for name, folder in choice.folders.items():
        if reasons := _reasons(folder, base, server):
            left_out.append(f"{name} is left out: {'; '.join(reasons)}")
            continue
        rank = read_config(folder, allow_more=True).rank
        path = _gguf(folder) if server == LLAMA_CPP else folder.absolute()
        served.append(ServedAdapter(name, path, rank))
    if not served:
        raise ValueError(
            f"{server} serves none of these adapters: {left_out[0]}; python -m seedlora merge of one alone, --method "
            "soup, brings it into a form that is served, and --into_base MODEL makes a whole model of it"
        )
    return served, left_out


def _reasons(folder: Path, base: str, server: str) -> list[str]:
    """Return what stands in the way of serving an adapter, as far as it is known."""
    return [reason for reason in serving_problems(folder, base=base)[server] if not reason.startswith(NOT_KNOWN)]


def _template(choice: AdapterChoice) -> Path | None:
    """Return the template of the chat endpoint, from the folder of the adapter that is asked for first."""
    return chat_template_file(choice.folders[choice.first].absolute())


def _notes(choice: AdapterChoice, names: Sequence[str]) -> list[str]:
    """Return what whoever asks the server has to know."""
    first = names[0]
    others = f"; also served: {', '.join(names[1:])}" if len(names) > 1 else ""
    why = f", {choice.why}" if choice.why and first == choice.first else ""
    notes = [f'ask for the model "{first}"{why}{others}']
    record = JSONFile(PROMPT_NAME, dict[str, object]).read(choice.folders[first])
    if record is not None and record.get("style") != "chat" and _template(choice) is None:
        notes.append(
            f"it was trained with the prompt style {record.get('style')}: send that text to /v1/completions; the chat "
            "endpoint puts the base model's own template around it"
        )
    return notes
