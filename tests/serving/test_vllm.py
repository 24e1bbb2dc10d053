"""vLLM itself serves a run as ``serve`` starts it: the same greedy answers as the product's own, adapter by adapter.

``make_vllm.sh`` makes its environment once, in $SEEDLORA_SERVING or a folder of the user's cache. Where it cannot, this
is skipped.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from seedlora.evaluation.endpoint import EndpointGenerator
from seedlora.model.embedded import embedded_folder
from tests.serving.answers import Reference, answers, cache_of, free_port, make_or_skip, prompts_of, save_run, started

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


def test_every_adapter_of_a_run_answers_as_the_products_own(vllm, tmp_path):
    base = str(embedded_folder())
    run = save_run(tmp_path / "my run", base, std=0.05)
    names = ("fused", "soup", "seed_1")
    reference = Reference(base, {name: run / name for name in names})
    prompts = prompts_of(reference)
    port = str(free_port())
    command = [sys.executable, "-m", "seedlora", "serve", str(run), "--options", "--host", "127.0.0.1", "--port", port]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]
    with started(command, f"http://127.0.0.1:{port}", seconds=1800) as url:
        generator = EndpointGenerator(url, models={name: name for name in names}, concurrency=2)
        served = {name: answers(generator, name, prompts) for name in names}
    for name, theirs in served.items():
        gaps = reference.differences(name, prompts, theirs)
        print(f"{name}: {len(prompts) - len(gaps)} of {len(prompts)} answers are the same; gaps {gaps}")
        assert all(gap < ROUNDING for gap in gaps), name
        assert len(gaps) <= 2
    assert served["fused"] != served["seed_1"]
