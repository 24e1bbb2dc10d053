"""``python -m seedlora merge`` as a user types it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from seedlora.cli.main import main
from seedlora.merge.inputs import read_adapters, stack_adapters
from seedlora.merge.layers import merge_stacks
from seedlora.merge.registry import METHODS, make_rule
from seedlora.names import FUSION_NAME
from tests.helpers.adapter_kinds import PLAIN
from tests.helpers.disk import files_of_at_most


@pytest.mark.parametrize("words", [[], ["--into_base", "BASE"]])
def test_a_full_disk_is_said_and_leaves_the_older_result(plain_folders, plain_base, tmp_path, capsys, words):
    out = tmp_path / "o"
    where = [str(plain_base) if word == "BASE" else word for word in words]
    words = ["merge", *plain_folders, "--method", "soup", *where]
    assert main([*words, "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    with files_of_at_most(1500):
        assert main([*words, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {out} was not written: File too large; ")
    assert line.endswith(" MiB are free there; the older one is untouched")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "greedy_soup"])
def test_every_method_from_the_shell(method, plain_folders, tmp_path, capsys):
    assert main(["merge", *plain_folders, "--method", method, "--out", str(tmp_path / "o"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["method"] == method
    merged = read_adapters([tmp_path / "o"])[str(tmp_path / "o")]
    wanted = merge_stacks(stack_adapters(read_adapters(plain_folders)), make_rule(method))
    for path, factors in wanted.items():
        assert torch.allclose(merged.layers[path].dense(), factors.dense(), atol=1e-4)


def test_the_result_has_the_options_and_the_dtype_that_were_asked_for(plain_folders, tmp_path, capsys):
    words = ["--method", "knots_ties", "--density", "0.3", "--rank", "4", "--dtype", "bfloat16"]
    words += ["--layers", "ffn", "--rest", "soup"]
    assert main(["merge", *plain_folders, *words, "--out", str(tmp_path / "o")]) == 0
    shown = capsys.readouterr().out
    assert "rank 4" in shown
    assert "--max-lora-rank 8" in shown
    record = json.loads((tmp_path / "o" / FUSION_NAME).read_text())
    assert record["options"] == {"density": 0.3}
    assert record["use"] == {"layers": "ffn", "rest": "soup", "rank": 4, "svd": "auto", "seed": 0}
    assert {t.dtype for t in load_file(tmp_path / "o" / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_only_results_are_replaced(plain_folders, plain_base, tmp_path, capsys, monkeypatch):
    """Inputs, base models and whatever else lies at ``--out`` stay as they are, byte for byte."""
    monkeypatch.chdir(tmp_path)
    for folder in plain_folders[:2]:
        shutil.copytree(folder, f"run/{Path(folder).name}")
    shutil.copytree(plain_base, "models/llama")
    config = Path("run/11/adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "models/llama"}))
    Path("notes").mkdir()
    Path("notes/todo.txt").write_text("keep me")
    before = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    two = ["merge", "run/11", "run/42"]
    for words, said in [
        ([*two, "--out", "run"], "the output run holds run/11, which would be deleted"),
        ([*two, "--out", "."], "the output . holds run/11"),
        ([*two, "--out", "run/42"], "the output run/42 is run/42"),
        ([*two, "--out", "models"], "the output models holds models/llama"),
        ([*two, "--out", "models", "--base", "models/llama"], "the output models holds models/llama"),
        ([*two, "--out", "models", "--into_base", "models/llama"], "the output models holds models/llama"),
        ([*two, "--out", "models/llama", "--into_base", "models/llama"], "the output models/llama is models/llama"),
        ([*two, "--out", "notes"], "the output notes is there and was not made by a merge"),
        ([*two, "--out", "notes/todo.txt"], "the output notes/todo.txt is there"),
        ([*two, "--out", "notes", "--into_base", "models/llama"], "the output notes is there"),
    ]:
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    Path("empty").mkdir()
    again = ["merge", plain_folders[0], "--out"]
    assert [main([*again, out, "--method", "soup"]) for out in ("empty", "empty")] == [0, 0]
    assert main([*again, "empty", "--into_base", "models/llama"]) == 0
    assert main([*again, "empty", "--into_base", "models/llama"]) == 0


@pytest.mark.parametrize("given", ["beside", "in the run", "absolute"])
def test_the_card_s_command_makes_the_adapter_again(given, plain_folders, plain_base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = [f"{run}/checkpoint-500" for run in ("first", "second")]
    if given == "in the run":
        sources = [f"run/{source}" for source in sources]
    for folder, source in zip(plain_folders, sources, strict=False):
        shutil.copytree(folder, source)
    shutil.copytree(plain_base, "llama")
    if given == "absolute":
        sources = [str(tmp_path / source) for source in sources]
    words = ["--method", "knots_ties", "--density", "0.4", "--layers", "ffn|q_proj", "--rest", "soup", "--rank", "3"]
    words += ["--dtype", "bfloat16", "--base", "llama"]
    out = Path("run/fused" if given == "in the run" else "other/place/merged")
    assert main(["merge", *sources, *words, "--out", str(out)]) == 0
    if given == "in the run":  # which may be moved, and is where the command is given
        shutil.move("run", "moved")
        out = Path("moved/fused")
        monkeypatch.chdir("moved")
    (command,) = [
        x for x in (tmp_path / out / "README.md").read_text().splitlines() if x.startswith("python -m seedlora")
    ]
    again = shlex.split(command)[3:]
    assert again[-2:] == ["--out", out.name]
    assert main([*again[:-1], "again"]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (Path("again") / name).read_bytes() == (tmp_path / out / name).read_bytes()


def test_hub_ids_are_read_like_folders(plain_folders, plain_base, tmp_path, monkeypatch):
    """From the hub's own cache, laid out as it lays it out, without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, folder in (("models--somebody--adapter", plain_folders[0]), ("models--somebody--base", plain_base)):
        revision = "0123456789abcdef0123456789abcdef01234567"
        shutil.copytree(folder, tmp_path / "hub" / name / "snapshots" / revision)
        (tmp_path / "hub" / name / "refs").mkdir()
        (tmp_path / "hub" / name / "refs" / "main").write_text(revision)
    words = ["somebody/adapter", *plain_folders[1:], "--method", "soup", "--json"]
    assert main(["merge", *words, "--out", str(tmp_path / "hub_id")]) == 0
    assert main(["merge", *plain_folders, "--method", "soup", "--out", str(tmp_path / "local")]) == 0
    found, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("hub_id", "local"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    record = json.loads((tmp_path / "hub_id" / FUSION_NAME).read_text())
    assert record["inputs"][0]["name"] == "somebody/adapter"
    assert (
        record["inputs"][0]["sha256"]
        == json.loads((tmp_path / "local" / FUSION_NAME).read_text())["inputs"][0]["sha256"]
    )
    assert main(["merge", *words, "--out", str(tmp_path / "full"), "--into_base", "somebody/base"]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert main(["merge", "somebody/else", *plain_folders, "--out", str(tmp_path / "o")]) == 2


@pytest.mark.parametrize(
    ("task", "name"), [("SEQ_CLS", "LlamaForSequenceClassification"), ("CAUSAL_LM", None), (None, "LlamaForCausalLM")]
)
def test_what_is_printed_loads_the_result(task, name, adapters_of, tmp_path, capsys):
    base = getattr(transformers, name or "LlamaForCausalLM").from_pretrained(adapters_of("lora").base)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    get_peft_model(base, LoraConfig(**PLAIN, task_type=task)).save_pretrained(tmp_path / "a")
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 0
    names = {}
    exec(capsys.readouterr().out.split("<<'PY'\n")[1].split("\nPY")[0], names)
    assert type(names["model"].get_base_model()) is type(base)
