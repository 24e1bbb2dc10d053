"""Training speed: three seeds as one stack, against one seed after the other in three other ways.

    python benchmarks/train.py                                    # both models, micro-batches 1, 4, 16, short rows
    python benchmarks/train.py --tokens 512 --micro-batch 1 4     # long rows
    python benchmarks/train.py --tokens mixed --micro-batch 4     # rows of many lengths, padded
    python benchmarks/train.py --seeds 1                          # one seed alone
    python benchmarks/train.py --stack 1 2 4 8 --plot stack.svg   # how the cost of a step grows with the seeds
    python benchmarks/train.py --profile --tokens 512 --micro-batch 1   # where the time of a stacked step goes
    python benchmarks/train.py --model llama2_7b --tokens 512 --micro-batch 8 --checkpointing   # on a GPU of 80 GB

Same rows, tokens, ranks, optimizer and dtype for all, in one process, in turns, so that a busy machine is as busy for
each; what is printed is the median over turns of the seconds for one step of all seeds, and ratios of the same turn.

- stack: the seeds as one stack (Lightning, this project)
- compiled: the same with ``--model.compile inductor``; only if asked for
- passes: the same with one seed at a time
- trainer: Hugging Face's Trainer with PEFT, once per seed
- plain: a PyTorch loop with PEFT, once per seed

Rows of mixed lengths come in optimizer steps of several micro-batches. All pad a micro-batch to its longest row; this
project's data modules sort the rows of a step by length before, which changes neither the rows nor the gradient, and a
stack pads to the longest row of all its seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import shapes  # benchmarks/shapes.py, which is beside this file
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.model.embedded import EMBEDDED
from seedlora.model.loading import fast_dtype, resolve_base_model
from seedlora.model.recomputation import RECOMPUTATIONS
from seedlora.training.model_options import PROJECTIONS
from seedlora.training.module import SeedLoRAModule

SEEDS = (11, 42, 202)
RANK, ALPHA, RATE = 8, 16, 2e-4
#: of both models
VOCABULARY = 49152
#: tokens of a row: (all, supervised); a short row is a two-digit sum with its answer, mixed ones are up to so long
ROWS = {"short": (29, 4), "512": (512, 256), "mixed": (512, 256)}
#: The shortest of mixed rows, and the micro-batches of their optimizer steps.
SHORTEST, ACCUMULATED = 32, 4
METHODS = ("stack", "compiled", "passes", "trainer", "plain")
CUDA = torch.cuda.is_available()
#: Steps of a fit that are not counted: a GPU has more to get ready.
WARM_UP = 3 if CUDA else 1
MODELS = ("smollm2", *shapes.SHAPES)


def now() -> float:
    """Seconds, when what was asked of the GPU is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def accumulated(kind: str) -> int:
    """Micro-batches of an optimizer step."""
    return ACCUMULATED if kind == "mixed" else 1


def rows_of(kind: str, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random token ids and labels of shape (rows, T), and the tokens of each row; what follows them is padding."""
    tokens, supervised = ROWS[kind]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, 30000, (rows, tokens), generator=generator)
    lengths = torch.full((rows,), tokens)
    if kind == "mixed":
        lengths = torch.randint(SHORTEST, tokens + 1, (rows,), generator=generator)
    place, end = torch.arange(tokens), lengths[:, None]
    scored = (place < end) & (place >= end - supervised * end // tokens)
    return ids.where(place < end, 0), ids.where(scored, -100), lengths


def micro_batches(kind: str, batch: int, seed: int, *, by_length: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The micro-batches of one optimizer step of one seed: ids and labels (b, T), and lengths (b,)."""
    ids, labels, lengths = rows_of(kind, batch * accumulated(kind), seed)
    order = lengths.argsort(stable=True) if by_length else torch.arange(len(lengths))
    parts = [(ids[part], labels[part], lengths[part]) for part in order.split(batch)]
    return [(i[:, : n.max()], label[:, : n.max()], n) for i, label, n in parts]


def tokens_of(kind: str, batch: int, seeds: tuple[int, ...], steps: int) -> float:
    """Tokens of one optimizer step of all seeds, padding not counted, on average."""
    drawn = (rows_of(kind, batch * accumulated(kind), seed * 1000 + step) for seed in seeds for step in range(steps))
    return sum(int(lengths.sum()) for *_, lengths in drawn) / steps


class StackedRows(pl.LightningDataModule):
    """The batches that the ensemble's data modules give, of random rows."""

    def __init__(self, kind: str, batch: int, steps: int) -> None:
        super().__init__()
        self.kind, self.batch, self.steps = kind, batch, steps
        self.seeds: tuple[int, ...] = SEEDS[:1]

    def train_dataloader(self) -> DataLoader[Any]:
        """One batch (N, b, T) per micro-batch."""

        def batches(step: int) -> list[dict[str, Any]]:
            seeds = [micro_batches(self.kind, self.batch, seed * 1000 + step, by_length=True) for seed in self.seeds]
            items = torch.tensor([sum(int((labels != -100).sum()) for _, labels, _ in micro) for micro in seeds])
            found = []
            for parts in zip(*seeds, strict=True):
                lengths = tuple(ids.shape[1] for ids, _, _ in parts)
                ids, labels = (
                    torch.stack(
                        [
                            nn.functional.pad(part[i], (0, max(lengths) - part[i].shape[1]), value=empty)
                            for part in parts
                        ]
                    )
                    for i, empty in enumerate((0, -100))
                )
                found.append({"input_ids": ids, "labels": labels, "lengths": lengths, "num_items": items})
            return found

        return DataLoader([batch for step in range(self.steps) for batch in batches(step)], batch_size=None)

    def val_dataloader(self) -> list[Any]:
        """Return nothing to validate on."""
        return []


class Clock(pl.Callback):
    """The seconds of each micro-batch, the optimizer's included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        self.start = now()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop."""
        self.seconds.append(now() - self.start)


class Profiled(pl.Callback):
    """Profiles the last micro-batch of a fit."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.profiler = torch.profiler.profile(record_shapes=True)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, i: int) -> None:
        """Start."""
        if i == self.last:
            self.profiler.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        """Stop."""
        if i == self.last:
            now()  # what it has asked of a GPU belongs to it
            self.profiler.stop()


def lightning_steps(
    model: str,
    seeds: tuple[int, ...],
    stack: int,
    kind: str,
    batch: int,
    steps: int,
    callbacks: tuple[pl.Callback, ...] = (),
    **options: Any,
) -> list[float]:
    """Seconds of every step of all seeds: one fit per stack of them."""
    module = SeedLoRAModule(model, r=RANK, lora_alpha=ALPHA, learning_rate=RATE, lr_scheduler="constant", **options)
    total: list[float] = [0.0] * steps
    with tempfile.TemporaryDirectory() as folder:
        ensemble = SeedEnsembleCallback(
            seeds, merge="none", dirpath=Path(folder) / "run", budget="full", stack_size=stack
        )
        while ensemble.pending:
            clock = Clock()
            trainer = pl.Trainer(
                max_epochs=1,
                accelerator="gpu" if CUDA else "cpu",
                devices=1,
                gradient_clip_val=1.0,
                accumulate_grad_batches=accumulated(kind),
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                use_distributed_sampler=False,
                callbacks=[ensemble, clock, *callbacks],
            )
            trainer.fit(module, datamodule=StackedRows(kind, batch, steps))
            micro = accumulated(kind)
            taken = [sum(clock.seconds[i : i + micro]) for i in range(0, steps * micro, micro)]
            total = [a + b for a, b in zip(total, taken, strict=True)]
    return total


def peft_model(model: str, seed: int, *, checkpointing: bool) -> nn.Module:
    """What a user of PEFT trains."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(resolve_base_model(model), dtype=fast_dtype())
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=list(PROJECTIONS))
    peft = get_peft_model(base.to("cuda" if CUDA else "cpu"), config).train()
    if checkpointing:
        peft.gradient_checkpointing_enable({"use_reentrant": False})
    return peft


def plain_steps(
    model: str, seeds: tuple[int, ...], kind: str, batch: int, steps: int, *, checkpointing: bool
) -> list[float]:
    """A PyTorch loop per seed."""
    total = [0.0] * steps
    for seed in seeds:
        peft = peft_model(model, seed, checkpointing=checkpointing)
        device = next(peft.parameters()).device
        parameters = [p for p in peft.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        for step in range(steps):
            parts = micro_batches(kind, batch, seed * 1000 + step, by_length=False)
            start = now()
            for part in parts:
                ids, labels, lengths = (t.to(device) for t in part)
                loss = peft(input_ids=ids, attention_mask=mask(ids, lengths), labels=labels).loss / len(parts)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            float(loss)
            total[step] += now() - start
    return total


def mask(ids: Tensor, lengths: Tensor) -> Tensor:
    """1 for a token, 0 for padding."""
    return (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()


def trainer_steps(
    model: str, seeds: tuple[int, ...], kind: str, batch: int, steps: int, *, checkpointing: bool
) -> list[float]:
    """Hugging Face's Trainer per seed."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    total = [0.0] * steps

    class Rows(Dataset[dict[str, Tensor]]):
        def __init__(self, seed: int) -> None:
            parts = [rows_of(kind, batch * accumulated(kind), seed * 1000 + step) for step in range(steps)]
            self.ids, self.labels, self.lengths = (torch.cat(tensors) for tensors in zip(*parts, strict=True))

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {
                "input_ids": self.ids[i],
                "attention_mask": mask(self.ids, self.lengths[i : i + 1])[0],
                "labels": self.labels[i],
            }

    def to_the_longest(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        longest = int(batch["attention_mask"].sum(1).max())
        return {key: tensor[:, :longest] for key, tensor in batch.items()}

    class Stopwatch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.start = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            total[state.global_step - 1] += now() - self.start

    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulated(kind),
                num_train_epochs=1,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
                use_cpu=not CUDA,
                dataloader_pin_memory=False,
                seed=seed,
            )
            peft = peft_model(model, seed, checkpointing=checkpointing)
            Trainer(peft, arguments, to_the_longest, train_dataset=Rows(seed), callbacks=[Stopwatch()]).train()
    return total


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what the libraries print."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        warnings.simplefilter("ignore")
        yield


def in_turns(runs: dict[str, Callable[[], list[float]]], rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Per method and round, the median seconds of a step, the first steps of a fit not counted; peak bytes of a GPU."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    peaks = dict.fromkeys(runs, 0)
    for _ in range(rounds):
        for name, run in runs.items():
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            with quiet():
                found[name].append(statistics.median(run()[WARM_UP:]))
            peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() if CUDA else 0)
    return found, peaks


def compare(options: argparse.Namespace, models: dict[str, str]) -> list[dict[str, Any]]:
    """The table of all settings."""
    records = []
    seeds = SEEDS if options.seeds == len(SEEDS) else tuple(range(1, options.seeds + 1))
    for label in options.model:
        for kind in options.tokens:
            for batch in options.micro_batch:
                model, steps = models[label], options.steps + WARM_UP
                common = {"kind": kind, "batch": batch, "steps": steps}
                recomputes = options.checkpointing != "none"
                ours = partial(lightning_steps, model, seeds, **common, gradient_checkpointing=options.checkpointing)
                runs: dict[str, Callable[[], list[float]]] = {
                    "stack": partial(ours, len(seeds)),
                    "compiled": partial(ours, len(seeds), compile="inductor"),
                    "passes": partial(ours, 1),
                    "trainer": partial(trainer_steps, model, seeds, **common, checkpointing=recomputes),
                    "plain": partial(plain_steps, model, seeds, **common, checkpointing=recomputes),
                }
                found, peaks = in_turns({name: runs[name] for name in options.method}, options.rounds)
                seconds = {name: statistics.median(values) for name, values in found.items()}
                ratios = {
                    name: statistics.median(a / b for a, b in zip(found[name], found["stack"], strict=True))
                    for name in found
                }
                tokens = tokens_of(kind, batch, seeds, steps)
                records.append(
                    {"model": label, "tokens": kind, "micro_batch": batch, "seconds": seconds, "ratio": ratios}
                    | {"seeds": len(seeds), "checkpointing": options.checkpointing, "peak_bytes": peaks}
                    | {"tokens_per_second": {name: tokens / s for name, s in seconds.items()}}
                )
                memory = {name: f" {peak / 2**30:.1f} GiB" if CUDA else "" for name, peak in peaks.items()}
                shown = "  ".join(
                    f"{n} {s:.3g} s ({tokens / s:.0f} tok/s){memory[n]} x{ratios[n]:.2f}" for n, s in seconds.items()
                )
                print(f"{label:8} {kind:>5} tokens, micro-batch {batch:2}: {shown}", flush=True)
    return records


def growth(options: argparse.Namespace, models: dict[str, str]) -> list[dict[str, Any]]:
    """Seconds of a step by the number of seeds in the stack, against one seed with as many rows."""
    records = []
    for label in options.model:
        for batch in options.micro_batch:
            kind, model = options.tokens[0], models[label]
            common = {"steps": options.steps + WARM_UP, "gradient_checkpointing": options.checkpointing}
            fit = partial(lightning_steps, model, kind=kind, **common)
            runs = {f"{n}": partial(fit, tuple(range(n)), n, batch=batch) for n in options.stack}
            rows = {f"1, {n} times the rows": partial(fit, (0,), 1, batch=n * batch) for n in options.stack[1:]}
            found, _ = in_turns({**runs, **rows}, options.rounds)
            seconds = {name: statistics.median(values) for name, values in found.items()}
            records.append({"model": label, "tokens": kind, "micro_batch": batch, "seconds": seconds})
            shown = "  ".join(f"{name}: {s:.3g} s" for name, s in seconds.items())
            print(f"{label:8} {kind:>5} tokens, micro-batch {batch:2}: seeds {shown}", flush=True)
    return records


def place_of(shapes: list[Any]) -> str:
    """Where an operation belongs, by the sizes of its tensors: vocabulary, or columns of all adapters."""
    sizes = {size for shape in shapes for size in shape if isinstance(size, int)}
    if sizes & {shape.vocabulary for shape in shapes.SHAPES.values()}:
        return " (head)"
    return " (adapters)" if len(SEEDS) * RANK in sizes else ""


def profile(options: argparse.Namespace, models: dict[str, str]) -> list[dict[str, Any]]:
    """Where the time of one stacked step goes: the operations that take most of it by themselves."""
    records = []
    for label in options.model:
        for kind in options.tokens:
            for batch in options.micro_batch:
                watch, steps = Profiled(last=3 * accumulated(kind) - 1), 3
                with quiet():
                    lightning_steps(
                        models[label],
                        SEEDS,
                        len(SEEDS),
                        kind,
                        batch,
                        steps,
                        callbacks=(watch,),
                        gradient_checkpointing=options.checkpointing,
                    )
                seconds: dict[str, float] = {}
                for event in watch.profiler.key_averages(group_by_input_shape=True):
                    if event.device_type != torch.autograd.DeviceType.CPU:
                        continue  # a kernel, whose time is with the operation that launched it
                    name = f"{event.key}{place_of(event.input_shapes)}"
                    taken = event.self_device_time_total if CUDA else event.self_cpu_time_total
                    seconds[name] = seconds.get(name, 0.0) + taken / 1e6
                total = sum(seconds.values())
                print(f"{label:8} {kind:>5} tokens, micro-batch {batch:2}: {total:.2f} s in operations")
                top = sorted(seconds.items(), key=lambda item: -item[1])[:12]
                for name, each in top:
                    print(f"    {each / total:6.1%}  {name}", flush=True)
                records.append({"model": label, "tokens": kind, "micro_batch": batch, "seconds": total, "top": top})
    return records


def plot(records: list[dict[str, Any]], file: Path) -> None:
    """Seconds of a step by the number of seeds, beside one seed with as many rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for i, record in enumerate(records):
        seconds = record["seconds"]
        label = f"{record['model']}, micro-batch {record['micro_batch']}"
        n = [name for name in seconds if name.isdigit()]
        axes.plot([int(x) for x in n], [seconds[x] for x in n], "o-", color=f"C{i}", label=f"{label}: seeds")
        rows = [seconds[n[0]], *(value for name, value in seconds.items() if not name.isdigit())]
        axes.plot([int(x) for x in n], rows, "x--", color=f"C{i}", label=f"{label}: one seed, as many rows")
    axes.set(xlabel="seeds in the stack", ylabel="seconds of a step", ylim=(0, None))
    axes.legend(fontsize="small")
    figure.savefig(file)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["smollm2", "llama6"])
    parser.add_argument("--micro-batch", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--tokens", nargs="+", choices=list(ROWS), default=["short"])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["stack", "passes", "trainer", "plain"])
    parser.add_argument(
        "--checkpointing",
        nargs="?",
        choices=RECOMPUTATIONS,
        default="none",
        const="full",
        help="what is recomputed; the methods that know no selective recomputation recompute all",
    )
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds of the comparison")
    parser.add_argument(
        "--profile", action="store_true", help="instead of the comparison: operations of a stacked step"
    )
    parser.add_argument("--stack", nargs="+", type=int, help="numbers of seeds, instead of the comparison")
    parser.add_argument("--steps", type=int, default=4, help="timed steps in a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="with --stack: a picture")
    parser.add_argument("--folder", type=Path, help="where models of random weights are kept for the next time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kept = options.folder or Path(folder)
        models = {n: shapes.random_model(n, kept) if n in shapes.SHAPES else EMBEDDED for n in options.model}
        records = (profile if options.profile else growth if options.stack else compare)(options, models)
    if options.stack and options.plot:
        plot(records, options.plot)
    if options.out:
        device = torch.cuda.get_device_name() if CUDA else "cpu"
        about = {
            "device": device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": str(fast_dtype()),
            "r": RANK,
        }
        options.out.write_text(json.dumps({**about, "results": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
