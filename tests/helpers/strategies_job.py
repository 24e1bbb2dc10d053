"""One fit and one test for each strategy, in the processes that Lightning starts.

One process of its own runs all strategies, one after the other: what takes time is the start.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.distributed.strategies import CPUDeepSpeedStrategy, FSDP2Strategy, choose_strategy
from seedlora.training import whole_models
from seedlora.training.whole_models import WholeModels
from tests.helpers.interventions import Break, Poison, Stop
from tests.helpers.models import SEEDS, make_data, make_module
from tests.helpers.paths import ROOT
from tests.helpers.precision import in_float64


def start(*arguments: object) -> None:
    """Run this module as a process, to its good end."""
    command = [sys.executable, "-m", "tests.helpers.strategies_job", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def zero(stage):
    """ZeRO; stage 3 also partitions what it would keep whole because it is small: all of a tiny model."""
    zero_optimization = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    return CPUDeepSpeedStrategy(config={"zero_optimization": zero_optimization})


STRATEGIES = {
    "ddp": lambda: "ddp",
    "zero1": lambda: zero(1),
    "zero2": lambda: zero(2),
    "zero3": lambda: zero(3),
    "fsdp2": FSDP2Strategy,
}
KINDS = {
    "dora": {"adapter": "dora"},
    "qlora": {"quantization": "nf4"},
    "int8": {"quantization": "int8"},
    "pissa": {"adapter": "pissa"},
    "loftq": {"adapter": "loftq", "quantization": "nf4"},
    "rslora": {"adapter": "rslora"},
    "lora_plus": {"lora_plus_ratio": 16.0},
    "compiled": {"compile": "aot_eager", "target_modules": ["q_proj", "down_proj"]},
    "in full": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "full": {"adapter": "full", "learning_rate": 2e-4},
    "bf16": {"dtype": "bfloat16"},
    "sgd": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}, "learning_rate": 0.5},
    "own optimizer": {"optimizer": "tests.helpers.optimizers.SignMomentum", "weight_decay": 0.1},
    "muon": {"optimizer": "muon", "learning_rate": 2e-2},
}
#: Kinds that are not computed in float64, and the noise of their gradients: precision.py says what that is. (Whole
#: models are sent between the processes in the dtype of the base's file.)
IN_FLOAT32 = {"bf16": 1e-2, "compiled": 1e-5, "full": 1e-5}
#: Options that the seeds differ in.
SWEPT = {"learning_rate": [1e-3, 4e-3, 2e-3], "r": [2, 6, 4], "lora_plus_ratio": [1, 4, 1]}
#: What replicas do together.
SCHEMES = {
    "branch": {"scheme": "branch", "ema": 0.9},
    "local": {"scheme": "local", "average_every": 1, "outer_learning_rate": 0.7},
    "halved": {"halving": [0.67]},
}
#: With steps so long that the validation loss soon rises.
WATCHED = {"learning_rate": 0.02}


def strategies_of(kind):
    """Packed weights, compiled layers and weights in full are refused where the base model is split.

    Muon looks at whole tensors, which all but DDP cut.
    """
    if kind == "muon":
        return ("ddp",)
    options = KINDS[kind]
    whole_base = options.keys() & {"quantization", "compile", "modules_to_save"} or options.get("adapter") == "full"
    return ("ddp", "zero2") if whole_base else ("ddp", "zero2", "zero3", "fsdp2")


def precision_of(kind):
    """In float64, where sums in another order are the same, as far as it goes."""
    return nullcontext() if kind in IN_FLOAT32 else in_float64()


def run(
    base_model: str,
    dirpath: Path,
    *,
    batch_size: int,
    strategy,
    devices: int,
    poison: tuple[Poison, ...] = (),
    watched: bool = False,
    accelerator: str = "cpu",
    sweep: dict[str, list[float]] | None = None,
    scheme: dict[str, object] | None = None,
    **options: object,
) -> dict[str, object]:
    """Two passes, accumulation, with and without a clip, a number of rows that two ranks do not share evenly.

    Watched, each seed keeps its best weights of up to ten validations and stops after one that is no better. Of a sweep
    each seed has one value. A scheme trains all seeds in one pass.
    """
    exclude = "exclude" if poison else "stop"
    extra = {"keep": "best", "patience": 1} if watched else {}
    extra |= {} if sweep is None else {"sweep": sweep, "sweep_mode": "zip"}
    extra |= {"stack_size": 2} if scheme is None else scheme
    callback = SeedEnsembleCallback(
        SEEDS, compare="ties", dirpath=dirpath, budget="full", on_divergence=exclude, **extra
    )
    module = make_module(base_model, **{"gradient_checkpointing": "full", **options})
    data = make_data(num_val=9, num_test=13, batch_size=batch_size, eval_batch_size=2)
    metrics = {}
    while callback.pending:
        trainer = pl.Trainer(
            accelerator=accelerator,
            max_epochs=5 if watched else 1,
            val_check_interval=0.5 if watched else 1.0,
            accumulate_grad_batches=2,
            # AdamW takes any scale of the gradient for the same: the first pass is clipped, the second is not.
            gradient_clip_val=0.05 if len(callback.pending) == len(SEEDS) else None,
            callbacks=[callback, *poison],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            # a strategy object serves one trainer
            strategy=strategy(),
            devices=devices,
        )
        trainer.fit(module, datamodule=data)
        weight = module.model.get_input_embeddings().weight
        assert (weight.dtype == torch.bfloat16) == (module.options.base_dtype == torch.bfloat16)
        metrics |= {name: value.item() for name, value in trainer.callback_metrics.items()}
        metrics |= {f"best step of {name}": best.step for name, best in callback.fit_state.best.items()}
        metrics |= {f"stopped {name}": True for name in module.replicas.idle - set(module.replicas.left_out)}
    trainer.test(module, datamodule=data, verbose=False)
    scores = callback.results.scores
    return metrics | {f"test/{label}": [score.value, score.n] for label, score in scores.items()}


def main_of_devices(base_model: str, folder: str, accelerator: str, devices: str, name: str) -> None:
    """A strategy, by its name in Lightning, on so many devices of a kind; the same rows for any number of them."""
    strategy, n = partial(choose_strategy, name, accelerator=accelerator), int(devices)
    run(base_model, Path(folder) / name, batch_size=4 // n, strategy=strategy, devices=n, accelerator=accelerator)


def watch_merges(folder: Path) -> None:
    """Write down who merges whole models to be scored, and the hash of what is scored on each rank."""
    make_weight_merger, merge = whole_models.make_weight_merger, WholeModels.merge

    def change(models, base, rule):
        (folder / f"{os.getpid()} merges {rule.name}").touch()
        return make_weight_merger(models, base, rule)

    def fused(self, trainer, folders, rule):
        made = merge(self, trainer, folders, rule)
        digest = hashlib.sha256(b"".join(each.numpy().tobytes() for (each,) in made.modules.values())).hexdigest()
        (folder / f"{os.getpid()} scores {rule.name}").write_text(digest)
        return made

    whole_models.make_weight_merger, WholeModels.merge = change, fused


def main_of_kind(base_model: str, folder: str, kind: str) -> None:
    """A kind of adapter under the strategies."""
    watch_merges(Path(folder))
    with precision_of(kind):
        for name in strategies_of(kind):
            run(base_model, Path(folder) / name, batch_size=2, strategy=STRATEGIES[name], devices=2, **KINDS[kind])


@in_float64()
def main(base_model: str, folder: str) -> None:
    """Write each strategy's metrics beside its adapters."""
    for name, make in STRATEGIES.items():
        dirpath = Path(folder) / name
        metrics = run(base_model, dirpath, batch_size=2, strategy=make, devices=2)
        # every rank has the same numbers; the last to write wins
        (dirpath / "metrics.json").write_text(json.dumps(metrics))
    for name in ("ddp", "zero2"):
        dirpath = Path(folder) / f"swept {name}"
        run(base_model, dirpath, batch_size=2, strategy=STRATEGIES[name], devices=2, sweep=SWEPT)
    for name, scheme in SCHEMES.items():
        run(base_model, Path(folder) / name, batch_size=2, strategy=STRATEGIES["ddp"], devices=2, scheme=scheme)
    broken = Path(folder) / "broken"
    run(base_model, broken, batch_size=2, strategy=FSDP2Strategy, devices=2, poison=(Break("seed_42", 3),))
    watched = Path(folder) / "watched"
    metrics = run(base_model, watched, batch_size=2, strategy=lambda: "ddp", devices=2, watched=True, **WATCHED)
    (watched / "metrics.json").write_text(json.dumps(metrics))
    excluded = Path(folder) / "excluded"
    run(base_model, excluded, batch_size=2, strategy=lambda: "ddp", devices=2, poison=(Poison("seed_42", 2),))
    stopped = Path(folder) / "stopped"
    run(base_model, stopped, batch_size=2, strategy=lambda: "ddp", devices=2, poison=(Stop("seed_42", 2),))


if __name__ == "__main__":
    {2: main, 3: main_of_kind, 5: main_of_devices}[len(sys.argv) - 1](*sys.argv[1:])
