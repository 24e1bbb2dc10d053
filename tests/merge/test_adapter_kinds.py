"""Adapters of every kind, trained and saved by PEFT: what we merge them to, and what PEFT's own merge does.

The right answer is independent of our reader: each adapter is merged alone into its base by PEFT, and the base's
original weights are subtracted.
"""

import json
import shutil
from functools import cache

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from seedlora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError
from seedlora.adapters.reading import read_adapter
from seedlora.adapters.servers import base_shapes
from seedlora.cli.main import main
from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.into_base import merge_into_base
from seedlora.merge.registry import make_rule
from seedlora.model.weight_files import WeightFiles
from seedlora.names import FUSION_NAME
from seedlora.selection.choice import soup_of
from seedlora.updates.factors import LoRAFactors

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN = {"r": 4, "lora_alpha": 10, "target_modules": SEVEN}
KINDS = {
    "lora": PLAIN,
    "rslora": PLAIN | {"use_rslora": True},
    "rank_pattern": PLAIN | {"rank_pattern": {"q_proj": 2, "up_proj": 6}},
    "alpha_pattern": PLAIN | {"alpha_pattern": {"v_proj": 3}},
    "dora": PLAIN | {"use_dora": True},
    "dora, rslora": PLAIN | {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "dora, embeddings": PLAIN | {"use_dora": True, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "pissa": PLAIN | {"init_lora_weights": "pissa"},
    "pissa, rslora": PLAIN | {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "olora": PLAIN | {"init_lora_weights": "olora"},
    "dora, pissa": PLAIN | {"use_dora": True, "init_lora_weights": "pissa"},
    "mica": PLAIN | {"init_lora_weights": "mica"},
    "lora_bias": PLAIN | {"lora_bias": True},
    "modules_to_save": PLAIN | {"modules_to_save": ["lm_head", "embed_tokens"]},
    "conv1d": {"r": 4, "lora_alpha": 10, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
}
KINDS["conv1d, dora"] = KINDS["conv1d"] | {"use_dora": True}
KINDS["conv1d, pissa"] = KINDS["conv1d"] | {"init_lora_weights": "pissa"}
KINDS["conv1d, lora_bias"] = KINDS["conv1d"] | {"lora_bias": True}
SEEDS = (1, 2, 3)
LAYERS = {"layers": "up_proj", "rest": "nothing"}


def llama(*, bias=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        attention_bias=bias,
        mlp_bias=bias,
    )
    return LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(model, seed):
    """Move everything that is trained by a random step from where it started."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_B" in name:
            step = torch.randn(parameter.shape, generator=generator)
            scale = 0.1 * parameter.data.abs() if "magnitude" in name else 0.1
            parameter.data = parameter.data + scale * step


class Made:
    """Three adapters of one kind over one base: their folders, and what each adds to the base's weights."""

    def __init__(self, root, kind):
        self.kind, self.base = kind, root / "base"
        make = gpt2 if kind.startswith("conv1d") else lambda: llama(bias=kind == "lora_bias")
        make().save_pretrained(self.base)
        before = {key: value.clone() for key, value in loaded(self.base).state_dict().items()}
        self.before, self.folders, self.added = before, [], []
        for seed in SEEDS:
            model = get_peft_model(loaded(self.base), LoraConfig(**KINDS[kind], task_type="CAUSAL_LM"))
            train(model, seed)
            model.save_pretrained(root / str(seed))
            self.folders.append(root / str(seed))
            merged = model.merge_and_unload().state_dict()
            self.added.append({key: merged[key] - before[key] for key in before})

    @property
    def mean(self):
        return {key: sum(added[key] for added in self.added) / len(self.added) for key in self.before}

    def changed(self, folder):
        """What the model of a folder with an adapter, loaded by PEFT, has become."""
        merged = PeftModel.from_pretrained(loaded(self.base), folder).merge_and_unload().state_dict()
        return {key: merged[key] - self.before[key] for key in self.before}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return cache(lambda kind: Made(tmp_path_factory.mktemp("kind"), kind))


def distance(found, wanted):
    """Relative, over the whole model."""
    difference = sum(float((found[key] - wanted[key]).double().square().sum()) for key in wanted)
    return (difference / sum(float(value.double().square().sum()) for value in wanted.values())) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_fused_to_the_mean_of_what_they_add(kind, made, tmp_path):
    """As an adapter of a rank that holds it all, and in the base's weights."""
    case = made(kind)
    merge_folders(case.folders, tmp_path / "out", method="soup", options={"rank": 32, "svd": "exact"})
    assert distance(case.changed(tmp_path / "out"), case.mean) < 2e-5
    merge_into_base(case.folders, case.base, tmp_path / "full", method="soup")
    full = loaded(tmp_path / "full").state_dict()
    assert distance({key: full[key] - case.before[key] for key in full}, case.mean) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_is_its_own_fusion(kind, made, tmp_path):
    case = made(kind)
    bytes_before = [(folder / WEIGHTS_NAME).read_bytes() for folder in case.folders]
    merge_into_base(case.folders[:1], case.base, tmp_path / "full", method="seedlora")
    full = loaded(tmp_path / "full").state_dict()
    assert distance({key: full[key] - case.before[key] for key in full}, case.added[0]) < 2e-5
    assert bytes_before == [(folder / WEIGHTS_NAME).read_bytes() for folder in case.folders]


@torch.no_grad()
def test_classifiers_stay_classifiers(tmp_path):
    """PEFT saves the head of a classifier beside the factors, and puts it back by the task type alone."""

    def classifier():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**(llama().config.to_dict() | {"pad_token_id": 0})))

    rows, logits = torch.arange(1, 21).view(2, 10), []
    for seed in SEEDS:
        model = get_peft_model(classifier(), LoraConfig(**PLAIN, task_type="SEQ_CLS"))
        train(model, seed)
        model.save_pretrained(tmp_path / str(seed))
        logits.append(model.eval()(input_ids=rows).logits)
    merge_folders([tmp_path / str(SEEDS[0])], tmp_path / "one", method="soup")
    found = PeftModel.from_pretrained(classifier(), tmp_path / "one").eval()(input_ids=rows).logits
    torch.testing.assert_close(found, logits[0], atol=1e-5, rtol=1e-4)
    merge_folders([tmp_path / str(seed) for seed in SEEDS], tmp_path / "all", method="soup")
    assert json.loads((tmp_path / "all" / CONFIG_NAME).read_text())["task_type"] == "SEQ_CLS"
    PeftModel.from_pretrained(classifier(), tmp_path / "all")


@pytest.mark.parametrize(
    ("task", "name"), [("SEQ_CLS", "LlamaForSequenceClassification"), ("CAUSAL_LM", None), (None, "LlamaForCausalLM")]
)
def test_what_is_printed_loads_the_result(task, name, made, tmp_path, capsys):
    base = getattr(transformers, name or "LlamaForCausalLM").from_pretrained(made("lora").base)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    get_peft_model(base, LoraConfig(**PLAIN, task_type=task)).save_pretrained(tmp_path / "a")
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 0
    names = {}
    exec(capsys.readouterr().out.split("<<'PY'\n")[1].split("\nPY")[0], names)
    assert type(names["model"].get_base_model()) is type(base)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rslora", "rank_pattern", "pissa", "olora", "modules_to_save", "lora_bias"])
def test_the_folder_loads_in_peft_with_equal_logits(kind, made, tmp_path):
    case = made(kind)
    merge_folders(case.folders, tmp_path / "out", method="soup")
    dense = loaded(case.base)
    mean = case.mean
    dense.load_state_dict({key: case.before[key] + mean[key] for key in mean})
    rows = torch.arange(20).view(2, 10)
    found = PeftModel.from_pretrained(loaded(case.base), tmp_path / "out")(input_ids=rows).logits
    torch.testing.assert_close(found, dense(input_ids=rows).logits, atol=2e-5, rtol=1e-4)


def paper_formula(updates):
    """Equations 4 and 5 of SeedLoRA on dense updates (N, D, K), as printed."""
    updates = updates.double()
    average = updates.mean(0)
    sigma = updates.flatten(1).std(1).mean()
    return sigma * (average - average.mean()) / average.std() + updates.mean((1, 2)).mean()


@pytest.mark.parametrize("kind", ["dora", "pissa", "conv1d, dora"])
def test_seedlora_of_full_rank(kind, made, tmp_path):
    case = made(kind)
    merge_into_base(case.folders, case.base, tmp_path / "full")
    full = loaded(tmp_path / "full").state_dict()
    for key in (key for key in full if case.added[0][key].any()):
        wanted = paper_formula(torch.stack([added[key] for added in case.added]))
        found = (full[key] - case.before[key]).double()
        assert float((found - wanted).norm() / wanted.norm()) < 2e-5, key


def test_dora_at_a_rank_says_its_error(made, tmp_path):
    case = made("dora")
    words = ["merge", *map(str, case.folders), "--method", "soup", "--rank", "5", "--svd", "exact"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / FUSION_NAME).read_text())
    found, mean = case.changed(tmp_path / "out"), case.mean
    assert record["kinds"] == ["DoRA"]
    for path, error in record["compression"]["layers"].items():
        wanted = mean[f"{path}.weight"]
        best = torch.linalg.svdvals(wanted.double())[5:].norm() / wanted.double().norm()
        assert error == pytest.approx(float(best), rel=1e-3)
        assert float((found[f"{path}.weight"] - wanted).norm() / wanted.norm()) == pytest.approx(error, rel=1e-3)
    assert "relative Frobenius error" in (tmp_path / "out" / "README.md").read_text()


def test_the_default_rank_of_dora_is_that_of_lora(made, tmp_path):
    case = made("dora")
    merge_folders(case.folders, tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["r"] == 3 * 4 + 1


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_against_peft_s_own_conversion(kind, made, tmp_path):
    """The factors of ``path_initial_model_for_weight_conversion``: rank 2r, the same update."""
    case = made(kind)
    config = LoraConfig(**KINDS[kind], task_type="CAUSAL_LM")
    model = get_peft_model(loaded(case.base), config)
    initial = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = config.init_lora_weights
    train(model, SEEDS[0])
    assert any(not torch.equal(p, initial[name]) for name, p in model.named_parameters() if name in initial)
    model.peft_config["default"].init_lora_weights = KINDS[kind]["init_lora_weights"]
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    wanted = read_adapter(tmp_path / "plain")
    found = read_adapter(case.folders[0], base=WeightFiles(case.base))
    assert found.layers.keys() == wanted.layers.keys()
    for path, factors in wanted.layers.items():
        assert found.layers[path].rank == factors.rank == 2 * 4
        torch.testing.assert_close(found.layers[path].dense(), factors.dense(), atol=1e-5, rtol=1e-4)


def test_starts_are_subtracted_as_they_were(made, tmp_path):
    """Of an adapter in bfloat16: its start was in float32, and is not rounded again."""
    case = made("pissa")
    shutil.copytree(case.folders[0], tmp_path / "a")
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(case.folders[0] / WEIGHTS_NAME).items()}
    save_file(tensors, tmp_path / "a" / WEIGHTS_NAME)
    start = get_peft_model(loaded(case.base), LoraConfig(**KINDS["pissa"], task_type="CAUSAL_LM")).state_dict()
    found = read_adapter(tmp_path / "a", base=WeightFiles(case.base))
    for path, factors in found.layers.items():
        key = f"base_model.model.{path}.lora_{{}}"
        a, b = (tensors[key.format(x) + ".weight"].double() for x in "AB")
        a_0, b_0 = (start[key.format(x) + ".default.weight"].double() for x in "AB")
        wanted = (b @ a - b_0 @ a_0) * 10 / 4
        assert float((factors.to(torch.float64).dense()[0] - wanted).norm() / wanted.norm()) < 1e-6


def test_starts_are_not_computed_for_adapters_that_do_not_fit(made, copy, tmp_path, monkeypatch):
    folder = copy("pissa", task_type="SEQ_CLS")

    def start(*args, **kwargs):
        raise AssertionError("the work was begun")

    monkeypatch.setattr("seedlora.adapters.original_base._initial_factors", start)
    for merge in (merge_folders, lambda *args: merge_into_base(args[0], made("pissa").base, args[1])):
        with pytest.raises(AdapterError, match="task_type is CAUSAL_LM in .* and SEQ_CLS in"):
            merge([made("pissa").folders[0], folder], tmp_path / "out")


def test_weights_of_the_rule_weigh_what_is_averaged(made, tmp_path):
    case = made("modules_to_save")
    options = {"weights": [1.0, 2.0, 3.0]}
    merge_folders(case.folders, tmp_path / "out", method="soup", options=options)
    found = load_file(tmp_path / "out" / WEIGHTS_NAME)
    each = [load_file(folder / WEIGHTS_NAME) for folder in case.folders]
    for key in ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"):
        wanted = (each[0][key] + 2 * each[1][key] + 3 * each[2][key]) / 6
        torch.testing.assert_close(found[key], wanted)
    record = json.loads((tmp_path / "out" / FUSION_NAME).read_text())
    assert record["averaged"] == ["lm_head.weight", "model.embed_tokens.weight"]
    assert "averaged" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(AdapterError, match="add up to more than 0"):
        merge_folders(case.folders, tmp_path / "no", method="soup", options={"weights": [1, 1, -2]})


@pytest.mark.parametrize(("kind", "held"), [("modules_to_save", "lm_head.weight"), ("lora_bias", "lora_bias")])
def test_a_rule_that_leaves_adapters_out_averages_nothing(kind, held, made, tmp_path):
    score = {"score": lambda layers: 0.0}
    with pytest.raises(AdapterError, match=f"greedy_soup chooses among adapters, and {held} would be the mean of all"):
        merge_folders(made(kind).folders, tmp_path / "out", method="greedy_soup", options=score)
    merge_folders(made("lora").folders, tmp_path / "out", method="greedy_soup", options=score)
    merge_folders(made(kind).folders, tmp_path / "two", method=soup_of([2, 0]))
    merge_folders([made(kind).folders[i] for i in (0, 2)], tmp_path / "soup", method="soup")
    found, wanted = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("two", "soup"))
    keys = {key for key in wanted if "lora_A" not in key and "lora_B.w" not in key}
    assert keys
    assert all(torch.equal(found[key], wanted[key]) for key in keys)


def test_a_rule_s_own_weights_are_its_own(made, tmp_path):
    def first(stack, *, weights):
        assert weights == "of another meaning"
        return LoRAFactors(stack.A[:1], stack.B[:1])

    merge_folders(made("lora").folders, tmp_path / "out", method=make_rule(first, {"weights": "of another meaning"}))


@pytest.mark.parametrize("kind", ["modules_to_save", "lora_bias"])
def test_everything_has_the_dtype_that_is_asked_for(kind, made, tmp_path):
    merge_folders(made(kind).folders, tmp_path / "out", method="soup", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS_NAME).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["rslora", "modules_to_save", "lora_bias", "dora", "alpha_pattern"])
def test_inspect_says_who_serves_it(kind, made, tmp_path, capsys):
    case = made(kind)
    assert main(["inspect", str(case.folders[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    name = {"rslora": "use_rslora", "dora": "DoRA"}.get(kind, kind)
    assert any(reason.startswith(name) for reason in found["servable"]["vLLM"])
    assert (found["servable"]["LoRAX"] == []) == (kind == "alpha_pattern")
    assert main(["inspect", str(case.folders[0])]) == 0
    assert "what stands in the way" in capsys.readouterr().out
    assert main(["merge", str(case.folders[0]), "--method", "soup", "--rank", "8", "--out", str(tmp_path / "o")]) == 0
    shown = capsys.readouterr().out
    if kind in ("rslora", "dora", "alpha_pattern"):
        assert "served by vLLM, SGLang, LoRAX, TGI, llama.cpp (vLLM: --max-lora-rank 8)" in shown
    else:
        assert f"not by vLLM, SGLang, LoRAX, TGI, llama.cpp ({kind}" in shown


def test_compare_shows_dora_at_a_rank(made, capsys):
    case = made("dora")
    assert main(["compare", *map(str, case.folders)]) == 0
    shown = capsys.readouterr().out
    assert "DoRA's updates have full rank; shown is the best rank 64 of each" in " ".join(shown.split())


@pytest.fixture
def copy(made, tmp_path):
    """A copy of an adapter of some kind, and a function that edits its files."""

    def edited(kind, tensors=None, **config):
        folder = tmp_path / "copy"
        shutil.copytree(made(kind).folders[1], folder)
        if tensors is not None:
            found = load_file(folder / WEIGHTS_NAME)
            tensors(found)
            save_file(found, folder / WEIGHTS_NAME)
        file = folder / CONFIG_NAME
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return edited


MAGNITUDE = "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(MAGNITUDE), "use_dora is set, but 'model.layers.0.mlp.up_proj' has no .lora_magnitude_vector"),
        (lambda t: t.update({MAGNITUDE: t[MAGNITUDE][:-1].clone()}), r"has shape \(23,\), \(24,\) is needed"),
        (lambda t: t.update({MAGNITUDE: t[MAGNITUDE] * float("inf")}), "holds NaN or infinity"),
        (
            lambda t: t.update({MAGNITUDE.replace("up_", "x_"): t[MAGNITUDE].clone()}),
            "has .lora_magnitude_vector but no factors",
        ),
    ],
)
def test_broken_magnitudes(edit, message, copy, made, tmp_path):
    with pytest.raises(AdapterError, match=message):
        merge_folders([copy("dora", edit)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def one_sentence(words, capsys):
    assert main(words) == 2
    found = capsys.readouterr()
    assert found.err.count("\n") == 1
    assert found.out == ""
    return found.err


@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_a_base_that_is_not_there(kind, copy, made, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    folder = copy(kind, base_model_name_or_path=str(tmp_path / "gone"))
    capsys.readouterr()  # bars of the models' saving
    said = one_sentence(["merge", str(folder), *out], capsys)
    assert "its update depends on the base weights, which cannot be read" in said
    assert "gone is no folder" in said
    assert "--base MODEL" in said
    assert main(["merge", str(folder), *out, "--base", str(made(kind).base), "--method", "soup"]) == 0
    capsys.readouterr()
    (tmp_path / "copy" / CONFIG_NAME).write_text(
        json.dumps(json.loads((folder / CONFIG_NAME).read_text()) | {"base_model_name_or_path": None})
    )
    assert "names no base model, whose weights" in one_sentence(["inspect", str(folder)], capsys)


@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_another_base(kind, made, tmp_path, capsys):
    config = LlamaConfig(**(llama().config.to_dict() | {"intermediate_size": 20}))
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    gpt2().save_pretrained(tmp_path / "gpt2")
    words = ["merge", *map(str, made(kind).folders), "--out", str(tmp_path / "out"), "--base"]
    capsys.readouterr()  # bars of the models' saving
    assert "it is not the base model of this adapter" in one_sentence([*words, str(tmp_path / "other")], capsys)
    assert "has no weight for the adapted layer" in one_sentence([*words, str(tmp_path / "gpt2")], capsys)
    assert not (tmp_path / "out").exists()


def test_kinds_are_not_mixed(made, tmp_path):
    pair = [made("lora").folders[0], made("dora").folders[0]]
    for folder in pair:  # the same base, as far as their names say
        shutil.copytree(folder, tmp_path / folder.parent.name)
    pair = [tmp_path / folder.parent.name for folder in pair]
    for folder in pair:
        file = folder / CONFIG_NAME
        config = json.loads(file.read_text()) | {"base_model_name_or_path": str(made("dora").base)}
        file.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="is DoRA, of .* make plain LoRA of it first"):
        merge_folders(pair, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "said"), [("lora_bias", "only .* has lora_bias"), ("modules_to_save", "only .* has lm_head")]
)
def test_what_only_one_of_them_has(kind, said, copy, made, tmp_path):
    base = {"base_model_name_or_path": str(made(kind).base)}
    with pytest.raises(AdapterError, match=said):
        merge_folders([made(kind).folders[0], copy("lora", **base)], tmp_path / "out")


@pytest.fixture
def loftq(copy):
    """An adapter that belongs on nf4 alone; the base model that it names is the original."""
    folder = copy("lora")
    (folder / "base.json").write_text('{"quantization": "nf4"}')
    return folder


def in_bits(base, folder, **options):
    """A base model as bitsandbytes stores it."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    if "load_in_8bit" not in options:
        options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32, **options}
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}, dtype=torch.float32
    )
    model.save_pretrained(folder)
    return folder, model


def test_loftq_s_adapters_do_not_go_into_another_base(made, loftq, tmp_path):
    base = made("lora").base
    with pytest.raises(AdapterError, match="belongs on the base model in nf4 alone.* is not quantised; give a folder"):
        merge_into_base([loftq], base, tmp_path / "out")
    for bits, options in {"int8": {"load_in_8bit": True}, "fp4": {"bnb_4bit_quant_type": "fp4"}}.items():
        folder, _ = in_bits(base, tmp_path / bits, **options)
        with pytest.raises(AdapterError, match=f"belongs on the base model in nf4 alone.* is in {bits}; give a folder"):
            merge_into_base([loftq], folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_loftq_s_adapters_go_into_the_base_in_nf4(made, loftq, tmp_path):
    folder, model = in_bits(made("lora").base, tmp_path / "nf4", bnb_4bit_quant_type="nf4")
    merge_into_base([loftq], folder, tmp_path / "out", method="soup")
    found = loaded(tmp_path / "out").state_dict()
    for path, factors in read_adapter(loftq).layers.items():
        wanted = dequantize_module_weight(model.get_submodule(path)).double() + factors.dense()[0].double()
        torch.testing.assert_close(found[f"{path}.weight"].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_loftq_is_not_fused_with_adapters_of_the_original_base(first, made, loftq, tmp_path):
    pair = [loftq, made("lora").folders[0]][:: 1 if first else -1]
    with pytest.raises(AdapterError, match=r"copy belongs on the one in nf4 alone|copy on the one in nf4 alone"):
        merge_folders(pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (loftq / "base.json").write_text('["nf4"]')
    with pytest.raises(AdapterError, match=r"base.json: .* is no record of a quantization"):
        read_adapter(loftq)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merged_model_says_what_an_adapter_says(kind, made, tmp_path):
    """The card with the gain, and the prompt of the training, without which it would be asked in another style."""
    case = made(kind)
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in case.folders]
    for folder in folders:
        (folder / "prompt.json").write_text('{"style": "mine"}')
    merge_into_base(folders, case.base, tmp_path / "full", options={"mean_shift": False})
    merge_folders(folders, tmp_path / "out", options={"mean_shift": False, "rank": 16})
    gains = []
    full = loaded(tmp_path / "full").state_dict()
    for key, mean in case.mean.items():
        if mean.any():
            gains.append(float((full[key] - case.before[key]).double().norm() / mean.double().norm()))
    wanted = {"mean": sum(gains) / len(gains), "min": min(gains), "max": max(gains)}
    for name in ("full", "out"):
        record = json.loads((tmp_path / name / FUSION_NAME).read_text())
        assert record["gain"] == pytest.approx(wanted, rel=1e-4)
        assert (tmp_path / name / "prompt.json").read_text() == '{"style": "mine"}'
        card = (tmp_path / name / "README.md").read_text()
        assert f"The fused update is {wanted['mean']:.3g} times as long as the mean of the inputs" in card
        assert "# 3 LoRA adapters merged with `seedlora`" in card
        assert ("Kinds of the inputs: DoRA" in card) == (kind == "dora")
    assert "library_name: transformers" in (tmp_path / "full" / "README.md").read_text()
    assert f"--into-base {case.base}" in (tmp_path / "full" / "README.md").read_text()


def test_the_record_says_which_svd_a_layer_got(made, tmp_path, monkeypatch):
    """Matrices of 16 x 16 and 24 x 16 entries; those of more than 256 are large here."""
    monkeypatch.setattr("seedlora.updates.compression.EXACT_ENTRIES", 256)
    folders = made("dora").folders
    merge_folders(folders, tmp_path / "out", method="soup", options={"rank": 2})
    found = json.loads((tmp_path / "out" / FUSION_NAME).read_text())["compression"]
    assert found["svd"] == {"exact": 4, "randomized": 3}
    merge_into_base(folders, made("dora").base, tmp_path / "full", options={"rank": 2, "svd": "exact"}, method="soup")
    found = json.loads((tmp_path / "full" / FUSION_NAME).read_text())["compression"]
    assert found["svd"] == {"exact": 7}


def test_biases_need_a_place_in_the_base(copy, made, tmp_path):
    llama().save_pretrained(tmp_path / "without")
    with pytest.raises(AdapterError, match="has no bias in the base model"):
        merge_into_base([copy("lora_bias")], tmp_path / "without", tmp_path / "out")


def test_resized_vocabularies_do_not_go_into_the_base(made, copy, tmp_path):
    def longer(tensors):
        key = "base_model.model.lm_head.weight"
        tensors[key] = torch.cat([tensors[key], tensors[key][:1]])

    with pytest.raises(AdapterError, match="was its vocabulary resized"):
        merge_into_base([copy("modules_to_save", longer)], made("modules_to_save").base, tmp_path / "out")


def test_modules_of_different_shapes_are_named_with_both(made, copy, tmp_path):
    key = "base_model.model.lm_head.weight"
    one, other = made("modules_to_save").folders[0], copy("modules_to_save", lambda t: t.update({key: t[key][:31]}))
    with pytest.raises(AdapterError) as caught:
        merge_folders([one, other], tmp_path / "out")
    assert str(caught.value) == f"lm_head.weight has shape (32, 16) in {one} and (31, 16) in {other}"


@pytest.mark.parametrize("targets", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
@pytest.mark.parametrize("said", [{"tie_word_embeddings": True}, {}, {"text_config": {"tie_word_embeddings": True}}])
def test_a_tied_base_is_not_changed_twice(targets, said, tmp_path):
    """The adapter's update is of the embedding alone; in the base's one matrix it would be of the head as well."""
    config = LlamaConfig(**(llama().config.to_dict() | {"tie_word_embeddings": True}))
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    entries = json.loads(file.read_text())
    assert entries.pop("tie_word_embeddings")
    file.write_text(json.dumps(entries | said))
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(**(PLAIN | targets), task_type="CAUSAL_LM"))
    train(model, 1)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="what is added to model.embed_tokens.* would change both"):
        merge_into_base([tmp_path / "a"], tmp_path / "base", tmp_path / "out", method="soup")
    weights = tmp_path / "base" / "model.safetensors"
    both = {"lm_head.weight": torch.zeros(32, 16)} | load_file(weights)
    save_file(both, weights, metadata={"format": "pt"})
    file.write_text(json.dumps(entries | {"tie_word_embeddings": False}))
    merge_into_base([tmp_path / "a"], tmp_path / "base", tmp_path / "out", method="soup")
    assert not loaded(tmp_path / "out").lm_head.weight.any()


@pytest.mark.parametrize("bits", ["nf4", "nested nf4", "int8"])
def test_a_quantised_base_is_dequantised(bits, made, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    case = made("dora")
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
    assert main([*words, "--into-base", str(tmp_path / "q")]) == 0
    assert "the base model was stored quantised by bitsandbytes; the result is dequantised" in capsys.readouterr().out
    found = loaded(tmp_path / "o").state_dict()
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


def test_an_int8_base_comes_out_as_it_was_made(made, tmp_path):
    """In bfloat16, rounded once: half the size of the float32 in which int8 is dequantised."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    case, config = made("lora"), BitsAndBytesConfig(load_in_8bit=True)
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


def test_other_quantisations_are_refused(made, tmp_path):
    shutil.copytree(made("lora").base, tmp_path / "q")
    file = tmp_path / "q" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="is quantised by gptq; only bitsandbytes can be undone"):
        merge_into_base(made("lora").folders, tmp_path / "q", tmp_path / "out")


# What PEFT's add_weighted_adapter makes of the same adapters: docs/adapters.md has this table.

REFUSED = "Cannot add weighted adapters if they target the same module with modules_to_save"
#: How far off it is, in silence, by ``svd`` and by ``cat``; 0 is right.
PEFT_RESULT = {
    "lora": (0, 0),
    "alpha_pattern": (0, 0),
    "rank_pattern": (0, 0),
    "mica": (0, 0),
    "rslora": (3.0, 2.5),
    "dora": (0.5, 0.5),
    "lora_bias": (0.6, 0.6),
    "pissa": (0.34, 0.33),
    "olora": (0.33, 0.32),
    "modules_to_save": REFUSED,
}


def peft_mean(case, combination, folder, *, svd_rank=16):
    """The mean by PEFT: all adapters in one model, a third of each; saved, loaded again, and merged into the base."""
    names = ["first", "second", "third"]  # a "0" would be taken for a layer's number when the result is saved
    model = PeftModel.from_pretrained(loaded(case.base), case.folders[0], adapter_name=names[0])
    for name, other in zip(names[1:], case.folders[1:], strict=True):
        model.load_adapter(other, adapter_name=name)
    rank = {"svd_rank": svd_rank} if combination == "svd" else {}
    model.add_weighted_adapter(names, [1 / 3] * 3, "mean", combination_type=combination, **rank)
    model.save_pretrained(folder, selected_adapters=["mean"])
    return case.changed(folder / "mean")


@pytest.mark.parametrize("combination", ["svd", "cat"])
@pytest.mark.parametrize("kind", PEFT_RESULT)
def test_what_peft_makes_of_them(kind, combination, made, tmp_path):
    """Ours is right on each (above); a PEFT that changes for the better fails here, and the table is out of date."""
    case = made(kind)
    if PEFT_RESULT[kind] == REFUSED:
        with pytest.raises(ValueError, match=REFUSED):
            peft_mean(case, combination, tmp_path)
        return
    wanted = PEFT_RESULT[kind][("svd", "cat").index(combination)]
    assert distance(peft_mean(case, combination, tmp_path), case.mean) == pytest.approx(wanted, rel=0.2, abs=1e-5)


def test_a_rank_pattern_at_a_lower_rank_is_the_best_of_it(made, tmp_path):
    """By PEFT, saved and loaded again, and by us: neither applies the pattern of the inputs to the result."""
    case = made("rank_pattern")
    rest = [torch.linalg.svdvals(update.double())[3:] for update in case.mean.values() if update.any()]
    whole = sum(float(update.double().square().sum()) for update in case.mean.values())
    best = (sum(float(s.square().sum()) for s in rest) / whole) ** 0.5
    merge_folders(case.folders, tmp_path / "out", method="soup", options={"rank": 3, "match_norm": False})
    assert best > 0.3
    assert distance(case.changed(tmp_path / "out"), case.mean) == pytest.approx(best, rel=1e-4)
    assert distance(peft_mean(case, "svd", tmp_path, svd_rank=3), case.mean) == pytest.approx(best, rel=1e-4)
