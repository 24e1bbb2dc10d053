"""An ensemble without a Trainer: what is next, what is there, and what is merged."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig

from seedlora.adapters.reading import read_adapter
from seedlora.adapters.writing import write_adapter
from seedlora.merge.layers import merge_stacks
from seedlora.merge.registry import make_rule
from seedlora.records.selection import SELECTION, Selection
from seedlora.run.ensemble import Ensemble
from seedlora.run.ensemble_options import EnsembleOptions
from seedlora.run.merging import merge_run
from seedlora.training.replicas import Replica, ReplicaOptions
from seedlora.updates.factors import LoRAFactors
from seedlora.updates.stacks import Stacks, select_adapters

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
SEEDS = (3, 1, 2)
NAMES = ("seed_3", "seed_1", "seed_2")


def ensemble(folder, seeds=SEEDS, **options):
    return Ensemble(EnsembleOptions(seeds, dirpath=folder, **options))


def drawn(number, n=1):
    generator = torch.Generator().manual_seed(number)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return {path: LoRAFactors(draw(n, 4, 7), draw(n, 5, 4)) for path in PATHS}


def train(run, *names):
    """Write adapters that differ by their numbers, or by their names' places."""
    for name in names:
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"])
        number = int(name.removeprefix("seed_")) if name.startswith("seed_") else len(name)
        write_adapter(run.dirpath / name, drawn(number), config)


def dense(layers, path):
    return layers[path].dense()[0]


def test_an_ensemble_needs_no_lightning():
    code = "import sys, seedlora.run.ensemble; sys.exit('lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_each_fit_trains(tmp_path):
    run = ensemble(tmp_path, controls="all", stack_size=2, budget="full")
    assert (run.trained, run.pending, run.pending_controls, run.trains_controls) == ((), NAMES, (), True)
    assert run.next_names == ("seed_3", "seed_1")
    assert run.next_replicas == (Replica("seed_3", 3, 3), Replica("seed_1", 1, 1))
    assert run.metrics_path == tmp_path / "metrics-3-1.jsonl"
    assert run.control_limits(max_epochs=2, max_steps=-1) == {}
    train(run, "seed_3", "seed_1")
    assert (run.trained, run.pending, run.next_names) == (("seed_3", "seed_1"), ("seed_2",), ("seed_2",))
    run.folder.leave_out({"seed_2": "training loss not finite in step 6"})
    assert run.excluded == {"seed_2": "training loss not finite in step 6"}
    assert (run.pending, run.pending_controls) == ((), ("long_seed", "wide_seed"))
    # a control stands for the first seed, with the tokens, or the rank, of all that were trained
    assert (run.next_control, run.next_names) == ("long_seed", ("long_seed",))
    assert run.next_replicas == (Replica("long_seed", 3, 3),)
    assert run.control_limits(max_epochs=2, max_steps=-1) == {"max_epochs": 6}
    assert run.control_limits(max_epochs=None, max_steps=5) == {"max_steps": 15}
    train(run, "long_seed")
    assert run.next_replicas == (Replica("wide_seed", 3, 3, ReplicaOptions(rank_factor=2)),)
    assert run.control_limits(max_epochs=2, max_steps=-1) == {}
    train(run, "wide_seed")
    assert (run.next_control, run.next_names, run.next_replicas) == (None, (), ())
    assert (run.ckpt_path, run.ckpt_step) == (None, 0)


@pytest.mark.parametrize(
    ("vary", "seeds"), [("both", (1, 1)), ("init", (1, 3)), ("order", (3, 1))], ids=["both", "init", "order"]
)
def test_what_a_seed_decides(tmp_path, vary, seeds):
    assert ensemble(tmp_path, vary=vary).replicas[1] == Replica("seed_1", init_seed=seeds[0], order_seed=seeds[1])


def test_auto_is_all_seeds_until_the_memory_has_decided(tmp_path):
    run = ensemble(tmp_path, stack_size="auto")
    assert run.next_names == ("seed_3", "seed_1", "seed_2")
    run.stack_size = 1
    assert run.next_names == ("seed_3",)


def test_seeds_in_training_are_merged_with_the_finished_ones_in_the_order_of_the_seeds(tmp_path):
    run = ensemble(tmp_path, merge="soup", merge_options={"weights": [5, 1, 2]})
    train(run, "seed_1")
    training = Stacks({path: LoRAFactors.stack([drawn(3)[path], drawn(2)[path]]) for path in PATHS}, {})
    found = run.merge_live(training, ["seed_3", "seed_2"], stack=["seed_3", "seed_2"])
    for path in PATHS:
        wanted = (5 * dense(drawn(3), path) + dense(drawn(1), path) + 2 * dense(drawn(2), path)) / 3
        assert torch.allclose(dense(found, path), wanted, atol=1e-5)
    # one that was left out, and one whose folder is of a run that was killed while it wrote the stack
    alone = run.merge_live(select_adapters(training, [1]), ["seed_2"], stack=["seed_1", "seed_2"])
    for path in PATHS:
        assert torch.allclose(dense(alone, path), 2 * dense(drawn(2), path), atol=1e-5)


def test_the_run_is_merged_into_its_folder(tmp_path, capsys):
    run = ensemble(tmp_path, merge="ties", merge_options={"density": 0.5})
    train(run, "seed_3", "seed_1")
    assert merge_run(run) is None
    train(run, "seed_2")
    run.folder.begin(["seed_2"])
    (tmp_path / "results.json").write_text("{}")
    assert merge_run(run) == run.fused_path
    # what a killed run had left, and what an earlier test had said
    assert {path.name for path in tmp_path.iterdir()} == {"seed_3", "seed_1", "seed_2", "soup", "fused"}
    stacks = {path: LoRAFactors.stack([drawn(seed)[path] for seed in SEEDS]) for path in PATHS}
    wanted, fused = merge_stacks(stacks, make_rule("ties", {"density": 0.5})), read_adapter(run.fused_path).layers
    for path in PATHS:
        assert torch.allclose(dense(fused, path), dense(wanted, path), atol=1e-5)
    assert run.merged_otherwise is None
    assert list(run.folders) == ["seed_3", "seed_1", "seed_2", "soup", "fused"]

    other = ensemble(tmp_path, merge="ties")
    assert other.merged_otherwise == ('ties {"density": 0.5}', "ties")
    plain = ensemble(tmp_path, merge="soup")
    assert merge_run(plain) == plain.fused_path
    assert {label: folder.name for label, folder in plain.folders.items()} == {
        **{f"seed_{seed}": f"seed_{seed}" for seed in SEEDS},
        "soup": "fused",
    }
    none = ensemble(tmp_path, merge="none", compare="ties")
    assert merge_run(none) is None
    said = "merge='none' merges nothing: removed fused, which were made by soup"
    assert said in capsys.readouterr().err
    # soup is made anew where others are compared
    assert list(none.read_tested(torch.device("cpu"))) == ["seed_3", "seed_1", "seed_2", "soup"]
    assert list(none.beside(torch.device("cpu"))) == ["ties"]
    assert list(ensemble(tmp_path, merge="none").read_tested(torch.device("cpu"))) == ["seed_3", "seed_1", "seed_2"]


def test_a_rule_that_is_to_be_chosen_merges_nothing_before(tmp_path):
    run = ensemble(tmp_path, merge="auto")
    train(run, "seed_3", "seed_1", "seed_2")
    assert (run.method_name, run.rule.name) == ("auto", "soup")
    with pytest.raises(ValueError, match="merge=.auto. chooses on validation rows: call Trainer.validate"):
        merge_run(run)
    selection: Selection = {
        "by": "loss",
        "rows": 4,
        "tokens": 9,
        "asked": "auto",
        "chosen": {"name": "ties density=0.5", "method": "ties", "options": {"density": 0.5}},
        "candidates": [],
        "best_seed": "seed_3",
        "scores": {},
        "against": {},
        "controls": {},
        "subsets": [],
    }
    SELECTION.write(tmp_path, selection)
    assert run.method_name == "auto: ties density=0.5"
    assert merge_run(run, make_rule("ties")) == run.fused_path
    assert (tmp_path / "selection.json").is_file()
    assert run.merged_otherwise is None
