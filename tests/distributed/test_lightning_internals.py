"""What is used of libraries beyond their documentation is still there: one test for each use, named after it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoConfig, AutoModelForCausalLM, configuration_utils

from seedlora.cli.argparse_internals import option_groups, option_names
from seedlora.distributed import deepspeed_internals, lightning_internals
from seedlora.distributed.strategies import CPUDeepSpeedStrategy, FSDP2Strategy
from seedlora.model.peft_internals import (
    FULL_MODULE_ATTRIBUTES,
    LORA_LAYER_ATTRIBUTES,
    dequantize_weight,
    no_target_modules,
    pattern_key,
)
from seedlora.model.quantization import quantize_layer
from seedlora.utils import torch_internals, transformers_internals


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet, **options)


class TestTorch:
    def test_write_count(self):
        tensor = torch.zeros(2)
        before = torch_internals.write_count(tensor)
        assert torch_internals.write_count(tensor) == before
        tensor.add_(1)
        assert torch_internals.write_count(tensor) > before

    def test_tensors_within(self):
        a, b, c = torch.zeros(3, 1).unbind()
        assert [id(x) for x in torch_internals.tensors_within((a, [b, 1]), {"x": c})] == [id(a), id(b), id(c)]

    def test_mark_rows_static(self):
        tensor = torch.zeros(2, 3)
        torch_internals.mark_rows_static(tensor)
        assert tensor._dynamo_static_indices == {0}

    def test_raise_recompile_limit(self):
        config = torch._dynamo.config
        with config.patch(recompile_limit=8):
            torch_internals.raise_recompile_limit(9)
            assert config.recompile_limit == 9
            torch_internals.raise_recompile_limit(3)
            assert config.recompile_limit == 9

    def test_cpu_multiplies_bfloat16(self):
        assert torch_internals.cpu_multiplies_bfloat16() in (True, False)


class TestTransformers:
    def test_attention_implementation(self, tiny_llama):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="sdpa")
        assert transformers_internals.attention_implementation(model.config) == "sdpa"
        model.set_attn_implementation("eager")
        assert transformers_internals.attention_implementation(model.config) == "eager"

    def test_set_model_name(self, tiny_llama):
        config = AutoConfig.from_pretrained(tiny_llama)
        transformers_internals.set_model_name(config, "chosen")
        assert config.name_or_path == "chosen"

    def test_hub_commit(self, tiny_llama):
        config = AutoConfig.from_pretrained(tiny_llama)
        assert transformers_internals.hub_commit(config) is None
        # The hub's reader fills in the same attribute.
        assert '"_commit_hash"' in inspect.getsource(configuration_utils)
        config._commit_hash = "0123abc"
        assert transformers_internals.hub_commit(config) == "0123abc"

    def test_unit_layer_classes(self, tiny_llama):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        assert transformers_internals.unit_layer_classes(model) == {"LlamaDecoderLayer"}

    def test_mark_quantized(self):
        from peft.tuners.lora import LoraModel

        model = SimpleNamespace()
        transformers_internals.mark_quantized(model, four_bits=True, eight_bits=False)
        source = inspect.getsource(LoraModel)
        for name, value in vars(model).items():
            assert value is (name == "is_loaded_in_4bit")
            assert f'"{name}"' in source  # PEFT reads it

    def test_render_jinja_template(self):
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, _ = render_jinja_template(
            [[{"role": "user", "content": "a"}]],
            chat_template="{{ messages[0].content }}{{ eos_token }}{% if add_generation_prompt %}!{% endif %}",
            add_generation_prompt=True,
            eos_token="<e>",
        )
        assert rendered == ["a<e>!"]


class TestPEFT:
    def test_pattern_key(self):
        assert pattern_key({"q_proj": 4}, "model.layers.0.q_proj") == "q_proj"
        assert pattern_key({r"layers\.0\..*": 4}, "model.layers.0.q_proj") == r"layers\.0\..*"
        assert pattern_key({"v_proj": 4}, "model.layers.0.q_proj") == "model.layers.0.q_proj"

    def test_no_target_modules(self, tiny_llama):
        from peft import LoraConfig, get_peft_model

        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        config = LoraConfig(target_modules=no_target_modules(), modules_to_save=["lm_head"])
        trained = [
            name for name, parameter in get_peft_model(model, config).named_parameters() if parameter.requires_grad
        ]
        assert [name.split(".")[-4] for name in trained] == ["lm_head"]

    @pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
    def test_dequantize_weight(self, kind):
        layer = torch.nn.Linear(64, 64, bias=False)
        weight = layer.weight.detach().clone()
        stored = layer if kind == "none" else quantize_layer(layer, kind)
        tolerance = {"none": 0, "nf4": 0.03, "int8": 0.002}[kind]
        torch.testing.assert_close(dequantize_weight(stored).float(), weight, atol=tolerance, rtol=0)

    @pytest.mark.parametrize("name", LORA_LAYER_ATTRIBUTES)
    def test_lora_layer_attributes(self, tiny_llama, name):
        from peft import LoraConfig, get_peft_model

        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
        layer = wrapped.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        assert hasattr(layer, name)

    @pytest.mark.parametrize("name", FULL_MODULE_ATTRIBUTES)
    def test_full_module_attributes(self, tiny_llama, name):
        from peft import LoraConfig, get_peft_model

        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        assert hasattr(wrapped.get_submodule("base_model.model.lm_head"), name)


class TestBitsandbytes:
    """What :func:`seedlora.model.quantization.quantize_layer` sets and reads."""

    def test_quantize_layer_in_4_bits(self):
        layer = quantize_layer(torch.nn.Linear(64, 64, bias=False), "nf4")
        assert "support_avx512bf16_for_cpu" in inspect.getsource(type(layer))
        assert layer.weight.quant_state.nested

    def test_quantize_layer_in_8_bits(self):
        layer = quantize_layer(torch.nn.Linear(64, 32, bias=False), "int8")
        assert layer.weight.SCB.shape == (32,)


class TestDeepSpeed:
    def test_skip_shared_memory_extension(self):
        # Of DeepSpeed's own, in a process of its own: it asks what can be built, once.
        lines = (
            "import os; os.environ['DS_ACCELERATOR'] = 'cpu'",
            "from seedlora.distributed.deepspeed_internals import skip_shared_memory_extension",
            "skip_shared_memory_extension()",
            "import deepspeed, importlib, inspect; backend = importlib.import_module('deepspeed.comm.torch')",
            "assert deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] is False",
            "assert 'deepspeed.ops.__compatible_ops__.get' in inspect.getsource(backend)",
        )
        done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_is_partitioned_parameter(self):
        from deepspeed.runtime.zero import partition_parameters

        parameter = torch.nn.Parameter(torch.zeros(2))
        assert not deepspeed_internals.is_partitioned_parameter(parameter)
        parameter.ds_id = 0
        assert deepspeed_internals.is_partitioned_parameter(parameter)
        assert "param.ds_id = " in inspect.getsource(partition_parameters)

    def test_is_last_micro_batch(self):
        from deepspeed.runtime.engine import DeepSpeedEngine

        assert callable(DeepSpeedEngine.is_gradient_accumulation_boundary)
        assert isinstance(CPUDeepSpeedStrategy.deepspeed_engine, property)
        engine = SimpleNamespace(is_gradient_accumulation_boundary=lambda: True)
        assert deepspeed_internals.is_last_micro_batch(SimpleNamespace(deepspeed_engine=engine))

    def test_local_gradient_under_zero_3(self):
        from deepspeed.runtime.zero import stage3

        assert "p._z3_optimizer = self" in inspect.getsource(stage3)
        method = stage3.DeepSpeedZeroOptimizer_Stage3._get_fp32_grad_state_partition
        assert list(inspect.signature(method).parameters) == ["self", "param", "release_swap_buffers"]

    def test_local_gradient_under_zero_2(self):
        from deepspeed.utils import mixed_precision_linkage
        from deepspeed.utils.tensor_fragment import tensor_fragment

        source = inspect.getsource(mixed_precision_linkage)
        for name in ("_hp_mapping", "_index_in_param_group"):
            assert f"lp_param.{name} = " in source
        assert "_hp_mapping = None" in source  # of a parameter that is another rank's
        method = tensor_fragment.get_lp_grad_fragment
        assert len(inspect.signature(method).parameters) == 2

    def test_destroy_engine(self):
        from deepspeed.runtime.engine import DeepSpeedEngine

        assert callable(DeepSpeedEngine.destroy)
        ended = []
        module = torch.nn.Linear(1, 1)
        deepspeed_internals.destroy_engine(module)
        module.destroy = lambda: ended.append(True)
        deepspeed_internals.destroy_engine(module)
        assert ended == [True]


class TestLightning:
    def test_attached_trainer(self):
        module = BoringModel()
        assert lightning_internals.attached_trainer(module) is None
        chosen = trainer(fast_dev_run=True)
        chosen.fit(module)
        assert lightning_internals.attached_trainer(module) is chosen

    @pytest.mark.parametrize("wanted", [True, False])
    def test_uses_distributed_sampler(self, wanted):
        assert lightning_internals.uses_distributed_sampler(trainer(use_distributed_sampler=wanted)) is wanted

    def test_validates_after_batch(self):
        seen = []

        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer, *_):
                seen.append(lightning_internals.validates_after_batch(trainer))

        limits = {"limit_train_batches": 4, "limit_val_batches": 1, "num_sanity_val_steps": 0}
        trainer(max_epochs=1, val_check_interval=2, callbacks=[Watch()], **limits).fit(BoringModel())
        assert seen == [False, True, False, True]

    def test_validates_after_batch_never_without_validation_rows(self):
        assert not lightning_internals.validates_after_batch(trainer(limit_val_batches=0))

    def test_started_processes(self):
        from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

        assert lightning_internals.started_processes(trainer().strategy) == ()
        launcher = _SubprocessScriptLauncher(cluster_environment=None, num_processes=1, num_nodes=1)
        assert lightning_internals.started_processes(SimpleNamespace(launcher=launcher)) == []

    def test_registered_options(self):
        assert lightning_internals.registered_options("deepspeed_stage_2")["stage"] == 2

    def test_share_data_alone(self):
        strategy = FSDP2Strategy()
        strategy.num_nodes, strategy.parallel_devices = 2, [torch.device("cpu", i) for i in range(3)]
        lightning_internals.share_data_alone(strategy)
        source = inspect.getsource(ModelParallelStrategy.setup_environment)
        for name, value in (("_data_parallel_size", 6), ("_tensor_parallel_size", 1)):
            assert getattr(strategy, name) == value
            assert f"self.{name}" in source

    def test_set_up_without_gpu(self):
        from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

        # Nothing is passed by but the refusal.
        statements = inspect.getsource(DeepSpeedStrategy.setup_environment).strip().splitlines()
        assert statements[-1].strip() == "super().setup_environment()"
        assert issubclass(DeepSpeedStrategy, DDPStrategy)
        assert sum("raise " in line for line in statements) == 1


class TestArgparse:
    def parser(self, kind=LightningArgumentParser):
        parser = kind()
        parser.add_argument("--one", type=int)
        parser.add_argument_group("Some").add_argument("--two", type=int, help="the second")
        return parser

    def test_option_names(self):
        assert {"--help", "--one", "--two"} <= set(option_names(self.parser()))

    def test_option_groups(self):
        groups = {}

        class Parser(LightningArgumentParser):
            def format_help(self):
                groups.update({title: (names, text) for title, names, text in option_groups(self)})
                return ""

        with pytest.raises(SystemExit):
            self.parser(Parser).parse_args(["--help"])
        names, text = groups["Some"]
        assert names == ["--two"]
        assert text.startswith("Some:\n")
        assert "the second" in text


def test_dataset_fingerprint():
    import datasets

    from seedlora.datamodules.sources import dataset_fingerprint

    rows = datasets.Dataset.from_dict({"a": [1, 2]})
    assert dataset_fingerprint(rows) == dataset_fingerprint(datasets.Dataset.from_dict({"a": [1, 2]}))
    assert dataset_fingerprint(rows) != dataset_fingerprint(rows.select([0]))
