"""SeedLoRAModule: a frozen base model with a stack of LoRA replicas, as a LightningModule.

Shape legend: ``N`` replicas, ``n`` of them active, ``b`` rows of each, ``T`` tokens, ``S`` scored tokens of a batch,
``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from seedlora.adapters.stack import AdapterStack
from seedlora.datamodules.rows import AskedRow
from seedlora.distributed.clipping import clip_gradients
from seedlora.distributed.lightning_internals import attached_trainer
from seedlora.distributed.sharded import is_partitioned, release_engine, shard_model
from seedlora.distributed.strategies import prepare_strategy, step_scale
from seedlora.model.attention import AUTO, Documents, SharedPrefix
from seedlora.model.embedded import EMBEDDED
from seedlora.model.loading import load_tokenizer
from seedlora.model.recomputation import recomputation
from seedlora.training.answering import Answer, Answerer
from seedlora.training.building import StackedModel, load_base, stack_replicas
from seedlora.training.checkpoint import REPLICAS, check_is_file, replicas_record, stored_settings
from seedlora.training.losses import TokenLosses
from seedlora.training.micro_batch import ForwardSize, MicroBatchLosses, TrainingBatch, micro_batch_losses, no_loss
from seedlora.training.model_options import PROJECTIONS, ModelOptions
from seedlora.training.optimizer import make_optimizer, make_schedule, parameter_groups
from seedlora.training.replicas import FitSettings, ReplicaStates
from seedlora.training.scoring import BatchScores, ExactMatches, ScoredLabels, Scorer


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
            2310.08659; it needs ``nf4``). LoRA+ goes with each. ``full`` trains every weight of the model instead, in
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
            either trains one copy for both. They are averaged where adapters are merged.
        learning_rate: of the optimizer, at the top of the schedule.
        lora_plus_ratio: the learning rate of B is so many times that of A; above 1 it is LoRA+ (Hayou et al., arXiv
            2402.12354, who take 16). DoRA's magnitudes learn like A.
        weight_decay: of the optimizer.
        lr_scheduler: ``cosine`` or ``linear`` (both to 0), or ``constant``, after the warm-up.
        warmup_ratio: part of the steps in which the rate grows linearly from near 0.
        warmup_steps: the same as a number of steps; it overrides the ratio.
        dtype: of the base weights: ``bfloat16``, ``float32``, or ``auto`` for bfloat16 where the machine is faster
            with it.
        gradient_checkpointing: what the backward pass recomputes instead of keeping it: ``none``; ``selective``, norms,
            activations and sums, but no result of a linear layer or of attention; or ``full``, whole decoder layers
            from their inputs, which takes the least memory and half as many operations again. ``true`` and ``false``
            are ``full`` and ``none``.
        compile: the backend by which ``torch.compile`` compiles each decoder layer for training, ``inductor`` for
            example; default: none.
        optimizer: ``adamw`` or another class of torch.optim by its name; ``adamw8bit`` or another of bitsandbytes; or
            as Lightning has it, ``class_path`` and ``init_args``: ``{class_path: torch.optim.RMSprop, init_args:
            {momentum: 0.9}}``.
        attention: the kernel of attention: ``sdpa`` (torch's own), ``eager`` (plain products), ``flash_attention_2``,
            ``flash_attention_3`` or ``flex_attention``, as transformers has them; ``auto`` is sdpa, and for short rows
            on a CPU eager, which is faster there.

    Raises:
        ValueError: for values out of range; the message names them.
    """

    #: The checkpoint holds the adapters alone.
    strict_loading = False
    # PEFT's and transformers' classes are typed Any in this file: the command line resolves its annotations, and
    # importing both would cost every --help seconds.
    model: Any
    stack: AdapterStack
    token_losses: TokenLosses

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
        gradient_checkpointing: bool | str = "none",
        compile: str | None = None,  # noqa: A002 - torch's word for it
        optimizer: str | dict[str, Any] = "adamw",
        attention: str = AUTO,
    ) -> None:
        super().__init__()
        rank_pattern, alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
        self.options = ModelOptions(
            base_model,
            adapter=adapter,
            quantization=quantization,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=target_modules,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            modules_to_save=modules_to_save or (),
            learning_rate=learning_rate,
            lora_plus_ratio=lora_plus_ratio,
            weight_decay=weight_decay,
            lr_scheduler=lr_scheduler,
            warmup_ratio=warmup_ratio,
            warmup_steps=warmup_steps,
            dtype=dtype,
            gradient_checkpointing=recomputation(gradient_checkpointing),
            compile=compile,
            optimizer=optimizer,
            attention=attention,
        )
        # Lightning saves the arguments as they are named here, into checkpoints too: as plain lists.
        target_modules = target_modules if isinstance(target_modules, str) else list(target_modules)
        modules_to_save = list(modules_to_save or ()) or None
        self.save_hyperparameters()
        self.prepare_fit(FitSettings())
        #: What validation and test score: Lightning gives their steps no arguments, so the callback sets it before.
        self.scored = ScoredLabels()
        #: What the last test found.
        self.exact_matches = ExactMatches()
        #: What answers in Trainer.predict; likewise.
        self.answerer: Answerer | None = None
        #: The size of the last forward in training.
        self.last_forward = ForwardSize(0, 0.0)
        self._tokenizer: Any = None
        self._built: StackedModel | None = None

    @property
    def tokenizer(self) -> Any:
        """Return the base model's tokenizer, read when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.options.base_model)
        return self._tokenizer

    @property
    def scorer(self) -> Scorer:
        """Return what scores the adapters of the stack, on the module's device and all ranks."""
        shares_prefix = self.options.reason_not_to_pack is None
        return Scorer(self.model, self.stack, self.token_losses, self.device, self._gather, shares_prefix=shares_prefix)

    def _gather(self, rows: Tensor) -> Tensor:
        return rows if attached_trainer(self) is None else self.all_gather(rows).reshape(-1, rows.shape[1])

    def prepare_fit(self, settings: FitSettings) -> None:
        """Take what an ensemble decides for the next fit, before the module is set up for it."""
        self.fit_settings = settings
        #: The replicas of the fit, and which of them train.
        self.replicas = ReplicaStates(settings)

    def setup(self, stage: str | None = None) -> None:
        """Load the base model, once, and create the adapters of the fit's replicas on it.

        Each adapter is initialised by PEFT under its own seed, whatever it is stacked with; the global random state is
        left as it was. Every fit starts from fresh adapters on the same base weights, so that the same seeds give the
        same bits however often a module was used; validation and test keep the adapters that are there.
        """
        options, settings, built = self.options, self.fit_settings, self._built
        trainer = attached_trainer(self)
        if trainer is not None:
            prepare_strategy(trainer, **options.needs_whole_base)
        if built is not None and built.replicas == settings.replicas and stage != "fit":
            if trainer is not None and is_partitioned(self.model):
                # A fit ends on the CPU, and ZeRO-3 does not bring back the small weights that it keeps whole.
                self.to(trainer.strategy.root_device)
            return
        base = None if built is None else built.without_adapters(options)
        if base is None:
            base = load_base(options)
        self._built = stack_replicas(base, settings.replicas, options)
        self.model, self.stack = self._built.model, self._built.stack
        self.token_losses = TokenLosses(self.model, self.stack, module=self)
        # An earlier fit may have left some idle.
        self.replicas = ReplicaStates(settings)

    def configure_model(self) -> None:
        """Split the model over the ranks where the strategy leaves that to the module."""
        if (trainer := attached_trainer(self)) is not None:
            shard_model(self.model, trainer)

    def on_fit_start(self) -> None:
        """Switch to training: models load in eval mode, which would silently switch off dropout and recomputation."""
        self.model.train()

    def teardown(self, stage: str) -> None:
        """Leave the module as another fit can take it."""
        if stage == "fit":
            release_engine(self.trainer)

    def forward(
        self,
        input_ids: Int[Tensor, "M T"],
        keep: Tensor,
        position_ids: Tensor | None = None,
        documents: Documents | SharedPrefix | None = None,
    ) -> Float[Tensor, "S V"]:
        """Return the logits at the positions kept: :meth:`seedlora.training.losses.TokenLosses.logits`."""
        return self.token_losses.forward(input_ids, keep, position_ids, documents)

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """Return the sum of the replicas' losses over one micro-batch, normalised over the optimizer step.

        Rows of idle replicas are left out. A loss that is not finite is found before the backward pass, on all ranks
        together: its replica is excluded, and the losses are computed again without it, so that nothing of it reaches
        the others. When none is left, the fit ends.

        Raises:
            DivergedError: if a loss is not finite, and that is to end the run.
        """
        while self.replicas.active:
            losses = micro_batch_losses(
                batch,
                self.replicas,
                self.stack,
                self.token_losses,
                dropout_key=(self.current_epoch, batch_idx, self.global_rank) if self.options.lora_dropout else None,
                are_one=self.are_one,
                reduce=partial(self.trainer.strategy.reduce, reduce_op="sum"),
            )
            if not (broken := losses.broken(self.stack)):
                self._show(losses)
                tokens = batch["num_items"][self.replicas.active_positions]
                # The losses of replicas that are one have one mean, over the tokens of all.
                return self._total(losses.sums / (tokens.sum() if self.are_one else tokens))
            self.replicas.exclude(broken, f"training loss not finite in step {self.trainer.global_step + 1}")
        self.trainer.should_stop = True
        return self._no_loss_of_idle()

    @property
    def are_one(self) -> bool:
        """Tell whether all replicas are one in this optimizer step, which sees the rows of all."""
        shared = self.fit_settings.shared_steps
        return shared > 0 and self.trainer.global_step < shared

    def _show(self, losses: MicroBatchLosses) -> None:
        """Log the mean loss of each replica over the micro-batch on all ranks."""
        sums, tokens = losses.shown
        means = zip(losses.replicas, sums / tokens, strict=True)
        shown = {f"train/loss_{replica.name}": mean for replica, mean in means if not replica.helps}
        self.log_dict(shown, prog_bar=True)
        self.last_forward = ForwardSize(losses.size, tokens.sum().item() / self.trainer.world_size)

    def _total(self, losses: Float[Tensor, " n"]) -> Tensor:
        """Sum up the replicas' losses for the backward pass."""
        total = losses.sum() * step_scale(self.trainer)
        return total + self._no_loss_of_idle() if self.replicas.idle and self.trainer.world_size > 1 else total

    def _no_loss_of_idle(self) -> Tensor:
        return no_loss(p for name in sorted(self.replicas.idle) for p in self.stack.parameters(name))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep idle replicas as they are: with any gradient, 0 or an earlier micro-batch's, AdamW would move them."""
        for name in self.replicas.idle:
            for parameter in self.stack.parameters(name):
                parameter.grad = None

    def check_weights(self) -> None:
        """Exclude the replicas that the last step spoiled, before their weights are used. All ranks must call it.

        The next training loss would find them too, but nothing follows the last step, and in a validation their rows
        would spoil all others'. It reads each weight once.

        Raises:
            DivergedError: if there are any, and that is to end the run.
        """
        names = [replica.name for replica in self.replicas.active]
        if not names:
            return
        bad = torch.tensor([not self.stack.is_finite(name) for name in names], dtype=torch.float32, device=self.device)
        # What one rank finds, all leave out.
        ranks = self.trainer.strategy.reduce(bad, reduce_op="sum").tolist()
        if broken := [name for name, found in zip(names, ranks, strict=True) if found]:
            self.replicas.exclude(broken, f"weights not finite after step {self.trainer.global_step}")

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor] | None:
        """Log loss per token and exact match of everything scored.

        Rows without a supervised token, which fill up the shares of the ranks, are not counted.

        Returns:
            What the batch says, for callbacks: :class:`seedlora.training.scoring.BatchScores` by name.
        """
        if not self.scored.adapters:
            return None
        scores = self.scorer.score(batch, self.scored)
        self._log_scores(scores, loss="val/loss", match="val/match")
        return scores._asdict()

    def _log_scores(self, scores: BatchScores, *, loss: str, match: str) -> None:
        """Log loss per token and exact match of everything scored, over all batches and ranks."""
        real = scores.tokens[0] > 0
        weight, rows = torch.stack([scores.tokens[0].sum(), real.sum()]).tolist()
        for label, losses, correct in zip(self.scored.labels, scores.losses, scores.correct, strict=True):
            self.log(f"{loss}_{label}", losses.sum() / max(weight, 1), batch_size=weight, sync_dist=True)
            self.log(f"{match}_{label}", (correct & real).sum() / max(rows, 1), batch_size=rows, sync_dist=True)

    def on_test_start(self) -> None:
        """Forget an earlier test."""
        self.exact_matches.reset()

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Collect, per item, which labels answer it exactly; log the share of such items, and the loss per token.

        Returns:
            What the batch says, for callbacks: :class:`seedlora.training.scoring.BatchScores` by name.
        """
        scores = self.scorer.score(batch, self.scored)
        self.exact_matches.add(batch["items"], scores.correct)
        self._log_scores(scores, loss="test/loss", match="test/score")
        return scores._asdict()

    def predict_step(self, batch: Sequence[AskedRow], batch_idx: int) -> list[Answer]:
        """Answer rows by the adapter that the ensemble's callback chose.

        Raises:
            ValueError: without it.
        """
        if self.answerer is None:
            raise ValueError(
                "Trainer.predict asks an adapter of a run: give the Trainer the run's SeedEnsembleCallback"
            )
        return self.answerer(batch)

    def configure_optimizers(self) -> dict[str, Any]:
        """Make the optimizer over all replicas, and the schedules of their learning rates."""
        groups = parameter_groups(self.stack, self.replicas, self.options)
        optimizer = make_optimizer(groups)
        total = self.fit_settings.total_steps or int(self.trainer.estimated_stepping_batches)
        schedule = make_schedule(optimizer, groups, total=total)
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
            trainer = attached_trainer(self)
            strategy = None if trainer is None else trainer.strategy
            clip_gradients(groups, max_norm=gradient_clip_val, algorithm=gradient_clip_algorithm, strategy=strategy)

    def _trained_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapters, leave the base model out.

        DeepSpeed writes the weights itself, without the frozen ones; the names are kept to check them by.
        """
        names = self._trained_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}
        checkpoint["trained"] = sorted(names)
        checkpoint[REPLICAS] = replicas_record(self.fit_settings)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *arguments: Any, **options: Any) -> SeedLoRAModule:
        """Return the module with the base model and the replicas of a checkpoint, as Lightning does.

        Raises:
            ValueError: for a folder, or a checkpoint that does not say whose weights it holds.
        """
        check_is_file(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *arguments, **options)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint has every weight in training: the lenient loading would not say.

        Where no Trainer has set the module up, it gets the base model and the checkpoint's replicas first.

        Raises:
            ValueError: naming a missing or foreign weight.
        """
        if self._built is None:
            self.prepare_fit(stored_settings(checkpoint))
            self.setup()
            self.scored = ScoredLabels({replica.name: replica.name for replica in self.replicas})
        names = self._trained_names()
        if odd := sorted(names ^ set(checkpoint.get("state_dict", checkpoint.get("trained", ())))):
            where = "the model" if odd[0] in names else "the checkpoint"
            raise ValueError(f"the checkpoint does not belong to this run: only {where} has '{odd[0]}'")
