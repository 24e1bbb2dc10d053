"""An ensemble without a Trainer: what is next, what is there, and what is merged."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig

from seedlora.adapters.reading import read_adapter
from seedlora.adapters.writing import write_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.datamodules.sampler import ReplicaSampler
from seedlora.merge.layers import merge_stacks
from seedlora.merge.registry import make_rule
from seedlora.records.selection import SELECTION, Selection
from seedlora.run.budget import ReplicaBudget, limited_batches, replica_budget
from seedlora.run.ensemble import Ensemble
from seedlora.run.ensemble_options import EnsembleOptions
from seedlora.run.fit_state import BestValidation, FitState
from seedlora.run.merging import merge_run
from seedlora.run.outcome import Outcome
from seedlora.run.stack_data import CountsTokens, HasDomains, HasPrompt, HasRows, HasTrainSample, PlannedData, StackData
from seedlora.scores.row_scores import RowScores
from seedlora.training.replicas import Replica
from seedlora.updates.factors import LoRAFactors
from seedlora.updates.stacks import Stacks, select_adapters
from tests.helpers.models import make_data

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
SEEDS = (3, 1, 2)


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


def test_the_callback_has_the_options_and_their_defaults():
    given = inspect.signature(SeedEnsembleCallback).parameters
    fields = {field.name: field.default for field in dataclasses.fields(EnsembleOptions)}
    assert {name: option.default for name, option in given.items()} == fields
    callback = SeedEnsembleCallback([5, 6], **{name: fields[name] for name in fields if name != "seeds"})
    assert callback.ensemble.options == EnsembleOptions((5, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, r"ensemble.seeds is empty; give at least one seed, for example \[11, 42, 202\]"),
        ({"seeds": (1, -1)}, r"ensemble.seeds must be from 0 to 2\*\*63 - 1, got -1"),
        ({"seeds": (7, 42, 7)}, "ensemble.seeds must differ, but 7 is given more than once"),
        ({"vary": "none"}, "Unknown ensemble.vary 'none'; choose one of both, init, order"),
        ({"stack_size": 0}, "ensemble.stack_size must be at least 1, or 'auto', got 0"),
        ({"keep": "first"}, "Unknown ensemble.keep 'first'; choose one of last, best"),
        ({"on_divergence": "pray"}, "Unknown ensemble.on_divergence 'pray'; choose one of stop, exclude"),
        ({"patience": 0}, "ensemble.patience must be at least 1 validation, got 0"),
        ({"checkpoint_every_n_steps": 0}, "ensemble.checkpoint_every_n_steps must be at least 1, got 0"),
        ({"budget": "half"}, "Unknown ensemble.budget 'half'; choose one of equal, full"),
        ({"merge": "tie"}, "Unknown merge method 'tie'; choose one of"),
        ({"compare": "ties, tie"}, "Unknown merge method 'tie'; choose one of"),
        ({"controls": "some"}, "Unknown ensemble.controls 'some'; choose one of none, untrained, all"),
        ({"merge": "soup", "merge_options": {"weights": [1, 2]}}, r"ensemble.merge_options weights must be 3 numbers"),
    ],
)
def test_wrong_options_are_known_when_they_are_made(options, message):
    with pytest.raises(ValueError, match=message):
        EnsembleOptions(**options)


def test_what_each_fit_trains(tmp_path):
    run = ensemble(tmp_path, controls="all", stack_size=2, budget="full")
    assert (run.trained, run.pending, run.pending_controls, run.trains_controls) == ((), SEEDS, (), True)
    assert run.next_names == ("seed_3", "seed_1")
    assert run.next_replicas == (Replica("seed_3", 3, 3), Replica("seed_1", 1, 1))
    assert run.metrics_path == tmp_path / "metrics-3-1.jsonl"
    assert run.control_limits(max_epochs=2, max_steps=-1) == {}
    train(run, "seed_3", "seed_1")
    assert (run.trained, run.pending, run.next_names) == ((3, 1), (2,), ("seed_2",))
    run.folder.leave_out({"seed_2": "training loss not finite in step 6"})
    assert run.excluded == {2: "training loss not finite in step 6"}
    assert (run.pending, run.pending_controls) == ((), ("long_seed", "wide_seed"))
    # a control stands for the first seed, with the tokens, or the rank, of all that were trained
    assert (run.next_control, run.next_names, run.next_rank_factor) == ("long_seed", ("long_seed",), 1)
    assert run.next_replicas == (Replica("long_seed", 3, 3),)
    assert run.control_limits(max_epochs=2, max_steps=-1) == {"max_epochs": 6}
    assert run.control_limits(max_epochs=None, max_steps=5) == {"max_steps": 15}
    train(run, "long_seed")
    assert (run.next_control, run.next_rank_factor) == ("wide_seed", 2)
    assert run.control_limits(max_epochs=2, max_steps=-1) == {}
    train(run, "wide_seed")
    assert (run.next_control, run.next_names, run.next_replicas) == (None, (), ())
    assert (run.ckpt_path, run.ckpt_step) == (None, 0)


@pytest.mark.parametrize(
    ("vary", "seeds"), [("both", (1, 1)), ("init", (1, 3)), ("order", (3, 1))], ids=["both", "init", "order"]
)
def test_what_a_seed_decides(tmp_path, vary, seeds):
    assert ensemble(tmp_path, vary=vary).replica(1) == Replica("seed_1", init_seed=seeds[0], order_seed=seeds[1])


def test_auto_is_all_seeds_until_the_memory_has_decided(tmp_path):
    run = ensemble(tmp_path, stack_size="auto")
    assert run.next_names == ("seed_3", "seed_1", "seed_2")
    run.stack_size = 1
    assert run.next_names == ("seed_3",)


def test_seeds_in_training_are_fused_with_the_finished_ones_in_the_order_of_the_seeds(tmp_path):
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


def test_the_run_is_fused_into_its_folder(tmp_path, capsys):
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
    said = "--merge none merges nothing: removed fused, which were made by soup"
    assert said in capsys.readouterr().err
    # soup is made anew where others are compared
    assert list(none.read_tested(torch.device("cpu"))) == ["seed_3", "seed_1", "seed_2", "soup"]
    assert list(none.beside(torch.device("cpu"))) == ["ties"]
    assert list(ensemble(tmp_path, merge="none").read_tested(torch.device("cpu"))) == ["seed_3", "seed_1", "seed_2"]


def test_a_rule_that_is_to_be_chosen_fuses_nothing_before(tmp_path):
    run = ensemble(tmp_path, merge="auto")
    train(run, "seed_3", "seed_1", "seed_2")
    assert (run.method_name, run.rule.name) == ("auto", "soup")
    with pytest.raises(ValueError, match="--merge auto chooses on validation rows: call Trainer.validate"):
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


def test_the_share_of_a_replica():
    assert replica_budget("equal", n=3, max_epochs=6, max_steps=-1) == ReplicaBudget(2, None)
    assert replica_budget("full", n=3, max_epochs=-1, max_steps=7) == ReplicaBudget(None, 7)
    share = replica_budget("equal", n=2, max_epochs=4, max_steps=6)
    assert (share.total_steps(1), share.total_steps(2)) == (2, 3)
    assert [share.has_all_steps(steps) for steps in (2, 3, 4)] == [False, True, True]
    assert [share.has_all_epochs(epochs) for epochs in (1, 2)] == [False, True]
    assert not ReplicaBudget().has_all_steps(10**9)
    assert not ReplicaBudget().has_all_epochs(10**9)
    for limits in ({"max_epochs": 4, "max_steps": -1}, {"max_epochs": 0, "max_steps": -1}):
        with pytest.raises(ValueError, match="among 3 seeds, which does not divide evenly"):
            replica_budget("equal", n=3, **limits)
    with pytest.raises(ValueError, match="the run has no end"):
        replica_budget("full", n=3, max_epochs=None, max_steps=-1)


@pytest.mark.parametrize(("limit", "taken"), [(1.0, 7), (0.5, 3), (5, 5), (9, 7), (0, 0), (0.0, 0)])
def test_the_batches_that_a_trainer_takes(limit, taken):
    assert limited_batches(7, limit) == taken


def test_the_best_validation():
    best = BestValidation(loss=1.0, step=3)
    assert [best.is_beaten_by(loss) for loss in (0.5, 1.0, float("nan"))] == [True, False, False]
    assert BestValidation(loss=float("nan"), step=3).is_beaten_by(9.0)
    state = FitState(best={"seed_1": best}, terminated=True)
    state.begin("long_seed", ReplicaBudget(1, None))
    assert (state.control, state.share.epochs, state.best, state.terminated) == ("long_seed", 1, {}, True)


class Rows(dict):
    """A test split that says which of its rows were taken."""

    def take(self, rows):
        return Rows(rows=rows.tolist())

    def sha256(self):
        return str(self["rows"])


class Data:
    def __init__(self):
        self.rows = {"test": Rows()}

    def domains(self, split):
        return {"kind": [f"{split} {i}" for i in range(9)]}


def test_the_outcome_of_a_test():
    items = torch.tensor([1, 2, 5])
    correct = torch.tensor([[True, False, True], [True, True, False], [False, True, True]])
    outcome = Outcome.of_test(("base", "seed_1", "fused"), correct, items)
    (batch,) = outcome.numbered_after([{"items": torch.tensor([0, 4, -1]), "labels": "kept"}])
    assert (batch["items"].tolist(), batch["labels"]) == ([6, 10, -1], "kept")
    alone = outcome.results(["seed_1"])
    assert "train_sample" not in outcome.record(alone, object())
    scores = RowScores(torch.ones(5), torch.tensor([True, True, False, True, True]), torch.full((5,), 2))
    outcome.train = dict.fromkeys(("base", "seed_1", "fused"), scores[3:])
    outcome.add({"ties": scores})
    found = outcome.results(["seed_1"])
    # the fused adapter last
    assert found.items == {"base": "110", "seed_1": "011", "ties": "110", "fused": "101"}
    record = outcome.record(found, Data())
    json.dumps(record)
    assert record["domains"] == {"kind": ["test 1", "test 2", "test 5"]}
    assert record["items_sha256"] == "[1, 2, 5]"
    assert list(record["train_sample"]["losses"]) == ["base", "seed_1", "ties", "fused"]
    assert record["train_sample"]["rows"] == 2
    assert outcome.record(found, object())["domains"] == {}


def test_the_data_modules_offer_all_that_a_stack_and_its_plan_can_use():
    data = make_data()
    for offer in (StackData, PlannedData, HasRows, HasPrompt, HasDomains, HasTrainSample):
        assert isinstance(data, offer)
    assert not isinstance(object(), StackData)
    assert issubclass(ReplicaSampler, CountsTokens)
