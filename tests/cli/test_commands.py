"""The commands as a user types them, and weights merged into a base model."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from seedlora.cli.main import main
from seedlora.merge.inputs import read_adapters, stack_adapters
from seedlora.merge.into_base import merge_into_base
from seedlora.merge.layers import merge_stacks
from seedlora.merge.registry import METHODS, make_rule
from seedlora.names import FUSION_NAME
from tests.adapters.test_reading import KINDS, SEVEN, gpt2, llama, save_adapter, weights
from tests.helpers import reference as ref
from tests.helpers.disk import files_of_at_most


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed in (11, 42, 202):
        save_adapter(root / str(seed), seed=seed, r=2, lora_alpha=6, target_modules=SEVEN)
    return [str(root / str(seed)) for seed in (11, 42, 202)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize("words", [[], ["--into-base", "BASE"]])
def test_a_full_disk_is_said_and_leaves_the_older_result(folders, base, tmp_path, capsys, words):
    out = tmp_path / "o"
    words = ["merge", *folders, "--method", "soup", *(str(base) if word == "BASE" else word for word in words)]
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
def test_every_method_from_the_shell(method, folders, tmp_path, capsys):
    assert main(["merge", *folders, "--method", method, "--out", str(tmp_path / "o"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["method"] == method
    merged = read_adapters([tmp_path / "o"])[str(tmp_path / "o")]
    wanted = merge_stacks(stack_adapters(read_adapters(folders)), make_rule(method))
    for path, factors in wanted.items():
        assert torch.allclose(merged.layers[path].dense(), factors.dense(), atol=1e-4)


def test_options_and_dtype(folders, tmp_path, capsys):
    words = ["--method", "knots_ties", "--density", "0.3", "--rank", "4", "--dtype", "bfloat16"]
    words += ["--layers", "ffn", "--rest", "soup"]
    assert main(["merge", *folders, *words, "--out", str(tmp_path / "o")]) == 0
    shown = capsys.readouterr().out
    assert "rank 4" in shown
    assert "--max-lora-rank 8" in shown
    record = json.loads((tmp_path / "o" / FUSION_NAME).read_text())
    assert record["options"] == {"density": 0.3}
    assert record["use"] == {"layers": "ffn", "rest": "soup", "rank": 4, "svd": "auto", "seed": 0}
    assert {t.dtype for t in load_file(tmp_path / "o" / "adapter_model.safetensors").values()} == {torch.bfloat16}


BAD = [
    (["merge", "A", "--out", "O", "--method", "tie"], "Unknown merge method 'tie'"),
    (["merge", "A", "--out", "O", "--method", "ties", "--density", "2"], r"density must be a number in (0, 1], got 2"),
    (["merge", "A", "--out", "O", "--method", "soup", "--density", "0.2"], "has no option 'density'"),
    (
        ["merge", "A", "--out", "O", "--method", "greedy_soup"],
        "greedy_soup chooses among adapters by a score",
    ),
    (["merge", "A", "--out", "O", "--method", "soup", "--weights", '{"a":1}'], "Merge method 'soup': "),
    (["merge", "A", "--out", "O", "--method", "ties", "--scale", "NaN"], "its result is not finite with scale=nan"),
    (["merge", "A", "A", "--out", "O"], "was given twice"),
    (["merge", "A/nowhere/at/all", "--out", "O"], "is no folder"),
    (["merge", "A", "--out", "O", "--dtype", "int4"], "argument --dtype: invalid choice"),
    (["merge", "A", "--out", "O", "--into-base", "A"], "holds no model.safetensors"),
    (["merge", "A", "--out", "O", "--into-base", "nowhere"], "is no folder"),
    (["merge", "A", "--out", "A/adapter_config.json/x"], "adapter_config.json is no folder that may be written to"),
    (["merge", "A"], "the following arguments are required: --out"),
    (["inspect", "nowhere"], "is no folder"),
    (["compare", "A", "--method", "nothing"], "Unknown merge method"),
    ([], "required: command"),
    (["fuse"], "invalid choice"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_sentence(words, message, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("A", folders[0], 1) if word.startswith("A") else word for word in words]
    assert main(words) == 2
    found = capsys.readouterr()
    assert message in found.err
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert found.out == ""
    assert not (tmp_path / "O").exists()


def test_only_results_are_replaced(folders, base, tmp_path, capsys, monkeypatch):
    """Inputs, base models and whatever else lies at ``--out`` stay as they are, byte for byte."""
    monkeypatch.chdir(tmp_path)
    for folder in folders[:2]:
        shutil.copytree(folder, f"run/{Path(folder).name}")
    shutil.copytree(base, "models/llama")
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
        ([*two, "--out", "models", "--into-base", "models/llama"], "the output models holds models/llama"),
        ([*two, "--out", "models/llama", "--into-base", "models/llama"], "the output models/llama is models/llama"),
        ([*two, "--out", "notes"], "the output notes is there and was not made by a merge"),
        ([*two, "--out", "notes/todo.txt"], "the output notes/todo.txt is there"),
        ([*two, "--out", "notes", "--into-base", "models/llama"], "the output notes is there"),
    ]:
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    Path("empty").mkdir()
    again = ["merge", folders[0], "--out"]
    assert [main([*again, out, "--method", "soup"]) for out in ("empty", "empty")] == [0, 0]
    assert main([*again, "empty", "--into-base", "models/llama"]) == 0
    assert main([*again, "empty", "--into-base", "models/llama"]) == 0


@pytest.mark.parametrize("given", ["beside", "in the run", "absolute"])
def test_the_card_s_command_makes_the_adapter_again(given, folders, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = [f"{run}/checkpoint-500" for run in ("first", "second")]
    if given == "in the run":
        sources = [f"run/{source}" for source in sources]
    for folder, source in zip(folders, sources, strict=False):
        shutil.copytree(folder, source)
    shutil.copytree(base, "llama")
    if given == "absolute":
        sources = [str(tmp_path / source) for source in sources]
    words = ["--method", "knots_ties", "--density", "0.4", "--layers", "ffn|q_proj", "--rest", "soup", "--rank", "3"]
    words += ["--dtype", "bfloat16", "--base", "llama"]
    out = Path("run/fused" if given == "in the run" else "other/place/fused")
    assert main(["merge", *sources, *words, "--out", str(out)]) == 0
    if given == "in the run":  # which may be moved, and is where the command is given
        shutil.move("run", "moved")
        out = Path("moved/fused")
        monkeypatch.chdir("moved")
    (command,) = [
        x for x in (tmp_path / out / "README.md").read_text().splitlines() if x.startswith("python -m seedlora")
    ]
    again = shlex.split(command)[3:]
    assert main([*again[:-1], "again"]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (Path("again") / name).read_bytes() == (tmp_path / out / name).read_bytes()


def test_as_a_module(folders, tmp_path):
    run = [sys.executable, "-m", "seedlora", "inspect"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*run, folders[0]], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0
    assert "gate_proj" in done.stdout
    done = subprocess.run([*run, str(tmp_path)], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_inspect_and_compare(folders, tmp_path, capsys):
    assert main(["inspect", folders[0], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == [2]
    assert len(found["layers"]) == 14
    assert main(["compare", *folders, "--plot", str(tmp_path / "p")]) == 0
    shown = capsys.readouterr().out
    assert "rho" in shown
    assert {f.name for f in (tmp_path / "p").iterdir()} == {
        *("pairs.svg", "cosines.svg", "spectra.svg", "distributions.svg", "gains.svg")
    }
    assert all("currentColor" not in f.read_text() for f in (tmp_path / "p").iterdir())
    assert main(["compare", *folders, "--json", "--method", "soup"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row[i] for i, row in enumerate(found["cosines"])] == pytest.approx([1, 1, 1])
    assert {row["module"] for row in found["modules"]} == set(SEVEN)


def test_methods_are_all_listed(capsys):
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["methods"]) == set(METHODS)
    assert found["methods"]["ties"]["options"] == {"density": 0.2, "scale": 1.0, "scope": "layer"}
    assert main(["methods"]) == 0
    assert "Yadav" in capsys.readouterr().out


def test_into_base_is_what_peft_merges(folders, base, tmp_path):
    words = ["merge", *folders, "--method", "soup", "--out", str(tmp_path / "o"), "--into-base", str(base)]
    assert main(words) == 0
    before = llama().state_dict()
    added = []
    for seed in (11, 42, 202):
        one = weights(save_adapter(tmp_path / "x", seed=seed, r=2, lora_alpha=6, target_modules=SEVEN))
        added.append({key: one[key] - before[key] for key in before})
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "o").state_dict()
    for key in before:
        assert torch.allclose(found[key], before[key] + ref.mean([a[key] for a in added]), atol=1e-4)
    names = {f.name for f in base.iterdir()}
    assert names | {FUSION_NAME, "README.md"} == {f.name for f in (tmp_path / "o").iterdir()}


def test_dense_rules_go_into_the_base_exactly(folders, base, tmp_path):
    merge_into_base(folders, base, tmp_path / "o", method="ties")
    stacks = stack_adapters(read_adapters(folders))
    path = "model.layers.1.mlp.down_proj"
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "o").state_dict()[f"{path}.weight"]
    wanted = ref.ties(list(stacks[path].dense().double()))
    assert torch.allclose(found.double(), llama().state_dict()[f"{path}.weight"] + wanted, atol=1e-5)
    assert "compression" not in json.loads((tmp_path / "o" / FUSION_NAME).read_text())
    merge_into_base(folders, base, tmp_path / "o", method="ties", options={"rank": 3})
    assert "compression" in json.loads((tmp_path / "o" / FUSION_NAME).read_text())


@pytest.mark.parametrize("kind", ["conv1d", "head and embedding"])
def test_into_base_of_transposed_weights(kind, tmp_path):
    make, config = KINDS[kind]
    make().save_pretrained(tmp_path / "base")
    one = weights(save_adapter(tmp_path / "a", make, **config))
    merge_into_base([tmp_path / "a"], tmp_path / "base", tmp_path / "o", method="soup")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "o").state_dict()
    for key, wanted in one.items():
        assert torch.allclose(found[key], wanted, atol=1e-4), key


def test_into_base_refuses_what_does_not_fit(folders, base, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    save_file({"a": torch.ones(1)}, tmp_path / "q" / "model.safetensors")
    with pytest.raises(ValueError, match="is quantised"):
        merge_into_base(folders, tmp_path / "q", tmp_path / "o")
    (tmp_path / "q" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight for the adapted layer"):
        merge_into_base(folders, tmp_path / "q", tmp_path / "o")
    gpt2().save_pretrained(tmp_path / "g")
    with pytest.raises(ValueError, match="has no weight"):
        merge_into_base(folders, tmp_path / "g", tmp_path / "o")
    with pytest.raises(ValueError, match="the output .* is .*, which would be deleted"):
        merge_into_base(folders, base, base)
    assert not (tmp_path / "o").exists()


def test_shards_keep_their_metadata_and_dtype(folders, tmp_path):
    llama().bfloat16().save_pretrained(tmp_path / "b")
    merge_into_base(folders, tmp_path / "b", tmp_path / "o")
    with safe_open(tmp_path / "o" / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
        assert {handle.get_tensor(key).dtype for key in handle.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_hub_ids_are_read_like_folders(folders, base, tmp_path, monkeypatch):
    """From the hub's own cache, laid out as it lays it out, without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, folder in (("models--somebody--adapter", folders[0]), ("models--somebody--base", base)):
        revision = "0123456789abcdef0123456789abcdef01234567"
        shutil.copytree(folder, tmp_path / "hub" / name / "snapshots" / revision)
        (tmp_path / "hub" / name / "refs").mkdir()
        (tmp_path / "hub" / name / "refs" / "main").write_text(revision)
    words = ["somebody/adapter", *folders[1:], "--method", "soup", "--json"]
    assert main(["merge", *words, "--out", str(tmp_path / "hub_id")]) == 0
    assert main(["merge", *folders, "--method", "soup", "--out", str(tmp_path / "local")]) == 0
    found, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("hub_id", "local"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    record = json.loads((tmp_path / "hub_id" / FUSION_NAME).read_text())
    assert record["inputs"][0]["name"] == "somebody/adapter"
    assert (
        record["inputs"][0]["sha256"]
        == json.loads((tmp_path / "local" / FUSION_NAME).read_text())["inputs"][0]["sha256"]
    )
    assert main(["merge", *words, "--out", str(tmp_path / "full"), "--into-base", "somebody/base"]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert main(["merge", "somebody/else", *folders, "--out", str(tmp_path / "o")]) == 2
