"""vLLM itself serves a run as ``serve`` starts it: the same greedy answers as the product's own, adapter by adapter.

``make_vllm.sh`` makes its environment once, in $SEEDLORA_SERVING or a folder of the user's cache. Where it cannot, this
is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from seedlora.adapters.peft_config import read_config
from seedlora.adapters.server_commands import ServedAdapter, vllm_command
from seedlora.evaluation.endpoint import EndpointGenerator
from seedlora.merge.into_base import merge_into_base
from seedlora.model.embedded import embedded_folder
from tests.serving.answers import (
    Reference,
    answers,
    cache_of,
    check_same,
    free_port,
    make_or_skip,
    prompts_of,
    save_kinds,
    save_run,
    started,
)
from tests.serving.models import save_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]
ROOT = Path(__file__).parents[2]
#: What a difference of logits is, between two programs that multiply the same float32 numbers in another order.
ROUNDING = 2e-3
ALONE = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@pytest.fixture
def vllm(monkeypatch):
    folder = cache_of("vllm")
    make_or_skip("make_vllm.sh", folder)
    for key, value in (ALONE | {"PYTHONPATH": str(ROOT), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}).items():
        monkeypatch.setenv(key, value)


OPTIONS = (
    "--host",
    "127.0.0.1",
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "512",
    "--max-num-seqs",
    "4",
)


@contextmanager
def served(command: list[str]) -> Iterator[str]:
    port = str(free_port())
    with started([*command, *OPTIONS, "--port", port], f"http://127.0.0.1:{port}", seconds=1800) as url:
        yield url


def serve(source: Path) -> list[str]:
    return [sys.executable, "-m", "seedlora", "serve", str(source), "--options"]


def test_every_adapter_of_a_run_answers_as_the_products_own(vllm, tmp_path):
    """And ``evaluate --endpoint`` scores it, by the answers that the server gives."""
    base = str(embedded_folder())
    run = save_run(tmp_path / "my run", base, std=0.05)
    names = ("fused", "soup", "seed_1")
    reference = Reference(base, {name: run / name for name in names})
    prompts = prompts_of(reference)
    with served(serve(run)) as url:
        generator = EndpointGenerator(url, models={name: name for name in names}, concurrency=2)
        theirs = {name: answers(generator, name, prompts) for name in names}
        scored = evaluated(run / "fused", tmp_path, "--endpoint", url, "--concurrency", "2")
    for name, said in theirs.items():
        check_same(reference, name, prompts, said, gap=ROUNDING)
    assert theirs["fused"] != theirs["seed_1"]
    own = evaluated(run / "fused", tmp_path, "--dtype", "float32")
    same = sum(a == b for a, b in zip(scored, own, strict=True))
    print(f"evaluate --endpoint: {same} of {len(own)} answers to GSM8K's form are the same")
    assert len(own) == 8
    assert same >= 6


def evaluated(adapter: Path, folder: Path, *options: str) -> list[str]:
    """The answers to eight questions in the form of GSM8K, as ``evaluate`` keeps them."""
    file, out = folder / "gsm8k.jsonl", folder / f"scores {len([*folder.iterdir()])}"
    rows = [
        {"question": f"Ann has {i} pens and buys {i + 3}. How many?", "answer": f"#### {2 * i + 3}"} for i in range(8)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", "--adapter", f"fused={adapter}", "--task", "gsm8k", "--task_path", f"gsm8k={file}"]
    words += ["--max_new_tokens", "48", "--prompt_style", "chat", "--out", str(out), *options]
    subprocess.run([sys.executable, "-m", "seedlora", *words], check=True)
    lines = (out / "samples.jsonl").read_text().splitlines()
    return [answer["text"] for answer in map(json.loads, lines)]


def test_reduced_adapters_and_plain_ones_made_of_rslora_and_dora(vllm, tmp_path):
    base = str(embedded_folder())
    folders = save_kinds(tmp_path, base, std=0.05)
    reference = Reference(base, folders)
    prompts = prompts_of(reference)
    adapters = [ServedAdapter(name, folder, read_config(folder).rank) for name, folder in folders.items()]
    with served(vllm_command(base, adapters)) as url:
        generator = EndpointGenerator(url, models={name: name for name in folders}, concurrency=2)
        theirs = {name: answers(generator, name, prompts) for name in folders}
    for name, said in theirs.items():
        check_same(reference, name, prompts, said, gap=ROUNDING)


def test_merged_weights_of_dora(vllm, tmp_path):
    """A whole model in bfloat16, as the base is; both multiply in float32."""
    base = str(embedded_folder())
    dora = save_adapter(tmp_path / "dora", base, r=8, lora_alpha=16, std=0.05, use_dora=True)
    merged = merge_into_base([dora], base, tmp_path / "merged", method="soup")
    reference = Reference(str(merged), {})
    prompts = prompts_of(reference)
    with served(serve(merged)) as url:
        theirs = answers(EndpointGenerator(url, models={"base": "merged"}, concurrency=2), "base", prompts)
    check_same(reference, "base", prompts, theirs, gap=ROUNDING)
