"""What is used of transformers beyond its documentation is still there: one test for each use, named after it."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

from transformers import AutoConfig, AutoModelForCausalLM, configuration_utils

from seedlora.utils import transformers_internals


class TestTransformers:
    def test_attention_implementation(self, tiny_llama):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="sdpa")
        assert transformers_internals.attention_implementation(model.config) == "sdpa"
        model.set_attn_implementation("eager")
        assert transformers_internals.attention_implementation(model.config) == "eager"

    def test_supports_attention(self, tiny_llama):
        config = AutoConfig.from_pretrained(tiny_llama)
        names = ("sdpa", "eager", "flash_attention_2", "flex_attention")
        assert all(transformers_internals.supports_attention(config, name) for name in names)
        assert not transformers_internals.supports_attention(AutoConfig.for_model("codegen"), "flex_attention")
        assert transformers_internals.supports_attention(AutoConfig.for_model("codegen"), "eager")

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
