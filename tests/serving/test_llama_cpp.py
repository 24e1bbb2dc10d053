"""llama.cpp itself serves what ``export`` writes: the same greedy answers as the product's own, token by token.

``make_llama_cpp.sh`` builds it once, in $SEEDLORA_SERVING or a folder of the user's cache. Where it cannot, all of this
is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from seedlora.cli.main import main
from seedlora.evaluation.endpoint import EndpointGenerator
from seedlora.merge.into_base import merge_into_base
from seedlora.model.embedded import embedded_folder
from tests.serving.answers import (
    Reference,
    answers,
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
from tests.serving.models import CONFIGS, save_adapter, save_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]
ROOT = Path(__file__).parents[2]
#: What a difference of logits is, between two programs that multiply the same float32 numbers in another order.
ROUNDING = 2e-3
#: The same where activations are rounded to bfloat16 before each product.
ROUNDING_BF16 = 0.2
#: It ends an answer at every token of its vocabulary that is known to end something, and transformers at the model's.
ENDS = ("<|endoftext|>",)
EXACT = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")


@dataclass(frozen=True)
class LlamaCpp:
    """Where it was built, and what its converter needs on the path."""

    folder: Path
    packages: Path

    def environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": f"{ROOT}:{self.packages}",
            "PATH": f"{self.folder / 'build/bin'}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }


@pytest.fixture(scope="module")
def llama_cpp() -> LlamaCpp:
    folder = cache_of("llama_cpp")
    make_or_skip("make_llama_cpp.sh", folder)
    return LlamaCpp(folder / "llama.cpp", folder / "python")


@pytest.fixture(autouse=True)
def _its_environment(llama_cpp, monkeypatch):
    for key, value in llama_cpp.environment().items():
        monkeypatch.setenv(key, value)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_tensors_are_those_of_llama_cpps_converter(kind, llama_cpp, tmp_path):
    """Bit by bit, but for alpha / r, which it leaves in the metadata and we fold into B."""
    base = save_model(tmp_path / "base", kind)
    adapter = save_adapter(tmp_path / "adapter", base, lora_alpha=8)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    assert main(["export", str(adapter), "--gguf", str(ours)]) == 0
    script = [sys.executable, str(llama_cpp.folder / "convert_lora_to_gguf.py"), "--base", base]
    subprocess.run([*script, "--outfile", str(theirs), str(adapter)], check=True, capture_output=True)
    ours, theirs = ({t.name: np.array(t.data) for t in GGUFReader(file).tensors} for file in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert np.array_equal(ours[name], tensor * (2 if name.endswith("lora_b") else 1)), name


@contextmanager
def served(source: Path, *words: str, options: tuple[str, ...] = EXACT) -> Iterator[str]:
    """``seedlora serve`` as a user starts it; the address comes back once it answers."""
    port = str(free_port())
    command = [sys.executable, "-m", "seedlora", "serve", str(source), "--server", "llama.cpp", *words]
    command += ["--options", "--port", port, "--threads", "1", "--ctx-size", "1024", "--parallel", "1", *options]
    with started(command, f"http://127.0.0.1:{port}") as url:
        yield url


def tiny(folder: Path) -> str:
    """A random Llama with grouped heads and the vocabulary of the embedded model, which llama.cpp knows."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 49152, "initializer_range": 0.1}
    base = save_model(folder, "Llama", **shape, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)
    for file in embedded_folder().glob("*"):
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template", "vocab", "merges")):
            shutil.copy(file, folder)
    return base


def to_gguf(llama_cpp: LlamaCpp, base: str, out: Path) -> Path:
    script = [sys.executable, str(llama_cpp.folder / "convert_hf_to_gguf.py"), base, "--outtype", "f32"]
    subprocess.run([*script, "--outfile", str(out)], check=True, capture_output=True)
    return out


@pytest.fixture(scope="module", params=["tiny", "embedded"])
def model(request, llama_cpp, tmp_path_factory):
    """A base model, adapters on it as a run has them, and its GGUF file."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in llama_cpp.environment().items():
            patch.setenv(key, value)
        base = tiny(folder / "base") if request.param == "tiny" else str(embedded_folder())
        std = 0.3 if request.param == "tiny" else 0.05
        run = save_run(folder / "run", base, std=std)
        odd = folder / "odd"
        save_adapter(odd, base, r=8, lora_alpha=16, use_rslora=True, rank_pattern={"v_proj": 3}, std=std / 2)
        return base, run, odd, to_gguf(llama_cpp, base, folder / "base.gguf")


def test_the_served_answers_are_the_products_own(model, record_property):
    """Of all kinds, an adapter of several ranks under rsLoRA among them; float32 throughout, so only ties may part."""
    base, run, odd, base_gguf = model
    folders = {"fused": run / "fused", "soup": run / "soup", "seed_1": run / "seed_1", "odd": odd}
    folders |= save_kinds(run.parent / "kinds", base, std=0.05 if base == str(embedded_folder()) else 0.3)
    reference = Reference(base, folders, ends=ENDS)
    prompts = prompts_of(reference)
    assert json.loads((run / "fused" / "adapter_config.json").read_text())["r"] in (24, 25)
    for name, folder in folders.items():
        with served_adapter(folder, base_gguf) as url:
            theirs = answers(EndpointGenerator(url, models={name: name}, concurrency=1), name, prompts)
        # As users start it, keys and values are kept in float16. Random text is no measure: it does not come back as
        # the same tokens, so where two answers part cannot be found.
        if name == "fused" and base == str(embedded_folder()):
            with served(folder, "--base_gguf", str(base_gguf), options=()) as url:
                other = answers(EndpointGenerator(url, models={name: name}, concurrency=1), name, prompts)
            loose = reference.differences(name, prompts, other)
            print(f"{name}, the server's defaults: {len(prompts) - len(loose)} of {len(prompts)}; gaps {loose}")
            assert all(gap < ROUNDING_BF16 for gap in loose)
        check_same(reference, name, prompts, theirs, gap=ROUNDING)
        without = answers(reference.generator, "base", prompts)
        assert sum(a != b for a, b in zip(theirs, without, strict=True)) >= 35, "the adapter changes nothing"


def test_rows_in_the_order_of_transformers_give_other_answers(model, monkeypatch):
    """The comparison would notice: without the reordering of q and k most answers are others."""
    base, run, _, base_gguf = model
    folder, out = run / "seed_3", run / "seed_3.gguf"
    with monkeypatch.context() as patch:
        patch.setattr("seedlora.adapters.gguf_file._INTERLEAVED", set())
        assert main(["export", str(folder), "--gguf", str(out)]) == 0
    reference = Reference(base, {"seed_3": folder}, ends=ENDS)
    prompts = prompts_of(reference)
    with served(folder, "--base_gguf", str(base_gguf)) as url:  # the file is newer than the adapter, so it is taken
        theirs = answers(EndpointGenerator(url, models={"seed_3": "seed_3"}, concurrency=1), "seed_3", prompts)
    out.unlink()
    same = len(prompts) - len(reference.differences("seed_3", prompts, theirs))
    print(f"not reordered: {same} of {len(prompts)} answers are the same")
    assert same <= 25


@contextmanager
def served_adapter(folder: Path, base_gguf: Path) -> Iterator[str]:
    if folder.name != "odd":
        with served(folder, "--base_gguf", str(base_gguf)) as url:
            yield url
        return
    # rsLoRA is written by export, and no other converter: serve wants the form that all servers read.
    out = folder.with_name("odd.gguf")
    assert main(["export", str(folder), "--gguf", str(out)]) == 0
    port = str(free_port())
    command = ["llama-server", "--model", str(base_gguf), "--lora", str(out), "--alias", "odd", "--port", port]
    command += ["--threads", "1", "--ctx-size", "1024", "--parallel", "1", *EXACT]
    with started(command, f"http://127.0.0.1:{port}") as url:
        yield url


def test_a_run_is_served_whole_and_only_the_first_adapter_is_applied(model):
    """Left to itself the server would add all of them up; a request asks for another by its number."""
    base, run, _, base_gguf = model
    reference = Reference(base, {"fused": run / "fused", "seed_2": run / "seed_2"}, ends=ENDS)
    prompts = prompts_of(reference)[:5]
    with served(run, "--base_gguf", str(base_gguf)) as url:
        theirs = answers(EndpointGenerator(url, models={"fused": "fused"}, concurrency=1), "fused", prompts)
        with urllib.request.urlopen(f"{url}/lora-adapters") as answer:
            loaded = json.loads(answer.read())
        scales = [{"id": entry["id"], "scale": 1.0} for entry in loaded if Path(entry["path"]).stem == "seed_2"]
        asked = [completion(url, prompt.text, lora=scales) for prompt in prompts]
    assert [(Path(entry["path"]).stem, entry["scale"]) for entry in loaded] == [
        ("fused", 1.0),
        *((name, 0.0) for name in ("soup", "seed_1", "seed_2", "seed_3")),
    ]
    for name, said in (("fused", theirs), ("seed_2", asked)):
        assert all(gap < ROUNDING for gap in reference.differences(name, prompts, said)), name


def test_a_whole_model_by_llama_cpps_own_tools(model, llama_cpp, tmp_path):
    """``--into_base`` gives the answers of the merged weights; ``--quantize`` gives a smaller file that is served.

    Weights in bfloat16 are multiplied with activations that llama.cpp rounds to bfloat16, where the product's are
    float32: there near ties may part.
    """
    base, run, _, _ = model
    out = tmp_path / "whole.gguf"
    words = ["export", str(run / "fused"), "--gguf", str(out), "--into_base", "--llama_cpp", str(llama_cpp.folder)]
    assert main(words) == 0
    merged = merge_into_base([run / "fused"], base, tmp_path / "merged", method="soup")
    reference = Reference(str(merged), {}, ends=ENDS)
    prompts = prompts_of(reference)
    size = out.stat().st_size
    with served_file(out) as url:
        theirs = answers(EndpointGenerator(url, models={"base": out.name}, concurrency=1), "base", prompts)
    in_float32 = json.loads((merged / "config.json").read_text())["dtype"] == "float32"
    gap, ties = (ROUNDING, 3) if in_float32 else (ROUNDING_BF16, 20)
    check_same(reference, "base", prompts, theirs, gap=gap, ties=ties)
    assert main([*words, "--quantize", "Q8_0"]) == 0
    assert out.stat().st_size < 0.6 * size
    with served_file(out) as url:
        smaller = answers(EndpointGenerator(url, models={"base": out.name}, concurrency=1), "base", prompts)
    print(f"Q8_0: {sum(a == b for a, b in zip(theirs, smaller, strict=True))} of {len(prompts)} answers as before")
    assert all(isinstance(text, str) for text in smaller)


@contextmanager
def served_file(file: Path) -> Iterator[str]:
    port = str(free_port())
    command = ["llama-server", "--model", str(file), "--alias", file.name, "--port", port]
    command += ["--threads", "1", "--ctx-size", "1024", "--parallel", "1", *EXACT]
    with started(command, f"http://127.0.0.1:{port}") as url:
        yield url
