"""Make the commands that start a server for adapters: vLLM's, which takes each by its name, and llama.cpp's."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seedlora.adapters.servers import VLLM_RANKS, vllm_rank
from seedlora.model.tokenizer_files import chat_template_file

#: Stands in a command for a base model that no adapter names.
_BASE_MODEL = "BASE_MODEL"


@dataclass(frozen=True)
class ServedAdapter:
    """Describe an adapter as a server has it.

    Args:
        name: the model that requests ask for.
        path: its folder, or its GGUF file.
        rank: the largest of its layers.
    """

    name: str
    path: Path
    rank: int


def vllm_command(
    base: str, adapters: Sequence[ServedAdapter], *, chat_template: Path | None = None, more: Sequence[str] = ()
) -> list[str]:
    """Return the words that start vLLM's server.

    Args:
        base: the base model's folder or hub id.
        adapters: at least one, each of a rank that vLLM takes.
        chat_template: a file with the template of the chat endpoint. Default: the base model's own.
        more: further options.

    Raises:
        ValueError: if a rank is over vLLM's limit.
    """
    largest = max(adapter.rank for adapter in adapters)
    if (limit := vllm_rank(largest)) is None:
        raise ValueError(f"rank {largest} is over vLLM's limit")
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(limit)]
    words += ["--max-loras", str(len(adapters))] if len(adapters) > 1 else []
    words += ["--lora-modules", *map(_module, adapters)]
    return [*words, *_template(chat_template), *more]


def vllm_model_command(
    model: Path, name: str, *, chat_template: Path | None = None, more: Sequence[str] = ()
) -> list[str]:
    """Return the words that start vLLM's server for a whole model, which requests ask for by ``name``."""
    return ["vllm", "serve", str(model), "--served-model-name", name, *_template(chat_template), *more]


def llama_cpp_command(
    server: str,
    base: Path,
    adapters: Sequence[ServedAdapter],
    *,
    chat_template: Path | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """Return the words that start llama.cpp's server.

    The first adapter is applied, the others wait for a request's ``lora``: left to itself the server would apply the
    sum of all.

    Args:
        server: the program.
        base: the base model's GGUF file.
        adapters: with the paths of their GGUF files; none for a whole model.
        chat_template: as for :func:`vllm_command`.
        more: further options.

    Raises:
        ValueError: if a path cannot be said in ``--lora-scaled``.
    """
    words = [server, "--model", str(base)]
    if len(adapters) == 1:
        words += ["--lora", str(adapters[0].path)]
    elif adapters:
        for adapter in adapters:
            if set(str(adapter.path)) & set(',:"'):
                raise ValueError(f"{adapter.path}: llama.cpp takes several adapters from paths without , : and quotes")
        scaled = (f"{adapter.path}:{int(i == 0)}" for i, adapter in enumerate(adapters))
        # Its cache of prompts does not ask by which adapter they were read: answers of another one would come out.
        words += ["--lora-scaled", ",".join(scaled), "--cache-ram", "0"]
    words += ["--alias", adapters[0].name] if adapters else []
    return [*words, *(["--jinja", "--chat-template-file", str(chat_template)] if chat_template else []), *more]


def shown(command: Sequence[str]) -> str:
    """Return a command to be pasted into a shell: a line for each option, whatever its words hold."""
    lines: list[list[str]] = [[]]
    for word in command:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " \\\n    ".join(" ".join(line) for line in lines)


def next_commands(
    *, base_model: str, adapter: Path, rank: int, serve: bool = True, auto_class: str = "AutoPeftModelForCausalLM"
) -> str:
    """Return the commands that talk to the adapter, load it with PEFT, and serve it if it can be; for any shell."""
    note = "" if base_model else f"# no base model is named: write it in the place of {_BASE_MODEL}\n"
    base = () if base_model else ("--base", _BASE_MODEL)
    load = f"""{note}{_chat(adapter, *base)}
# load it with PEFT
python - <<'PY'
{_load(base_model, adapter, auto_class)}
PY"""
    if not serve:
        return load
    if vllm_rank(rank) is None:
        limit = f"# rank {rank} is over vLLM's limit of {VLLM_RANKS[-1]}"
        return f"{load}\n{limit}: merge fewer or smaller adapters to serve it"
    words = vllm_command(
        base_model or _BASE_MODEL,
        [ServedAdapter(adapter.name, adapter, rank)],
        chat_template=chat_template_file(adapter),
    )
    return f"{load}\n# serve it with vLLM\n{shown(words)}"


def _load(base_model: str, adapter: Path, auto_class: str) -> str:
    """Return the lines of Python that load an adapter over its base model."""
    if base_model:
        return f"from peft import {auto_class}\nmodel = {auto_class}.from_pretrained({json.dumps(str(adapter))})"
    of_base = auto_class.replace("AutoPeft", "Auto")
    return (
        f"from peft import PeftModel\nfrom transformers import {of_base}\n"
        f'model = PeftModel.from_pretrained({of_base}.from_pretrained("{_BASE_MODEL}"), {json.dumps(str(adapter))})'
    )


def model_commands(folder: Path) -> str:
    """Return the commands that talk to, load, serve and score a whole model; for any shell."""
    return f"""{_chat(folder)}
# load it with transformers
python - <<'PY'
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({json.dumps(str(folder))})
PY
# serve it with vLLM
{shlex.join(["vllm", "serve", str(folder)])}
# score it by generation
{shlex.join(["python", "-m", "seedlora", "evaluate", "--base_model", str(folder), "--task", "gsm8k"])}"""


def _chat(folder: Path, *more: str) -> str:
    return f"# talk to it\n{shlex.join(['python', '-m', 'seedlora', 'chat', str(folder), *more])}"


def _module(adapter: ServedAdapter) -> str:
    """Write an adapter for ``--lora-modules``, which takes paths with a comma or an equals sign as JSON alone."""
    if set(str(adapter.path)) & set(",="):
        return json.dumps({"name": adapter.name, "path": str(adapter.path)})
    return f"{adapter.name}={adapter.path}"


def _template(file: Path | None) -> list[str]:
    return [] if file is None else ["--chat-template", str(file)]
