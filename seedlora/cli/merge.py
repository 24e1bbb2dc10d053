"""The command ``merge``: fuse adapters into one, or into their base model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from seedlora.adapters.gguf import convert_to_gguf, gguf_command
from seedlora.adapters.peft_config import PEFT_AUTO_CLASSES
from seedlora.adapters.servers import next_commands, serving_problems
from seedlora.cli.terminal import describe_serving, layer_counter, print_json, progress_bar
from seedlora.merge.adapter_folders import fuse_folders
from seedlora.merge.into_base import fuse_into_base
from seedlora.merge.record import RECORD_NAME
from seedlora.merge.registry import make_rule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_merge(arguments: Mapping[str, Any]) -> None:
    """Merge adapters into one folder, or into their base model."""
    options = {
        key.removeprefix("option "): _parse_value(text)
        for key, text in arguments.items()
        if key.startswith("option ") and text is not None
    }
    method, out = arguments["method"], Path(arguments["out"])
    make_rule(method, options)
    _check_into_base(arguments)
    _merge(arguments, options, out)
    record = json.loads((out / RECORD_NAME).read_text(encoding="utf-8"))
    llama_cpp = None if arguments["gguf"] is None else Path(arguments["gguf"])
    converted = None if llama_cpp is None else convert_to_gguf(out, record["base_model"], llama_cpp)
    served = {} if arguments["into_base"] is not None else serving_problems(out, base=arguments["base"])
    if arguments["json"]:
        print_json(record | {"out": str(out), "servable": served, "gguf": str(converted) if converted else None})
        return
    console = Console()
    count = len(arguments["adapters"])
    what = "1 adapter" if count == 1 else f"{count} adapters"
    console.print(f"{what} fused with [bold]{method}[/bold] into {out}", soft_wrap=True)
    _print_inputs(console, method, record)
    if arguments["into_base"] is None:
        _print_commands(console, out, record, served)
    _print_compression(console, method, record, into_base=arguments["into_base"] is not None)
    if missing := record.get("incomplete_groups"):
        console.print(f"some servers want these layers too, but their shape is unknown: {', '.join(missing[:4])}, ...")
    if converted is not None:
        console.print(f"converted: {converted}", soft_wrap=True)
    elif llama_cpp is not None:
        console.print(f"no convert_lora_to_gguf.py in {arguments['gguf']}; where llama.cpp is, run:", soft_wrap=True)
        print(shlex.join(gguf_command(out, record["base_model"], Path("."))))  # noqa: T201 - to be copied


def _check_into_base(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for options that change nothing where the result is added to a base model."""
    if arguments["into_base"] is None:
        return
    for name, reason in (("dtype", "weights keep the dtype of the base model"), ("gguf", "it converts an adapter")):
        if arguments[name] is not None:
            raise ValueError(f"--{name} is not used with --into-base: {reason}")
    if arguments["base"] not in (None, arguments["into_base"]):
        raise ValueError("--base is not used with --into-base: the base model is the one that is added to")


def _merge(arguments: Mapping[str, Any], options: Mapping[str, Any], out: Path) -> None:
    """Write the folder of the result, with a bar that counts the layers."""
    method, sources, base = arguments["method"], arguments["adapters"], arguments["base"]
    with progress_bar() as progress:
        on_layer = layer_counter(progress, progress.add_task(f"{method}", total=None))
        if arguments["into_base"] is not None:
            fuse_into_base(sources, arguments["into_base"], out, method=method, options=options, on_layer=on_layer)
        else:
            dtype = DTYPES.get(arguments["dtype"] or "")
            fuse_folders(sources, out, method=method, options=options, dtype=dtype, base=base, on_layer=on_layer)


def _print_inputs(console: Console, method: str, record: Mapping[str, Any]) -> None:
    """Print what the inputs are, as far as they are more than plain LoRA on a base model that is not quantised."""
    if kinds := record.get("kinds"):
        console.print(f"kinds of the inputs: {', '.join(kinds)}")
    if averaged := record.get("averaged"):
        console.print(f"averaged, not fused by {method}: {', '.join(averaged)}", soft_wrap=True)
    if "dequantised" in record:
        console.print(f"the base model was stored quantised by {record['dequantised']}; the result is dequantised")


def _print_commands(
    console: Console, out: Path, record: Mapping[str, Any], served: Mapping[str, Sequence[str]]
) -> None:
    """Print the shape of a fused adapter, the commands that load and serve it, and which servers do."""
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    console.print(f"rank {config['r']}, lora_alpha {config['lora_alpha']}; {', '.join(config['target_modules'])}")
    commands = next_commands(
        base_model=record["base_model"],
        adapter=out,
        rank=config["r"],
        serve=not served["vLLM"],
        auto_class=PEFT_AUTO_CLASSES.get(config["task_type"], "AutoPeftModel"),
    )
    print(commands)  # noqa: T201 - to be copied
    console.print(describe_serving(served, config["r"]), soft_wrap=True)


def _print_compression(console: Console, method: str, record: Mapping[str, Any], *, into_base: bool) -> None:
    """Print what the compression of inputs and of the result took away, if anything was compressed."""
    if "inputs_compressed" in record:
        largest = record["inputs_compressed"]["relative_error_max"]
        console.print(
            f"{method} works on factors: each input was compressed first, relative error {largest:.3g} at most"
        )
    if "compression" in record:
        mean, largest = (record["compression"][f"relative_error_{key}"] for key in ("mean", "max"))
        exact = "" if into_base else "; --into-base MODEL adds the update to the weights as it is"
        console.print(
            f"compressed: relative Frobenius error {mean:.3g} on average, {largest:.3g} at most{exact}", soft_wrap=True
        )


def _parse_value(text: str) -> Any:
    """Read a word of the command line as JSON if it is JSON, else as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
