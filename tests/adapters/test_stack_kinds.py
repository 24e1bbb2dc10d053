"""Every kind of adapter, stacked: PEFT's own forward is the reference, one adapter at a time."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GemmaConfig,
    GPT2Config,
    MistralConfig,
    Qwen2Config,
)
from transformers.pytorch_utils import Conv1D

from seedlora.adapters.reading import read_adapter
from seedlora.adapters.stack import AdapterStack
from seedlora.adapters.writing import write_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.distributed.strategies import choose_strategy, prepare_strategy
from seedlora.merge.adapter_folders import merge_folders
from seedlora.model.quantization import dequantized_weight, quantize_layer
from seedlora.model.weight_files import WeightFiles
from seedlora.run.memory import trainable_parameters
from seedlora.training.model_options import PROJECTIONS
from seedlora.training.replicas import FitSettings
from tests.adapters.test_stack import ROWS, SEEDS
from tests.helpers.models import built, make_data, make_module, replicas
from tests.helpers.precision import SAME, plain_model
from tests.training.test_module import OPTIONS, plain_peft_run

KINDS = [
    ("lora", "none"),
    ("rslora", "none"),
    ("dora", "none"),
    ("pissa", "none"),
    ("lora", "nf4"),
    ("lora", "int8"),
    ("dora", "nf4"),
    ("dora", "int8"),
    ("pissa", "nf4"),
    ("loftq", "nf4"),
]


def moved(base_model, *seeds, **options):
    """A module whose adapters, magnitudes included, are away from where they start."""
    module = built(base_model, *seeds, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.mul_(1 + 0.2 * noise) if "magnitude" in name else parameter.data.add_(0.05 * noise)
    return module


def peft_model(module, name):
    """A PEFT model of its own with one adapter of the module, whole weights as its layers multiply by them as base.

    PiSSA's base is the residual.
    """
    base = plain_model(module.options.base_path)
    config = module.options.lora_config()
    config.fan_in_fan_out = module.options.saved_config().fan_in_fan_out
    model = get_peft_model(base, config, adapter_name=name)
    with torch.no_grad():
        for path, layer in module.stack.layers.items():
            theirs = model.get_base_model().get_submodule(path)
            weight = weight_of(layer.base_layer)
            if layer.stack_start is not None and layer.stack_start.frozen_block_of == "own":
                weight = weight - layer.scaling[name] * layer.stack_start.B @ layer.stack_start.A
            theirs.base_layer.weight.copy_(weight.T if theirs.fan_in_fan_out else weight)
            for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
                if name in getattr(layer, part):
                    getattr(theirs, part)[name].weight.copy_(getattr(layer, part)[name].weight)
    return model


def weight_of(layer):
    """The weights (D, K) that a layer multiplies by, whatever it keeps."""
    width = layer.nx if isinstance(layer, Conv1D) else layer.in_features
    columns = layer(torch.eye(width))
    return (columns if layer.bias is None else columns - layer.bias).T


def close(adapter, quantization):
    """How closely: DoRA's norms of int8 weights take bitsandbytes' constant for 1/127, which is off by 4e-9 of it."""
    near = 1e-8 if (adapter, quantization) == ("dora", "int8") else SAME
    return {"atol": near, "rtol": near}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("adapter", "quantization"), KINDS)
@torch.no_grad()
def test_each_block_of_rows_goes_through_its_own_adapter(tiny_llama, adapter, quantization):
    module = moved(tiny_llama, *SEEDS, adapter=adapter, quantization=quantization)
    names = ["seed_202", None, "seed_11"]
    module.stack.route(names)
    stacked = module.model(input_ids=ROWS).logits
    for name, rows, logits in zip(names, ROWS.chunk(3), stacked.chunk(3), strict=True):
        if name is not None:
            expected = peft_model(module, name)(input_ids=rows).logits
            torch.testing.assert_close(logits, expected, **close(adapter, quantization))


class StopAfter(pl.Callback):
    """Ends the run without warning after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise TimeoutError


def train(base_model, dirpath, seeds, *, stack_size=None, max_steps=-1, stop=None, resume=False, **options):
    """Train to the end without merging, in as many fits as there are stacks."""
    callback = SeedEnsembleCallback(
        seeds,
        dirpath=dirpath,
        merge="none",
        budget="full",
        stack_size=stack_size,
        checkpoint_every_n_steps=1,
        resume=resume,
    )
    module, data = make_module(base_model, **options), make_data()
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    while callback.pending:
        trainer = pl.Trainer(
            max_epochs=1,
            max_steps=max_steps,
            callbacks=[callback, *([] if stop is None else [StopAfter(stop)])],
            accelerator="cpu",
            limit_val_batches=0,
            **silent,
            **OPTIONS,
        )
        trainer.fit(module, datamodule=data, ckpt_path=callback.ckpt_path, weights_only=True)
    return callback


def saved(folder):
    return load_file(folder / "adapter_model.safetensors")


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def plain(adapter, quantization):
    """The base model as transformers quantises it, and PEFT's configuration."""

    def adapt(base_model):
        double = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"}
        quantised = {
            "none": lambda: None,
            "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, **double),
            "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        }[quantization]()
        model = plain_model(base_model, quantization_config=quantised, device_map={"": "cpu"})
        flags = {"use_rslora": adapter == "rslora", "use_dora": adapter == "dora"}
        return model, LoraConfig(r=4, lora_alpha=12, target_modules=list(PROJECTIONS), **flags)

    return adapt


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("adapter", "quantization"), [*KINDS[1:3], *KINDS[4:6]])
def test_a_replica_equals_a_plain_peft_loop(tiny_llama, tmp_path, adapter, quantization):
    options = {"adapter": adapter, "quantization": quantization, "lora_plus_ratio": 4.0}
    callback = train(tiny_llama, tmp_path, SEEDS[:2], **options)
    ours = saved(callback.adapter_path(42))
    expected = plain_peft_run(
        tiny_llama, 42, epochs=1, accumulate=2, clip=0.05, ratio=4.0, adapt=plain(adapter, quantization)
    )
    assert set(ours) == set(expected)
    assert {"dora": 1}.get(adapter, 0) == any("magnitude" in key for key in ours)
    for key, tensor in expected.items():
        assert relative(ours[key], tensor) < SAME, key


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("adapter", "quantization"), [*KINDS[1:5], *KINDS[7:]])
def test_a_replica_of_a_stack_equals_its_standalone_run(tiny_llama, tmp_path, adapter, quantization):
    options = {"adapter": adapter, "quantization": quantization, "lora_dropout": 0.1, "max_steps": 3}
    stacked = train(tiny_llama, tmp_path / "stack", SEEDS[:2], **options)
    alone = train(tiny_llama, tmp_path / "alone", SEEDS[1:2], **options)
    expected = saved(alone.adapter_path(42))
    for key, tensor in expected.items():
        assert relative(saved(stacked.adapter_path(42))[key], tensor) < SAME, key
        assert relative(saved(stacked.adapter_path(11))[key], tensor) > 1e-3, key


@pytest.mark.parametrize(("adapter", "quantization"), [("dora", "int8"), ("pissa", "nf4")])
def test_passes_give_the_bits_of_standalone_runs(tiny_llama, tmp_path, adapter, quantization):
    """Also the second pass, on a base that is quantised already and whose starts are known."""
    options = {"adapter": adapter, "quantization": quantization, "lora_dropout": 0.1, "max_steps": 3}
    passes = train(tiny_llama, tmp_path / "passes", SEEDS[:2], stack_size=1, **options)
    alone = train(tiny_llama, tmp_path / "alone", SEEDS[1:2], **options)
    found = saved(passes.adapter_path(42))
    assert all(torch.equal(found[key], tensor) for key, tensor in saved(alone.adapter_path(42)).items())


@pytest.mark.parametrize(
    ("adapter", "quantization", "ratio"),
    [
        ("dora", "nf4", 1.0),
        ("pissa", "none", 1.0),
        ("loftq", "nf4", 1.0),
        ("lora", "int8", 1.0),
        ("rslora", "none", 16.0),
    ],
)
def test_a_run_that_stopped_resumes_to_the_same_bits(tiny_llama, tmp_path, adapter, quantization, ratio):
    options = {"adapter": adapter, "quantization": quantization, "lora_plus_ratio": ratio}
    options |= {"lora_dropout": 0.1, "max_steps": 4}
    whole = train(tiny_llama, tmp_path / "whole", SEEDS[:2], **options)
    with pytest.raises(TimeoutError):
        train(tiny_llama, tmp_path / "stopped", SEEDS[:2], stop=3, **options)
    assert list((tmp_path / "stopped").glob("checkpoints/*/step=3.ckpt"))
    resumed = train(tiny_llama, tmp_path / "stopped", SEEDS[:2], resume=True, **options)
    expected = saved(whole.adapter_path(42))
    assert all(torch.equal(saved(resumed.adapter_path(42))[key], tensor) for key, tensor in expected.items())


@pytest.mark.usefixtures("float64")
def test_dora_is_read_back_scored_and_fused_as_it_acts(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback(SEEDS[:2], dirpath=tmp_path, merge="soup", budget="full")
    module, data = make_module(tiny_llama, adapter="dora"), make_data()
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_steps=2, callbacks=[callback], accelerator="cpu", num_sanity_val_steps=0, **silent)
    trainer.fit(module, datamodule=data)
    assert "val/loss_seed_42" in trainer.callback_metrics
    assert "val/loss_fused" not in trainer.callback_metrics
    trained = {name: tensor.clone() for name, tensor in module.stack.magnitudes("seed_42").items()}
    module.stack.route(["seed_42"])
    expected = module.model(input_ids=ROWS).logits
    for layer in module.stack.layers.values():  # only what was read may be used
        layer.lora_magnitude_vector["seed_42"].weight.data.fill_(7)
    trainer.test(module, datamodule=data, verbose=False)
    assert list(callback.results.scores) == ["base", "seed_11", "seed_42", "soup"]
    module.stack.route(["seed_42"])
    torch.testing.assert_close(module.model(input_ids=ROWS).logits, expected, atol=SAME, rtol=SAME)
    base = WeightFiles(tiny_llama)
    read = read_adapter(tmp_path / "seed_42", base=base).magnitudes
    assert all(torch.equal(magnitude, trained[path]) for path, magnitude in read.items())
    assert read_adapter(tmp_path / "fused").layers.keys() == trained.keys()
    assert json.loads((tmp_path / "fused" / "fusion.json").read_text())["compression"]["relative_error_max"] < 0.5


def test_cards_say_what_base_an_adapter_belongs_to(tiny_llama, tmp_path):
    callback = train(tiny_llama, tmp_path, SEEDS[:2], adapter="loftq", quantization="nf4", max_steps=1)
    wanted = "belongs on the base model in nf4, not on the original"
    assert wanted in (callback.adapter_path(42) / "README.md").read_text()
    merge_folders([callback.adapter_path(seed) for seed in SEEDS[:2]], tmp_path / "fused")
    assert wanted in (tmp_path / "fused" / "README.md").read_text()


def test_a_row_of_zeros_does_not_spoil_dora(tiny_llama):
    module = make_module(tiny_llama, adapter="dora")
    module.setup("fit")
    layer = next(iter(module.stack.layers.values()))
    layer.base_layer.weight.data[3] = 0
    stack = AdapterStack(module.model)
    stack.route(["seed_42"])
    module.model(input_ids=ROWS).logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in stack.parameters("seed_42"))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("adapter", "quantization"), [pair for pair in KINDS if pair != ("pissa", "nf4")])
@torch.no_grad()
def test_peft_loads_what_is_saved_to_the_same_logits(tiny_llama, tmp_path, adapter, quantization):
    """On the original base, or on what transformers quantises it to: LoftQ's folder too is for that one."""
    module = moved(tiny_llama, *SEEDS, adapter=adapter, quantization=quantization)
    stack = module.stack
    write_adapter(
        tmp_path, stack.stored_factors("seed_42"), module.options.saved_config(), magnitudes=stack.magnitudes("seed_42")
    )
    model = PeftModel.from_pretrained(plain(adapter, quantization)(tiny_llama)[0], tmp_path).train()
    stack.route(["seed_42"])
    ours = module.model(input_ids=ROWS).logits
    torch.testing.assert_close(ours, model(input_ids=ROWS).logits, **close(adapter, quantization))
    stack.route([None])
    assert not torch.allclose(ours, module.model(input_ids=ROWS).logits, atol=1e-2)


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_the_base_model_of_pissa_is_the_original_bit_for_bit(tiny_llama):
    module = make_module(tiny_llama, adapter="pissa")
    module.setup("fit")
    original = plain_model(tiny_llama)(input_ids=ROWS).logits
    module.stack.route([None])
    assert torch.equal(module.model(input_ids=ROWS).logits, original)
    module.stack.route(["seed_42"])
    torch.testing.assert_close(module.model(input_ids=ROWS).logits, original, atol=SAME, rtol=SAME)
    for path, factors in module.stack.factors(["seed_42"]).items():
        assert factors.rank == 8
        assert factors.dense().abs().max() < 1e-6, path


@torch.no_grad()
def test_pissa_starts_at_the_best_approximation_of_a_weight(tiny_llama):
    module = make_module(tiny_llama, adapter="pissa")
    module.setup("fit")
    for layer in module.stack.layers.values():
        w = layer.base_layer.weight
        rest = w - layer.scaling["seed_42"] * layer.stack_start.B @ layer.stack_start.A
        best = torch.linalg.svdvals(w)[4:].norm()
        assert best * 0.9999 < rest.norm() < best * 1.01


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("adapter", ["pissa", "loftq"])
@torch.no_grad()
def test_starts_on_a_4_bit_base_lose_less_than_the_base_alone(tiny_llama, adapter):
    """And what is loaded, or is no adapter, has PiSSA's start beside it, because the layer holds the residual."""
    module = make_module(tiny_llama, adapter=adapter, quantization="nf4")
    module.prepare_fit(FitSettings(replicas(11, 42)))
    module.setup("fit")
    original = plain_model(tiny_llama)
    lost = torch.zeros(2)
    for path, layer in module.stack.layers.items():
        w = original.get_submodule(path).weight
        start = layer.scaling["seed_42"] * layer.stack_start.B @ layer.stack_start.A
        alone = dequantized_weight(quantize_layer(original.get_submodule(path), "nf4"))
        lost += torch.stack(
            [(dequantized_weight(layer.base_layer) + start - w).square().sum(), (alone - w).square().sum()]
        )
        assert torch.equal(layer.lora_A["seed_11"].weight, layer.lora_A["seed_42"].weight)
    assert lost[0] < 0.95 * lost[1]
    module.stack.load("copy", module.stack.factors(["seed_42"]))
    outputs = []
    for name in ("copy", "seed_42", None):
        module.stack.route([name])
        outputs.append(module.model(input_ids=ROWS).logits)
    torch.testing.assert_close(outputs[0], outputs[1], atol=SAME, rtol=SAME)
    # PiSSA starts at its base; LoftQ starts closer to the original than the 4-bit base is
    assert torch.allclose(outputs[1], outputs[2], atol=1e-5) == (adapter == "pissa")


FAMILIES = {
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 4}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "gemma": (GemmaConfig, {"num_key_value_heads": 1, "head_dim": 8}),
    "gpt2": (GPT2Config, {}),
}


@pytest.fixture(scope="module")
def families(tiny_llama, tmp_path_factory):
    """The folder of a tiny random model of each family, all with the same tokenizer."""
    root = tmp_path_factory.mktemp("families")
    size = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    for name, (kind, options) in FAMILIES.items():
        inner = {} if name == "gpt2" else {"intermediate_size": 48}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(kind(**size, **inner, **tokens, **options))
            for bias in (p for key, p in model.named_parameters() if key.endswith("bias")):
                bias.data.normal_(std=0.1)  # they start at zero, and would hide a mistake
        model.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(root / name)
    return root


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_each_family_trains_stacked_as_alone(families, tmp_path, family, adapter):
    options = {"adapter": adapter, "lora_dropout": 0.1, "target_modules": "all-linear"}
    base = str(families / family)
    stacked = train(base, tmp_path / "stack", SEEDS[:2], max_steps=2, **options)
    alone = train(base, tmp_path / "alone", SEEDS[1:2], max_steps=2, **options)
    tensors, expected = (saved(run.adapter_path(42)) for run in (stacked, alone))
    assert max(relative(tensors[key], tensor) for key, tensor in expected.items()) < SAME
    assert all(tensor.norm() > 0 for tensor in expected.values())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@torch.no_grad()
def test_dora_on_layers_with_biases_and_on_conv1d_is_peft_s(families, family, quantization):
    module = moved(str(families / family), 42, adapter="dora", target_modules="all-linear", quantization=quantization)
    module.stack.route(["seed_42"])
    logits = module.model(input_ids=ROWS).logits
    expected = peft_model(module, "seed_42")(input_ids=ROWS).logits
    torch.testing.assert_close(logits, expected, **close("dora", quantization))


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_patterns_of_rank_and_alpha_are_peft_s(tiny_llama, tmp_path):
    module = moved(
        tiny_llama,
        *SEEDS,
        adapter="pissa",
        target_modules=r".*\.(q_proj|down_proj)",
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 5},
    )
    module.options.check()
    assert {path.rpartition(".")[2] for path in module.stack.layers} == {"q_proj", "down_proj"}
    write_adapter(tmp_path, module.stack.stored_factors("seed_11"), module.options.saved_config())
    model = PeftModel.from_pretrained(plain("lora", "none")(tiny_llama)[0], tmp_path)
    module.stack.route(["seed_11"])
    logits = module.model(input_ids=ROWS).logits
    torch.testing.assert_close(logits, model(input_ids=ROWS).logits, atol=SAME, rtol=SAME)
    ranks = {path: factors.rank for path, factors in read_adapter(tmp_path).layers.items()}
    assert ranks["model.layers.1.self_attn.q_proj"] == 4
    assert ranks["model.layers.0.self_attn.q_proj"] == 8
    factors = module.stack.factors(["seed_11", "seed_42"])
    assert factors["model.layers.1.self_attn.q_proj"].rank == 4
    trained = sum(p.numel() for p in module.stack.parameters("seed_11"))
    assert trained == trainable_parameters(module.options)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_the_plan_counts_what_is_trained(tiny_llama, adapter):
    module = built(tiny_llama, 42, adapter=adapter)
    assert sum(p.numel() for p in module.stack.parameters("seed_42")) == trainable_parameters(module.options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "lokr"}, "Unknown model.adapter 'lokr'; choose one of lora, rslora, dora, pissa, loftq"),
        ({"quantization": "fp4"}, "Unknown model.quantization 'fp4'; choose one of none, nf4, int8"),
        ({"adapter": "loftq"}, "model.adapter loftq starts at what nf4 loses; set model.quantization nf4, got none"),
        ({"adapter": "loftq", "quantization": "int8"}, "set model.quantization nf4, got int8"),
        ({"adapter": "pissa", "quantization": "int8"}, "pissa goes with model.quantization none or nf4, got int8"),
        ({"rank_pattern": {"q_proj": 0}}, "model.rank_pattern must be at least 1 everywhere, got {'q_proj': 0}"),
        (
            {"target_modules": ["query"]},
            "model.target_modules query: base model .* has no such linear layer; it has down",
        ),
        (
            {"target_modules": "q_proj"},
            "'q_proj' matches the whole path of no linear layer, for example model.layers.0",
        ),
        ({"target_modules": "(q"}, r"'\(q' is no regular expression"),
        ({"target_modules": ["lm_head"]}, "lm_head: base model .* has no such linear layer"),
        ({"rank_pattern": {"query": 2}}, "model.rank_pattern: 'query' matches no adapted layer, e.g. model.layers.0"),
        ({"adapter": "pissa", "r": 64}, "model.r 64: pissa takes at most 32 directions of model.layers.0"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_loads(tiny_llama, options, message):
    with pytest.raises(ValueError, match=message):
        make_module(tiny_llama, **options).options.check()


def test_a_missing_bitsandbytes_is_said_at_once(tiny_llama, monkeypatch):
    monkeypatch.setattr("seedlora.model.quantization.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="model.quantization nf4 needs bitsandbytes: pip install 'seedlora.quantization.'"
    ):
        make_module(tiny_llama, quantization="nf4")


def test_a_quantised_base_is_not_split_over_processes(tiny_llama):
    strategy = choose_strategy("deepspeed_stage_3", accelerator="cpu")
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="quantization nf4 and CPUDeepSpeedStrategy.*use ddp or deepspeed_stage_2"):
        prepare_strategy(trainer, quantization="nf4")


def test_the_same_start_and_the_same_order_make_no_ensemble(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="ensemble.vary init.*pissa.*start at the same weights"):
        callback = SeedEnsembleCallback(SEEDS, dirpath=tmp_path, vary="init", budget="full")
        trainer = pl.Trainer(max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False)
        trainer.fit(make_module(tiny_llama, adapter="pissa"), datamodule=make_data())
