"""A replica of a stack learns what it would learn alone; the reference is a plain PEFT loop written out here."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.training.replicas import FitSettings
from tests.helpers.models import SEEDS, built, make_data, make_module, replicas
from tests.helpers.precision import SAME
from tests.helpers.training import SILENT, largest_difference, plain_peft_run, trained_updates


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_a_replica_of_a_stack_equals_a_plain_peft_loop(tiny_llama, tmp_path, ratio):
    stacked = trained_updates(tiny_llama, tmp_path, SEEDS, epochs=2, module_options={"lora_plus_ratio": ratio})
    for seed in SEEDS if ratio == 1 else SEEDS[:1]:
        expected = plain_peft_run(tiny_llama, seed, epochs=2, accumulate=2, clip=0.05, ratio=ratio)
        assert len(expected) == 2 * len(stacked[seed])
        for path, ours in stacked[seed].items():
            a, b = (expected[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
            assert ((ours.A[0] - a).norm() / a.norm()).item() < SAME
            assert ((ours.B[0] - 3 * b).norm() / (3 * b).norm()).item() < SAME  # lora_alpha / r = 3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_replica_of_a_stack_equals_its_standalone_run(tiny_llama, tmp_path, dropout):
    stacked = trained_updates(tiny_llama, tmp_path / "stack", SEEDS, dropout=dropout)
    alone = trained_updates(tiny_llama, tmp_path / "alone", [42], dropout=dropout)
    assert largest_difference(stacked[42], alone[42]) < SAME
    assert largest_difference(stacked[11], alone[42]) > 0.1


def test_passes_of_one_seed_give_the_bits_of_standalone_runs(tiny_llama, tmp_path):
    passes = trained_updates(tiny_llama, tmp_path / "passes", SEEDS, dropout=0.1, stack_size=1)
    for seed in SEEDS:
        assert (
            largest_difference(
                passes[seed], trained_updates(tiny_llama, tmp_path / f"{seed}", [seed], dropout=0.1)[seed]
            )
            == 0
        )


def test_the_same_run_twice_gives_the_same_bits(tiny_llama, tmp_path):
    first, second = (trained_updates(tiny_llama, tmp_path / name, SEEDS, dropout=0.1) for name in ("a", "b"))
    assert all(largest_difference(first[seed], second[seed]) == 0 for seed in SEEDS)


@pytest.mark.usefixtures("float64")
def test_gradient_checkpointing_trains_the_same(tiny_llama, tmp_path):
    plain = trained_updates(tiny_llama, tmp_path / "plain", SEEDS, dropout=0.1)
    checkpointed = trained_updates(
        tiny_llama, tmp_path / "checkpointed", SEEDS, dropout=0.1, module_options={"gradient_checkpointing": "full"}
    )
    assert largest_difference(plain[42], checkpointed[42]) < SAME


class Seen(pl.Callback):
    """Whether two seeds began at the same weights, and whether they saw the same rows in every step."""

    def on_train_start(self, trainer, module):
        first, second = (module.stack.parameters(replica.name) for replica in module.replicas)
        self.same_init, self.same_order = all(map(torch.equal, first, second)), True

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.same_order &= torch.equal(*batch["input_ids"])


@pytest.mark.usefixtures("float64")
def test_vary_fixes_the_init_or_the_order(tiny_llama, tmp_path):
    updates = {}
    for vary, same_init, same_order in (("both", False, False), ("init", False, True), ("order", True, False)):
        callback, seen = SeedEnsembleCallback((1, 2), vary=vary, budget="full", dirpath=tmp_path / vary), Seen()
        run = pl.Trainer(max_epochs=1, callbacks=[callback, seen], accelerator="cpu", **SILENT)
        run.fit(make_module(tiny_llama), datamodule=make_data())
        assert (seen.same_init, seen.same_order) == (same_init, same_order)
        updates[vary] = [read_adapter(callback.adapter_path(seed)).layers for seed in (1, 2)]
    for vary in ("init", "order"):
        assert largest_difference(updates[vary][0], updates["both"][0]) < SAME
        first, second = (torch.cat([f.A.flatten() for f in layers.values()]) for layers in updates[vary])
        # A moves little from where it starts.
        assert ((second - first).norm() / first.norm() < 0.5) == (vary == "order")
        assert largest_difference(updates[vary][1], updates[vary][0]) > 1e-3
        assert largest_difference(updates[vary][1], updates["both"][1]) > 1e-3


@pytest.mark.usefixtures("float64")
def test_the_loss_is_the_mean_over_the_supervised_tokens_of_the_step(tiny_llama):
    """Three replicas, padded rows, accumulation: each loss against a sum over rows written out."""
    module = make_module(tiny_llama)
    module.prepare_fit(FitSettings(replicas(*SEEDS)))
    module.setup("fit")
    data = make_data(task="gcd")
    data.tokenizer = module.tokenizer
    data.setup("fit")
    data.seeds = SEEDS
    loader = data.train_dataloader()
    micro = next(iter(loader.sampler))
    batch = loader.dataset[micro]
    module.stack.route([r.name for r in module.replicas])
    losses, *_ = module.token_losses(batch["input_ids"].flatten(0, 1), batch["labels"].flatten(0, 1))
    ours = losses.view(3, -1).sum(1) / batch["num_items"]
    for i, (replica, rows) in enumerate(zip(module.replicas, micro.rows, strict=True)):
        module.stack.route([replica.name])
        total = 0.0
        for row in rows:
            ids, labels = data.rows["train"].padded([row])
            logp = module.model(input_ids=ids).logits[0].log_softmax(-1)
            total -= sum(logp[t - 1, ids[0, t]].item() for t in range(ids.shape[1]) if labels[0, t] != -100)
        assert ours[i].item() == pytest.approx(total / micro.num_items[i], rel=SAME)


def test_replicas_are_clipped_each_on_its_own_norm(tiny_llama):
    module = make_module(tiny_llama)
    module.prepare_fit(FitSettings(replicas(42, 1)))
    module.setup("fit")
    for replica, size in zip(module.replicas, (1e-3, 1e3), strict=True):
        for parameter in module.stack.parameters(replica.name):
            parameter.grad = torch.full_like(parameter, size)
    small = [p.grad.clone() for p in module.stack.parameters("seed_42")]
    module.configure_gradient_clipping(None, 1.0, "norm")
    assert all(torch.equal(a, p.grad) for a, p in zip(small, module.stack.parameters("seed_42"), strict=True))
    norm = torch.stack([p.grad.norm() for p in module.stack.parameters("seed_1")]).norm()
    assert norm.item() == pytest.approx(1.0, rel=1e-3)


def test_half_precision_trainers_are_refused(tiny_llama):
    trainer = pl.Trainer(precision="bf16-true", logger=False, enable_checkpointing=False, accelerator="cpu")
    module = make_module(tiny_llama)
    module._trainer = trainer
    with pytest.raises(ValueError, match="bf16-true.*set dtype for"):
        module.setup("fit")


def test_only_adapters_are_in_the_checkpoint(tiny_llama, tmp_path):
    module = built(tiny_llama, *SEEDS)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])
    del checkpoint["state_dict"][next(iter(checkpoint["state_dict"]))]
    with pytest.raises(ValueError, match="only the model has"):
        module.on_load_checkpoint(checkpoint)
