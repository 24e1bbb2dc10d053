"""Controls at equal tokens: one seed with the rows of all in each step, and the long seed's best step."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
from safetensors.torch import load_file

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.names import WIDE_BATCHES
from seedlora.run.controls import best_of, control_replicas
from seedlora.training.replicas import Replica, ReplicaOptions
from tests.helpers.interventions import Poison, StopAfter
from tests.helpers.models import make_data, make_module
from tests.helpers.precision import SAME, relative
from tests.helpers.training import OPTIONS, SILENT, plain_peft_run, saved

SEEDS = (11, 42)


def fit(folder, base_model, *, callbacks=(), test=False, epochs=1, resume=False, **options):
    """Train seeds, then their controls; return the callback."""
    given = {"merge": "soup", "budget": "full", "dirpath": folder, "controls": "equal_tokens"}
    callback = SeedEnsembleCallback(SEEDS, **given, checkpoint_every_n_steps=1, resume=resume, **options)
    module, data = make_module(base_model), make_data()
    while callback.pending or callback.pending_controls:
        limits = {"max_epochs": epochs, **callback.ensemble.control_limits(max_epochs=epochs, max_steps=-1)}
        trainer = pl.Trainer(
            callbacks=[callback, *callbacks], accelerator="cpu", val_check_interval=0.5, **limits, **SILENT, **OPTIONS
        )
        trainer.fit(module, datamodule=data, ckpt_path=callback.ckpt_path, weights_only=True)
    if test:
        trainer.test(module, datamodule=data, verbose=False)
    return callback


def test_a_wide_batch_is_as_many_replicas_as_there_are_seeds_each_with_its_own_rows():
    like = Replica("seed_3", 3, 3, ReplicaOptions())
    for power, name in zip((0, 0.5, 1), WIDE_BATCHES, strict=True):
        first, *others = control_replicas(name, like, seeds=(3, 1, 2), trained=3)
        assert first == Replica(name, 3, 3, ReplicaOptions(rate_factor=3**power))
        assert [(r.name, r.init_seed, r.order_seed, r.helps) for r in others] == [
            (f"{name}_1", 3, 1, True),
            (f"{name}_2", 3, 2, True),
        ]
    assert control_replicas("long_seed", like, seeds=(3, 1), trained=2) == (Replica("long_seed", 3, 3),)


def test_the_best_is_the_one_with_the_lowest_validation_loss_that_is_known():
    row = {"steps": 3, "stopped": False, "kept_step": None}
    rows = {"a": {**row, "validation_loss": 2.0}, "b": row, "c": {**row, "validation_loss": 1.0}}
    assert best_of(["a", "b", "c"], rows) == "c"
    assert best_of(["b", "d"], rows) is None


@pytest.fixture(scope="module")
def everything(tiny_llama, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("run") / "x", tiny_llama, ema=0.9, test=True)


def test_what_is_trained_at_equal_tokens_is_scored_with_the_others(everything):
    controls = ["long_seed", "long_seed_best", "long_seed_ema", "wide_batch", "wide_batch_ema"]
    labels = set(everything.results.scores)
    assert labels >= {"base", "seed_11", "seed_42", "soup", "gain_seed", "greedy_soup", *controls}
    assert not labels & {*WIDE_BATCHES}
    trained = json.loads((everything.dirpath / "trained.json").read_text())
    # the steps of one replica with the rows of both; the tokens of both, as the long seed has them
    assert [trained[name]["steps"] for name in WIDE_BATCHES] == [6, 6, 6]
    tokens = trained["seed_11"]["tokens"] + trained["seed_42"]["tokens"]
    assert [trained[name]["tokens"] for name in WIDE_BATCHES] == [tokens] * 3
    assert trained["long_seed"]["steps"] == 12
    best = best_of(list(WIDE_BATCHES), trained)
    assert everything.ensemble.folders["wide_batch"] == everything.dirpath / best
    # helpers are neither validated nor written
    assert not list(everything.dirpath.glob("wide_batch_x*_1"))
    metrics = (everything.dirpath / "trained.json").read_text()
    assert "_x1_1" not in metrics


@pytest.mark.usefixtures("float64")
def test_a_wide_batch_is_a_plain_run_with_the_rows_of_all_seeds(tiny_llama, tmp_path):
    callback = fit(tmp_path, tiny_llama)
    wanted = plain_peft_run(tiny_llama, SEEDS[0], epochs=1, accumulate=2, clip=0.05, rows_of=SEEDS)
    found = saved(callback.dirpath / "wide_batch_x1")
    for key, tensor in wanted.items():
        assert relative(found[key], tensor) < SAME, key


def test_the_long_seed_is_written_as_it_was_at_its_best_validation_too(everything):
    best, last = (saved(everything.dirpath / name) for name in ("long_seed_best", "long_seed"))
    assert best.keys() == last.keys()
    assert (everything.dirpath / "long_seed_best" / "control.json").is_file()


def test_a_rate_at_which_a_wide_batch_diverges_is_left_out_and_the_others_count(tiny_llama, tmp_path):
    poison = Poison("wide_batch_xn", 2)
    callback = fit(tmp_path, tiny_llama, callbacks=[poison], test=True)
    assert list(callback.ensemble.folder.left_out) == ["wide_batch_xn"]
    assert "wide_batch" in callback.results.scores


def test_a_resumed_wide_batch_gives_the_same_bits(everything, tiny_llama, tmp_path):
    class StopWide(StopAfter):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if any(replica.name == "wide_batch_xroot" for replica in module.replicas):
                super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    with pytest.raises(TimeoutError):
        fit(tmp_path, tiny_llama, callbacks=[StopWide(4)], ema=0.9)
    assert (tmp_path / "checkpoints" / "wide_batch_xroot-wide_batch_xroot_1" / "step=4.ckpt").is_file()
    fit(tmp_path, tiny_llama, resume=True, ema=0.9)
    for name in (*WIDE_BATCHES, "wide_batch_xroot_ema"):
        file = f"{name}/adapter_model.safetensors"
        found, wanted = load_file(tmp_path / file), load_file(everything.dirpath / file)
        assert all((found[key] == tensor).all() for key, tensor in wanted.items()), name


def test_rows_of_all_seeds_do_not_go_with_a_sweep_or_passes(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="controls='equal_tokens' has the rows of all seeds, and with sweep"):
        SeedEnsembleCallback(SEEDS, controls="equal_tokens", sweep={"r": [4]})
    with pytest.raises(ValueError, match="controls='equal_tokens' trains all 2 replicas at once"):
        fit(tmp_path, tiny_llama, stack_size=1)
