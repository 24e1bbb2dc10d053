"""Convert adapters for llama.cpp, by its own script, which is run as a process of its own."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

SCRIPT = "convert_lora_to_gguf.py"


def gguf_command(adapter: Path, base_model: str, llama_cpp: Path) -> list[str]:
    """Return the command that turns an adapter folder into one GGUF file beside it.

    Args:
        adapter: a PEFT folder.
        base_model: folder or hub id; the script needs its configuration, not its weights.
        llama_cpp: the folder of llama.cpp's sources.
    """
    base = ["--base", base_model] if Path(base_model).is_dir() else ["--base-model-id", base_model]
    outfile = adapter.with_name(f"{adapter.name}.gguf")
    return ["python", str(llama_cpp / SCRIPT), *base, "--outfile", str(outfile), str(adapter)]


def convert_to_gguf(adapter: Path, base_model: str, llama_cpp: Path) -> Path | None:
    """Run the script of a copy of llama.cpp.

    Returns:
        The GGUF file; None if the script is not there.

    Raises:
        ValueError: if the script fails; the message ends in its last line.
    """
    if not (llama_cpp / SCRIPT).is_file():
        return None
    command = gguf_command(adapter, base_model, llama_cpp)
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, check=False)
    outfile = adapter.with_name(f"{adapter.name}.gguf")
    if done.returncode != 0 or not outfile.is_file():
        last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise ValueError(f"the adapter is in {adapter}, but {shlex.join(command)} failed: {last}")
    return outfile
