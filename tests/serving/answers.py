"""Greedy answers of a server beside the product's own, and how near another token was where the two part."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seedlora.evaluation.folder_generators import make_folder_generator
from seedlora.evaluation.generate import Generation, Prompt
from seedlora.merge.adapter_folders import merge_folders
from seedlora.model.weight_files import WeightFiles
from tests.serving.models import save_adapter

TOKENS = 16
QUESTIONS = (
    *("What is 17 + 25?", "Name three colours.", "Write a haiku about the sea.", "Who wrote Hamlet?"),
    *("Translate 'good morning' into French.", "What is the capital of Japan?", "List two prime numbers above 50."),
    *("Explain gravity to a child.", "What is 9 * 8 - 5?", "Give a synonym of 'quick'.", "Complete: once upon a time"),
    *("Is water wet?", "Sort: 3, 1, 2.", "What is the boiling point of water?", "Spell 'necessary'."),
    *("What comes after Tuesday?", "Write a Python function that adds.", "What is 100 / 7?", "Say hello."),
    *("Why is the sky blue?", "How many legs has a spider?", "Name a river in Africa.", "What is 12 squared?"),
    *("Write the word 'cat' backwards.", "Who painted the Mona Lisa?", "What is the opposite of 'cold'?"),
    *("Give the plural of 'mouse'.", "Which planet is the largest?", "What is 7 + 8 * 2?", "Define 'entropy'."),
    *("List the vowels.", "What do bees make?", "Translate 'thank you' into Spanish.", "Is 91 a prime number?"),
    *("Name the seasons.", "What is half of 86?", "Who discovered penicillin?", "Rhyme with 'light'."),
    *("How many minutes has a day?", "What is the chemical symbol of gold?", "Write a title for a book on bread."),
    *("Say 'yes' in German.", "What is 3 to the power of 4?", "Name an instrument with strings.", "What is ice?"),
    *("Count from five to nine.", "Which sea lies north of Africa?", "Shorten 'do not'.", "What is 250 - 75?"),
    "Tell me a fact about whales.",
)


def cache_of(name: str) -> Path:
    """Where an environment is made once: $SEEDLORA_SERVING, or a folder of the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seedlora-serving"
    return Path(os.environ.get("SEEDLORA_SERVING") or default) / name


def make_or_skip(script: str, folder: Path) -> None:
    """Make an environment by a script of this folder, unless it is there; skip the tests where it cannot be made."""
    words = [str(Path(__file__).with_name(script)), str(folder)]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{script}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")


def save_run(run: Path, base: str, *, std: float) -> Path:
    """Write three seeds of rank 8, fused, and their soup, as a run has them."""
    seeds = [save_adapter(run / f"seed_{i}", base, r=8, lora_alpha=16, std=std, seed=i) for i in (1, 2, 3)]
    (run / "run.json").write_text("{}")
    merge_folders(seeds, run / "fused", method="seedlora")
    merge_folders(seeds, run / "soup", method="soup")
    return run


def save_kinds(folder: Path, base: str, *, std: float) -> dict[str, Path]:
    """Write what else is served, by name: a fused adapter of rank 8, and plain LoRA made of rsLoRA and of DoRA."""
    shape = {"r": 8, "lora_alpha": 16, "std": std}
    seeds = [save_adapter(folder / "of" / f"seed_{i}", base, **shape, seed=i) for i in (1, 2, 3)]
    rslora = save_adapter(folder / "of" / "rslora", base, **shape | {"std": std / 2}, use_rslora=True, seed=4)
    dora = save_adapter(folder / "of" / "dora", base, **shape, use_dora=True, seed=5)
    return {
        "reduced": merge_folders(seeds, folder / "reduced", method="seedlora", options={"rank": 8}),
        "rslora": merge_folders([rslora], folder / "rslora", method="soup"),
        "dora": merge_folders([dora], folder / "dora", method="soup", options={"rank": 64}, base=base),
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def started(command: list[str], url: str, *, seconds: float = 600) -> Iterator[str]:
    """A server that answers; it is stopped by the signal that a user's Ctrl-C or service manager sends."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(process, url, log, time.monotonic() + seconds)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _wait(process: subprocess.Popen[bytes], url: str, log: IO[bytes], until: float) -> None:
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    log.seek(0)
    raise AssertionError(f"the server did not answer: {log.read().decode(errors='replace')[-3000:]}")


def answers(generator, name: str, prompts: list[Prompt]) -> list[str]:
    found: dict[int, str] = {}

    def on_done(_: str, i: int, said: Generation) -> None:
        found[i] = said.text

    generator({name: prompts}, max_new_tokens=TOKENS, stops=(), on_done=on_done)
    return [found[i] for i in range(len(prompts))]


def completion(url: str, prompt: str, **more: object) -> str:
    """A greedy answer of a server that is asked as any program asks it."""
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **more}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.loads(answer.read())["choices"][0]["text"]


class Reference:
    """The product's own answers over one base model in float32, and how near another token was where two part.

    Args:
        base: the folder of the model.
        adapters: folders by name.
        ends: tokens that end an answer of the server beside those that do by the model's own configuration.
    """

    def __init__(self, base: str, adapters: dict[str, Path], *, ends: tuple[str, ...] = ()) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.generator = make_folder_generator(self.model, self.tokenizer, adapters, base=WeightFiles(base))
        self.generator._ends |= {self.tokenizer.convert_tokens_to_ids(end) for end in ends}

    def differences(self, name: str, prompts: list[Prompt], theirs: list[str]) -> list[float]:
        """For each answer that is another one: how many logits our token was above theirs where the two part.

        An answer that differs and cannot be told apart in tokens counts as infinity.
        """
        found = []
        for prompt, own, other in zip(prompts, answers(self.generator, name, prompts), theirs, strict=True):
            if own != other:
                found.append(self._gap(name, prompt, own, other))
        return found

    @torch.no_grad()
    def _gap(self, name: str, prompt: Prompt, own: str, other: str) -> float:
        encode = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        start = self.tokenizer(prompt.text, add_special_tokens=prompt.add_special_tokens)["input_ids"]
        ours, theirs = encode(own), encode(other)
        ours, theirs = ([*ids, self.tokenizer.eos_token_id] for ids in (ours, theirs))
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if same is None:
            return float("inf")
        self.generator._route([self.generator._adapters[name]])
        logits = self.model(torch.tensor([start + ours[:same]])).logits[0, -1]
        return float(logits[ours[same]] - logits[theirs[same]])


def check_same(
    reference: Reference, name: str, prompts: list[Prompt], theirs: list[str], *, gap: float, ties: int = 3
) -> None:
    """Print how many answers are equal; fail unless the others part where two tokens are as good as equally likely."""
    gaps = reference.differences(name, prompts, theirs)
    print(f"{name}: {len(prompts) - len(gaps)} of {len(prompts)} answers are the same; gaps {gaps}")
    assert all(found < gap for found in gaps), f"{name}: {gaps}"
    assert len(gaps) <= ties, name


def prompts_of(reference: Reference) -> list[Prompt]:
    turns = ([{"role": "user", "content": question}] for question in QUESTIONS)
    texts = (reference.tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns)
    return [Prompt(text, False) for text in texts]
