"""Adapters merged into the weights of a base model: whole, tied, transposed, quantised, and what does not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from seedlora.adapters.adapter import AdapterError
from seedlora.adapters.reading import read_adapter
from seedlora.adapters.servers import base_shapes
from seedlora.cli.main import main
from seedlora.merge.inputs import read_adapters, stack_adapters
from seedlora.merge.into_base import merge_into_base
from seedlora.model.weight_files import WeightFiles
from seedlora.names import FUSION_NAME
from tests.helpers import reference as ref
from tests.helpers.adapter_folders import PLAIN_KINDS, SEVEN, merged_weights, save_adapter, small_gpt2, small_llama
from tests.helpers.adapter_kinds import PLAIN, load_base, move_trained, one_layer_llama
from tests.helpers.full_modules import save_replica
from tests.helpers.models import SEEDS, moved_in_all
from tests.helpers.precision import plain_model


def test_into_base_is_what_peft_merges(plain_folders, plain_base, tmp_path):
    words = ["merge", *plain_folders, "--method", "soup", "--out", str(tmp_path / "o"), "--into_base", str(plain_base)]
    assert main(words) == 0
    before = small_llama().state_dict()
    added = []
    for seed in (11, 42, 202):
        one = merged_weights(save_adapter(tmp_path / "x", seed=seed, r=2, lora_alpha=6, target_modules=SEVEN))
        added.append({key: one[key] - before[key] for key in before})
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "o").state_dict()
    for key in before:
        assert torch.allclose(found[key], before[key] + ref.mean([a[key] for a in added]), atol=1e-4)
    names = {f.name for f in plain_base.iterdir()}
    assert names | {FUSION_NAME, "README.md"} == {f.name for f in (tmp_path / "o").iterdir()}


def test_dense_rules_go_into_the_base_exactly(plain_folders, plain_base, tmp_path):
    merge_into_base(plain_folders, plain_base, tmp_path / "o", method="ties")
    stacks = stack_adapters(read_adapters(plain_folders))
    path = "model.layers.1.mlp.down_proj"
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "o").state_dict()[f"{path}.weight"]
    wanted = ref.ties(list(stacks[path].dense().double()))
    assert torch.allclose(found.double(), small_llama().state_dict()[f"{path}.weight"] + wanted, atol=1e-5)
    assert "compression" not in json.loads((tmp_path / "o" / FUSION_NAME).read_text())
    merge_into_base(plain_folders, plain_base, tmp_path / "o", method="ties", options={"rank": 3})
    assert "compression" in json.loads((tmp_path / "o" / FUSION_NAME).read_text())


@pytest.mark.parametrize("kind", ["conv1d", "head and embedding"])
def test_into_base_of_transposed_weights(kind, tmp_path):
    make, config = PLAIN_KINDS[kind]
    make().save_pretrained(tmp_path / "base")
    one = merged_weights(save_adapter(tmp_path / "a", make, **config))
    merge_into_base([tmp_path / "a"], tmp_path / "base", tmp_path / "o", method="soup")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "o").state_dict()
    for key, wanted in one.items():
        assert torch.allclose(found[key], wanted, atol=1e-4), key


def test_into_base_refuses_what_does_not_fit(plain_folders, plain_base, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    save_file({"a": torch.ones(1)}, tmp_path / "q" / "model.safetensors")
    with pytest.raises(ValueError, match="is quantised"):
        merge_into_base(plain_folders, tmp_path / "q", tmp_path / "o")
    (tmp_path / "q" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight for the adapted layer"):
        merge_into_base(plain_folders, tmp_path / "q", tmp_path / "o")
    small_gpt2().save_pretrained(tmp_path / "g")
    with pytest.raises(
        AdapterError, match="14 of 14 layers. is no layer of the base model .*, which has no layer of that"
    ):
        merge_into_base(plain_folders, tmp_path / "g", tmp_path / "o")
    with pytest.raises(ValueError, match="the output .* is .*, which would be deleted"):
        merge_into_base(plain_folders, plain_base, plain_base)
    assert not (tmp_path / "o").exists()


def test_shards_keep_their_metadata_and_dtype(plain_folders, tmp_path):
    small_llama().bfloat16().save_pretrained(tmp_path / "b")
    merge_into_base(plain_folders, tmp_path / "b", tmp_path / "o")
    with safe_open(tmp_path / "o" / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
        assert {handle.get_tensor(key).dtype for key in handle.keys()} == {torch.bfloat16}  # noqa: SIM118


LAYERS = {"layers": "up_proj", "rest": "nothing"}


def in_bits(base, folder, **options):
    """A base model as bitsandbytes stores it."""
    pytest.importorskip("bitsandbytes")
    if "load_in_8bit" not in options:
        options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32, **options}
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}, dtype=torch.float32
    )
    model.save_pretrained(folder)
    return folder, model


def test_loftq_s_adapters_do_not_go_into_another_base(adapters_of, loftq, tmp_path):
    base = adapters_of("lora").base
    with pytest.raises(AdapterError, match="belongs on the base model in nf4 alone.* is not quantised; give a folder"):
        merge_into_base([loftq], base, tmp_path / "out")
    for bits, options in {"int8": {"load_in_8bit": True}, "fp4": {"bnb_4bit_quant_type": "fp4"}}.items():
        folder, _ = in_bits(base, tmp_path / bits, **options)
        with pytest.raises(AdapterError, match=f"belongs on the base model in nf4 alone.* is in {bits}; give a folder"):
            merge_into_base([loftq], folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_loftq_s_adapters_go_into_the_base_in_nf4(adapters_of, loftq, tmp_path):
    folder, model = in_bits(adapters_of("lora").base, tmp_path / "nf4", bnb_4bit_quant_type="nf4")
    merge_into_base([loftq], folder, tmp_path / "out", method="soup")
    found = load_base(tmp_path / "out").state_dict()
    for path, factors in read_adapter(loftq).layers.items():
        wanted = dequantize_module_weight(model.get_submodule(path)).double() + factors.dense()[0].double()
        torch.testing.assert_close(found[f"{path}.weight"].double(), wanted, atol=1e-5, rtol=1e-5)


def test_biases_need_a_place_in_the_base(edited_copy, adapters_of, tmp_path):
    one_layer_llama().save_pretrained(tmp_path / "without")
    with pytest.raises(AdapterError, match="has no bias in the base model"):
        merge_into_base([edited_copy("lora_bias")], tmp_path / "without", tmp_path / "out")


def test_resized_vocabularies_do_not_go_into_the_base(adapters_of, edited_copy, tmp_path):
    def longer(tensors):
        key = "base_model.model.lm_head.weight"
        tensors[key] = torch.cat([tensors[key], tensors[key][:1]])

    with pytest.raises(AdapterError, match="was its vocabulary resized"):
        merge_into_base([edited_copy("modules_to_save", longer)], adapters_of("modules_to_save").base, tmp_path / "out")


@pytest.mark.parametrize("targets", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
@pytest.mark.parametrize("said", [{"tie_word_embeddings": True}, {}, {"text_config": {"tie_word_embeddings": True}}])
def test_a_tied_base_is_not_changed_twice(targets, said, tmp_path):
    """The adapter's update is of the embedding alone; in the base's one matrix it would be of the head as well."""
    config = LlamaConfig(**(one_layer_llama().config.to_dict() | {"tie_word_embeddings": True}))
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    entries = json.loads(file.read_text())
    assert entries.pop("tie_word_embeddings")
    file.write_text(json.dumps(entries | said))
    model = get_peft_model(base, LoraConfig(**(PLAIN | targets), task_type="CAUSAL_LM"))
    move_trained(model, 1)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="what is added to model.embed_tokens.* would change both"):
        merge_into_base([tmp_path / "a"], tmp_path / "base", tmp_path / "out", method="soup")
    weights = tmp_path / "base" / "model.safetensors"
    both = {"lm_head.weight": torch.zeros(32, 16)} | load_file(weights)
    save_file(both, weights, metadata={"format": "pt"})
    file.write_text(json.dumps(entries | {"tie_word_embeddings": False}))
    merge_into_base([tmp_path / "a"], tmp_path / "base", tmp_path / "out", method="soup")
    assert not load_base(tmp_path / "out").lm_head.weight.any()


@pytest.mark.parametrize("bits", ["nf4", "nested nf4", "int8"])
def test_a_quantised_base_is_dequantised(bits, adapters_of, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    case = adapters_of("dora")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    options = {"load_in_8bit": True} if bits == "int8" else four | {"bnb_4bit_use_double_quant": bits != "nf4"}
    quantised = AutoModelForCausalLM.from_pretrained(
        case.base, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}, dtype=torch.float32
    )
    quantised.save_pretrained(tmp_path / "q", max_shard_size="2KB")
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 2
    assert "quantization_config" in json.loads((tmp_path / "q" / "config.json").read_text())
    assert base_shapes(tmp_path / "q") == base_shapes(case.base)
    weights = WeightFiles(tmp_path / "q")
    dense = {
        f"{name}.weight": dequantize_module_weight(module).float()
        for name, module in quantised.named_modules()
        if getattr(module, "weight", None) is not None
    }
    words = ["merge", *map(str, case.folders), "--method", "soup", "--out", str(tmp_path / "o")]
    assert main([*words, "--into_base", str(tmp_path / "q")]) == 0
    assert "the base model was stored quantised by bitsandbytes; the result is dequantised" in capsys.readouterr().out
    found = load_base(tmp_path / "o").state_dict()
    for key, weight in dense.items():
        path = key.removesuffix(".weight")
        wanted = weight.double()
        if any(path.endswith(name) for name in SEVEN):
            updates = []
            for adapter in (read_adapter(folder, base=weights) for folder in case.folders):
                row = wanted + adapter.layers[path].dense()[0].double()
                scale = adapter.magnitudes[path].double()[:, None] / row.norm(dim=1, keepdim=True)
                updates.append(scale * row - wanted)
            wanted = wanted + sum(updates) / 3
        torch.testing.assert_close(found[key].double(), wanted, atol=1e-5, rtol=1e-5)


def test_an_int8_base_comes_out_as_it_was_made(adapters_of, tmp_path):
    """In bfloat16, rounded once: half the size of the float32 in which int8 is dequantised."""
    pytest.importorskip("bitsandbytes")
    case, config = adapters_of("lora"), BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(
        case.base, quantization_config=config, device_map={"": "cpu"}, dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "q")
    merge_into_base(case.folders[:1], tmp_path / "q", tmp_path / "out", method="soup", options=LAYERS)
    found, weights = load_file(tmp_path / "out" / "model.safetensors"), WeightFiles(tmp_path / "q")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    update = read_adapter(case.folders[0]).layers["model.layers.0.mlp.up_proj"].dense()[0]
    for name, added in (("up_proj", update), ("down_proj", torch.zeros(()))):
        key = f"model.layers.0.mlp.{name}.weight"
        torch.testing.assert_close(found[key], (weights.weight(key) + added).bfloat16(), atol=0, rtol=0)


def test_other_quantisations_are_refused(adapters_of, tmp_path):
    shutil.copytree(adapters_of("lora").base, tmp_path / "q")
    file = tmp_path / "q" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="is quantised by gptq; only bitsandbytes can be undone"):
        merge_into_base(adapters_of("lora").folders, tmp_path / "q", tmp_path / "out")


@torch.no_grad()
def test_a_tied_head_goes_into_the_base_as_the_embedding_it_is(families, tmp_path):
    folder = str(families / "gemma")
    module = moved_in_all(folder, *SEEDS[:2], modules_to_save=["embed_tokens"])
    for seed in SEEDS[:2]:
        save_replica(module, f"seed_{seed}", tmp_path / str(seed))
    merge_into_base([tmp_path / str(seed) for seed in SEEDS[:2]], folder, tmp_path / "whole", method="soup")
    found, expected = plain_model(tmp_path / "whole"), plain_model(folder)
    weights = [load_file(tmp_path / str(seed) / "adapter_model.safetensors") for seed in SEEDS[:2]]
    key = "base_model.model.model.embed_tokens.weight"
    torch.testing.assert_close(found.lm_head.weight, (weights[0][key] + weights[1][key]) / 2)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert not torch.equal(found.lm_head.weight, expected.lm_head.weight)


def test_the_head_of_a_classifier_is_named(adapters_of, tmp_path):
    base = adapters_of("lora").base
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.save_pretrained(tmp_path / "with head")
    get_peft_model(model, LoraConfig(**PLAIN, task_type="SEQ_CLS")).save_pretrained(tmp_path / "a")
    said = (
        "the adapters are for SEQ_CLS and hold its head, score.weight, .* load the result by AutoPeftModelForSequence"
    )
    with pytest.raises(AdapterError, match=said):
        merge_into_base([tmp_path / "a"], base, tmp_path / "out", method="soup")
    merge_into_base([tmp_path / "a"], tmp_path / "with head", tmp_path / "out", method="soup")
    assert load_file(tmp_path / "out" / "model.safetensors")["score.weight"].shape == (3, 16)
