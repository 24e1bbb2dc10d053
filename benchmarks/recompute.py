"""Count what recomputing saves and costs: bytes alive and operations of the decoder layers, by mode, without computing.

    python benchmarks/recompute.py                      # the shape of LLaMA-2-7B, three seeds, 8 rows of 512 each
    python benchmarks/recompute.py --model smollm2 --rows 4

Forward and backward run on tensors without values, so that a 7B step takes seconds on any machine: every operation is
seen, with its shapes. Bytes are of storages that are alive, beside weights; operations are those of products and of
attention. The estimate is that of ``seedlora.run.memory`` for the same step, less what belongs to the head.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import shapes  # this and the next are beside this file
import torch
from live_bytes import LiveBytes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from seedlora.model.embedded import embedded_folder
from seedlora.model.recomputation import RECOMPUTATIONS
from seedlora.run.memory import step_memory
from seedlora.training.building import stack_replicas
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import Replica
from seedlora.training.starting_points import FrozenBase


def measure(folder: str, mode: str, *, seeds: int, rows: int, tokens: int, dtype: str = "bfloat16") -> dict[str, Any]:
    """Bytes and operations of a forward and backward of the decoder layers."""
    options = SeedLoRAModule(folder, r=8, dtype=dtype, gradient_checkpointing=mode).options
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=options.base_dtype).requires_grad_(False)
        base.config.use_cache = False
        built = stack_replicas(FrozenBase(base, {}), [Replica(f"seed_{i}", i, i) for i in range(seeds)], options)
    built.model.train()
    with FakeTensorMode():
        put_on_cpu(built.model)
        ids = torch.zeros(seeds * rows, tokens, dtype=torch.long)
        built.stack.route([f"seed_{i}" for i in range(seeds)])

        decoder = built.model.get_base_model().base_model
        # The kernel knows that attention is causal; without values transformers would make it a mask.
        vars(sys.modules[type(decoder).__module__])["create_causal_mask"] = lambda **_: None

        def forward() -> torch.Tensor:
            return decoder(input_ids=ids).last_hidden_state

        with LiveBytes(built.model.parameters()) as live:
            hidden = forward()
            kept = live.now
            hidden.backward(torch.ones_like(hidden))
            del hidden
        # Together with the other it would keep what it sees.
        with FlopCounterMode(display=False) as counter:
            hidden = forward()
            hidden.backward(torch.ones_like(hidden))
    size = {"tokens": ids.numel(), "supervised": 0, "longest": tokens}
    estimate = step_memory(options, seeds, **size, device=torch.device("cuda"))
    weights = sum(d * k for d, k in options.outline.linear.values())
    total = counter.get_total_flops()
    gradients = 4 * seeds * sum(p.numel() for p in built.stack.parameters("seed_0"))
    return {
        "mode": mode,
        "kept": kept,
        "peak": live.peak - gradients,
        "estimate": estimate.activations,
        "operations": total,
        "per_weight": total / weights / ids.numel(),
    }


def put_on_cpu(model: nn.Module) -> None:
    """Replace the tensors of a model on the meta device by such of the CPU, which a fake mode leaves without values."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                made.setdefault(id(p), nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad))
                module._parameters[name] = made[id(p)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def main() -> None:
    """Print a table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2_7b", help=f"smollm2, or one of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8, help="of each seed")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    records = []
    with tempfile.TemporaryDirectory() as root:
        folder = str(embedded_folder())
        if options.model in shapes.SHAPES:
            folder = str(shapes.config_folder(options.model, Path(root)))
        for mode in RECOMPUTATIONS:
            sizes = {"seeds": options.seeds, "rows": options.rows, "tokens": options.tokens}
            found = measure(folder, mode, **sizes, dtype=options.dtype)
            records.append(found)
            kept, peak, estimated = (found[key] / 2**30 for key in ("kept", "peak", "estimate"))
            print(
                f"{mode:10} kept {kept:6.2f} GiB, peak {peak:6.2f}, estimated {estimated:6.2f} "
                f"({estimated / peak:.2f}); {found['operations'] / 1e12:7.1f} T operations, "
                f"{found['per_weight']:.2f} per frozen weight and token",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
