"""Seeds that stop before the others: no longer improving, diverged, or told to by SIGTERM."""

from __future__ import annotations

import json
import os
import signal

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import JSONLinesLogger, SeedEnsembleCallback
from seedlora.run.memory import Memory, fitting_stack
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import StoppedError
from tests.callbacks.test_seed_ensemble import trainer
from tests.helpers.models import make_data, make_module
from tests.helpers.precision import SAME
from tests.helpers.strategies_job import Break, Poison


class Scripted(SeedLoRAModule):
    """Validation losses as told, the last one again and again; keeps the weights that were there at each validation."""

    losses: dict[str, list[float]]

    def on_validation_start(self):
        self.weights.append(
            {r.name: [p.detach().clone() for p in self.stack.parameters(r.name)] for r in self.replicas}
        )

    def validation_step(self, batch, batch_idx):
        for name, values in self.losses.items():
            self.log(f"val/loss_{name}", values[min(len(self.weights), len(values)) - 1])


def fit(base, callback, losses, **options):
    module = Scripted(base, dtype="float32", r=4)
    module.losses, module.weights = losses, []
    run = trainer(callback, **{"max_epochs": 3, "val_check_interval": 0.25, "num_sanity_val_steps": 0, **options})
    run.fit(module, datamodule=make_data())
    return module, run


def written(callback, seed):
    return load_file(callback.adapter_path(seed) / "adapter_model.safetensors")


def same(tensors, weights):
    """Whether a file holds these weights, in whatever order."""
    sums = [sorted(t.double().sum().item() for t in these) for these in (tensors.values(), weights)]
    return sums[0] == sums[1]


def test_each_seed_keeps_its_own_best_weights(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2, 3], budget="full", keep="best", dirpath=tmp_path / "x")
    losses = {"seed_1": [3, 1, 2, 4], "seed_2": [4, 3, 2, 1], "seed_3": [1, 2, 3, float("nan")]}
    module, _ = fit(tiny_llama, callback, losses, max_epochs=1)
    assert len(module.weights) == 4
    for seed, best in ((1, 1), (2, 3), (3, 0)):
        assert same(written(callback, seed), module.weights[best][f"seed_{seed}"])
        assert not same(written(callback, seed), module.weights[(best + 1) % 4][f"seed_{seed}"])


@pytest.mark.usefixtures("float64")
def test_a_seed_without_patience_left_is_stopped_and_the_others_train_as_before(tiny_llama, tmp_path):
    plain = SeedEnsembleCallback([1, 2], budget="full", dirpath=tmp_path / "plain")
    fit(tiny_llama, plain, {}, max_epochs=1)
    callback = SeedEnsembleCallback([1, 2], budget="full", patience=1, dirpath=tmp_path / "x")
    module, run = fit(tiny_llama, callback, {"seed_1": [1, 2], "seed_2": [4, 3, 2, 1]}, max_epochs=1)
    assert module.replicas.idle == {"seed_1"}
    assert same(written(callback, 1), module.weights[1]["seed_1"])
    trained = json.loads((callback.dirpath / "trained.json").read_text())
    assert {name: (row["steps"], row["stopped"]) for name, row in trained.items()} == {
        "seed_1": (6, True),
        "seed_2": (12, False),
    }
    lengths, sampler = run.datamodule.rows["train"].lengths, run.datamodule.train_dataloader().sampler
    sampler.set_epoch(0)
    for seed, steps in ((1, 6), (2, 12)):
        saw = sum(int(lengths[sampler.order(seed, step)].sum()) for step in range(steps))
        assert trained[f"seed_{seed}"]["tokens"] == saw
    assert all(map(torch.equal, module.weights[1]["seed_1"], module.weights[3]["seed_1"]))
    assert run.global_step == 12
    for key, value in written(plain, 2).items():
        assert torch.allclose(written(callback, 2)[key], value, rtol=0, atol=SAME)


def test_a_seed_stopped_within_an_optimizer_step_moves_no_more(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", patience=1, keep="best", dirpath=tmp_path / "x")
    # validations after 3, 6, 9 and 12 batches, steps of 4: at the second one two batches are accumulated
    losses = {"seed_1": [1, 2], "seed_2": [4, 3, 2, 1]}
    module, run = fit(tiny_llama, callback, losses, max_epochs=1, accumulate_grad_batches=4)
    assert module.replicas.idle == {"seed_1"}
    assert run.global_step == 3
    assert same(written(callback, 1), module.weights[0]["seed_1"])
    assert same(written(callback, 2), module.weights[3]["seed_2"])
    trained = json.loads((callback.dirpath / "trained.json").read_text())
    assert [row["kept_step"] for row in trained.values()] == [0, 3]


def test_the_fit_ends_when_all_seeds_are_stopped(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", patience=2, keep="best", dirpath=tmp_path / "x")
    module, run = fit(tiny_llama, callback, {"seed_1": [1], "seed_2": [1]})
    assert len(module.weights) == 3
    assert run.global_step == 9
    assert same(written(callback, 1), module.weights[0]["seed_1"])
    assert callback.fused_path.is_dir()


def test_a_diverged_seed_ends_the_run_by_name(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", checkpoint_every_n_steps=2, dirpath=tmp_path / "x")
    run = trainer(callback, max_epochs=1)
    run.callbacks.append(Poison("seed_2", 5))
    with pytest.raises(StoppedError, match=r"seed_2: training loss not finite in step 6; lower"):
        run.fit(make_module(tiny_llama), datamodule=make_data())
    assert callback.ensemble.ckpt_step == 4


@pytest.mark.usefixtures("float64")
def test_a_diverged_seed_is_excluded_and_the_others_are_unharmed(tiny_llama, tmp_path):
    alone = SeedEnsembleCallback([1, 3], merge="soup", budget="full", dirpath=tmp_path / "alone")
    trainer(alone, max_epochs=1).fit(make_module(tiny_llama), datamodule=make_data())
    callback = SeedEnsembleCallback(
        [1, 2, 3], merge="soup", budget="full", on_divergence="exclude", dirpath=tmp_path / "x"
    )
    run, module, data = trainer(callback, max_epochs=1), make_module(tiny_llama), make_data()
    run.callbacks.append(Poison("seed_2", 5))
    run.fit(module, datamodule=data)
    assert callback.trained == (1, 3)
    assert callback.ensemble.excluded == {2: "training loss not finite in step 6"}
    trained = json.loads((callback.dirpath / "trained.json").read_text())
    assert {name: row["steps"] for name, row in trained.items()} == dict.fromkeys(("seed_1", "seed_3"), run.global_step)
    assert callback.pending == ()
    assert "val/loss_seed_1" in run.callback_metrics
    for path in (alone.fused_path, *map(alone.adapter_path, (1, 3))):
        wanted = load_file(path / "adapter_model.safetensors")
        found = load_file(callback.dirpath / path.name / "adapter_model.safetensors")
        assert wanted.keys() == found.keys()
        assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=SAME) for key in wanted)
    run.test(module, datamodule=data, verbose=False)
    assert set(callback.results.scores) == {"base", "seed_1", "seed_3", "soup"}


class Finite(list, pl.Callback):
    """Of each validation, whether all its losses are finite."""

    def on_validation_end(self, trainer, module):
        self.append(all(value.isfinite() for value in trainer.callback_metrics.values()))


#: Broken by a step that no training loss follows: just before a validation, and in the last one.
UNSEEN = [(6, {"keep": "best", "patience": 9}, {"val_check_interval": 0.25}), (12, {}, {"limit_val_batches": 0})]


@pytest.mark.parametrize(("step", "options", "run_options"), UNSEEN)
def test_weights_broken_before_any_loss_sees_them_end_the_run(tiny_llama, tmp_path, step, options, run_options):
    callback = SeedEnsembleCallback(
        [1, 2], budget="full", checkpoint_every_n_steps=5, dirpath=tmp_path / "x", **options
    )
    run = trainer(callback, max_epochs=1, **run_options)
    run.callbacks.append(Break("seed_2", step))
    message = f"seed_2: weights not finite after step {step}; lower model.learning_rate, or go on without it by on_div"
    with pytest.raises(StoppedError, match=message):
        run.fit(make_module(tiny_llama), datamodule=make_data())
    assert callback.ensemble.ckpt_step == step // 5 * 5
    assert callback.trained == ()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("step", "options", "run_options"), UNSEEN)
def test_weights_broken_before_any_loss_sees_them_harm_no_other_seed(tiny_llama, tmp_path, step, options, run_options):
    alone = SeedEnsembleCallback([1, 3], merge="soup", budget="full", dirpath=tmp_path / "alone", **options)
    trainer(alone, max_epochs=1, **run_options).fit(make_module(tiny_llama), datamodule=make_data())
    callback = SeedEnsembleCallback(
        [1, 2, 3], merge="soup", budget="full", on_divergence="exclude", dirpath=tmp_path / "x", **options
    )
    run, finite = trainer(callback, max_epochs=1, **run_options), Finite()
    run.callbacks += [Break("seed_2", step), finite]
    run.fit(make_module(tiny_llama), datamodule=make_data())
    assert all(finite)
    assert callback.ensemble.excluded == {2: f"weights not finite after step {step}"}
    assert callback.trained == (1, 3)
    for path in (alone.fused_path, *map(alone.adapter_path, (1, 3))):
        wanted = load_file(path / "adapter_model.safetensors")
        found = load_file(callback.dirpath / path.name / "adapter_model.safetensors")
        assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=SAME) for key in wanted)


def test_a_first_validation_loss_that_is_no_number_is_not_the_best_for_ever(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", keep="best", dirpath=tmp_path / "x")
    losses = {"seed_1": [float("nan"), 3, 1, 2], "seed_2": [float("nan")]}
    module, _ = fit(tiny_llama, callback, losses, max_epochs=1)
    assert same(written(callback, 1), module.weights[2]["seed_1"])


def test_no_seed_left_ends_the_run(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1], budget="full", on_divergence="exclude", dirpath=tmp_path / "x")
    run = trainer(callback, max_epochs=1)
    run.callbacks.append(Poison("seed_1", 2))
    with pytest.raises(StoppedError, match="the training loss of every seed is not finite; lower"):
        run.fit(make_module(tiny_llama), datamodule=make_data())
    assert not (tmp_path / "x" / "excluded.json").exists()


@pytest.mark.usefixtures("float64")
def test_a_diverged_stack_leaves_the_other_stacks_alone(tiny_llama, tmp_path):
    weights = {"weights": [1, 5, 2]}
    options = {"budget": "full", "on_divergence": "exclude", "stack_size": 1, "merge_options": weights}
    options |= {"compare": "seedlora", "compare_options": {"seedlora": weights}}
    callback = SeedEnsembleCallback([1, 2, 3], merge="soup", dirpath=tmp_path / "x", **options)
    module, data = make_module(tiny_llama), make_data()
    for seed in (1, 2, 3):
        run = trainer(callback, max_epochs=1)
        if seed == 2:
            run.callbacks.append(Poison("seed_2", 3))
        run.fit(module, datamodule=data)
    assert callback.pending == ()
    assert callback.ensemble.excluded == {2: "training loss not finite in step 4"}
    assert not (tmp_path / "x" / "checkpoints").exists()
    first, third, fused = (read_adapter(path) for path in (*map(callback.adapter_path, (1, 3)), callback.fused_path))
    for path, factors in fused.layers.items():
        # the weights of the seeds that are left, over their number
        wanted = (first.layers[path].dense() + 2 * third.layers[path].dense()) / 2
        assert torch.allclose(factors.dense(), wanted, rtol=0, atol=SAME)

    # a command that only tests finds what it asks for, and what is compared has the weights of these seeds too
    assert (
        SeedEnsembleCallback([1, 2, 3], merge="soup", dirpath=tmp_path / "x", **options).ensemble.merged_otherwise
        is None
    )
    run.test(module, datamodule=data, verbose=False)
    assert "seedlora" in callback.results.scores


def test_a_stopped_seed_is_written_when_the_last_one_diverges(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", patience=1, on_divergence="exclude", dirpath=tmp_path / "x")
    module = Scripted(tiny_llama, dtype="float32", r=4)
    module.losses, module.weights = {"seed_1": [1, 2], "seed_2": [4, 3, 2, 1]}, []
    run = trainer(callback, max_epochs=1, val_check_interval=0.25, num_sanity_val_steps=0)
    run.callbacks.append(Poison("seed_2", 7))
    run.fit(module, datamodule=make_data())
    assert callback.trained == (1,)
    assert callback.ensemble.excluded == {2: "training loss not finite in step 8"}
    assert same(written(callback, 1), module.weights[1]["seed_1"])


def test_weights_are_one_per_seed():
    with pytest.raises(ValueError, match=r"weights must be 2 numbers, one per seed, got \[1, 2, 3\]"):
        SeedEnsembleCallback([1, 2], merge="soup", merge_options={"weights": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"compare_options weights must be 2 numbers, one per seed, got \[1, 2, 3\]"):
        SeedEnsembleCallback(
            [1, 2], merge="soup", compare="seedlora", compare_options={"seedlora": {"weights": [1, 2, 3]}}
        )


class Terminate(pl.Callback):
    def __init__(self, batch=5):
        self.batch = batch

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


class Validations(list, pl.Callback):
    """The optimizer steps at which validations ended."""

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.append(trainer.global_step)


class Fail(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 15:
            raise RuntimeError("killed")


def test_the_last_step_of_an_epoch_is_saved_too(tiny_llama, tmp_path):
    """Epochs of 12 steps and a checkpoint every 12: there would be none."""

    def fit(name, *callbacks, ckpt_path=None, **options):
        callback = SeedEnsembleCallback(
            [1, 2], patience=9, keep="best", checkpoint_every_n_steps=12, dirpath=tmp_path / name, **options
        )
        logger = JSONLinesLogger(callback.ensemble.metrics_path)
        logger.rewind(callback.ensemble.ckpt_step)
        run = trainer(callback, max_epochs=4, logger=logger, log_every_n_steps=1)
        run.callbacks += callbacks
        data = make_data()
        run.fit(make_module(tiny_llama, lora_dropout=0.1), datamodule=data, ckpt_path=ckpt_path, weights_only=True)

    validations, wanted = Validations(), Validations()
    fit("whole", wanted)
    with pytest.raises(RuntimeError, match="killed"):
        fit("x", validations, Fail())
    (checkpoint,) = tmp_path.glob("x/checkpoints/*/*")
    assert checkpoint.name == "step=12.ckpt"
    fit("x", validations, ckpt_path=checkpoint, resume=True)
    for name in ("seed_1", "seed_2", "fused"):
        file = "adapter_model.safetensors"
        assert (tmp_path / "x" / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()
    assert validations == wanted
    assert (tmp_path / "x" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


# validations between two steps, and just after the one that is saved
@pytest.mark.parametrize("interval", [6, 4])
def test_sigterm_finishes_the_step_saves_and_resumes_to_the_same_bits(tiny_llama, tmp_path, interval):
    options = {"max_epochs": 4, "accumulate_grad_batches": 4, "val_check_interval": interval}
    before = signal.getsignal(signal.SIGTERM)
    whole = SeedEnsembleCallback([1, 2], patience=9, keep="best", dirpath=tmp_path / "whole")
    run, wanted, found = trainer(whole, **options), Validations(), Validations()
    run.callbacks.append(wanted)
    run.fit(make_module(tiny_llama, lora_dropout=0.1), datamodule=make_data())
    assert signal.getsignal(signal.SIGTERM) == before
    callback = SeedEnsembleCallback([1, 2], patience=9, keep="best", dirpath=tmp_path / "x")
    run = trainer(callback, **options)
    run.callbacks[:0] = [Terminate(), found]  # before the one that leaves
    with pytest.raises(StoppedError, match="terminated by SIGTERM; step 2 is saved"):
        run.fit(make_module(tiny_llama, lora_dropout=0.1), datamodule=make_data())
    assert signal.getsignal(signal.SIGTERM) == before
    assert callback.ensemble.ckpt_step == 2
    again = SeedEnsembleCallback([1, 2], patience=9, keep="best", dirpath=tmp_path / "x", resume=True)
    run = trainer(again, **options)
    run.callbacks.append(found)
    run.fit(
        make_module(tiny_llama, lora_dropout=0.1),
        datamodule=make_data(),
        ckpt_path=callback.ckpt_path,
        weights_only=True,
    )
    for name in ("seed_1", "seed_2", "fused"):
        file = "adapter_model.safetensors"
        assert (tmp_path / "x" / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()
    assert found == wanted


def test_a_resume_leaves_a_seed_stopped_that_had_no_patience_left(tiny_llama, tmp_path):
    options = {"max_epochs": 1}
    whole = SeedEnsembleCallback([1, 2], budget="full", patience=1, keep="best", dirpath=tmp_path / "whole")
    fit(tiny_llama, whole, {"seed_1": [1, 2], "seed_2": [4, 3, 2, 1]}, **options)
    first = SeedEnsembleCallback([1, 2], budget="full", patience=1, keep="best", dirpath=tmp_path / "x")
    module = Scripted(tiny_llama, dtype="float32", r=4)
    module.losses, module.weights = {"seed_1": [1, 2], "seed_2": [4, 3]}, []
    run = trainer(first, val_check_interval=0.25, num_sanity_val_steps=0, **options)
    run.callbacks.append(Terminate(7))  # validations after 3, 6, 9 and 12
    with pytest.raises(StoppedError, match="step 8 is saved"):
        run.fit(module, datamodule=make_data())
    assert module.replicas.idle == {"seed_1"}
    again = SeedEnsembleCallback([1, 2], budget="full", patience=1, keep="best", dirpath=tmp_path / "x", resume=True)
    module = Scripted(tiny_llama, dtype="float32", r=4)
    module.losses, module.weights = {"seed_1": [0], "seed_2": [2, 1]}, []  # better than ever, and not looked at
    run = trainer(again, val_check_interval=0.25, num_sanity_val_steps=0, **options)
    run.fit(module, datamodule=make_data(), ckpt_path=again.ckpt_path, weights_only=True)
    assert module.replicas.idle == {"seed_1"}
    assert len(module.weights) == 2
    for name in ("seed_1", "seed_2", "fused"):
        file = "adapter_model.safetensors"
        assert (tmp_path / "x" / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()


def test_a_resume_leaves_an_excluded_seed_out(tiny_llama, tmp_path):
    found = {}
    for name, batch in (("whole", None), ("x", 7)):
        options = {"budget": "full", "on_divergence": "exclude", "dirpath": tmp_path / name}
        callback = SeedEnsembleCallback([1, 2, 3], **options)
        run = trainer(callback, max_epochs=1)
        run.callbacks.append(Poison("seed_2", 5))
        if batch is None:
            run.fit(make_module(tiny_llama), datamodule=make_data())
        else:
            run.callbacks.append(Terminate(batch))
            with pytest.raises(StoppedError, match="step 8 is saved"):
                run.fit(make_module(tiny_llama), datamodule=make_data())
            callback = SeedEnsembleCallback([1, 2, 3], resume=True, **options)
            checkpoint = callback.ckpt_path
            trainer(callback, max_epochs=1).fit(
                make_module(tiny_llama), datamodule=make_data(), ckpt_path=checkpoint, weights_only=True
            )
        assert callback.ensemble.excluded == {2: "training loss not finite in step 6"}
        files = (tmp_path / name).glob("*/adapter_model.safetensors")
        found[name] = {file.parent.name: file.read_bytes() for file in files}
    assert found["x"].keys() == {"seed_1", "seed_3", "soup", "fused"}
    assert found["x"] == found["whole"]


def test_sigterm_in_the_last_step_is_answered_when_the_seeds_are_written(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", dirpath=tmp_path / "x")
    run = trainer(callback, max_epochs=1)
    run.callbacks.append(Terminate(11))
    with pytest.raises(StoppedError, match="terminated by SIGTERM after training; the adapters are written"):
        run.fit(make_module(tiny_llama), datamodule=make_data())
    assert callback.pending == ()
    assert not callback.fused_path.exists()
    assert not (tmp_path / "x" / "checkpoints").exists()


@pytest.mark.usefixtures("float64")
def test_another_seed_is_trained_alone_and_fused_with_those_there(tiny_llama, tmp_path):
    first = SeedEnsembleCallback([1, 2], budget="full", dirpath=tmp_path / "x")
    trainer(first, max_epochs=1).fit(make_module(tiny_llama), datamodule=make_data())
    times = {s: (first.adapter_path(s) / "adapter_model.safetensors").stat().st_mtime_ns for s in (1, 2)}
    more = SeedEnsembleCallback([1, 2, 3], budget="full", dirpath=tmp_path / "x", resume=True)
    run = trainer(more, max_epochs=1)
    module = make_module(tiny_llama)
    run.fit(module, datamodule=make_data())
    assert [replica.name for replica in module.replicas] == ["seed_3"]
    assert {s: (first.adapter_path(s) / "adapter_model.safetensors").stat().st_mtime_ns for s in (1, 2)} == times
    record = json.loads((more.fused_path / "fusion.json").read_text())
    assert [item["name"] for item in record["inputs"]] == ["seed_1", "seed_2", "seed_3"]
    together = SeedEnsembleCallback([1, 2, 3], budget="full", dirpath=tmp_path / "all")
    trainer(together, max_epochs=1).fit(make_module(tiny_llama), datamodule=make_data())
    wanted, found = (load_file(c.fused_path / "adapter_model.safetensors") for c in (together, more))
    assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=SAME) for key in wanted)


@pytest.mark.parametrize("n", [1, 16])
def test_one_seed_and_sixteen(tiny_llama, tmp_path, n):
    callback = SeedEnsembleCallback(range(n), budget="full", dirpath=tmp_path / "x")
    run, module, data = trainer(callback, max_steps=2), make_module(tiny_llama), make_data()
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    assert len(callback.trained) == n
    assert callback.results.scores["fused"].n == 12


def test_the_stack_that_fits():
    def memory(n):
        return Memory(base=10, adapters=n, optimizer=n, activations=8 * n)

    assert fitting_stack(5, memory, 1000) == 5
    assert fitting_stack(5, memory, 50) == 3
    assert fitting_stack(5, memory, 1) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "first"}, "Unknown ensemble.keep 'first'; choose one of last, best"),
        ({"on_divergence": "pray"}, "Unknown ensemble.on_divergence 'pray'; choose one of stop, exclude"),
        ({"patience": 0}, "ensemble.patience must be at least 1 validation, got 0"),
        ({"stack_size": "most"}, "ensemble.stack_size must be at least 1, or 'auto', got 'most'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SeedEnsembleCallback(**options)


def test_best_weights_need_validation(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", keep="best", dirpath=tmp_path / "x")
    with pytest.raises(ValueError, match="need validation rows"):
        trainer(callback, limit_val_batches=0).fit(make_module(tiny_llama), datamodule=make_data())
