"""The command ``merge``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from seedlora.adapters.gguf import convert, gguf_command
from seedlora.adapters.reading import TASKS
from seedlora.adapters.servers import next_commands, servable
from seedlora.cli.terminal import print_json, progress_bar, served_line
from seedlora.merge.adapter_folders import fuse_folders
from seedlora.merge.registry import make_rule
from seedlora.merge.whole_models import fuse_into_base
from seedlora.records.fusion import FUSION

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_merge(arguments: Mapping[str, Any]) -> None:
    """Merge adapters into one folder, or into their base model."""
    options = {
        key.removeprefix("option "): _value(text)
        for key, text in arguments.items()
        if key.startswith("option ") and text is not None
    }
    method, sources, out = arguments["method"], arguments["adapters"], Path(arguments["out"])
    make_rule(method, options)
    if arguments["into_base"] is not None:
        for name, reason in (("dtype", "weights keep the dtype of the base model"), ("gguf", "it converts an adapter")):
            if arguments[name] is not None:
                raise ValueError(f"--{name} is not used with --into-base: {reason}")
        if arguments["base"] not in (None, arguments["into_base"]):
            raise ValueError("--base is not used with --into-base: the base model is the one that is added to")
    with progress_bar() as progress:
        task = progress.add_task(f"{method}", total=None)
        on_layer = lambda _path: progress.advance(task)  # noqa: E731
        if arguments["into_base"] is not None:
            fuse_into_base(sources, arguments["into_base"], out, method=method, options=options, on_layer=on_layer)
        else:
            dtype = DTYPES.get(arguments["dtype"] or "")
            base = arguments["base"]
            fuse_folders(sources, out, method=method, options=options, dtype=dtype, base=base, on_layer=on_layer)
    record = FUSION.read(out)
    assert record is not None
    converted = None if arguments["gguf"] is None else convert(out, record["base_model"], Path(arguments["gguf"]))
    served = {} if arguments["into_base"] is not None else servable(out, base=arguments["base"])
    if arguments["json"]:
        print_json({**record, "out": str(out), "servable": served, "gguf": str(converted) if converted else None})
        return
    console = Console()
    what = "1 adapter" if len(sources) == 1 else f"{len(sources)} adapters"
    console.print(f"{what} fused with [bold]{method}[/bold] into {out}", soft_wrap=True)
    if kinds := record.get("kinds"):
        console.print(f"kinds of the inputs: {', '.join(kinds)}")
    if averaged := record.get("averaged"):
        console.print(f"averaged, not fused by {method}: {', '.join(averaged)}", soft_wrap=True)
    if "dequantised" in record:
        console.print(f"the base model was stored quantised by {record['dequantised']}; the result is dequantised")
    if arguments["into_base"] is None:
        config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
        console.print(f"rank {config['r']}, lora_alpha {config['lora_alpha']}; {', '.join(config['target_modules'])}")
        loads = next_commands(
            base_model=record["base_model"],
            adapter=out,
            rank=config["r"],
            serve=not served["vLLM"],
            auto_class=TASKS.get(config["task_type"], "AutoPeftModel"),
        )
        print(loads)  # noqa: T201 - to be copied
        console.print(served_line(served, config["r"]), soft_wrap=True)
    if "inputs_compressed" in record:
        largest = record["inputs_compressed"]["relative_error_max"]
        console.print(
            f"{method} works on factors: each input was compressed first, relative error {largest:.3g} at most"
        )
    if "compression" in record:
        errors = record["compression"]
        mean, largest = errors["relative_error_mean"], errors["relative_error_max"]
        exact = "" if arguments["into_base"] else "; --into-base MODEL adds the update to the weights as it is"
        console.print(
            f"compressed: relative Frobenius error {mean:.3g} on average, {largest:.3g} at most{exact}", soft_wrap=True
        )
    if missing := record.get("incomplete_groups"):
        console.print(f"some servers want these layers too, but their shape is unknown: {', '.join(missing[:4])}, ...")
    if converted is not None:
        console.print(f"converted: {converted}", soft_wrap=True)
    elif arguments["gguf"] is not None:
        console.print(f"no convert_lora_to_gguf.py in {arguments['gguf']}; where llama.cpp is, run:", soft_wrap=True)
        print(shlex.join(gguf_command(out, record["base_model"], Path("."))))  # noqa: T201 - to be copied


def _value(text: str) -> Any:
    """A word of the command line as JSON if it is JSON, else as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
