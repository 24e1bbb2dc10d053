"""Modules that every replica trains in full; the references are PEFT's own ``modules_to_save`` and plain loops."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from seedlora.adapters.adapter import AdapterError
from seedlora.adapters.writing import write_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.cli.main import main
from seedlora.distributed.strategies import choose_strategy, prepare_strategy
from seedlora.merge.averages import average_modules
from seedlora.merge.into_base import merge_into_base
from seedlora.merge.registry import make_rule
from seedlora.run.memory import step_memory, trainable_parameters
from seedlora.run.operations import Work, work
from seedlora.selection.choice import soup_of
from seedlora.training.live_updates import load_updates
from seedlora.training.model_options import PROJECTIONS
from seedlora.training.optimizer import learning_rate_factor
from seedlora.training.replicas import FitSettings
from seedlora.training.whole_models import WholeModels
from tests.adapters.test_stack import ROWS, SEEDS
from tests.adapters.test_stack_kinds import families, relative, saved, train  # noqa: F401 - a fixture
from tests.helpers.models import make_data, make_module, replicas
from tests.helpers.precision import SAME, plain_model
from tests.training.test_module import plain_peft_run

ENDS = ["embed_tokens", "lm_head"]
SILENT = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def spread(base_model, *seeds, **options):
    """A module that is set up, everything that is trained away from where it starts."""
    module = make_module(base_model, **options)
    module.prepare_fit(FitSettings(replicas(*seeds)))
    module.options.check()
    module.setup("fit")
    generator = torch.Generator().manual_seed(1)
    for replica in module.replicas:
        for parameter in module.stack.parameters(replica.name):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def save(module, name, folder):
    stack = module.stack
    write_adapter(folder, stack.stored_factors(name), module.options.saved_config(), modules=stack.full_weights(name))


CHOICES = {
    "head and embedding": ("llama", ENDS, ["q_proj", "up_proj"]),
    "embedding": ("llama", ["embed_tokens"], ["q_proj", "up_proj"]),
    "norms and layers": ("llama", ["norm", "layers.0.input_layernorm", "o_proj"], ["q_proj", "up_proj"]),
    "tied": ("gemma", ["lm_head"], ["q_proj", "up_proj"]),
    "positions, Conv1D, biases, tied": ("gpt2", ["wte", "wpe", "ln_f", "h.1.mlp.c_fc"], ["c_attn"]),
}


@pytest.fixture
def model_of(tiny_llama, families):  # noqa: F811
    return lambda family: tiny_llama if family == "llama" else str(families / family)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_each_block_has_its_own_weights_and_peft_loads_them(model_of, tmp_path, choice):
    family, names, targets = CHOICES[choice]
    folder = model_of(family)
    module = spread(folder, *SEEDS, modules_to_save=names, target_modules=targets)
    module.stack.route(["seed_202", None, "seed_11"])
    stacked = module.model(input_ids=ROWS).logits.chunk(3)
    torch.testing.assert_close(stacked[1], plain_model(folder)(input_ids=ROWS[2:4]).logits, atol=SAME, rtol=SAME)
    for name, rows, logits in (("seed_202", ROWS[:2], stacked[0]), ("seed_11", ROWS[4:], stacked[2])):
        save(module, name, tmp_path / name)
        theirs = PeftModel.from_pretrained(plain_model(folder), tmp_path / name)
        torch.testing.assert_close(logits, theirs(input_ids=rows).logits, atol=SAME, rtol=SAME)
        module.stack.load("read", module.stack.factors([name]), modules=module.stack.full_weights(name))
        module.stack.route([None, "read"])
        read = module.model(input_ids=torch.cat([rows, rows])).logits[2:]
        torch.testing.assert_close(read, logits, atol=SAME, rtol=SAME)
    assert trainable_parameters(module.options) == sum(p.numel() for p in module.stack.parameters("seed_42"))


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_a_head_of_its_own_scores_blocks_with_different_numbers_of_labels(tiny_llama, tmp_path):
    module = spread(tiny_llama, *SEEDS, modules_to_save=ENDS)
    labels = ROWS.clone()
    for row, masked in enumerate((1, 6, 3, 7, 0, 5)):
        labels[row, :masked] = -100
    module.stack.route(["seed_11", None, "seed_42"])
    losses, right, keep = module.token_losses(ROWS, labels)
    assert keep.view(3, -1).sum(1).tolist() == [7, 4, 8]
    for block, name in ((0, "seed_11"), (2, "seed_42")):
        save(module, name, tmp_path / name)
        rows = slice(2 * block, 2 * block + 2)
        logits = PeftModel.from_pretrained(plain_model(tiny_llama), tmp_path / name)(input_ids=ROWS[rows]).logits[
            :, :-1
        ]
        wanted = cross_entropy(logits.flatten(0, 1), labels[rows, 1:].flatten(), reduction="none").view(2, -1)
        torch.testing.assert_close(losses[rows, :-1], wanted, atol=SAME, rtol=SAME)
        assert torch.equal(right[rows][keep[rows]], (logits.argmax(-1) == ROWS[rows, 1:])[keep[rows][:, :-1]])


def test_rows_that_are_not_those_of_the_batch_are_refused(tiny_llama):
    module = spread(tiny_llama, 1, 2, modules_to_save=["norm"])
    norm = module.stack.modules["model.norm"]
    module.stack.route(["seed_1", "seed_2"])
    module.model(input_ids=ROWS)
    with pytest.raises(RuntimeError, match="model.norm: 4 rows are not the 6 of the batch, in 2 blocks"):
        norm(torch.zeros(4, 32))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("family", "names"), [("llama", [*ENDS, "norm"]), ("gemma", ["embed_tokens"])])
def test_a_replica_equals_a_plain_peft_loop(model_of, tmp_path, family, names):
    folder = model_of(family)

    def adapt(folder):
        tied = {"ensure_weight_tying": True} if family == "gemma" else {}
        kept = ["model.norm" if name == "norm" else name for name in names]
        config = LoraConfig(r=4, lora_alpha=12, target_modules=list(PROJECTIONS), modules_to_save=kept, **tied)
        return plain_model(folder), config

    callback = train(folder, tmp_path, SEEDS[:2], modules_to_save=names)
    ours = saved(callback.adapter_path(42))
    expected = plain_peft_run(folder, 42, epochs=1, accumulate=2, clip=0.05, adapt=adapt)
    assert {key for key in ours if "lora_" not in key} >= {"base_model.model.model.embed_tokens.weight"}
    for key, tensor in expected.items():
        assert relative(ours[key], tensor) < SAME, key
    before = plain_model(folder).get_input_embeddings().weight
    assert relative(ours["base_model.model.model.embed_tokens.weight"], before) > 1e-3
    if family == "gemma":
        assert torch.equal(ours["base_model.model.lm_head.weight"], ours["base_model.model.model.embed_tokens.weight"])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_stacked_alone_in_passes_and_resumed(tiny_llama, tmp_path, adapter):
    """A stack within rounding of a standalone run; passes and resumed runs to the bit."""
    options = {"adapter": adapter, "lora_dropout": 0.1, "modules_to_save": ENDS}
    alone = saved(train(tiny_llama, tmp_path / "alone", SEEDS[1:2], max_steps=3, **options).adapter_path(42))
    stack = train(tiny_llama, tmp_path / "stack", SEEDS[:2], max_steps=3, **options)
    passes = train(tiny_llama, tmp_path / "passes", SEEDS[:2], stack_size=1, max_steps=3, **options)
    with pytest.raises(TimeoutError):
        train(tiny_llama, tmp_path / "stopped", SEEDS[:2], stop=2, max_steps=3, **options)
    resumed = train(tiny_llama, tmp_path / "stopped", SEEDS[:2], resume=True, max_steps=3, **options)
    assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} < set(alone)
    for key, tensor in alone.items():
        found = saved(stack.adapter_path(42))[key]
        assert relative(found, tensor) < SAME, key
        assert torch.equal(saved(passes.adapter_path(42))[key], tensor), key
        assert torch.equal(saved(resumed.adapter_path(42))[key], found), key
        assert relative(saved(stack.adapter_path(11))[key], tensor) > 1e-3, key


def test_a_run_averages_them_in_everything_it_scores(tiny_llama, tmp_path):
    """Live, on validation rows, among controls and in the folders; a whole model is the same."""
    callback = SeedEnsembleCallback(
        SEEDS, dirpath=tmp_path, budget="full", stack_size=2, merge="soup", compare="ties", controls="untrained"
    )
    module, data = make_module(tiny_llama, modules_to_save=ENDS), make_data()
    while callback.pending:
        trainer = pl.Trainer(
            max_steps=3, val_check_interval=1, callbacks=[callback], accelerator="cpu", num_sanity_val_steps=0, **SILENT
        )
        trainer.fit(module, datamodule=data)
    seeds = [saved(callback.adapter_path(seed)) for seed in SEEDS]
    fused = saved(tmp_path / "fused")
    for key in ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"):
        torch.testing.assert_close(fused[key], sum(seed[key] for seed in seeds) / 3)
    loaded, losses, tokens = PeftModel.from_pretrained(plain_model(tiny_llama), tmp_path / "fused"), 0.0, 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            labels = batch["labels"][:, 1:]
            logits = loaded(input_ids=batch["input_ids"]).logits[:, :-1]
            losses += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100))
            tokens += int((labels != -100).sum())
    selection = json.loads((tmp_path / "selection.json").read_text())
    assert selection["scores"]["fused"]["loss"] == pytest.approx(losses / tokens, rel=1e-4)
    assert float(trainer.callback_metrics["val/loss_fused"]) == pytest.approx(losses / tokens, rel=1e-4)
    trainer.test(module, datamodule=data, verbose=False)
    assert {"base", "seed_202", "ties", "greedy_soup", "soup"} < set(callback.results.scores)
    module.stack.route(["soup"])
    with torch.no_grad():
        expected = loaded(input_ids=ROWS).logits
        torch.testing.assert_close(module.model(input_ids=ROWS).logits, expected, atol=1e-4, rtol=1e-4)
        merge_into_base([callback.adapter_path(seed) for seed in SEEDS], tiny_llama, tmp_path / "whole", method="soup")
        torch.testing.assert_close(
            plain_model(tmp_path / "whole")(input_ids=ROWS).logits, expected, atol=1e-4, rtol=1e-4
        )
    assert "averaged" in (tmp_path / "fused" / "README.md").read_text()


@torch.no_grad()
def test_a_tied_head_goes_into_the_base_as_the_embedding_it_is(families, tmp_path):  # noqa: F811
    folder = str(families / "gemma")
    module = spread(folder, *SEEDS[:2], modules_to_save=["embed_tokens"])
    for seed in SEEDS[:2]:
        save(module, f"seed_{seed}", tmp_path / str(seed))
    merge_into_base([tmp_path / str(seed) for seed in SEEDS[:2]], folder, tmp_path / "whole", method="soup")
    found, expected = plain_model(tmp_path / "whole"), plain_model(folder)
    weights = [load_file(tmp_path / str(seed) / "adapter_model.safetensors") for seed in SEEDS[:2]]
    key = "base_model.model.model.embed_tokens.weight"
    torch.testing.assert_close(found.lm_head.weight, (weights[0][key] + weights[1][key]) / 2)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert not torch.equal(found.lm_head.weight, expected.lm_head.weight)


def test_members_and_weights_of_a_rule_say_what_is_averaged():
    each = {"lm_head.weight": [torch.full((2, 2), x) for x in (1.0, 2.0, 6.0)]}
    assert average_modules(each, make_rule("soup"))["lm_head.weight"].unique().item() == 3
    assert average_modules(each, make_rule("soup", {"weights": [1, 0, 3]}))["lm_head.weight"].unique().item() == 19 / 4
    assert average_modules(each, soup_of([2, 0]))["lm_head.weight"].unique().item() == 3.5
    with pytest.raises(AdapterError, match="must be 3 numbers"):
        average_modules(each, make_rule("soup", {"weights": [1, 2]}))


def test_a_base_in_bfloat16_trains_float32_copies(tiny_llama, tmp_path):
    callback = train(tiny_llama, tmp_path, [42], max_steps=1, dtype="bfloat16", modules_to_save=ENDS)
    ours = saved(callback.adapter_path(42))["base_model.model.lm_head.weight"]
    assert ours.dtype == torch.float32
    step = (ours - plain_model(tiny_llama).lm_head.weight.bfloat16().float()).abs()
    # AdamW's first step is the learning rate, which bfloat16 would have lost on most entries
    assert 0 < step.max() < 2.1e-3
    assert (ours != ours.bfloat16().float()).float().mean() > 0.9


def test_the_estimate_of_memory_counts_them(tiny_llama):
    size = {"tokens": 100, "supervised": 50, "longest": 10}
    plain, full = (
        step_memory(make_module(tiny_llama, **o).options, 3, **size) for o in ({}, {"modules_to_save": ENDS})
    )
    weights = 3 * 2 * 257 * 32
    assert full.adapters - plain.adapters == full.optimizer - plain.optimizer == 8 * weights
    assert full.activations - plain.activations == 50 * 257 * (2 * 4 + 12 - 4 - 8)
    half = step_memory(make_module(tiny_llama, modules_to_save=ENDS, dtype="bfloat16").options, 3, **size)
    small = step_memory(make_module(tiny_llama, dtype="bfloat16").options, 3, **size)
    assert half.activations - small.activations == 50 * 257 * (2 * 2 + 12 - 2 - 8) + 2 * weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"modules_to_save": ["head"]},
            "model.modules_to_save head: base model .* has no such module that holds weights",
        ),
        ({"modules_to_save": ["mlp"]}, "mlp: base model .* holds weights itself; it has embed_tokens, q_proj"),
        ({"modules_to_save": ["o_proj"]}, "layers.0.self_attn.o_proj is among model.target_modules too"),
        (
            {"modules_to_save": ["o_proj"], "target_modules": ["q_proj"], "quantization": "nf4"},
            "layers.0.self_attn.o_proj would be quantised, and weights in nf4 take no gradient",
        ),
    ],
)
def test_what_cannot_be_trained_in_full_is_refused_before_anything_loads(tiny_llama, options, message):
    with pytest.raises(ValueError, match=message):
        make_module(tiny_llama, **options).options.check()


def test_experts_do_not_see_their_rows_in_order(tiny_llama, tmp_path):
    from transformers import MixtralConfig

    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    MixtralConfig(vocab_size=257, **size).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mlp.experts of base model .* does not see whole rows in their order"):
        make_module(str(tmp_path), modules_to_save=["experts"], target_modules=["q_proj"]).options.check()


def test_weights_in_full_are_not_split_over_processes():
    strategy = choose_strategy("deepspeed_stage_3", accelerator="cpu")
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(
        ValueError, match="modules_to_save.*CPUDeepSpeedStrategy, which splits.*use ddp or deepspeed_stage_2"
    ):
        prepare_strategy(trainer, full="modules_to_save norm")


def test_the_work_of_a_head_that_is_trained():
    frozen, trained = Work(10, 5, 2), Work(10, 5, 2, head_trained=True)
    assert math.isclose(trained.operations(tokens=7, scored=3) - frozen.operations(tokens=7, scored=3), 3 * 2 * 5)


# Every weight


FULL = {"adapter": "full", "learning_rate": 2e-4}


def plain_run(base_model, seed, *, steps, accumulate, clip):
    """Full fine-tuning in plain PyTorch, each row alone in its forward; of ours is the order of the rows."""
    data = make_data()
    data.tokenizer = make_module(base_model).tokenizer
    data.setup("fit")
    data.seeds = (seed,)
    model = plain_model(base_model).eval()  # without GPT-2's own dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0)
    sampler = data.train_dataloader().sampler
    sampler.batch_size, sampler.steps = 2 * accumulate, sampler.steps // accumulate
    for step, micro in zip(range(steps), sampler, strict=False):
        factor = learning_rate_factor(step, "cosine", warmup=-(-6 * steps // 100), total=steps)
        optimizer.param_groups[0]["lr"] = 2e-4 * factor
        losses, tokens = [], 0
        for row in micro.rows[0]:
            ids, labels = data.rows["train"].padded([row])
            logits, said = model(input_ids=ids).logits[0, :-1], labels[0, 1:] != -100
            losses.append(cross_entropy(logits[said], ids[0, 1:][said], reduction="sum"))
            tokens += int(said.sum())
        (sum(losses) / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "qwen2"])
def test_a_replica_is_what_a_plain_loop_trains(model_of, tmp_path, family):
    """In a stack and alone; the folder is one that transformers loads."""
    folder = model_of(family)
    callback = train(folder, tmp_path / "stack", SEEDS[:2], stack_size=2, max_steps=3, **FULL)
    expected = plain_run(folder, 42, steps=3, accumulate=2, clip=0.05)
    found = load_file(callback.adapter_path(42) / "model.safetensors")
    assert set(found) == set(load_file(Path(folder) / "model.safetensors"))
    for key, tensor in found.items():
        assert relative(tensor, expected[key]) < SAME, key
    loaded = plain_model(callback.adapter_path(42)).state_dict()
    assert all(relative(loaded[key], tensor) < 1e-7 for key, tensor in found.items())  # read in float32
    if family != "llama":
        assert (callback.adapter_path(42) / "tokenizer.json").is_file()
        return
    alone = train(folder, tmp_path / "alone", SEEDS[1:2], max_steps=3, **FULL)
    passes = train(folder, tmp_path / "passes", SEEDS[:2], max_steps=3, **FULL)  # one at a time is the default
    with pytest.raises(TimeoutError):
        train(folder, tmp_path / "stopped", SEEDS[1:2], stop=2, max_steps=3, **FULL)
    resumed = train(folder, tmp_path / "stopped", SEEDS[1:2], resume=True, max_steps=3, **FULL)
    for key, tensor in load_file(alone.adapter_path(42) / "model.safetensors").items():
        assert relative(found[key], tensor) < SAME
        for other in (passes, resumed):
            assert torch.equal(load_file(other.adapter_path(42) / "model.safetensors")[key], tensor), key


def test_copies_start_at_the_files_where_the_base_is_rounded(tiny_llama, tmp_path):
    """Or the rounding of the base would be merged as if it had been learnt."""
    options = FULL | {"learning_rate": 1e-9, "dtype": "bfloat16"}
    callback = train(tiny_llama, tmp_path, [42], max_steps=1, **options)
    found = plain_model(callback.adapter_path(42)).state_dict()
    for key, tensor in plain_model(tiny_llama).state_dict().items():
        torch.testing.assert_close(found[key], tensor, atol=1e-7, rtol=0)


@pytest.fixture(scope="module")
def whole_run(tiny_llama, tmp_path_factory):
    """A run of whole models, merged by SeedLoRA, with TIES beside it; what it scored."""
    folder = tmp_path_factory.mktemp("whole")
    callback = SeedEnsembleCallback(SEEDS, dirpath=folder, budget="full", compare="ties")
    module, data = make_module(tiny_llama, **FULL), make_data()
    while callback.pending:
        trainer = pl.Trainer(max_steps=3, callbacks=[callback], accelerator="cpu", num_sanity_val_steps=0, **SILENT)
        trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return callback, module, data


def test_whole_models_are_fused_by_the_rule_on_what_training_added(tiny_llama, whole_run):
    callback, *_ = whole_run
    before = plain_model(tiny_llama).state_dict()
    seeds = [plain_model(callback.adapter_path(seed)).state_dict() for seed in SEEDS]
    fused, soup = (plain_model(callback.dirpath / name).state_dict() for name in ("fused", "soup"))
    for key, start in before.items():
        added = torch.stack([seed[key] - start for seed in seeds]).double()
        mean = added.mean(0)
        torch.testing.assert_close(soup[key], (start + mean).float(), atol=1e-6, rtol=1e-5)
        if start.ndim == 2:
            sigma = added.flatten(1).std(1, correction=0).mean()
            wanted = sigma * (mean - mean.mean()) / mean.std(correction=0) + added.mean((1, 2)).mean()
            assert relative(fused[key].double() - start, wanted) < 1e-3, key
            assert relative(fused[key].double() - start, mean) > 1e-2, key
        else:
            torch.testing.assert_close(fused[key], soup[key])
    record = json.loads((callback.fused_path / "fusion.json").read_text())
    assert record["averaged"] == ["input_layernorm", "norm", "post_attention_layernorm"]
    card = (callback.fused_path / "README.md").read_text()
    assert "3 models merged with `seedlora`" in card
    assert "averaged: `input_layernorm`" in card
    assert f"--method seedlora --into-base {tiny_llama}" in card
    assert "**this model**" in card
    assert "rank of a seed" not in card


def test_whole_models_are_scored_as_their_folders_answer(whole_run):
    callback, module, data = whole_run
    scores = callback.results.scores
    assert list(scores) == ["base", "seed_11", "seed_42", "seed_202", "soup", "ties", "fused"]
    sample = json.loads((callback.dirpath / "results.json").read_text())["train_sample"]
    assert list(sample["losses"]) == list(scores)
    answers = plain_model(callback.fused_path)
    correct, losses, tokens = [], 0.0, 0
    for batch in data.train_sample(sample["rows"]):
        with torch.no_grad():
            logits = answers(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        losses += float(cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum", ignore_index=-100))
        tokens += int((batch["labels"][:, 1:] != -100).sum())
    assert sample["losses"]["fused"]["value"] == pytest.approx(losses / tokens, rel=1e-4)
    for batch in data.test_dataloader():
        predicted = answers(input_ids=batch["input_ids"]).logits[:, :-1].argmax(-1)
        labels = batch["labels"][:, 1:]
        right = ((predicted == labels) | (labels == -100)).all(1)
        correct += right[batch["items"] >= 0].tolist()
    assert scores["fused"].value == pytest.approx(sum(correct) / len(correct))
    load_updates(module.stack, "fused", WholeModels(module.stack, module.options).read(callback.fused_path))
    module.stack.route([None, "fused"])
    with torch.no_grad():
        rows = torch.cat([ROWS, ROWS])
        torch.testing.assert_close(module.model(input_ids=rows).logits[6:], answers(input_ids=ROWS).logits)


def test_whole_models_trained_elsewhere_go_through_merge(tiny_llama, whole_run, tmp_path, capsys):
    callback, *_ = whole_run
    models = [str(callback.adapter_path(seed)) for seed in SEEDS]
    assert main(["merge", *models, "--out", str(tmp_path / "no")]) == 2
    assert "seed_11 is a whole model and no adapter; python -m seedlora merge merges such models by --into-base" in (
        capsys.readouterr().err
    )
    assert main(["merge", *models, "--into-base", tiny_llama, "--out", str(tmp_path / "out")]) == 0
    found, expected = (plain_model(folder).state_dict() for folder in (tmp_path / "out", callback.fused_path))
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    for options, message in (
        (["--method", "tsv_m"], "works on the factors"),
        (["--rank", "4"], "rank 4 is for adapters"),
    ):
        assert main(["merge", *models, "--into-base", tiny_llama, "--out", str(tmp_path / "no"), *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"quantization": "nf4"},
            "model.adapter full trains every weight in full, to which model.quantization nf4 does",
        ),
        ({"lora_plus_ratio": 4.0}, "model.lora_plus_ratio 4.0 does not apply"),
        ({"modules_to_save": ["norm"]}, "model.modules_to_save .'norm'. does not apply"),
        ({"lora_dropout": 0.1}, "model.lora_dropout 0.1 does not apply"),
        ({"r": 16}, "model.r 16 does not apply"),
        ({"lora_alpha": 32}, "model.lora_alpha 32 does not apply"),
        ({"target_modules": "all-linear"}, "model.target_modules all-linear does not apply"),
    ],
)
def test_options_of_adapters_are_refused_where_there_is_none(tiny_llama, options, message):
    with pytest.raises(ValueError, match=message):
        make_module(tiny_llama, **{**FULL, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"merge": "auto"},
            "--merge auto chooses among merges of the seeds' factors, and what model.adapter full adds",
        ),
        ({"controls": "untrained"}, "ensemble.controls chooses among"),
        ({"merge": "tsv_m"}, "'tsv_m' works on the factors of adapters.*choose one of seedlora, .*soup"),
        ({"compare": "knots_ties"}, "'knots_ties' works on the factors"),
        ({"vary": "init"}, "with model.adapter full all seeds start at the same weights"),
    ],
)
def test_what_an_ensemble_of_whole_models_cannot_do_is_refused(tiny_llama, tmp_path, options, message):
    callback = SeedEnsembleCallback(SEEDS, dirpath=tmp_path, budget="full", **options)
    with pytest.raises(ValueError, match=message):
        trainer = pl.Trainer(max_epochs=1, callbacks=[callback], **SILENT)
        trainer.fit(make_module(tiny_llama, **FULL), datamodule=make_data())


def test_the_plan_of_whole_models(tiny_llama):
    module = make_module(tiny_llama, **FULL, dtype="bfloat16")
    parameters = sum(p.numel() for p in plain_model(tiny_llama).parameters())
    assert trainable_parameters(module.options) == parameters
    size = {"tokens": 100, "supervised": 50, "longest": 10}
    one, two = (step_memory(module.options, n, **size) for n in (1, 2))
    assert one.base == 2 * parameters
    assert one.adapters == one.optimizer == two.adapters - one.adapters == 8 * parameters
    assert two.activations - one.activations == 2 * parameters
    assert work(module.options).operations(tokens=1, scored=0) == 6 * sum(d * k for d, k in module_shapes(tiny_llama))


def module_shapes(folder):
    return [layer.weight.shape for name, layer in plain_model(folder).named_modules() if "proj" in name]
