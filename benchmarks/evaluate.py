"""Generation by all adapters at once against one adapter after the other: tokens per second, and their ratio.

    python benchmarks/evaluate.py [--base_model embedded] [--adapters 4] [--items 1 8 16] [--new-tokens 64]

Random adapters of rank 8 over one base; the same prompts, exactly ``--new-tokens`` each; the runs alternate, and the
best of three is taken. ``stacked`` is one forward over the rows of all, ``one by one`` the same code with one adapter
routed, ``peft`` is transformers' generate through PEFT's own forward. Nothing else should run: the load is printed.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from peft import LoraConfig, get_peft_model

from seedlora.adapters.stack import AdapterStack
from seedlora.evaluation.generate import generate_greedily
from seedlora.model.loading import eval_mode, fast_dtype, load_model, load_tokenizer

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", default="embedded")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--items", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads, {fast_dtype()}")
    tokenizer = load_tokenizer(options.base_model)
    names = [f"a{i}" for i in range(options.adapters)]
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=SEVEN, init_lora_weights=False)
    torch.manual_seed(0)
    base = load_model(options.base_model, dtype=fast_dtype())
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    text = "Below is an instruction that describes a task.\n\n### Instruction:\nWhat is {} + {}?\n\n### Response:"
    for items in options.items:
        rows = [tokenizer(text.format(i, 10**i))["input_ids"] for i in range(items)]
        length = {"max_new_tokens": options.new_tokens}
        stack = AdapterStack(model)

        def stacked(names=names, rows=rows, stack=stack, length=length) -> None:
            with stack.frozen():
                stack.route(names)
                generate_greedily(base, rows * len(names), blocks=len(names), ended=lambda *_: False, **length)

        def one_by_one(stacked=stacked) -> None:
            for name in names:
                stacked([name])

        def peft(rows=rows, stack=stack, length=length) -> None:
            forwards = [vars(layer).pop("forward") for layer in stack.layers.values()]
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
            for name in names:
                model.set_adapter(name)
                free = {"do_sample": False, "min_new_tokens": options.new_tokens, "pad_token_id": 0, "use_cache": True}
                model.generate(input_ids=ids, attention_mask=mask, **free, **length)
            for layer, forward in zip(stack.layers.values(), forwards, strict=True):
                vars(layer)["forward"] = forward

        best = dict.fromkeys(("stacked", "one by one", "peft"), float("inf"))
        with eval_mode(model), torch.no_grad():
            for _ in range(3):
                for name, run in (("stacked", stacked), ("one by one", one_by_one), ("peft", peft)):
                    started = time.perf_counter()
                    run()
                    best[name] = min(best[name], time.perf_counter() - started)
        tokens = options.adapters * items * options.new_tokens
        rates = {name: tokens / seconds for name, seconds in best.items()}
        told = ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items())
        ratios = [rates["stacked"] / rates[name] for name in ("one by one", "peft")]
        print(
            f"{options.adapters} adapters x {items} items: {told}; ratios {ratios[0]:.2f}, {ratios[1]:.2f}", flush=True
        )


if __name__ == "__main__":
    main()
