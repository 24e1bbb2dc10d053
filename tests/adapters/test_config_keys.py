"""Every key of a configuration is known, or the adapter is refused by its name."""

from __future__ import annotations

import pytest
from peft import LoraConfig

from seedlora.adapters import config_keys
from seedlora.adapters.adapter import AdapterError
from seedlora.adapters.peft_config import read_config
from seedlora.cli.main import main

GROUPS = (
    config_keys.READ_KEYS,
    config_keys.HARMLESS_KEYS,
    config_keys.MORE_THAN_FACTORS,
    config_keys.REFUSED_KEYS,
)


def test_every_key_that_peft_writes_is_known_and_of_one_kind():
    known = [key for group in GROUPS for key in group]
    assert len(known) == len(set(known))
    assert set(LoraConfig().to_dict()) <= set(known)


@pytest.mark.parametrize("value", [True, 1, "yes", [1], {"a": 0}])
def test_a_key_that_is_not_known_is_refused_by_name(value, broken):
    for allow_more in (False, True):
        with pytest.raises(AdapterError, match=r"adapter_config.json: use_hira is .* not known here"):
            read_config(broken(config={"use_hira": value}), allow_more=allow_more)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_a_key_that_is_not_set_is_none_to_care_about(value, broken):
    assert read_config(broken(config={"use_hira": value})).rank == 2


def test_harmless_keys_are_read_over(broken):
    assert read_config(broken(config=dict.fromkeys(config_keys.HARMLESS_KEYS, "x"))).rank == 2


@pytest.mark.parametrize("key", config_keys.REFUSED_KEYS)
def test_what_cannot_be_merged_is_refused_by_name(key, broken):
    with pytest.raises(AdapterError, match=f"{key} is set; "):
        read_config(broken(config={key: True}), allow_more=True)


@pytest.mark.parametrize("words", [["merge", "A", "--out", "out"], ["inspect", "A"], ["compare", "A"], ["serve", "A"]])
def test_every_command_refuses_it(words, broken, tmp_path, capsys):
    folder = broken(config={"use_hira": True, "base_model_name_or_path": "somebody/model"})
    places = {"A": str(folder), "out": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in words]) == 2
    assert "use_hira" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["push", "A", "somebody/name", "--dry-run"], ["export", "A", "--gguf", "x.gguf"]])
def test_what_sends_and_exports_refuses_it_too(words, broken, capsys):
    folder = broken(config={"use_hira": True, "base_model_name_or_path": "somebody/model"})
    assert main([str(folder) if word == "A" else word for word in words]) == 2
    assert "use_hira" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("init", "name"),
    [
        *(("pissa", "PiSSA"), ("PiSSA_niter_4", "PiSSA"), ("olora", "OLoRA"), ("loftq", "LoftQ"), ("corda", "CorDA")),
        *(("lora_ga", "LoRA-GA"), ("gaussian", None), ("eva", None), (True, None), (False, None), (None, None)),
    ],
)
def test_which_starts_change_the_base(init, name):
    assert config_keys.base_changing_init({"init_lora_weights": init}) == name


def test_a_start_that_is_not_known_is_refused(broken):
    with pytest.raises(AdapterError, match="init_lora_weights is 'hyper', and whether that changes the base weights"):
        read_config(broken(config={"init_lora_weights": "hyper"}), allow_more=True)


@pytest.mark.parametrize("pattern", ["(a+)+$", ".*.*.*.*.*", "a?" * 40])
def test_patterns_that_take_for_ever_are_refused(pattern, broken):
    with pytest.raises(AdapterError, match="of alpha_pattern, the key .* cannot be used: it repeats"):
        read_config(broken(config={"alpha_pattern": {pattern: 4}}))


def test_a_large_value_does_not_fill_the_message(broken):
    folder = broken(config={"use_hira": "x" * 10_000})
    with pytest.raises(AdapterError) as caught:
        read_config(folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "entries",
    [
        {"lora_bias": True, "init_lora_weights": "olora"},  # seed 322 of the benchmark of adapters
        {"lora_bias": True, "use_dora": True},
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
    ],
)
def test_what_peft_itself_would_not_load_is_refused(entries, broken):
    folder = broken(config=entries)
    with pytest.raises(ValueError, match="only supported with|not supported for|cannot be used"):
        LoraConfig.from_pretrained(str(folder))
    with pytest.raises(AdapterError, match="PEFT would not load this adapter"):
        read_config(folder, allow_more=True)
