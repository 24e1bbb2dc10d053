"""Three adapters of each kind, trained and saved by PEFT, and what each adds to the base weights.

The right answer is independent of our reader: each adapter is merged alone into its base by PEFT, and the base's
original weights are subtracted.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.helpers.adapter_folders import SEVEN, small_gpt2, small_llama

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


def one_layer_llama(*, bias: bool = False) -> LlamaForCausalLM:
    """Make the base model of all kinds but those of Conv1D."""
    return small_llama(layers=1, key_value_heads=2, bias=bias)


def load_base(folder):
    """Read a whole model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def move_trained(model, seed):
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
        base = small_gpt2(layers=1) if kind.startswith("conv1d") else one_layer_llama(bias=kind == "lora_bias")
        base.save_pretrained(self.base)
        before = {key: value.clone() for key, value in load_base(self.base).state_dict().items()}
        self.before, self.folders, self.added = before, [], []
        for seed in SEEDS:
            model = get_peft_model(load_base(self.base), LoraConfig(**KINDS[kind], task_type="CAUSAL_LM"))
            move_trained(model, seed)
            model.save_pretrained(root / str(seed))
            self.folders.append(root / str(seed))
            merged = model.merge_and_unload().state_dict()
            self.added.append({key: merged[key] - before[key] for key in before})

    @property
    def mean(self):
        """What the three add, averaged."""
        return {key: sum(added[key] for added in self.added) / len(self.added) for key in self.before}

    def changed(self, folder):
        """What the model of a folder with an adapter, loaded by PEFT, has become."""
        merged = PeftModel.from_pretrained(load_base(self.base), folder).merge_and_unload().state_dict()
        return {key: merged[key] - self.before[key] for key in self.before}


def distance(found, wanted):
    """Return the relative distance over the whole model."""
    difference = sum(float((found[key] - wanted[key]).double().square().sum()) for key in wanted)
    return (difference / sum(float(value.double().square().sum()) for value in wanted.values())) ** 0.5
