"""Make the commands that start a server for adapters: vLLM's, which takes each by its name, and llama.cpp's."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seedlora.adapters.servers import vllm_rank


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


def _module(adapter: ServedAdapter) -> str:
    """Write an adapter for ``--lora-modules``, which takes paths with a comma or an equals sign as JSON alone."""
    if set(str(adapter.path)) & set(",="):
        return json.dumps({"name": adapter.name, "path": str(adapter.path)})
    return f"{adapter.name}={adapter.path}"


def _template(file: Path | None) -> list[str]:
    return [] if file is None else ["--chat-template", str(file)]
