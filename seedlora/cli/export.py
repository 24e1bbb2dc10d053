"""The command ``export``: an adapter, or the whole model with it, for llama.cpp and Ollama."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seedlora.adapters.adapter import PROMPT_NAME, is_model, locate
from seedlora.adapters.gguf import (
    MODEL_SCRIPT,
    QUANTIZE,
    SCRIPT,
    SERVER,
    UNQUANTIZED,
    convert_to_gguf,
    find_tool,
    gguf_command,
    model_gguf_commands,
    run_tool,
)
from seedlora.adapters.gguf_file import ARCHITECTURES, MAGIC, gguf_model, write_gguf
from seedlora.adapters.modelfile import Turns, modelfile, prompt_facts
from seedlora.adapters.reading import base_model_of, read_adapter
from seedlora.adapters.servers import serving_problems
from seedlora.cli.command_parser import NAMED_BASE_HELP, CommandParser, run_command
from seedlora.cli.terminal import counting_bar, print_json
from seedlora.merge.into_base import merge_into_base
from seedlora.model.loading import load_config, resolve_base_model
from seedlora.records.json_file import JSONFile
from seedlora.utils.files import write_text
from seedlora.utils.places import expanded
from seedlora.utils.progress import plain_console

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Stands in a Modelfile for a base model that is no file or folder here.
_BASE_GGUF = "base.gguf"


@dataclass(frozen=True)
class BaseModel:
    """Hold the base model of an export, given or named by the adapter, and its configuration."""

    name: str
    config: PretrainedConfig

    @property
    def folder(self) -> Path | None:
        """Return its folder, if it is one of this machine."""
        path = Path(resolve_base_model(self.name))
        return path if path.is_dir() else None

    @property
    def dtype(self) -> str:
        """Return what its weights are stored in."""
        dtype = str(self.config.dtype).removeprefix("torch.")
        return dtype if dtype in UNQUANTIZED else "bfloat16"


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), argv, run_export)


def make_parser() -> CommandParser:
    """Make the parser of the command."""
    parser = CommandParser("export", "Write an adapter, or a whole model, for llama.cpp and Ollama.")
    add = parser.add_argument
    add("adapter", help="a PEFT adapter folder or hub id, or the folder of a whole model")
    add("--gguf", metavar="FILE", required=True, help="the file to write; only an older GGUF file is replaced")
    add("--base", metavar="MODEL", help=NAMED_BASE_HELP)
    add("--base_gguf", metavar="FILE", help="the base model in this format, for the Modelfile and the printed commands")
    add("--into_base", action="store_true", help="write the whole model with the adapter in its weights")
    add("--quantize", metavar="TYPE", help="of a whole model, by llama.cpp's quantiser: Q4_K_M, Q8_0, ...")
    add("--llama_cpp", metavar="FOLDER", help="where llama.cpp is, for whole models and other architectures")
    add("--json", action="store_true", help="print what was written as JSON")
    return parser


def run_export(arguments: Mapping[str, Any]) -> None:
    """Write an adapter, or a whole model, as one GGUF file, with an Ollama Modelfile beside it.

    Raises:
        ValueError: for a request that cannot be carried out, or a tool of llama.cpp that is not on this machine: the
            commands are printed then.
    """
    out, folder = Path(arguments["gguf"]), locate(arguments["adapter"])
    llama_cpp = None if arguments["llama_cpp"] is None else expanded(arguments["llama_cpp"])
    whole = is_model(folder)
    quantize = _quantization(arguments["quantize"], whole=whole or arguments["into_base"])
    _check_out(out)
    for name in ("into_base", "base", "base_gguf"):
        if whole and arguments[name]:
            raise ValueError(f"--{name} is not used: {folder} is a whole model and no adapter")
    if whole:
        base = BaseModel(str(folder), load_config(str(folder)))
        _export_model(None, base, out, quantize=quantize, llama_cpp=llama_cpp)
    else:
        base = named_base(folder, arguments["base"])
        if arguments["into_base"]:
            _export_model(folder, base, out, quantize=quantize, llama_cpp=llama_cpp)
        else:
            export_adapter(folder, base, out, llama_cpp=llama_cpp)
    in_file = whole or arguments["into_base"]
    beside = out.with_suffix(".Modelfile")
    base_gguf = None if arguments["base_gguf"] is None else expanded(arguments["base_gguf"])
    write_text(beside, _modelfile(folder, base, out, base_gguf, in_file=in_file))
    commands = _commands(out, beside, base_gguf or Path(_BASE_GGUF), in_file=in_file)
    if arguments["json"]:
        print_json({"gguf": str(out), "modelfile": str(beside), "base_model": base.name, "commands": commands})
        return
    console = plain_console()
    console.print(f"written: {out}, and {beside.name} beside it", soft_wrap=True, highlight=False)
    print(f"# serve it with llama.cpp\n{commands[0]}\n# or with Ollama\n{commands[1]}")  # noqa: T201 - to be copied


def _quantization(name: str | None, *, whole: bool) -> str | None:
    """Check a quantisation and return it by llama.cpp's name."""
    if name is None:
        return None
    if not whole:
        raise ValueError(f"--quantize {name} is for whole models; add --into_base, or leave the adapter in float32")
    from gguf import LlamaFileType

    kinds = [kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType if kind.name.startswith("MOSTLY_")]
    if name.upper() not in kinds:
        raise ValueError(f"Unknown quantisation '{name}'; choose one of {', '.join(kinds)}")
    return name.upper()


def _check_out(out: Path) -> None:
    if out.suffix != ".gguf":
        raise ValueError(f"--gguf takes a file that ends in .gguf, got {out}")
    if not out.exists():
        return
    if not out.is_file():
        raise ValueError(f"{out} is there and is no file; give another --gguf")
    with out.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{out} is there and is no GGUF file, so it is not replaced; give another --gguf")


def named_base(folder: Path, given: str | None) -> BaseModel:
    """Return the base model of an adapter, its configuration read.

    Raises:
        ValueError: if it is not named, or not to be had.
    """
    named = base_model_of(folder)
    if not (name := given or named):
        raise ValueError(f"{folder} names no base model; give --base MODEL")
    try:
        return BaseModel(name, load_config(name))
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}{'' if given else '; give --base MODEL'}") from None


def export_adapter(folder: Path, base: BaseModel, out: Path, *, llama_cpp: Path | None) -> None:
    """Write the adapter alone: by ourselves, or by llama.cpp's script if its architecture is not known here."""
    if (model := gguf_model(base.config)) is not None:
        write_gguf(out, read_adapter(folder), model)
        return
    if reasons := serving_problems(folder, base=base.name)["llama.cpp"]:
        raise ValueError(f"llama.cpp's script would not read all of {folder}: {reasons[0]}; add --into_base")
    name = resolve_base_model(base.name)
    if llama_cpp is None or convert_to_gguf(folder, name, llama_cpp, outfile=out) is None:
        print(shlex.join(gguf_command(folder, name, llama_cpp or Path("llama.cpp"), outfile=out)))  # noqa: T201
        known = ", ".join(sorted({name.removesuffix("ForCausalLM") for name in ARCHITECTURES if "Causal" in name}))
        kind = next(iter(base.config.architectures or ()), "a model of an unknown class")
        raise ValueError(
            f"adapters of {known} are written here, {kind} takes llama.cpp's {SCRIPT}, which is not in "
            f"{llama_cpp or '--llama_cpp FOLDER'}; the command above does it"
        )


def _export_model(
    adapter: Path | None, base: BaseModel, out: Path, *, quantize: str | None, llama_cpp: Path | None
) -> None:
    """Write the whole model, with an adapter in its weights, by llama.cpp's own tools.

    Raises:
        ValueError: if they are not there; nothing is written then.
    """
    tools = [MODEL_SCRIPT, *([QUANTIZE] if quantize else [])]
    source = resolve_base_model(base.name)
    if missing := [tool for tool in tools if find_tool(tool, llama_cpp) is None]:
        merged = out.with_name(f"{out.stem}-merged")
        model = merged if adapter is not None else Path(source)
        merge = ["python", "-m", "seedlora", "merge", str(adapter), "--method", "soup", "--into_base", source]
        commands = [[*merge, "--out", str(merged)]] if adapter is not None else []
        commands += model_gguf_commands(model, out, dtype=base.dtype, quantize=quantize, llama_cpp=llama_cpp)
        print("\n".join(map(shlex.join, commands)))  # noqa: T201 - to be copied
        where = "among the commands" if llama_cpp is None else f"in {llama_cpp} nor among the commands"
        raise ValueError(
            f"{' and '.join(missing)} of llama.cpp {'is' if len(missing) == 1 else 'are'} not {where} of this machine; "
            "give --llama_cpp FOLDER, or use the commands above"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch, counting_bar() as progress:
        model = Path(source)
        if adapter is not None:
            model, task = Path(scratch) / "merged", progress.add_task("merging", total=None)
            merge_into_base([adapter], source, model, method="soup", on_layer=lambda _path: progress.advance(task))
        progress.add_task("llama.cpp", total=None)
        made = Path(scratch) / out.name
        for command in model_gguf_commands(model, made, dtype=base.dtype, quantize=quantize, llama_cpp=llama_cpp):
            run_tool(command, made if command[-1] == quantize else _outfile(command))
        os.replace(made, out)


def _outfile(command: list[str]) -> Path:
    return Path(command[command.index("--outfile") + 1])


def _modelfile(folder: Path, base: BaseModel, out: Path, base_gguf: Path | None, *, in_file: bool) -> str:
    """Return the Modelfile's text."""
    record = JSONFile(PROMPT_NAME, dict[str, Any]).read(folder)
    wrapping, stop, notes = None, None, list[str]()
    if record is not None:
        # Imported where it is needed: with the data modules comes Lightning.
        from seedlora.datamodules import prompts

        def render(turns: Turns) -> str:
            return prompts.render(record or {}, [prompts.Turn(*turn) for turn in turns])

        wrapping, stop = prompt_facts(record, render)
    if wrapping is None:
        why = "is not known" if record is None else f"({record['style']}) cannot be said in a Go template"
        notes.append(f"The prompt of the training {why}: Ollama takes that of the base model.")
    if in_file:
        start = f"./{out.name}"
    elif base_gguf is not None:
        start = str(base_gguf.resolve())
    elif base.folder is not None:
        start = str(base.folder.resolve())
    else:
        start = f"./{_BASE_GGUF}"
        notes.append(f"{_BASE_GGUF} is {base.name}, by llama.cpp's {MODEL_SCRIPT} --remote {base.name}")
    return modelfile(
        base=start, adapter=None if in_file else f"./{out.name}", wrapping=wrapping, stop=stop, notes=notes
    )


def _commands(out: Path, beside: Path, base_gguf: Path, *, in_file: bool) -> list[str]:
    """Return the commands by which llama.cpp and Ollama serve it."""
    served = ["--model", str(out)] if in_file else ["--model", str(base_gguf), "--lora", str(out)]
    name = out.stem.lower()
    ollama = [shlex.join(["ollama", "create", name, "-f", str(beside)]), shlex.join(["ollama", "run", name])]
    return [shlex.join([SERVER, *served]), " && ".join(ollama)]
