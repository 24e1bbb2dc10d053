"""PEFT, and transformers' own server over it, answer as the product does, adapter by adapter.

``make_transformers.sh`` puts what the server imports into $SEEDLORA_SERVING or a folder of the user's cache.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from seedlora.merge.into_base import merge_into_base
from seedlora.model.embedded import embedded_folder
from tests.serving.answers import (
    TOKENS,
    Reference,
    cache_of,
    check_same,
    completion,
    free_port,
    make_or_skip,
    prompts_of,
    save_kinds,
    save_run,
    started,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]
#: What a difference of logits is, between stacked products of float32 numbers and single ones.
ROUNDING = 2e-3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter of each kind, by name."""
    base, folder = str(embedded_folder()), tmp_path_factory.mktemp("adapters")
    run = save_run(folder / "run", base, std=0.05)
    return {name: run / name for name in ("fused", "soup", "seed_1")} | save_kinds(folder / "kinds", base, std=0.05)


def test_peft_answers_as_the_product(folders):
    reference = Reference(str(embedded_folder()), folders)
    prompts = prompts_of(reference)
    for name, folder in folders.items():
        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer, said = reference.tokenizer, []
        for start in range(0, len(prompts), 10):
            texts = [prompt.text for prompt in prompts[start : start + 10]]
            ids = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
            new = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[:, ids["input_ids"].shape[1] :]
            said += tokenizer.batch_decode(new, skip_special_tokens=True)
        check_same(reference, name, prompts, said, gap=ROUNDING)


def with_its_base(adapter, folder, base):
    """Put an adapter in one folder with its base model, the one form in which the server takes a local adapter."""
    folder.mkdir(parents=True)
    for file in Path(base).iterdir():
        (folder / file.name).symlink_to(file)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).symlink_to(adapter / name)
    return folder


def test_the_server_of_transformers_answers_as_the_product(folders, tmp_path, monkeypatch):
    """Adapters beside their base model's files, and a whole model; all by their folders."""
    folder = cache_of("transformers")
    make_or_skip("make_transformers.sh", folder)
    monkeypatch.setenv("PYTHONPATH", str(folder / "python"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base, port = str(embedded_folder()), str(free_port())
    reference = Reference(base, folders)
    prompts = prompts_of(reference)
    whole = merge_into_base([folders["fused"]], base, tmp_path / "whole", method="soup")
    served = {name: with_its_base(path, tmp_path / "served" / name, base) for name, path in folders.items()}
    served["whole"] = whole
    command = [os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", "--host", "127.0.0.1"]
    command += ["--port", port, "--device", "cpu", "--dtype", "float32"]
    with started(command, f"http://127.0.0.1:{port}") as url:
        theirs = {
            name: [completion(url, prompt.text, model=str(path)) for prompt in prompts] for name, path in served.items()
        }
    merged = Reference(str(whole), {})
    for name, said in theirs.items():
        by, label = (merged, "base") if name == "whole" else (reference, name)
        check_same(by, label, prompts, said, gap=ROUNDING)
    assert theirs["fused"] != theirs["seed_1"]
