"""Folders with whatever in them end in AdapterError and in nothing else."""

from __future__ import annotations

import contextlib
import json
import shutil

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from seedlora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError
from seedlora.adapters.reading import read_adapter
from seedlora.adapters.servers import base_shapes, serving_problems
from seedlora.model.weight_files import WeightFiles
from tests.helpers.adapter_folders import KEY, V

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
            adapter = read_adapter(base_and_pissa / "a", base=WeightFiles(base_and_pissa / "base"))
            assert all(bool(factors.B.isfinite().all()) for factors in adapter.layers.values())
        shapes = base_shapes(base_and_pissa / "base")
        assert shapes is None or all(len(shape) == 2 for shape in shapes.values())
    finally:
        file.write_bytes(before)


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
