"""llama.cpp's own tools: its converters of adapters and models and its quantiser, run as processes of their own."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SCRIPT = "convert_lora_to_gguf.py"
MODEL_SCRIPT = "convert_hf_to_gguf.py"
QUANTIZE, SERVER = "llama-quantize", "llama-server"
#: What the converter of models stores weights in by itself; everything else takes the quantiser.
UNQUANTIZED = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def gguf_command(adapter: Path, base_model: str, llama_cpp: Path, *, outfile: Path | None = None) -> list[str]:
    """Return the command that turns an adapter folder into one GGUF file.

    Args:
        adapter: a PEFT folder.
        base_model: folder or hub id; the script needs its configuration, not its weights.
        llama_cpp: the folder of llama.cpp's sources.
        outfile: the file. Default: beside the folder.
    """
    base = ["--base", base_model] if Path(base_model).is_dir() else ["--base-model-id", base_model]
    outfile = outfile or adapter.with_name(f"{adapter.name}.gguf")
    return ["python", str(llama_cpp / SCRIPT), *base, "--outfile", str(outfile), str(adapter)]


def convert_to_gguf(adapter: Path, base_model: str, llama_cpp: Path, *, outfile: Path | None = None) -> Path | None:
    """Run the script of a copy of llama.cpp.

    Returns:
        The GGUF file; None if the script is not there.

    Raises:
        ValueError: if the script fails; the message ends in its last line.
    """
    if not (llama_cpp / SCRIPT).is_file():
        return None
    outfile = outfile or adapter.with_name(f"{adapter.name}.gguf")
    run_tool(
        gguf_command(adapter, base_model, llama_cpp, outfile=outfile), outfile, before=f"the adapter is in {adapter}, "
    )
    return outfile


def find_tool(name: str, llama_cpp: Path | None) -> str | None:
    """Return where a tool of llama.cpp is: in its folder, in what was built there, or where commands are looked for.

    Args:
        name: of the tool.
        llama_cpp: the folder of llama.cpp. Default: commands alone.
    """
    folders = [] if llama_cpp is None else [llama_cpp, llama_cpp / "build" / "bin", llama_cpp / "bin"]
    return next((str(folder / name) for folder in folders if (folder / name).is_file()), shutil.which(name))


def model_gguf_commands(
    model: Path, outfile: Path, *, dtype: str, quantize: str | None, llama_cpp: Path | None
) -> list[list[str]]:
    """Return the commands that turn a model's folder into one GGUF file.

    Tools that are not found stand there by their names.

    Args:
        model: a folder of transformers' form, its tokenizer in it.
        outfile: the file.
        dtype: of the model's weights, which the file keeps.
        quantize: llama.cpp's name of a quantisation, ``Q4_K_M`` for example. Default: none.
        llama_cpp: as for :func:`find_tool`.
    """
    whole = outfile if quantize is None else outfile.with_name(f"{outfile.stem}-{UNQUANTIZED[dtype]}.gguf")
    script = find_tool(MODEL_SCRIPT, llama_cpp) or MODEL_SCRIPT
    commands = [["python", script, str(model), "--outfile", str(whole), "--outtype", UNQUANTIZED[dtype]]]
    if quantize is not None:
        commands.append([find_tool(QUANTIZE, llama_cpp) or QUANTIZE, str(whole), str(outfile), quantize])
    return commands


def run_tool(command: Sequence[str], outfile: Path, *, before: str = "") -> None:
    """Run a tool of llama.cpp; ``python`` as its first word means this one.

    Args:
        command: its words.
        outfile: what it writes.
        before: begins the message of an error: what is there already.

    Raises:
        ValueError: if it fails; the message ends in its last line.
    """
    words = [sys.executable, *command[1:]] if command[0] == "python" else list(command)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 0 and outfile.is_file():
        return
    last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
    missing = re.search(r"No module named '([\w.]+)'", last)
    advice = f" (pip install {missing[1]})" if missing else ""
    but = f"{before}but " if before else ""
    raise ValueError(f"{but}{shlex.join(command)} failed: {last}{advice}")
