"""Merge rules on synthetic adapters of LLaMA's shape, against the dense computation and against peers.

    python benchmarks/merge.py --out results.json              # 7B: 32 layers x 7 projections, three r=8 adapters
    python benchmarks/merge.py --shape 70b --only ours         # 80 layers, 8192/28672
    python benchmarks/merge.py --layers 2 --dense-layers 1     # a short look

Prints seconds, peak memory beside the process's own at the start of a measurement, and ratios; writes them as JSON.
Peers work on a stated subset of layers, and are compared with ours on the same subset. Nothing else should run: the
load is checked first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seedlora.adapters.adapter import WEIGHTS_NAME
from seedlora.adapters.writing import universal_config, write_adapter
from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.into_base import merge_into_base
from seedlora.merge.layers import merge_stacks, merged_updates
from seedlora.merge.registry import make_rule
from seedlora.updates.dense import DenseUpdates
from seedlora.updates.factors import LoRAFactors

#: hidden size, feed-forward size, key/value size, layers
SHAPES = {"7b": (4096, 11008, 4096, 32), "70b": (8192, 28672, 1024, 80), "tiny": (256, 688, 256, 4)}
SEEDS, RANK = 3, 8
EXACT = ("seedlora", "soup", "seedlora_gain", "model_stock", "karcher", "tsv_m", "iso_c", "seedft")
CORE = ("core_ties", "knots_ties", "knots_dare_ties")
ELEMENTWISE = ("ties", "dare_linear", "dare_ties")


def projections(shape: str) -> dict[str, tuple[int, int]]:
    """(D, K) of the seven projections of one layer."""
    hidden, ffn, kv, _ = SHAPES[shape]
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


def make_stacks(shape: str, layers: int) -> dict[str, LoRAFactors]:
    """Adapters whose updates have a pairwise cosine of about 0.3: that of the As times that of the Bs."""
    generator = torch.Generator().manual_seed(0)
    common = 0.3**0.25

    def draw(rows: int, columns: int) -> Tensor:
        shared = torch.randn(1, rows, columns, generator=generator)
        own = torch.randn(SEEDS, rows, columns, generator=generator)
        return (common * shared + (1 - common**2) ** 0.5 * own).mul_(0.02).bfloat16()

    return {
        f"model.layers.{i}.{name}": LoRAFactors(draw(RANK, k), draw(d, RANK))
        for i in range(layers)
        for name, (d, k) in projections(shape).items()
    }


def measured(run: Callable[[], object], repeat: int = 1) -> dict[str, float]:
    """Least seconds of ``repeat`` runs, and peak memory of the first beside what was held before, in MiB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, seconds, peak = memory("VmRSS"), [], 0.0
    for i in range(repeat):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
        if i == 0:
            peak = memory("VmHWM") - before
        gc.collect()
    return {"seconds": min(seconds), "peak_mib": peak}


def memory(field: str) -> float:
    """A field of this process's memory in MiB: VmRSS is held now, VmHWM the peak since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def dense_seedlora(stacks: dict[str, LoRAFactors]) -> None:
    """The paper's equations, layer by layer: materialise, average, match."""
    for stack in stacks.values():
        deltas = stack.to(torch.float32).dense()
        average = deltas.mean(0)
        mu = torch.stack([delta.mean() for delta in deltas]).mean()
        sigma = torch.stack([delta.std() for delta in deltas]).mean()
        sigma * (average - average.mean()) / average.std() + mu


def blockwise(stacks: dict[str, LoRAFactors], method: str) -> None:
    """Every block of the exact dense result, computed and let go."""
    for _, update in merged_updates(stacks, make_rule(method)):
        assert isinstance(update, DenseUpdates)
        for _ in update.blocks():
            pass


def peft_dense(stacks: dict[str, LoRAFactors], method: str) -> None:
    """The same rule by PEFT's helpers, fed with dense updates."""
    from peft.utils import merge_utils

    for stack in stacks.values():
        deltas = list(stack.to(torch.float32).dense())
        if method == "ties":
            merge_utils.ties(deltas, torch.ones(SEEDS), density=0.2)
        else:
            weights = torch.full((SEEDS,), 1 / SEEDS if method == "dare_linear" else 1.0)
            getattr(merge_utils, method)(deltas, weights, density=0.5)


def peft_model(stacks: dict[str, LoRAFactors]) -> nn.Module:
    """A PEFT model of bare linear layers that holds the adapters."""
    from peft import LoraConfig, get_peft_model

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for path, stack in stacks.items():
                d, k = stack.shape
                self.add_module(path.replace(".", "_"), nn.Linear(k, d, bias=False, dtype=torch.bfloat16))

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[path.replace(".", "_") for path in stacks])
    model = get_peft_model(Layers(), config, adapter_name="0", autocast_adapter_dtype=False)
    for n in range(1, SEEDS):
        model.add_adapter(str(n), config)
    for path, stack in stacks.items():
        layer = getattr(model.base_model.model, path.replace(".", "_"))
        for n in range(SEEDS):
            layer.lora_A[str(n)].weight.data = stack.A[n].float()
            layer.lora_B[str(n)].weight.data = stack.B[n].float()
    return model


def peft_merge(model: nn.Module, kind: str) -> None:
    """PEFT's own merge, all layers of the model."""
    names = [str(n) for n in range(SEEDS)]
    options = {"svd_rank": RANK} if kind == "svd" else {}
    model.add_weighted_adapter(names, [1 / SEEDS] * SEEDS, f"merged_{kind}", combination_type=kind, **options)
    model.delete_adapter(f"merged_{kind}")


def mergekit_ties(stacks: dict[str, LoRAFactors]) -> None:
    """TIES with mergekit's trim."""
    from mergekit.sparsify import SparsificationMethod, sparsify

    for stack in stacks.values():
        deltas = torch.stack(
            [sparsify(delta, 0.2, SparsificationMethod.magnitude) for delta in stack.to(torch.float32).dense()]
        )
        agree = deltas.sign() == torch.where(deltas.sum(0) >= 0, 1, -1)
        (deltas * agree).sum(0) / agree.sum(0).clamp_min(1)


def end_to_end(stacks: dict[str, LoRAFactors], method: str, repeat: int) -> dict[str, float]:
    """Three folders in, one out, against reading and writing the same bytes with safetensors alone."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for n in range(SEEDS):
            layers = {path: LoRAFactors(s.A[n : n + 1], s.B[n : n + 1]) for path, s in stacks.items()}
            write_adapter(root / str(n), layers, universal_config(layers, base_model="synthetic"))
        sources = [root / str(n) for n in range(SEEDS)]
        ours = measured(lambda: merge_folders(sources, root / "out", method=method), repeat)

        def alone() -> None:
            for source in sources:
                read = load_file(source / WEIGHTS_NAME)
                sum(float(tensor.view(torch.uint8)[0, 0]) for tensor in read.values())
            save_file(merged, root / "alone.safetensors")
            with (root / "alone.safetensors").open("rb") as handle:
                os.fsync(handle.fileno())

        merged = load_file(root / "out" / WEIGHTS_NAME)
        merged = {key: tensor.clone() for key, tensor in merged.items()}
        floor = measured(alone, repeat)
    return ours | {"floor_seconds": floor["seconds"], "ratio": ours["seconds"] / floor["seconds"]}


def into_base(shape: str, stacks: dict[str, LoRAFactors], shards: int = 4) -> dict[str, float]:
    """A base of one layer per shard with adapters added to its weights: peak memory against the largest shard."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        weights, sizes = {}, []
        for i in range(shards):
            layer = {
                f"model.layers.{i}.{name}.weight": torch.zeros(d, k, dtype=torch.bfloat16)
                for name, (d, k) in projections(shape).items()
            }
            file = f"model-{i}.safetensors"
            (root / "base").mkdir(exist_ok=True)
            save_file(layer, root / "base" / file)
            weights |= dict.fromkeys(layer, file)
            sizes.append((root / "base" / file).stat().st_size / 2**20)
        (root / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
        for n in range(SEEDS):
            few = {p: s for p, s in stacks.items() if int(p.split(".")[2]) < shards}
            layers = {p: LoRAFactors(s.A[n : n + 1], s.B[n : n + 1]) for p, s in few.items()}
            write_adapter(root / str(n), layers, universal_config(layers, base_model="synthetic"))
        sources = [root / str(n) for n in range(SEEDS)]
        del layer
        found = measured(lambda: merge_into_base(sources, root / "base", root / "out"))
    return found | {"shard_mib": max(sizes)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--layers", type=int, help="of the model; default: all")
    parser.add_argument("--dense-layers", type=int, default=1, help="layers for the dense computation and PEFT's cat")
    parser.add_argument("--only", choices=["ours"], help="leave the peers out")
    parser.add_argument("--slow", action="store_true", help="also PEFT's svd, on one projection")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--busy", action="store_true", help="measure although the machine is busy")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if (load := os.getloadavg()[0]) > 0.7 and not options.busy:
        raise SystemExit(f"the load is {load:.2f}: timings would mean nothing; wait, or say --busy")
    torch.set_num_threads(options.threads)
    layers = options.layers or SHAPES[options.shape][3]
    before = memory("VmRSS")
    stacks = make_stacks(options.shape, layers)
    results: dict[str, object] = {
        "shape": options.shape,
        "layers": layers,
        "adapters": SEEDS,
        "r": RANK,
        "dtype": "bfloat16",
        "threads": options.threads,
        "torch": torch.__version__,
        "adapters_mib": memory("VmRSS") - before,
    }
    print(f"{options.shape}, {layers} layers x 7, {SEEDS} adapters of r={RANK}, {results['adapters_mib']:.0f} MiB")
    names = list(projections(options.shape))
    subset = {path: stack for path, stack in stacks.items() if int(path.split(".")[2]) < options.dense_layers}
    few = {f"model.layers.0.{name}": stacks[f"model.layers.0.{name}"] for name in (names[0], names[5])}

    def report(name: str, found: dict[str, float]) -> dict[str, float]:
        results[name] = found
        print(f"  {name:42}" + "  ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
        return found

    def fused(method: str, **rank: int) -> None:
        forgetful = {path: LoRAFactors(s.A, s.B) for path, s in stacks.items()}  # nothing remembered
        merge_stacks(forgetful, make_rule(method, rank))

    whole = {name: report(name, measured(lambda m=name: fused(m), options.repeat)) for name in EXACT + CORE}
    report("seedlora to rank 8", measured(lambda: fused("seedlora", rank=RANK), options.repeat))
    report("seedlora, into a base of 4 shards", into_base(options.shape, stacks))
    for name in ("seedlora", "knots_ties"):
        report(f"{name}, folders to folder", end_to_end(stacks, name, options.repeat))
    ours = {
        m: report(f"{m} by blocks, q and up of layer 0", measured(lambda m=m: blockwise(few, m), options.repeat))
        for m in ELEMENTWISE
    }
    if options.only is None:
        share = len(stacks) / len(subset)
        dense = report(f"dense seedlora, {options.dense_layers} layers", measured(lambda: dense_seedlora(subset)))
        for name, found in whole.items():
            report(f"dense seedlora / {name}", {"ratio": dense["seconds"] * share / found["seconds"]})
        for m in ELEMENTWISE:
            peer = report(f"PEFT {m}, q and up of layer 0", measured(lambda m=m: peft_dense(few, m)))
            report(f"PEFT {m} / ours", {"ratio": peer["seconds"] / ours[m]["seconds"]})
        model = peft_model(subset)
        peer = report(f"PEFT cat, {options.dense_layers} layers", measured(lambda: peft_merge(model, "cat")))
        report("PEFT cat / soup", {"ratio": peer["seconds"] * share / whole["soup"]["seconds"]})
        if options.slow:
            one = {path: stack for path, stack in few.items() if path.endswith("q_proj")}
            model = peft_model(one)
            peer = report("PEFT svd to rank 8, q of layer 0", measured(lambda: peft_merge(model, "svd")))
            mine = report(
                "soup to rank 8, q of layer 0",
                measured(lambda: merge_stacks(one, make_rule("soup", {"rank": RANK})), options.repeat),
            )
            report("PEFT svd / ours", {"ratio": peer["seconds"] / mine["seconds"]})
        try:
            peer = report("mergekit ties, q and up of layer 0", measured(lambda: mergekit_ties(few)))
            report("mergekit ties / ours", {"ratio": peer["seconds"] / ours["ties"]["seconds"]})
        except ImportError:
            print("  mergekit is not installed: left out")
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
