"""The command ``merge``: merge adapters into one, or into their base model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docstring_parser
import torch
from rich.console import Console

from seedlora.adapters.gguf import convert_to_gguf, gguf_command
from seedlora.adapters.peft_config import PEFT_AUTO_CLASSES
from seedlora.adapters.reading import base_model_of
from seedlora.adapters.server_commands import model_commands, next_commands
from seedlora.adapters.servers import describe_serving, serving_problems
from seedlora.cli.command_parser import BASE_HELP, CommandParser, run_command
from seedlora.cli.terminal import counting_bar, layer_counter, print_json
from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.common_options import COMMON_DEFAULTS, CommonOptions
from seedlora.merge.into_base import merge_into_base
from seedlora.merge.method_table import PYTHON_ONLY
from seedlora.merge.registry import METHODS, make_rule
from seedlora.names import GREEDY
from seedlora.records.fusion import FUSION, FusionRecord
from seedlora.utils.plain_data import from_json
from seedlora.utils.progress import plain_console

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _Request:
    """The arguments of the command.

    Args:
        adapters: folders or hub ids.
        out: the folder to write.
        method: a merge method.
        options: of the method.
        dtype: a key of :data:`DTYPES`, for the result.
        into_base: the base model that the result is added to.
        base: the base model, where the adapters' own name for it will not do.
        llama_cpp: the folder of llama.cpp, whose script converts the result.
    """

    adapters: Sequence[str]
    out: Path
    method: str
    options: Mapping[str, object]
    dtype: str | None
    into_base: str | None
    base: str | None
    llama_cpp: Path | None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> _Request:
        """Read the arguments as the parser gives them."""
        options = {
            key.removeprefix("option "): _parse_value(text)
            for key, text in arguments.items()
            if key.startswith("option ") and text is not None
        }
        return cls(
            adapters=arguments["adapters"],
            out=Path(arguments["out"]),
            method=arguments["method"],
            options=options,
            dtype=arguments["dtype"],
            into_base=arguments["into_base"],
            base=arguments["base"],
            llama_cpp=None if arguments["gguf"] is None else Path(arguments["gguf"]),
        )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), argv, merge)


def make_parser() -> CommandParser:
    """Make the parser of the command."""
    parser = CommandParser("merge", "Merge adapters into one, or into the base model.")
    add = parser.add_argument
    add("adapters", nargs="+", help="PEFT adapter folders or hub ids")
    add("--method", default="seedlora", help="see: python -m seedlora methods")
    add("--out", required=True, help="the folder to write; only an older result is replaced")
    add("--dtype", choices=sorted(DTYPES), help="of the result; default: that of the adapters")
    add("--into_base", metavar="MODEL", help="add the result to this model folder's weights instead")
    add("--base", metavar="MODEL", help=BASE_HELP)
    add("--gguf", metavar="LLAMA_CPP", help="also convert the result with llama.cpp's script, found there")
    add("--json", action="store_true", help="print the record as JSON")
    options = parser.add_argument_group("options of the methods", "python -m seedlora methods says which has which")
    for name, text in option_help().items():
        options.add_argument(f"--{name}", dest=f"option {name}", metavar="VALUE", help=text)
    return parser


def option_help() -> dict[str, str]:
    """Say of each option of the methods what it is, in the words of their docstrings, and which methods have it."""
    texts = {option: {text: ["all methods"]} for option, text in _argument_texts(CommonOptions).items()}
    for name, method in METHODS.items():
        own = [_argument_texts(function) for function in (method.rule, *method.surveys.values())]
        for option in method.options:
            if option not in PYTHON_ONLY and option not in COMMON_DEFAULTS:
                text = next((found[option] for found in own if option in found), "")
                texts.setdefault(option, {}).setdefault(text, []).append(name)
    return {
        option: "; ".join(f"{text} ({', '.join(names)})".strip() for text, names in sorted(told.items(), reverse=True))
        for option, told in sorted(texts.items())
    }


def _argument_texts(function: Callable[..., object]) -> dict[str, str]:
    """Return the first sentence about each argument in a docstring, without its marks."""
    arguments = docstring_parser.parse(function.__doc__ or "").params
    texts = {argument.arg_name: " ".join((argument.description or "").split()) for argument in arguments}
    return {
        name: re.sub(r"``|:\w+:`~?|`", "", re.split(r"[.;](?= |$)", text)[0]).replace("%", "%%")
        for name, text in texts.items()
    }


def merge(arguments: Mapping[str, Any]) -> None:
    """Merge adapters into one folder, or into their base model."""
    request = _Request.of(arguments)
    if request.method == GREEDY:
        raise ValueError(
            f"{GREEDY} chooses among adapters by a score on validation rows, which a run has: python -m seedlora train "
            f"--merge {GREEDY}; of adapters from elsewhere, --method soup takes those that are given"
        )
    make_rule(request.method, request.options)
    _check_into_base(request)
    _merge(request)
    out, method, into_base = request.out, request.method, request.into_base is not None
    record = FUSION.read(out)
    assert record is not None
    converted = None
    if request.llama_cpp is not None:
        converted = convert_to_gguf(out, base_model_of(out), request.llama_cpp)
    served = {} if into_base else serving_problems(out, base=request.base)
    if arguments["json"]:
        print_json({**record, "out": str(out), "servable": served, "gguf": str(converted) if converted else None})
        return
    console = plain_console()
    count = len(request.adapters)
    what = "1 adapter" if count == 1 else f"{count} adapters"
    console.print(f"{what} merged with {method} into {out}", soft_wrap=True)
    _print_inputs(console, method, record)
    if into_base:
        print(model_commands(out))  # noqa: T201 - to be copied
    else:
        _print_commands(console, out, served)
    _print_compression(console, method, record, into_base=into_base)
    if missing := record.get("incomplete_groups"):
        console.print(f"some servers want these layers too, but their shape is unknown: {', '.join(missing[:4])}, ...")
    if converted is not None:
        console.print(f"converted: {converted}", soft_wrap=True)
    elif request.llama_cpp is not None:
        console.print(f"no convert_lora_to_gguf.py in {arguments['gguf']}; where llama.cpp is, run:", soft_wrap=True)
        print(shlex.join(gguf_command(out, base_model_of(out), Path("."))))  # noqa: T201 - to be copied


def _check_into_base(request: _Request) -> None:
    """Raise ValueError for options that change nothing where the result is added to a base model."""
    if request.into_base is None:
        return
    if request.dtype is not None:
        raise ValueError("--dtype is not used with --into_base: weights keep the dtype of the base model")
    if request.llama_cpp is not None:
        raise ValueError("--gguf is not used with --into_base: it converts an adapter")
    if request.base not in (None, request.into_base):
        raise ValueError("--base is not used with --into_base: the base model is the one that is added to")


def _merge(request: _Request) -> None:
    """Write the folder of the result, with a bar that counts the layers."""
    sources, out, method, options = request.adapters, request.out, request.method, request.options
    with counting_bar() as progress:
        on_layer = layer_counter(progress, progress.add_task(f"{method}", total=None))
        if request.into_base is not None:
            merge_into_base(sources, request.into_base, out, method=method, options=options, on_layer=on_layer)
        else:
            dtype = DTYPES.get(request.dtype or "")
            merge_folders(
                sources, out, method=method, options=options, dtype=dtype, base=request.base, on_layer=on_layer
            )


def _print_inputs(console: Console, method: str, record: FusionRecord) -> None:
    """Print what the inputs are, as far as they are more than plain LoRA on a base model that is not quantised."""
    if kinds := record.get("kinds"):
        console.print(f"kinds of the inputs: {', '.join(kinds)}")
    if averaged := record.get("averaged"):
        console.print(f"averaged, not merged by {method}: {', '.join(averaged)}", soft_wrap=True)
    if record.get("changes_nothing"):
        console.print(
            "the result is zero in all layers, so it will change nothing: were the inputs trained, do they cancel out, "
            "or did an option take everything away?",
            soft_wrap=True,
        )
    if differing := record.get("differing"):
        console.print(
            f"left behind, because the inputs differ in them: {', '.join(differing)}; what is asked of the result is "
            "worded by default, or by --prompt_style",
            soft_wrap=True,
        )
    if "dequantised" in record:
        console.print(f"the base model was stored quantised by {record['dequantised']}; the result is dequantised")


def _print_commands(console: Console, out: Path, served: Mapping[str, Sequence[str]]) -> None:
    """Print the shape of a fused adapter, the commands that load and serve it, and which servers do."""
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    console.print(f"rank {config['r']}, lora_alpha {config['lora_alpha']}; {', '.join(config['target_modules'])}")
    commands = next_commands(
        base_model=config["base_model_name_or_path"] or "",
        adapter=out,
        rank=config["r"],
        serve=not served["vLLM"],
        auto_class=PEFT_AUTO_CLASSES.get(config["task_type"], "AutoPeftModel"),
    )
    print(commands)  # noqa: T201 - to be copied
    console.print(describe_serving(served, config["r"]), soft_wrap=True)


def _print_compression(console: Console, method: str, record: FusionRecord, *, into_base: bool) -> None:
    """Print what the compression of inputs and of the result took away, if anything was compressed."""
    if "inputs_compressed" in record:
        largest = record["inputs_compressed"]["relative_error_max"]
        console.print(
            f"{method} works on factors: each input was compressed first, relative error {largest:.3g} at most"
        )
    if "compression" in record:
        errors = record["compression"]
        mean, largest = errors["relative_error_mean"], errors["relative_error_max"]
        exact = "" if into_base else "; --into_base MODEL adds the update to the weights as it is"
        console.print(
            f"compressed: relative Frobenius error {mean:.3g} on average, {largest:.3g} at most{exact}", soft_wrap=True
        )


def _parse_value(text: str) -> object:
    """Read a word of the command line as JSON, a number, such as ``.2``, or numbers with commas; else as text."""
    for read in (from_json, float, lambda words: [float(word) for word in words.split(",")]):
        try:
            return read(text)
        except ValueError:
            continue
    return text
