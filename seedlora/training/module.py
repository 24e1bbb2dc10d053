"""SeedLoRAModule: a frozen base model with a stack of LoRA replicas, as a LightningModule.

Shape legend: ``N`` replicas, ``b`` rows of each, ``T`` tokens, ``S`` supervised tokens of a batch, ``V`` vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import CatMetric

from seedlora.adapters.model_card import base_note
from seedlora.adapters.stack import ADAPTER_PARTS, AdapterStack
from seedlora.adapters.stacked_forward import StartFactors
from seedlora.adapters.writing import write_adapter
from seedlora.distributed.clipping import clip_gradients
from seedlora.distributed.sharded import (
    broadcast_from_rank0,
    decoder_layers,
    is_partitioned,
    is_sharded,
    release_engine,
    shard_model,
)
from seedlora.distributed.strategies import prepare_strategy, step_scale
from seedlora.merge.bound_rule import BoundRule
from seedlora.merge.model_folders import write_trained
from seedlora.merge.whole_models import make_weight_merger
from seedlora.model.compilation import check_backend, compile_layers
from seedlora.model.embedded import EMBEDDED
from seedlora.model.head_losses import head_losses, is_frozen_matrix
from seedlora.model.loading import eval_mode, fast_dtype, load_model, load_tokenizer, resolve_base_model
from seedlora.model.outline import ALL_LINEAR, outline
from seedlora.model.quantization import check_quantization
from seedlora.model.weight_files import WeightFiles
from seedlora.scores.row_scores import RowScores
from seedlora.training.losses import in_place, next_tokens
from seedlora.training.model_options import ADAPTERS, DTYPES, FULL, PROJECTIONS, SCHEDULES, require
from seedlora.training.optimizer import learning_rate_factor
from seedlora.training.replicas import DivergedError, Replica
from seedlora.training.scoring import ADAPTERS_PER_FORWARD, real_items
from seedlora.training.starting_points import prepare_base
from seedlora.updates.factors import LoRAFactors
from seedlora.updates.stacks import Layers, Stacks, full_weights


class SeedLoRAModule(pl.LightningModule):
    r"""A frozen causal language model and a stack of LoRA adapters, one per seed, trained at once.

    The loss of replica ``n`` is the mean over the supervised tokens of its optimizer step; the losses are summed, and
    each replica's gradient is clipped on its own norm:

    .. math:: L = \sum_n \frac{1}{M_n} \sum_{t \in \text{step}} -\log p_n(t)

    so that a replica learns what it would learn alone. The base model sees all replicas' rows in one product.

    The base model keeps ``dtype``, the adapters are float32; the trainer's precision stays at ``32-true``.

    Args:
        base_model: ``embedded`` (SmolLM2-135M-Instruct from the package index), a local folder, or a hub id.
        adapter: ``lora``; ``rslora`` (scaled by ``lora_alpha / sqrt(r)``, arXiv 2312.03732); ``dora`` (a magnitude per
            output, arXiv 2402.09353); ``pissa`` (starts at the largest singular vectors of the weights, saved as plain
            LoRA of rank 2r on the original base, arXiv 2404.02948); ``loftq`` (starts at what quantisation loses, arXiv
            2310.08659; it needs ``nf4``). LoRA+ goes with each. ``none`` trains every weight of the model instead, in
            float32, for each replica a copy; it takes none of the options of adapters, which stay at their defaults,
            and wants a much lower ``learning_rate`` (2e-5 for 7B).
        quantization: of the frozen base model: ``none``, ``nf4`` (QLoRA, arXiv 2305.14314) or ``int8``.
        r: rank of each adapter.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        lora_dropout: dropout on the input of the adapters; each replica has its own stream.
        target_modules: the linear layers to adapt: a list of name endings, a regular expression for the whole path, or
            ``all-linear`` for all but the head.
        rank_pattern: other ranks by layer: ending of its path, or a regular expression for one, as in PEFT.
        alpha_pattern: other ``lora_alpha`` by layer, likewise.
        modules_to_save: modules that each replica trains in full beside its adapter, in float32, by the endings of
            their names: ``embed_tokens``, ``lm_head``, norms. Where head and embedding are one matrix (tied), naming
            either trains one copy for both. They are averaged where adapters are fused.
        learning_rate: of AdamW, at the top of the schedule.
        lora_plus_ratio: the learning rate of B is so many times that of A; above 1 it is LoRA+ (Hayou et al., arXiv
            2402.12354, who take 16). DoRA's magnitudes learn like A.
        weight_decay: of AdamW.
        lr_scheduler: ``cosine`` or ``linear`` (both to 0), or ``constant``, after the warm-up.
        warmup_ratio: part of the steps in which the rate grows linearly from near 0.
        warmup_steps: the same as a number of steps; it overrides the ratio.
        dtype: of the base weights: ``bfloat16``, ``float32``, or ``auto`` for bfloat16 where the machine is faster
            with it.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        compile: the backend by which ``torch.compile`` compiles each decoder layer for training, ``inductor`` for
            example; default: none.

    Raises:
        ValueError: for values out of range; the message names them.
    """

    #: The checkpoint holds the adapters alone.
    strict_loading = False
    model: Any
    stack: AdapterStack

    def __init__(
        self,
        base_model: str = EMBEDDED,
        *,
        adapter: str = "lora",
        quantization: str = "none",
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        target_modules: Sequence[str] | str = PROJECTIONS,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        modules_to_save: Sequence[str] | None = None,
        learning_rate: float = 2e-3,
        lora_plus_ratio: float = 1.0,
        weight_decay: float = 0.0,
        lr_scheduler: str = "cosine",
        warmup_ratio: float = 0.06,
        warmup_steps: int | None = None,
        dtype: str = "auto",
        gradient_checkpointing: bool = False,
        compile: str | None = None,  # noqa: A002 - torch's word for it
    ) -> None:
        super().__init__()
        require(r >= 1, f"model.r must be at least 1, got {r}")
        require(lora_alpha > 0, f"model.lora_alpha must be positive, got {lora_alpha}")
        require(0 <= lora_dropout < 1, f"model.lora_dropout must be in [0, 1), got {lora_dropout}")
        require(learning_rate > 0, f"model.learning_rate must be positive, got {learning_rate}")
        require(lora_plus_ratio > 0, f"model.lora_plus_ratio must be positive, got {lora_plus_ratio}")
        require(0 <= warmup_ratio <= 1, f"model.warmup_ratio must be in [0, 1], got {warmup_ratio}")
        require(len(target_modules) > 0, "model.target_modules is empty: there would be nothing to train")
        choices = {"adapter": (adapter, ADAPTERS), "lr_scheduler": (lr_scheduler, SCHEDULES), "dtype": (dtype, DTYPES)}
        for name, (value, allowed) in choices.items():
            require(value in allowed, f"Unknown model.{name} '{value}'; choose one of {', '.join(allowed)}")
        check_quantization(quantization)
        require(
            adapter != "loftq" or quantization == "nf4",
            f"model.adapter loftq starts at what nf4 loses; set model.quantization nf4, got {quantization}",
        )
        require(
            adapter != "pissa" or quantization != "int8",
            "model.adapter pissa goes with model.quantization none or nf4, got int8",
        )
        rank_pattern, alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
        if adapter == FULL:
            asked = {
                "quantization": quantization if quantization != "none" else None,
                "lora_plus_ratio": lora_plus_ratio if lora_plus_ratio != 1 else None,
                "lora_dropout": lora_dropout,
                "rank_pattern": rank_pattern,
                "alpha_pattern": alpha_pattern,
                "modules_to_save": modules_to_save,
                "r": r if r != 8 else None,
                "lora_alpha": lora_alpha if lora_alpha != 16 else None,
                "target_modules": target_modules if [*target_modules] != [*PROJECTIONS] else None,
            }
            odd = next((f"{name} {value}" for name, value in asked.items() if value), None)
            require(odd is None, f"model.adapter none trains every weight in full, to which model.{odd} does not apply")
        for name, values in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
            low = {key: value for key, value in values.items() if value < 1}
            require(not low, f"model.{name} must be at least 1 everywhere, got {low}")
        if compile is not None:
            check_backend(compile)
            require(
                lora_dropout == 0,
                f"model.compile {compile} does not go with model.lora_dropout {lora_dropout}, whose random streams "
                "would break each graph into pieces; leave out one of them",
            )
        target_modules = target_modules if isinstance(target_modules, str) else list(target_modules)
        modules_to_save = list(modules_to_save or ()) or None
        self.save_hyperparameters()
        self.dtype_base = DTYPES[dtype] or fast_dtype()
        #: The adapters of the stack; whoever runs an ensemble sets them before the module is set up.
        self.replicas: tuple[Replica, ...] = (Replica("seed_42", 42, 42),)
        #: Names of replicas that train no more: their rows are left out of the forward.
        self.idle: set[str] = set()
        #: Whether a replica whose loss is not finite becomes idle; otherwise it ends the run.
        self.exclude_diverged = False
        #: Replicas whose loss or weights were not finite, and what was found in which optimizer step.
        self.diverged: dict[str, str] = {}
        #: Optimizer steps of the run, for the schedule; ``None`` takes the trainer's estimate.
        self.total_steps: int | None = None
        #: What validation and test score: label to adapter; ``None`` is the base model.
        self.scored: dict[str, str | None] = {}
        #: Further labels: the mean of the next-token probabilities of several of those scored.
        self.mixtures: dict[str, tuple[str, ...]] = {}
        #: Rank and ``lora_alpha`` of the replicas in units of their hyperparameters, at the same scaling.
        self.rank_factor = 1
        #: Tokens of the last training forward, padding included, and how many a rank scored, on average.
        self.last_forward: tuple[int, float] = (0, 0.0)
        self.test_correct, self.test_items = CatMetric(), CatMetric()
        self._tokenizer: Any = None
        #: Whether nothing follows the head; unknown until the first forward.
        self._head_is_last: bool | None = None
        self._built: tuple[Replica, ...] = ()
        self._starts: dict[str, StartFactors] = {}

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer, read when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.hparams["base_model"])
        return self._tokenizer

    @property
    def base_path(self) -> str:
        """What to give ``from_pretrained`` for the base model of these adapters."""
        return resolve_base_model(self.hparams["base_model"])

    @property
    def starts_at_weights(self) -> bool:
        """Whether the adapters start at factors of the base weights: the same ones for every seed."""
        return self.hparams["adapter"] in ("pissa", "loftq")

    @property
    def is_full_finetuning(self) -> bool:
        """Whether every weight of the model is trained, and there are no adapters."""
        return bool(self.hparams["adapter"] == FULL)

    @property
    def adds_dense(self) -> bool:
        """Whether what is trained adds updates of full rank to the weights, which take longer to fuse than to score."""
        return self.is_full_finetuning or self.hparams["adapter"] == "dora"

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """The layers to adapt, with their shapes (D, K); raises as :func:`seedlora.model.outline.outline`."""
        if self.is_full_finetuning:
            return {}
        return outline(self.hparams["base_model"]).matching_layers(self.hparams["target_modules"])

    @property
    def full_modules(self) -> dict[str, int]:
        """The modules that are trained in full, with the number of their parameters; raises as :attr:`targets`."""
        model = outline(self.hparams["base_model"])
        if self.is_full_finetuning:
            model.check_row_order(model.modules, f"model.adapter {FULL}")
            return model.modules
        return model.modules_trained_in_full(self.hparams["modules_to_save"] or ())

    @property
    def unsplit(self) -> dict[str, Any]:
        """What does not go with a base model in parts, for :func:`seedlora.distributed.strategies.prepare_strategy`."""
        hparams, names = self.hparams, ", ".join(self.hparams["modules_to_save"] or ())
        full = f"adapter {FULL}" if self.is_full_finetuning else names and f"modules_to_save {names}"
        return {"quantization": hparams["quantization"], "backend": hparams["compile"], "full": full or None}

    @property
    def precision_of_base(self) -> str:
        """The dtype of the base weights, and what the linear layers are quantised to, for people."""
        dtype, kind = str(self.dtype_base).removeprefix("torch."), self.hparams["quantization"]
        return dtype if kind == "none" else f"{kind} and {dtype}"

    @property
    def display_text(self) -> str:
        """What is trained, for people."""
        hparams = self.hparams
        if self.is_full_finetuning:
            return "no adapter, every weight in full, in float32"
        words = f"{hparams['adapter']}, r {hparams['r']}, lora_alpha {hparams['lora_alpha']:g}"
        if hparams["rank_pattern"] or hparams["alpha_pattern"]:
            words += ", other ones by pattern"
        if hparams["lora_plus_ratio"] != 1:
            words += f", LoRA+ {hparams['lora_plus_ratio']:g}"
        words += f", on {len(self.targets)} layers"
        if full := self.full_modules:
            words += f"; {', '.join(dict.fromkeys(path.rpartition('.')[2] for path in full))} in full"
        return words

    @property
    def averaged_text(self) -> str:
        """What a merge rule is not applied to, for people; empty if it is applied to everything."""
        if self.is_full_finetuning:
            return "vectors (norms, biases) are averaged"
        return "what is trained in full is averaged" if self.full_modules else ""

    @property
    def base_note(self) -> str:
        """What to know of the base model that the adapters belong to, for people."""
        return base_note(self.hparams["adapter"], self.hparams["quantization"])

    def rank(self, path: str) -> int:
        """The rank of an adapted layer in training."""
        from peft.utils.other import get_pattern_key

        ranks = self.hparams["rank_pattern"]
        return int(ranks.get(get_pattern_key(ranks, path), self.hparams["r"]))

    @property
    def lora_config(self) -> Any:
        """PEFT's configuration of each replica in training."""
        from peft import LoraConfig
        from peft.utils.constants import DUMMY_TARGET_MODULES

        hparams, names, wider = self.hparams, self.hparams["target_modules"], self.rank_factor
        if self.is_full_finetuning:
            names = DUMMY_TARGET_MODULES  # PEFT's word for no layer at all
        elif names == ALL_LINEAR:
            names = sorted({path.rpartition(".")[2] for path in self.targets})
        alpha = wider**0.5 if hparams["adapter"] == "rslora" else wider  # at the same scaling
        return LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.base_path,
            r=hparams["r"] * wider,
            lora_alpha=hparams["lora_alpha"] * alpha,
            lora_dropout=hparams["lora_dropout"],
            target_modules=names,
            rank_pattern={key: rank * wider for key, rank in hparams["rank_pattern"].items()},
            alpha_pattern={key: value * alpha for key, value in hparams["alpha_pattern"].items()},
            # Whole paths: PEFT would take norm for the end of input_layernorm.
            modules_to_save=sorted(self.full_modules) or None,
            use_rslora=hparams["adapter"] == "rslora",
            use_dora=hparams["adapter"] == "dora",
            fan_in_fan_out=outline(hparams["base_model"]).transposed and hparams["quantization"] == "none",
        )

    @property
    def saved_config(self) -> Any:
        """PEFT's configuration of a replica as it is saved: for the original base model, without quantisation."""
        config = self.lora_config
        config.fan_in_fan_out = outline(self.hparams["base_model"]).transposed
        if self.hparams["adapter"] == "pissa":
            # The start, with its sign turned, is beside what was trained.
            config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
            config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
            config.alpha_pattern = {key: 2 * alpha for key, alpha in config.alpha_pattern.items()}
        return config

    def check(self) -> None:
        """Everything that can be known without the weights: the model exists and has the layers to adapt.

        Raises:
            ValueError: if it has not.
            OSError: if it cannot be read.
        """
        from peft.utils.other import get_pattern_key

        targets, full, hparams = self.targets, self.full_modules, self.hparams
        if both := [path for path in full if path in targets]:
            raise ValueError(
                f"model.modules_to_save: {both[0]} is among model.target_modules too; a layer has an adapter or is "
                "trained in full"
            )
        if hparams["quantization"] != "none" and (few := set(full) & set(outline(hparams["base_model"]).linear)):
            raise ValueError(
                f"model.modules_to_save: {min(few)} would be quantised, and weights in {hparams['quantization']} take "
                "no gradient; embeddings, heads and norms are not quantised"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            used = {get_pattern_key(hparams[name], path) for path in targets}
            if unused := [key for key in hparams[name] if key not in used]:
                raise ValueError(f"model.{name}: '{unused[0]}' matches no adapted layer, e.g. {next(iter(targets))}")
        for path, shape in targets.items():
            if self.starts_at_weights and self.rank(path) > min(shape):
                most = f"{hparams['adapter']} takes at most {min(shape)} directions of {path}"
                raise ValueError(f"model.r {self.rank(path)}: {most}")

    def setup(self, stage: str | None = None) -> None:
        """Load the base model, once, and create the adapters of :attr:`replicas` on it.

        Each adapter is initialised by PEFT under its own seed, whatever it is stacked with; the global random state is
        left as it was. Every fit starts from fresh adapters on the same base weights, so that the same seeds give the
        same bits however often a module was used; validation and test keep the adapters that are there.
        """
        if self._trainer is not None:
            prepare_strategy(self.trainer, **self.unsplit)
        if self._built == self.replicas and stage != "fit":
            if self._trainer is not None and is_partitioned(self.model):
                # A fit ends on the CPU, and ZeRO-3 does not bring back the small weights that it keeps whole.
                self.to(self.trainer.strategy.root_device)
            return
        # DoRA's magnitudes start at the norms of the weights.
        lost = self._built and self.hparams["adapter"] == "dora" and is_partitioned(self.model)
        if self._built and not is_sharded(self.model) and not lost:
            base = self.stack.remove()
        else:
            base, self._starts = prepare_base(
                load_model(self.hparams["base_model"], dtype=self.dtype_base),
                self.lora_config,
                adapter=self.hparams["adapter"],
                quantization=self.hparams["quantization"],
            )
        from peft import get_peft_model

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # The stack ties what the base model ties.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            for i, replica in enumerate(self.replicas):
                torch.default_generator.manual_seed(replica.init_seed)  # of the CPU, and no GPU's
                if i == 0:
                    self.model = get_peft_model(base, self.lora_config, adapter_name=replica.name)
                else:
                    self.model.add_adapter(replica.name, self.lora_config)
        self.stack = AdapterStack(self.model, starts=self._starts)
        if self.is_full_finetuning:
            # What training adds is measured from the files, which may be finer than the base's dtype.
            weights = WeightFiles(self.base_path)
            places = self.places(weights)
            for own, parameter in (p for r in self.replicas for p in self.stack.full_weights(r.name).items()):
                parameter.copy_(weights.tensor(places[own]))
        for replica in self.replicas:
            for parameter in self.stack.parameters(replica.name):
                parameter.requires_grad_(True)
        if self.hparams["gradient_checkpointing"]:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.hparams["compile"] is not None:
            compile_layers(decoder_layers(self.model), self.hparams["compile"])
        self._built = self.replicas
        self.idle, self.diverged = set(), {}

    def configure_model(self) -> None:
        """Split the model over the ranks where the strategy leaves that to the module."""
        shard_model(self.model, self.trainer)

    def on_fit_start(self) -> None:
        """Models load in eval mode, which would silently switch dropout and gradient checkpointing off."""
        self.model.train()

    def teardown(self, stage: str) -> None:
        """Leave the module as another fit can take it."""
        if stage == "fit":
            release_engine(self.trainer)

    def forward(
        self, input_ids: Int[Tensor, "M T"], keep: Tensor, position_ids: Tensor | None = None
    ) -> Float[Tensor, "S V"]:
        """Logits at the positions kept, one after the other, from the adapters that the stack is routed to.

        Args:
            input_ids: rows padded on the right.
            keep: bool, shape (M, T): whose next-token logits are wanted.
            position_ids: shape (M, T), for rows that hold several samples: they restart with each, and attention stays
                within one. transformers makes its masks so when it is given positions and no mask.
        """
        at = keep.flatten().nonzero()[:, 0]
        with self.stack.head_sees(keep):
            return self._forward(input_ids, position_ids, lambda hidden: hidden.flatten(0, 1)[at])

    def _forward(
        self, input_ids: Tensor, position_ids: Tensor | None, before_head: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "S V"]:
        """The model's logits, of the hidden states that ``before_head`` lets through.

        The head is the largest layer of a small model, so it only sees what is scored: a hook gathers the hidden
        states in front of it, into one contiguous matrix, and every model family keeps its own code around the head.
        """
        hook = self._head.register_forward_pre_hook(lambda _, args: (before_head(args[0]), *args[1:]))
        try:
            if position_ids is None:
                return self.model(input_ids=input_ids).logits
            return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        finally:
            hook.remove()

    @property
    def _head(self) -> Any:
        return self.model.get_base_model().get_output_embeddings()

    def token_losses(
        self,
        input_ids: Int[Tensor, "M T"],
        labels: Int[Tensor, "M T"],
        position_ids: Tensor | None = None,
        *,
        greedy: bool = True,
    ) -> tuple[Float[Tensor, "M T"], Tensor, Tensor]:
        """Score the labels.

        Returns:
            Per position the negative log-likelihood of its label (0 where there is none), whether the label is the
            most likely token (all True unless ``greedy``), and whether there is one; all of shape (M, T) and shifted
            by one: position ``t`` predicts the label of ``t + 1``.
        """
        targets, keep, at = next_tokens(labels)
        losses, right = self._kept_losses(input_ids, keep, at, targets, position_ids, greedy=greedy)
        return *in_place(losses, right, keep, at), keep

    def _kept_losses(
        self, input_ids: Tensor, keep: Tensor, at: Tensor, targets: Tensor, position_ids: Tensor | None, *, greedy: bool
    ) -> tuple[Float[Tensor, " S"], Tensor | None]:
        """Losses at the positions kept, from chunks of logits where the model's logits are those of its head.

        Some families scale or cap them afterwards. So the model runs with its head on one position, and what comes out
        is compared with the head alone; from the first difference on, the family's own code sees all positions.
        """
        if self._head_is_last is not False and is_frozen_matrix(self._head) and len(targets):
            caught: list[Tensor] = []

            def catch(hidden: Tensor) -> Tensor:
                caught.append(hidden.flatten(0, 1)[at])
                return caught[0][:1].detach()

            logits = self._forward(input_ids, position_ids, catch)
            if self._head_is_last is None:
                with torch.no_grad():
                    self._head_is_last = torch.equal(logits.float(), self._head(caught[0][:1]).float())
            if self._head_is_last:
                return head_losses(caught[0], self._head, targets, greedy=greedy)
        logits = self(input_ids, keep, position_ids)
        losses = cross_entropy(logits.float(), targets, reduction="none")
        return losses, logits.argmax(-1) == targets if greedy else None

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The sum of the replicas' losses over one micro-batch (N, b, T), normalised over the optimizer step.

        Rows of idle replicas are left out. A loss that is not finite is found before the backward pass, on all ranks
        together: nothing of that replica then reaches the others. When none is left, the fit ends.

        Raises:
            DivergedError: if a loss is not finite, and :attr:`exclude_diverged` is not set.
        """
        active = [i for i, replica in enumerate(self.replicas) if replica.name not in self.idle]
        if not active:
            self.trainer.should_stop = True
            return self._no_loss()
        replicas, n = [self.replicas[i] for i in active], len(active)
        keys = None
        if self.hparams["lora_dropout"]:
            where = (self.current_epoch, batch_idx, self.global_rank)
            keys = [(replica.init_seed, *where) for replica in replicas]
        self.stack.route(
            [replica.name for replica in replicas],
            lengths=[batch["lengths"][i] for i in active],
            rows=[batch["rows"][i] for i in active] if "rows" in batch else (),
            dropout_keys=keys,
        )
        tensors = [batch[key] for key in ("input_ids", "labels", "position_ids") if key in batch]
        rows = ((t if n == len(t) else t[active]).flatten(0, 1) for t in tensors)
        losses, _, keep = self.token_losses(*rows, greedy=False)
        sums, tokens = losses.view(n, -1).sum(1), keep.view(n, -1).sum(1)
        # Shown: the mean over the micro-batch on all ranks. On the CPU from here on, where looking at a number and
        # logging it does not wait for the device once more.
        shown = self.trainer.strategy.reduce(torch.stack([sums.detach(), tokens.to(sums.dtype)]), reduce_op="sum").cpu()
        if bad := [replica.name for replica, ok in zip(replicas, shown[0].isfinite().tolist(), strict=True) if not ok]:
            # Zero times infinity: weights that are not finite spoil every row, and only their own replica is at fault.
            bad = [name for name in bad if not self.stack.is_finite(name)] or bad
            self._leave_out(bad, f"training loss not finite in step {self.trainer.global_step + 1}")
            return self.training_step(batch, batch_idx)
        named = {f"train/loss_{r.name}": loss for r, loss in zip(replicas, shown[0] / shown[1], strict=True)}
        self.log_dict(named, prog_bar=True)
        self.last_forward = keep.numel(), shown[1].sum().item() / self.trainer.world_size
        total = (sums / batch["num_items"][active]).sum() * step_scale(self.trainer)
        return total + self._no_loss() if self.idle and self.trainer.world_size > 1 else total

    def _no_loss(self) -> Tensor:
        """0, with a gradient of 0 for every parameter of the idle replicas: DDP waits for all."""
        idle = (parameter for name in sorted(self.idle) for parameter in self.stack.parameters(name))
        return torch.stack([(parameter.nan_to_num(0, 0, 0) * 0).sum() for parameter in idle]).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep idle replicas as they are: with any gradient, 0 or an earlier micro-batch's, AdamW would move them."""
        for name in self.idle:
            for parameter in self.stack.parameters(name):
                parameter.grad = None

    def check_weights(self) -> None:
        """Leave out the replicas that the last step spoiled, before their weights are used. All ranks must call it.

        The next training loss would find them too, but nothing follows the last step, and in a validation their rows
        would spoil all others'. It reads each weight once.

        Raises:
            DivergedError: if there are any, and :attr:`exclude_diverged` is not set.
        """
        active = [replica.name for replica in self.replicas if replica.name not in self.idle]
        if not active:
            return
        bad = torch.tensor([not self.stack.is_finite(name) for name in active], dtype=torch.float32, device=self.device)
        # What one rank finds, all leave out.
        found = self.trainer.strategy.reduce(bad, reduce_op="sum").tolist()
        if names := [name for name, ranks in zip(active, found, strict=True) if ranks]:
            self._leave_out(names, f"weights not finite after step {self.trainer.global_step}")

    def _leave_out(self, names: Sequence[str], why: str) -> None:
        """Make replicas idle that are not finite, or end the run."""
        if not self.exclude_diverged:
            raise DivergedError(
                f"{', '.join(names)}: {why}; lower model.learning_rate, or go on without it by on_divergence exclude"
            )
        self.diverged |= dict.fromkeys(names, why)
        self.idle |= set(names)

    def score(self, batch: Mapping[str, Any]) -> tuple[Float[Tensor, "N b"], Tensor, Tensor]:
        r"""Every adapter of :attr:`scored` on the same rows, :data:`ADAPTERS_PER_FORWARD` of them in one pass over the
        base model.

        A mixture's probability of a token is the mean of its members' after the same true tokens:
        :math:`p(t) = \frac1N \sum_n p_n(t)`.

        Returns:
            Per adapter, then per mixture of :attr:`mixtures`, and row: the summed loss, whether greedy decoding would
            give the response exactly, and the number of supervised tokens. The second needs no generation: greedy
            decoding gives the response if and only if each of its tokens, the end token included, is the most likely
            one after the true tokens before it.
        """
        ids, labels = batch["input_ids"], batch["labels"]
        names, found = list(self.scored), []
        for start in range(0, len(names), ADAPTERS_PER_FORWARD):
            group = names[start : start + ADAPTERS_PER_FORWARD]
            n = len(group)
            self.stack.route([self.scored[name] for name in group])
            losses, right, keep = self.token_losses(ids.repeat(n, 1), labels.repeat(n, 1))
            found.append((losses.sum(1).view(n, -1), right.all(1).view(n, -1), keep.sum(1).view(n, -1)))
        for members in self.mixtures.values():
            losses, right, keep = self._mixture_losses(ids, labels, members)
            found.append((losses.sum(1)[None], right.all(1)[None], keep.sum(1)[None]))
        scored, correct, tokens = (torch.cat(parts) for parts in zip(*found, strict=True))
        return scored, correct, tokens

    def _mixture_losses(
        self, input_ids: Int[Tensor, "b T"], labels: Int[Tensor, "b T"], members: Sequence[str]
    ) -> tuple[Float[Tensor, "b T"], Tensor, Tensor]:
        """As :meth:`token_losses`, of a mixture: a forward of each member, whose whole logits are needed."""
        targets, keep, at = next_tokens(labels)
        mixed_SV = None
        for member in members:
            self.stack.route([self.scored[member]])
            logp_SV = self(input_ids, keep).float().log_softmax(-1)
            mixed_SV = logp_SV if mixed_SV is None else torch.logaddexp(mixed_SV, logp_SV)
        assert mixed_SV is not None
        losses = math.log(len(members)) - mixed_SV.gather(1, targets[:, None])[:, 0]
        return *in_place(losses, mixed_SV.argmax(-1) == targets, keep, at), keep

    def places(self, weights: WeightFiles) -> dict[str, str]:
        """Where a folder of the base model, or of one like it, has what is trained in full: its key by our name."""
        found, tied = {}, outline(self.hparams["base_model"]).tied
        for path, wrapper in self.stack.modules.items():
            for parameter, _ in wrapper.original_module.named_parameters():
                try:
                    found[f"{path}.{parameter}"] = weights.key(path, parameter)
                except ValueError:
                    if path not in tied:
                        raise
                    found[f"{path}.{parameter}"] = weights.key(tied[0], parameter)
        return found

    def write(self, path: Path, name: str, files: Mapping[str, str], *, writer: bool) -> None:
        """Write the folder of one replica: PEFT's of an adapter, or a whole model. All ranks must call it.

        Args:
            path: of the folder.
            name: of the replica.
            files: further text files, by name.
            writer: whether this rank writes.
        """
        layers, magnitudes = self.stack.stored_factors(name), self.stack.magnitudes(name)
        modules = self.stack.full_weights(name)
        if writer and self.is_full_finetuning:
            base = WeightFiles(self.base_path)
            write_trained(path, base, {key: modules[own] for own, key in self.places(base).items()}, files=files)
        elif writer:
            write_adapter(path, layers, self.saved_config, files=files, magnitudes=magnitudes, modules=modules)

    def read_model(self, folder: Path) -> Layers:
        """A whole model like the base, to be scored."""
        weights = WeightFiles(folder)
        return Stacks({}, {own: [weights.tensor(key)] for own, key in self.places(weights).items()})

    def fused_model(self, folders: Sequence[Path], rule: BoundRule) -> Layers:
        """Whole models fused, to be scored; all of it in memory. The first rank fuses; all ranks must call it."""
        base, change = WeightFiles(self.base_path), lambda _, weight: torch.empty_like(weight)
        if self.global_rank == 0:
            change = make_weight_merger([WeightFiles(folder) for folder in folders], base, rule)
        new = {key: broadcast_from_rank0(self.trainer, change(key, base.weight(key))) for key in base.files}
        return Stacks({}, {own: [new[key]] for own, key in self.places(base).items()})

    def current(self, names: Sequence[str]) -> Stacks[LoRAFactors]:
        """The replicas as they are now, to be fused. All ranks must call it."""
        full = [self.stack.full_weights(name) for name in names]
        return Stacks(self.stack.factors(names), {key: [each[key] for each in full] for key in full[0]})

    def load(self, name: str, layers: Layers) -> None:
        """Put a fused adapter, with its full weights if it has any, beside those in training: to be scored."""
        self.stack.load(name, layers, modules={key: each[0] for key, each in full_weights(layers).items()})

    @torch.no_grad()
    def score_rows(
        self,
        adapters: Mapping[str, Layers],
        batches: Iterable[Mapping[str, Tensor]],
        *,
        on_batch: Callable[[], object] = lambda: None,
    ) -> dict[str, RowScores]:
        """Score adapters that need not be in the stack, all of them held at once. All ranks must call it.

        Args:
            adapters: by name; each is one adapter by layer path.
            batches: ``input_ids`` and ``labels`` (b, T), and ``items`` (b,), the numbers of the rows; a row with a
                negative one is not counted.
            on_batch: called after each batch.

        Returns:
            By name, over all rows of all ranks in the order of their numbers.
        """
        before, self.scored, mixtures, self.mixtures = self.scored, {name: name for name in adapters}, self.mixtures, {}
        for name, layers in adapters.items():
            self.load(name, layers)
        try:
            return self.score_batches(batches, on_batch=on_batch)
        finally:
            for name in adapters:
                self.stack.unload(name)
            self.scored, self.mixtures = before, mixtures

    @torch.no_grad()
    def score_batches(
        self, batches: Iterable[Mapping[str, Tensor]], *, on_batch: Callable[[], object] = lambda: None
    ) -> dict[str, RowScores]:
        """Score :attr:`scored` and :attr:`mixtures` on batches as :meth:`score_rows` takes them."""
        columns = []
        with eval_mode(self.model):
            for batch in batches:
                batch = {key: value.to(self.device) for key, value in batch.items()}
                losses, correct, tokens = self.score(batch)
                columns.append(torch.cat([batch["items"][None], tokens[:1], losses, correct]).T)
                on_batch()
        table = torch.cat(columns)
        if self._trainer is not None:
            table = self.all_gather(table).reshape(-1, table.shape[1])
        table = table[real_items(table[:, 0])].cpu()
        labels, tokens = (*self.scored, *self.mixtures), table[:, 1].long()
        n = len(labels)
        return {label: RowScores(table[:, 2 + i], table[:, 2 + n + i] > 0, tokens) for i, label in enumerate(labels)}

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log loss per token and exact match of every adapter scored.

        Rows without a supervised token, which fill up the shares of the ranks, are not counted.
        """
        if not self.scored:
            return
        losses, correct, tokens = self.score(batch)
        real = tokens[0] > 0
        weight, rows = torch.stack([tokens[0].sum(), real.sum()]).tolist()
        for label, loss, match in zip((*self.scored, *self.mixtures), losses, correct, strict=True):
            self.log(f"val/loss_{label}", loss.sum() / max(weight, 1), batch_size=weight, sync_dist=True)
            self.log(f"val/match_{label}", (match & real).sum() / max(rows, 1), batch_size=rows, sync_dist=True)

    def on_test_start(self) -> None:
        """Forget an earlier test."""
        self.test_correct.reset()
        self.test_items.reset()

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Collect, per item, which adapters answer it exactly."""
        _, correct, _ = self.score(batch)
        self.test_correct.update(correct.T.float())
        self.test_items.update(batch["items"])

    def tested_items(self) -> Tensor:
        """After a test: the numbers of the items of :meth:`test_matrix`; not all, if the trainer limits the batches."""
        items = self.test_items.compute().long().view(-1)
        return items[real_items(items)]

    def test_matrix(self) -> Tensor:
        """After a test: bool, shape (items, adapters and mixtures scored), in the order of the items, of all ranks."""
        items, correct = self.test_items.compute().long().view(-1), self.test_correct.compute()
        return correct.view(-1, len(self.scored) + len(self.mixtures))[real_items(items)] > 0

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over all replicas, which it treats element by element, and one schedule stepped per optimizer step."""
        hparams = self.hparams

        def parameters(*parts: str) -> list[torch.nn.Parameter]:
            return [p for replica in self.replicas for p in self.stack.parameters(replica.name, parts)]

        groups: list[dict[str, Any]] = [{"params": parameters(*ADAPTER_PARTS)}]
        if hparams["lora_plus_ratio"] != 1:
            rate_of_b = hparams["learning_rate"] * hparams["lora_plus_ratio"]
            others = [part for part in ADAPTER_PARTS if part != "lora_B"]
            groups = [{"params": parameters(*others)}, {"params": parameters("lora_B"), "lr": rate_of_b}]
        optimizer = torch.optim.AdamW(
            groups, lr=hparams["learning_rate"], weight_decay=hparams["weight_decay"], fused=True
        )
        total = self.total_steps or int(self.trainer.estimated_stepping_batches)
        warmup = hparams["warmup_steps"]
        warmup = math.ceil(hparams["warmup_ratio"] * total) if warmup is None else warmup
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, hparams["lr_scheduler"], warmup=warmup, total=total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each replica on its own gradient norm: a norm over all would couple them."""
        if gradient_clip_val:
            groups = [self.stack.parameters(replica.name) for replica in self.replicas]
            strategy = None if self._trainer is None else self.trainer.strategy
            clip_gradients(groups, max_norm=gradient_clip_val, algorithm=gradient_clip_algorithm, strategy=strategy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapters, leave the base model out.

        DeepSpeed writes the weights itself, without the frozen ones; the names are kept to check them by.
        """
        names = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}
        checkpoint["trained"] = sorted(names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint has every weight in training: the lenient loading would not say.

        Raises:
            ValueError: naming a missing or foreign weight.
        """
        names = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        if odd := sorted(names ^ set(checkpoint.get("state_dict", checkpoint.get("trained", ())))):
            where = "the model" if odd[0] in names else "the checkpoint"
            raise ValueError(f"the checkpoint does not belong to this run: only {where} has '{odd[0]}'")
