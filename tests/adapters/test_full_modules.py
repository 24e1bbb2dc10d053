"""Modules that are trained in full, in the stacked forward; the reference is PEFT's own ``modules_to_save``."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from seedlora.run.memory import trainable_parameters
from tests.helpers.full_modules import ENDS, save_replica
from tests.helpers.models import ROWS, SEEDS, moved_in_all
from tests.helpers.precision import SAME, plain_model

CHOICES = {
    "head and embedding": ("llama", ENDS, ["q_proj", "up_proj"]),
    "embedding": ("llama", ["embed_tokens"], ["q_proj", "up_proj"]),
    "norms and layers": ("llama", ["norm", "layers.0.input_layernorm", "o_proj"], ["q_proj", "up_proj"]),
    "tied": ("gemma", ["lm_head"], ["q_proj", "up_proj"]),
    "positions, Conv1D, biases, tied": ("gpt2", ["wte", "wpe", "ln_f", "h.1.mlp.c_fc"], ["c_attn"]),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_each_block_has_its_own_weights_and_peft_loads_them(model_of, tmp_path, choice):
    family, names, targets = CHOICES[choice]
    folder = model_of(family)
    module = moved_in_all(folder, *SEEDS, modules_to_save=names, target_modules=targets)
    module.stack.route(["seed_202", None, "seed_11"])
    stacked = module.model(input_ids=ROWS).logits.chunk(3)
    torch.testing.assert_close(stacked[1], plain_model(folder)(input_ids=ROWS[2:4]).logits, atol=SAME, rtol=SAME)
    for name, rows, logits in (("seed_202", ROWS[:2], stacked[0]), ("seed_11", ROWS[4:], stacked[2])):
        save_replica(module, name, tmp_path / name)
        theirs = PeftModel.from_pretrained(plain_model(folder), tmp_path / name)
        torch.testing.assert_close(logits, theirs(input_ids=rows).logits, atol=SAME, rtol=SAME)
        module.stack.load("read", module.stack.factors([name]), modules=module.stack.full_weights(name))
        module.stack.route([None, "read"])
        read = module.model(input_ids=torch.cat([rows, rows])).logits[2:]
        torch.testing.assert_close(read, logits, atol=SAME, rtol=SAME)
    assert trainable_parameters(module.options) == sum(p.numel() for p in module.stack.parameters("seed_42"))


def test_rows_that_are_not_those_of_the_batch_are_refused(tiny_llama):
    module = moved_in_all(tiny_llama, 1, 2, modules_to_save=["norm"])
    norm = module.stack.modules["model.norm"]
    module.stack.route(["seed_1", "seed_2"])
    module.model(input_ids=ROWS)
    with pytest.raises(RuntimeError, match="model.norm: 4 rows are not the 6 of the batch, in 2 blocks"):
        norm(torch.zeros(4, 32))
