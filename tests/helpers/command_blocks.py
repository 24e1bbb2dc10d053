"""The commands that README and docs show: collected, and adapted so that they run here in seconds."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.paths import DOCS, ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted(DOCS.glob("*.md"))]
#: What stands on the way of running a command here; its words are read by the real parser all the same.
CANNOT_RUN = {
    r"quantization|adamw8bit": "needs bitsandbytes and minutes; tests/model/test_quantization.py runs it",
    r"trainer\.strategy|trainer\.devices": "needs several devices; tests/distributed runs it",
    r"model\.compile": "compiles for minutes; tests/model/test_compilation.py runs it",
    r"adapter full": "its own learning rate and no quick size; tests/training/test_whole_models.py runs it",
    r"--endpoint|seedlora serve (?!.*--dry_run)": "needs a server; tests/serving runs it",
    r"seedlora push (?!.*--dry_run)|hub": "needs the hub; tests/cli/test_push.py runs it",
    r"--gguf model\.gguf|--quantize|--llama_cpp": "needs llama.cpp; tests/serving runs it",
    r"--lm_eval|evaluate\.lm_eval": "needs lm-evaluation-harness; tests/evaluation/test_harness.py runs it",
    r"--task math|humaneval": "needs files of the task; tests/evaluation runs it",
    r"SUMS": "needs three runs; tests/evaluation/test_joint.py runs it",
    r"^python (-m )?benchmarks[/.]": "takes minutes; its options are looked for in its source",
    r"--controls equal_tokens|--controls$|sweep|halving": "trains for minutes; tests/cli and tests/training run it",
    r"data\.style chat": "needs a chat template; tests/datamodules/test_chat_templates.py has some",
    r"--resume": "needs a run that was killed; tests/cli/test_resume.py runs it",
}
#: Programs that are not ours. Their commands are shown and not tried.
OTHERS = ("python3", "mkdocs", "ollama", "head", "source")


@dataclass(frozen=True)
class Shown:
    """A command as a page shows it.

    Args:
        page: where.
        words: as the shell splits them, comments left out.
        in_block: it stands in a block of commands, and not in a sentence, where it may be a part of one.
    """

    page: str
    words: tuple[str, ...]
    in_block: bool = True

    @property
    def line(self) -> str:
        """Return it as one line."""
        return shlex.join(self.words)

    @property
    def kind(self) -> str:
        """``train``, the name of a command of ours, a script of ``benchmarks``, or another program."""
        if self.words[:2] == ("python", "train.py"):
            return "train"
        if self.words[:3] == ("python", "-m", "seedlora"):
            return self.words[3]
        if self.words[0] == "seedlora":
            return self.words[1]
        if self.words[1:2] == ("-m",) and self.words[2].startswith("benchmarks."):
            module = self.words[2].replace(".", "/")
            return f"{module}/__main__.py" if (ROOT / module).is_dir() else f"{module}.py"
        return self.words[1] if self.words[0] == "python" else self.words[0]

    @property
    def options(self) -> list[str]:
        """The words after the command, without those that ``serve`` hands on to a server."""
        skip = 4 if self.words[:3] == ("python", "-m", "seedlora") else 3 if self.words[1:2] == ("-m",) else 2
        end = self.words.index("--options") if "--options" in self.words else None
        return list(self.words[skip:end])

    @property
    def why_not_run(self) -> str | None:
        """Why it is read and not run, if so."""
        if not self.in_block:
            return "a sentence names it"
        shown = " ".join(self.words)
        return next((reason for pattern, reason in CANNOT_RUN.items() if re.search(pattern, shown)), None)


def shown_commands() -> list[Shown]:
    """Collect the commands of all blocks, and those of ours with options that stand in a sentence or a table."""
    found: dict[Shown, None] = {}
    for page in PAGES:
        text, name = page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))
        for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, flags=re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    # What a launcher of processes starts is what is meant.
                    launched = "torch.distributed.run" in words and "train.py" in words
                    words = ["python", *words[words.index("train.py") :]] if launched else words
                    found[Shown(name, tuple(words))] = None
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        for span in re.findall(
            r"`(python (?:train\.py|-m seedlora|benchmarks/\w+\.py) [^`]*)`", " ".join(prose.split())
        ):
            words = tuple(shlex.split(span))
            complete = len(words) > (4 if "-m" in words else 2)
            if complete and not any(word.endswith("...") or word == "NAME" for word in words):
                found[Shown(name, words, in_block=False)] = None
    return list(found)


def adapted(shown: Shown, base_model: str) -> list[str]:
    """Return the words after a command that runs here: the same ones, and after those of training smaller sizes.

    The last value of an option counts, so what the page shows is still read first.
    """
    words = shown.options
    if shown.kind != "train" or words[:1] == ["test"] or any(word.endswith("help") for word in words):
        return words
    sizes = ["--model.base_model", base_model, "--model.dtype", "float32", "--trainer.accelerator", "cpu"]
    sizes += [
        "--trainer.max_epochs",
        "6",
        "--trainer.limit_train_batches",
        "2",
        "--trainer.accumulate_grad_batches",
        "1",
    ]
    if "--data" in words or "--config" in words:
        return [
            *words,
            *sizes,
            "--data.path",
            "rows.jsonl",
            "--data.test_fraction",
            "0.2",
            "--data.val_fraction",
            "0.2",
        ]
    return [*words, *sizes, "--data.num_train", "48", "--data.num_val", "8", "--data.num_test", "8"]


#: A row in the forms of all data sets whose configs the pages show.
ROW = {"prompt": "1+1?", "response": "2", "query": "1+1?", "answer": "2 #### 2", "question": "1+1?"}


def lay_out(folder: Path, base_model: str, adapters: Sequence[str], run: Path | None = None) -> None:
    """Put what the pages name into a folder: rows, adapters, a model, and a finished run if there is one."""
    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "MODEL").symlink_to(base_model)
    for name, adapter in zip("ABC", adapters, strict=True):
        (folder / name).symlink_to(adapter)
    (folder / "runs").mkdir()
    for name in ("RUN", "runs/x") if run else ():
        shutil.copytree(run, folder / name)
    own = {key: ROW[key] for key in ("prompt", "response")}
    for name, row in {"rows": ROW, "mine": own, "held_out": own, "dates": own}.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 40)
