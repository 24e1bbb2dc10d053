"""PEFT writes, we read; we write, PEFT reads. Broken folders end in AdapterError and in nothing else."""

import contextlib
import json
import shutil
import warnings

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from seedlora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError, locate
from seedlora.adapters.peft_config import PEFT_AUTO_CLASSES
from seedlora.adapters.reading import read_adapter
from seedlora.adapters.servers import base_shapes, serving_problems
from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.inputs import read_adapters, stack_adapters
from seedlora.model.weight_files import WeightFiles
from seedlora.names import FUSION_NAME

warnings.filterwarnings("ignore", category=UserWarning)
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
        )
    )


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "alpha is not r": (llama, {"r": 4, "lora_alpha": 10, "target_modules": SEVEN}),
    "rslora": (llama, {"r": 4, "lora_alpha": 10, "use_rslora": True, "target_modules": SEVEN}),
    "patterns": (
        llama,
        {
            "r": 4,
            "lora_alpha": 10,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"v_proj": 3, r".*\.0\.mlp\.up_proj": 7},
            "target_modules": SEVEN,
        },
    ),
    "rslora and patterns": (
        llama,
        {
            "r": 4,
            "lora_alpha": 10,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"q_proj": 3},
            "target_modules": SEVEN,
        },
    ),
    "partial": (llama, {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "all linear": (llama, {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"}),
    "head and embedding": (llama, {"r": 2, "lora_alpha": 6, "target_modules": ["lm_head", "embed_tokens", "q_proj"]}),
    "conv1d": (
        gpt2,
        {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
    ),
    "orthogonal": (llama, {"r": 2, "lora_alpha": 6, "init_lora_weights": "orthogonal", "target_modules": SEVEN}),
}


def save_adapter(path, make=llama, seed=1, dtype=torch.float32, **config):
    """A PEFT model with random factors, saved; the model comes back."""
    model = get_peft_model(make(), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    model.save_pretrained(path)
    return model


def weights(model):
    """Every weight of a model after its adapters are merged into it, by name."""
    return {key: value.float() for key, value in model.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_what_peft_adds(kind, tmp_path):
    make, config = KINDS[kind]
    model = save_adapter(tmp_path / "a", make, **config)
    adapter = read_adapter(tmp_path / "a")
    before, after = make().state_dict(), weights(model)
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert {f"{path}.weight" for path in adapter.layers} == changed
    for path, factors in adapter.layers.items():
        found = factors.dense()[0]
        wanted = after[f"{path}.weight"] - before[f"{path}.weight"]
        flipped = path in adapter.embeddings or adapter.fan_in_fan_out
        assert torch.allclose(found.T if flipped else found, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_adapters_are_what_peft_loads(kind, tmp_path):
    """The soup of two adapters, loaded by PEFT, adds the mean of what they add."""
    make, config = KINDS[kind]
    added = []
    base = make().state_dict()
    for seed in (1, 2):
        merged = weights(save_adapter(tmp_path / str(seed), make, seed=seed, **config))
        added.append({key: merged[key] - base[key] for key in base})
    make().save_pretrained(tmp_path / "base")
    merge_folders([tmp_path / "1", tmp_path / "2"], tmp_path / "out", method="soup", base=tmp_path / "base")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "out")
    keys = set(load_file(tmp_path / "out" / WEIGHTS_NAME))
    own = {key.replace(".default", "") for key in loaded.state_dict() if "lora_" in key}
    assert kind == "partial" or keys == own
    found = weights(loaded)
    for key in base:
        assert torch.allclose(found[key] - base[key], (added[0][key] + added[1][key]) / 2, atol=1e-4), key


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]])
def test_resized_vocabularies_are_not_cut(targets, tmp_path):
    """PEFT's folder has the new rows of the base beside the factors; the fused one has not."""

    def resized():
        model = llama()
        model.resize_token_embeddings(34)
        return model

    llama().save_pretrained(tmp_path / "base")
    resized().save_pretrained(tmp_path / "resized")
    save_adapter(tmp_path / "a", resized, r=2, target_modules=targets)
    one = [tmp_path / "a"]
    with pytest.raises(AdapterError, match=f"{targets[0]} was adapted over 34 rows, and whether .* is not known here"):
        merge_folders(one, tmp_path / "out")
    with pytest.raises(AdapterError, match=f"{targets[0]} was adapted over 34 rows, but the base model .*base has 32"):
        merge_folders(one, tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()
    merge_folders(one, tmp_path / "out", method="soup", base=tmp_path / "resized")
    found, wanted = (weights(PeftModel.from_pretrained(resized(), tmp_path / name)) for name in ("out", "a"))
    assert all(torch.allclose(found[key], wanted[key], atol=1e-5) for key in wanted)


class Numbered(torch.nn.Module):
    """Layers whose last name is a number, beside a list of blocks that are numbered as well."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"proj": torch.nn.Linear(6, 6)}) for _ in range(3)])
        self.mlp = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 6))

    def forward(self, x):
        for layer in self.layers:
            x = layer["proj"](x)
        return self.mlp(x)


@torch.no_grad()
def test_layers_that_are_named_by_a_number(tmp_path):
    model = save_adapter(tmp_path / "a", Numbered, r=2, target_modules=["mlp.0", "mlp.2", "proj"])
    merge_folders([tmp_path / "a"], tmp_path / "out", method="soup")
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["target_modules"] == ["mlp.0", "mlp.2", "proj"]
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(PeftModel.from_pretrained(Numbered(), tmp_path / "out")(x), model(x))


def test_the_fused_folder_is_universal(tmp_path):
    for seed in (1, 2):
        save_adapter(tmp_path / str(seed), seed=seed, **KINDS["rslora and patterns"][1])
    merge_folders([tmp_path / "1", tmp_path / "2"], tmp_path / "out", method="ties", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    assert config["r"] == config["lora_alpha"]
    assert not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["init_lora_weights"] is True
    assert sorted(config["target_modules"]) == sorted(SEVEN)
    tensors = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert len(tensors) == 2 * 2 * 7
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert {min(t.shape) for t in tensors.values()} == {config["r"]}
    record = json.loads((tmp_path / "out" / FUSION_NAME).read_text())
    assert record["method"] == "ties"
    assert 0 < record["compression"]["relative_error_mean"] <= record["compression"]["relative_error_max"] < 1
    assert [len(source["sha256"]) for source in record["inputs"]] == [64, 64]
    assert "relative Frobenius error" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "a"
    save_adapter(folder, r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture
def broken(good, tmp_path):
    """A copy of the good folder, and a function that edits it."""
    folder = tmp_path / "broken"
    shutil.copytree(good, folder)

    def edit(config=None, tensors=None):
        if config is not None:
            file = folder / CONFIG_NAME
            file.write_text(json.dumps(json.loads(file.read_text()) | config))
        if tensors is not None:
            found = load_file(folder / WEIGHTS_NAME)
            tensors(found)
            save_file(found, folder / WEIGHTS_NAME)
        return folder

    return edit


KEY = f"base_model.model.{Q}.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora is set; DoRA is not plain LoRA.*python -m seedlora merge merges it"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base weights; python -m seedlora merge computes"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights; .*convert the adapter after training"),
        ({"init_lora_weights": "corda"}, "'corda', which changes the base weights; .*convert"),
        ({"init_lora_weights": "loftq"}, "'loftq', which changes the base weights"),
        ({"lora_bias": True}, "lora_bias adds a vector"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set; modules_to_save holds full weights"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', a number is needed"),
        ({"lora_alpha": float("nan")}, "lora_alpha is 'nan'"),
        ({"r": 0}, "r is '0', a positive whole number"),
        ({"r": 3}, "has rank 2, but adapter_config.json says 3"),
        ({"rank_pattern": {"q_proj": 4}}, "has rank 2, but adapter_config.json says 4"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
        ({"alpha_pattern": {"(": 4}}, "is no regex"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is '3', text is needed"),
        ({"revision": ["v1"]}, "revision is .*, text is needed"),
        ({"task_type": "CHESS"}, "task_type is 'CHESS', one of CAUSAL_LM, SEQ_CLS"),
        ({"task_type": ["SEQ_CLS"]}, "task_type is .*, one of CAUSAL_LM"),
    ],
)
def test_refused_configurations(config, message, broken):
    with pytest.raises(AdapterError, match=message):
        read_adapter(broken(config=config))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(KEY), "has no .lora_A.weight beside it"),
        (lambda t: t.update({KEY: t[KEY] * float("nan")}), "holds NaN or infinity"),
        (lambda t: t.update({KEY: t[KEY][:0]}), "is empty"),
        (lambda t: t.update({KEY: t[KEY][:1]}), r"has shape \(1, 16\) and its B \(16, 2\)"),
        (lambda t: t.update({KEY: t[KEY].int()}), "is torch.int32"),
        (lambda t: t.update({KEY: t[KEY][0].clone()}), "has shape"),
        (lambda t: t.update({"other": torch.ones(2)}), "'other' is no factor"),
        (lambda t: t.update({KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(2)}), "is no factor"),
        (lambda t: t.update({"base_model.model.lora_A.weight": torch.ones(2, 2)}), "is no factor|has no"),
        (lambda t: t.update({KEY.replace(".weight", ".default.weight"): t.pop(KEY)}), "PEFT's own keys begin with"),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}),
            "but a full weight, as PEFT saves it of a resized vocabulary; add 'lm_head' to modules_to_save",
        ),
        (lambda t: t.clear(), "holds no LoRA factors"),
    ],
)
def test_refused_tensors(edit, message, broken):
    with pytest.raises(AdapterError, match=message):
        read_adapter(broken(tensors=edit))


def test_scaling_that_overflows(broken):
    def half(tensors):
        for key in tensors:
            tensors[key] = tensors[key].half()

    folder = broken(config={"lora_alpha": 1e6}, tensors=half)
    with pytest.raises(AdapterError, match=r"overflows torch.float16"):
        read_adapter(folder)


def test_pickles_and_missing_folders(good, tmp_path):
    shutil.copy(good / CONFIG_NAME, tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(
        AdapterError, match=r"pickled weights .* not read; there is adapter_model.bin: load it with PEFT"
    ):
        read_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"has no adapter_config.json"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"is no folder; give a PEFT adapter folder or a hub id"):
        locate(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"is no folder"):
        locate(good / CONFIG_NAME)


def test_adapters_that_do_not_belong_together(good, broken, tmp_path):
    with pytest.raises(AdapterError, match=r"was given twice"):
        read_adapters([good, good / "." / ""])
    folder = broken(config={"base_model_name_or_path": "other"})
    with pytest.raises(AdapterError, match=r"belongs to base model '', .* to 'other'"):
        stack_adapters(read_adapters([good, folder]))
    broken(config={"base_model_name_or_path": "", "revision": "v1"})
    with pytest.raises(AdapterError, match=r"revision is main in .* and v1 in"):
        stack_adapters(read_adapters([good, folder]))
    assert merge_folders([folder], tmp_path / "v1", method="soup")
    assert json.loads((tmp_path / "v1" / CONFIG_NAME).read_text())["revision"] == "v1"
    broken(config={"revision": "main"})
    assert stack_adapters(read_adapters([good, folder]))
    with pytest.raises(AdapterError, match=r"task_type is None in .* and SEQ_CLS in"):
        stack_adapters(read_adapters([good, broken(config={"base_model_name_or_path": "", "task_type": "SEQ_CLS"})]))
    save_adapter(tmp_path / "k", r=2, lora_alpha=6, target_modules=["q_proj", "k_proj"])
    with pytest.raises(AdapterError, match=r"adapt different layers: only .*k_proj"):
        stack_adapters(read_adapters([good, tmp_path / "k"]))
    folder = broken(config={"task_type": None}, tensors=lambda t: t.update({KEY: torch.ones(2, 20)}))
    with pytest.raises(AdapterError) as caught:
        stack_adapters(read_adapters([good, folder]))
    assert str(caught.value) == f"{Q} has shape (16, 16) in {good} and (16, 20) in {folder}"
    save_adapter(tmp_path / "w", r=2, lora_alpha=6, fan_in_fan_out=True, target_modules=["q_proj", "v_proj"])
    config = json.loads((tmp_path / "w" / CONFIG_NAME).read_text()) | {"fan_in_fan_out": True}
    (tmp_path / "w" / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"fan_in_fan_out is False in .* and True in"):
        stack_adapters(read_adapters([good, tmp_path / "w"]))


def test_different_ranks_and_alphas_are_stacked(tmp_path):
    save_adapter(tmp_path / "1", r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    save_adapter(tmp_path / "2", r=5, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj"])
    adapters = read_adapters([tmp_path / "1", tmp_path / "2"])
    stack = stack_adapters(adapters)[Q]
    assert stack.rank == 5
    for found, adapter in zip(stack.dense(), adapters.values(), strict=True):
        assert torch.allclose(found, adapter.layers[Q].dense()[0])


def test_resized_vocabularies_are_not_mixed(tmp_path):
    for seed in (1, 2):
        save_adapter(tmp_path / str(seed), seed=seed, r=2, target_modules=["embed_tokens", "q_proj"])
    file = tmp_path / "2" / WEIGHTS_NAME
    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"embed_tokens has different base weights"):
        stack_adapters(read_adapters([tmp_path / "1", tmp_path / "2"]))


def test_our_task_types_are_those_of_peft():
    assert set(PEFT_AUTO_CLASSES) == set(TaskType)
    assert all(hasattr(peft, name) for name in PEFT_AUTO_CLASSES.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "peft_type",
        "init_lora_weights",
        "bias",
        "use_rslora",
        "base_model_name_or_path",
        "fan_in_fan_out",
        "use_dora",
        "modules_to_save",
        "task_type",
        "lora_bias",
        "target_modules",
        "auto_mapping",
        "trainable_token_indices",
    ]
)
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def only_adapter_errors(folder):
    for base in (None, WeightFiles(folder / "nowhere")):
        with contextlib.suppress(AdapterError):
            adapter = read_adapter(folder, base=base)
            assert all(bool(factors.B.isfinite().all()) for factors in adapter.layers.values())
    with contextlib.suppress(ValueError):
        serving_problems(folder)


@FUZZ
@given(st.dictionaries(KEYS, JSON, min_size=1, max_size=3))
def test_fuzzed_configuration_values(good, tmp_path, edits):
    folder = tmp_path / "f"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    file = folder / CONFIG_NAME
    file.write_text(json.dumps(json.loads((good / CONFIG_NAME).read_text()) | edits))
    only_adapter_errors(folder)


@FUZZ
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_fuzzed_configuration_bytes(good, tmp_path, data):
    folder = tmp_path / "f"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    (folder / CONFIG_NAME).write_bytes(data)
    only_adapter_errors(folder)


@FUZZ
@given(cut=st.integers(0, 4000), at=st.integers(0, 4000), data=st.binary(max_size=40))
def test_fuzzed_weights(good, tmp_path, cut, at, data):
    folder = tmp_path / "f"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    original = (good / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes((original[:at] + data + original[at + len(data) :])[: cut or None])
    only_adapter_errors(folder)


@pytest.fixture(scope="module")
def base_and_pissa(tmp_path_factory):
    """A base model in shards, and an adapter that cannot be read without it."""
    folder = tmp_path_factory.mktemp("pissa")
    llama().save_pretrained(folder / "base", max_shard_size="4KB")
    save_adapter(folder / "a", r=2, init_lora_weights="pissa", target_modules=["q_proj"])
    return folder


@FUZZ
@given(
    st.sampled_from(["config.json", "model.safetensors.index.json"]),
    st.dictionaries(st.sampled_from(["quantization_config", "weight_map", "text_config", "vocab_size"]), JSON)
    | JSON
    | st.just({"quantization_config": {"quant_method": "bitsandbytes"}}),
)
def test_fuzzed_base_folders(base_and_pissa, name, content):
    """What is wrong with a base model is an AdapterError for who needs it, and nothing for who would like to know."""
    file = base_and_pissa / "base" / name
    before = file.read_bytes()
    try:
        file.write_text(json.dumps(content))
        with contextlib.suppress(AdapterError):
            read_adapter(base_and_pissa / "a", base=WeightFiles(base_and_pissa / "base"))
        base_shapes(base_and_pissa / "base")
    finally:
        file.write_bytes(before)


def test_bases_that_are_broken_are_named(base_and_pissa, tmp_path):
    shutil.copytree(base_and_pissa / "base", tmp_path / "base")
    for name, content, said in [
        ("config.json", [], "config.json holds no JSON object"),
        ("model.safetensors.index.json", {}, "index.json has no weight_map from keys to files"),
        ("model.safetensors.index.json", {"weight_map": {"a": "gone"}}, "gone"),
    ]:
        (tmp_path / "base" / name).write_text(json.dumps(content))
        with pytest.raises(AdapterError, match=f"a is PiSSA: its update depends on .* cannot be read: .*{said}"):
            read_adapter(base_and_pissa / "a", base=WeightFiles(tmp_path / "base"))
        shutil.copy(base_and_pissa / "base" / name, tmp_path / "base" / name)
    read_adapter(base_and_pissa / "a", base=WeightFiles(tmp_path / "base"))


NAMES = st.sampled_from(
    [KEY, KEY.replace("lora_A", "lora_B"), f"base_model.model.{V}.lora_embedding_A", "base_model.model..lora_A.weight"]
) | st.text(min_size=1, max_size=12)
TENSORS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64]),
    st.sampled_from([0.0, 1.0, float("nan"), float("inf"), 1e30]),
)


@FUZZ
@given(st.dictionaries(NAMES, TENSORS, max_size=3))
def test_fuzzed_tensors(good, tmp_path, edits):
    folder = tmp_path / "f"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    save_file(load_file(good / WEIGHTS_NAME) | edits, folder / WEIGHTS_NAME)
    only_adapter_errors(folder)
