"""A replica of a stack learns what it would learn alone; the reference is a plain PEFT loop written out here."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.training.model_options import PROJECTIONS
from seedlora.training.optimizer import learning_rate_factor
from seedlora.training.replicas import FitSettings
from tests.helpers.models import built, make_data, make_module, replicas
from tests.helpers.precision import SAME, plain_model

SEEDS = (11, 42, 202)
OPTIONS = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}


def fit(base_model, dirpath, seeds, *, dropout=0.0, stack_size=None, epochs=1, module_options=None, **trainer_options):
    """Train to the end, in as many fits as there are stacks; returns the updates per seed."""
    callback = SeedEnsembleCallback(seeds, dirpath=dirpath, budget="full", stack_size=stack_size)
    module = make_module(base_model, lora_dropout=dropout, **(module_options or {}))
    data = make_data()
    while callback.pending:
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            accelerator="cpu",
            **{**OPTIONS, **trainer_options},
        )
        trainer.fit(module, datamodule=data)
    return {seed: read_adapter(callback.adapter_path(seed)).layers for seed in seeds}


def difference(a, b):
    """Largest relative difference of any factor."""
    return max(
        ((getattr(a[path], f) - getattr(b[path], f)).norm() / getattr(b[path], f).norm()).item()
        for path in b
        for f in ("A", "B")
    )


def plain_lora(base_model):
    model = plain_model(base_model)
    return model, LoraConfig(r=4, lora_alpha=12, target_modules=list(PROJECTIONS))


def plain_peft_run(
    base_model, seed, *, epochs, accumulate, clip, ratio=1.0, adapt=plain_lora, start=lambda model: None
):
    """One seed in plain PyTorch and PEFT, each row alone in its forward, nothing of ours but the order of the rows."""
    data = make_data()
    data.tokenizer = make_module(base_model).tokenizer
    data.setup("fit")
    data.seeds = (seed,)
    model, config = adapt(base_model)
    torch.manual_seed(seed)
    model = get_peft_model(model, config).train()
    start(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for name, p in named if ("lora_B" in name) == of_b]} for of_b in (False, True)]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.0)
    sampler = data.train_dataloader().sampler
    sampler.batch_size, sampler.steps = 2 * accumulate, sampler.steps // accumulate
    total = epochs * sampler.steps
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for step, micro in enumerate(sampler):
            scale = learning_rate_factor(
                epoch * sampler.steps + step, "cosine", warmup=-(-6 * total // 100), total=total
            )
            optimizer.param_groups[0]["lr"] = 2e-3 * scale
            optimizer.param_groups[1]["lr"] = 2e-3 * scale * ratio
            losses, tokens = [], 0
            for row in micro.rows[0]:
                ids, labels = data.rows["train"].padded([row])
                logits = model(input_ids=ids).logits[0, :-1]
                said = labels[0, 1:] != -100
                losses.append(torch.nn.functional.cross_entropy(logits[said], ids[0, 1:][said], reduction="sum"))
                tokens += int(said.sum())
            (sum(losses) / tokens).backward()
            torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            optimizer.zero_grad()
    return get_peft_model_state_dict(model)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_a_replica_of_a_stack_equals_a_plain_peft_loop(tiny_llama, tmp_path, ratio):
    stacked = fit(tiny_llama, tmp_path, SEEDS, epochs=2, module_options={"lora_plus_ratio": ratio})
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
    stacked = fit(tiny_llama, tmp_path / "stack", SEEDS, dropout=dropout)
    alone = fit(tiny_llama, tmp_path / "alone", [42], dropout=dropout)
    assert difference(stacked[42], alone[42]) < SAME
    assert difference(stacked[11], alone[42]) > 0.1


def test_passes_of_one_seed_give_the_bits_of_standalone_runs(tiny_llama, tmp_path):
    passes = fit(tiny_llama, tmp_path / "passes", SEEDS, dropout=0.1, stack_size=1)
    for seed in SEEDS:
        assert difference(passes[seed], fit(tiny_llama, tmp_path / f"{seed}", [seed], dropout=0.1)[seed]) == 0


def test_the_same_run_twice_gives_the_same_bits(tiny_llama, tmp_path):
    first, second = (fit(tiny_llama, tmp_path / name, SEEDS, dropout=0.1) for name in ("a", "b"))
    assert all(difference(first[seed], second[seed]) == 0 for seed in SEEDS)


@pytest.mark.usefixtures("float64")
def test_gradient_checkpointing_trains_the_same(tiny_llama, tmp_path):
    plain = fit(tiny_llama, tmp_path / "plain", SEEDS, dropout=0.1)
    checkpointed = fit(
        tiny_llama, tmp_path / "checkpointed", SEEDS, dropout=0.1, module_options={"gradient_checkpointing": True}
    )
    assert difference(plain[42], checkpointed[42]) < SAME


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
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        run = pl.Trainer(max_epochs=1, callbacks=[callback, seen], accelerator="cpu", **dict.fromkeys(quiet, False))
        run.fit(make_module(tiny_llama), datamodule=make_data())
        assert (seen.same_init, seen.same_order) == (same_init, same_order)
        updates[vary] = [read_adapter(callback.adapter_path(seed)).layers for seed in (1, 2)]
    for vary in ("init", "order"):
        assert difference(updates[vary][0], updates["both"][0]) < SAME
        first, second = (torch.cat([f.A.flatten() for f in layers.values()]) for layers in updates[vary])
        # A moves little from where it starts.
        assert ((second - first).norm() / first.norm() < 0.5) == (vary == "order")
        assert difference(updates[vary][1], updates[vary][0]) > 1e-3
        assert difference(updates[vary][1], updates["both"][1]) > 1e-3


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
    losses, _, _ = module.token_losses(batch["input_ids"].flatten(0, 1), batch["labels"].flatten(0, 1))
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
    with pytest.raises(ValueError, match="bf16-true.*--model.dtype"):
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
