"""The options of the model, checked, and what can be known without the weights.

PEFT is imported inside the methods that need it: every ``--help`` imports this file, and PEFT would cost it seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from seedlora.adapters.model_card import base_note
from seedlora.model.attention import ATTENTIONS, AUTO, check_attention, reason_not_to_pack
from seedlora.model.compilation import check_backend
from seedlora.model.embedded import EMBEDDED
from seedlora.model.loading import check_base, fast_dtype, load_config, resolve_base_model
from seedlora.model.outline import ALL_LINEAR, Outline, outline
from seedlora.model.peft_internals import no_target_modules
from seedlora.model.quantization import check_quantization
from seedlora.model.recomputation import NOTHING, RECOMPUTATIONS
from seedlora.names import FULL, SCHEDULES
from seedlora.training.optimizer_choice import OptimizerChoice, optimizer_choice
from seedlora.training.replicas import ReplicaOptions
from seedlora.utils.options import name_option
from seedlora.utils.patterns import pattern_key

if TYPE_CHECKING:
    from peft import LoraConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = ("lora", "rslora", "dora", "pissa", "loftq", FULL)
#: Adapters that start at factors of the base weights, the same for every seed.
STARTING_AT_WEIGHTS = ("pissa", "loftq")
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


class NeedsWholeBase(TypedDict):
    """Holds the options for which every process needs the whole base model, and their values.

    They are the arguments of :func:`seedlora.distributed.strategies.prepare`.
    """

    quantization: str
    backend: str | None
    full: str | None


def require(condition: bool, message: str) -> None:
    """Raise ValueError unless a condition holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class ModelOptions:
    """Holds the options of :class:`seedlora.training.module.SeedLoRAModule`, which describes them.

    Raises:
        ValueError: for values out of range; the message names them.
    """

    base_model: str = EMBEDDED
    adapter: str = "lora"
    quantization: str = "none"
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: Sequence[str] | str = PROJECTIONS
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    learning_rate: float = 2e-3
    lora_plus_ratio: float = 1.0
    weight_decay: float = 0.0
    lr_scheduler: str = "cosine"
    warmup_ratio: float = 0.06
    warmup_steps: int | None = None
    dtype: str = "auto"
    gradient_checkpointing: str = NOTHING
    compile: str | None = None
    optimizer: str | Mapping[str, Any] = "adamw"
    attention: str = AUTO

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_choices()
        self._check_adapter_on_quantized_base()
        if self.is_full_finetuning:
            self._check_no_adapter_options()
        self._check_patterns_are_positive()
        if self.compile is not None:
            self._check_compile(self.compile)
        self._check_optimizer(self.optimizer_choice)

    def _check_ranges(self) -> None:
        require(self.r >= 1, f"{name_option('model.r')} must be at least 1, got {self.r}")
        require(self.lora_alpha > 0, f"{name_option('model.lora_alpha')} must be positive, got {self.lora_alpha}")
        require(
            0 <= self.lora_dropout < 1,
            f"{name_option('model.lora_dropout')} must be in [0, 1), got {self.lora_dropout}",
        )
        require(
            self.learning_rate > 0, f"{name_option('model.learning_rate')} must be positive, got {self.learning_rate}"
        )
        require(
            self.lora_plus_ratio > 0,
            f"{name_option('model.lora_plus_ratio')} must be positive, got {self.lora_plus_ratio}",
        )
        require(
            0 <= self.warmup_ratio <= 1,
            f"{name_option('model.warmup_ratio')} must be in [0, 1], got {self.warmup_ratio}",
        )
        require(
            len(self.target_modules) > 0,
            f"{name_option('model.target_modules')} is empty: there would be nothing to train",
        )

    def _check_choices(self) -> None:
        require(
            self.adapter != "none",
            f"{name_option('model.adapter', 'none')} is called {FULL} now: every weight is trained",
        )
        for name, value, allowed in (
            ("adapter", self.adapter, ADAPTERS),
            ("lr_scheduler", self.lr_scheduler, SCHEDULES),
            ("dtype", self.dtype, DTYPES),
            ("attention", self.attention, ATTENTIONS),
            ("gradient_checkpointing", self.gradient_checkpointing, RECOMPUTATIONS),
        ):
            require(
                value in allowed,
                f"Unknown {name_option(f'model.{name}')} '{value}'; choose one of {', '.join(allowed)}",
            )
        check_quantization(self.quantization)

    def _check_adapter_on_quantized_base(self) -> None:
        require(
            self.adapter != "loftq" or self.quantization == "nf4",
            f"{name_option('model.adapter', 'loftq')} starts at what nf4 loses; set "
            f"{name_option('model.quantization', 'nf4')}, got {self.quantization}",
        )
        require(
            self.adapter != "pissa" or self.quantization != "int8",
            f"{name_option('model.adapter', 'pissa')} goes with {name_option('model.quantization')} none or nf4, got "
            "int8",
        )

    def _check_no_adapter_options(self) -> None:
        """Refuse options of adapters where there is none: they must be at their defaults."""
        at_default = {
            "quantization": self.quantization == ModelOptions.quantization,
            "lora_plus_ratio": self.lora_plus_ratio == ModelOptions.lora_plus_ratio,
            "lora_dropout": self.lora_dropout == ModelOptions.lora_dropout,
            "rank_pattern": not self.rank_pattern,
            "alpha_pattern": not self.alpha_pattern,
            "modules_to_save": not self.modules_to_save,
            "r": self.r == ModelOptions.r,
            "lora_alpha": self.lora_alpha == ModelOptions.lora_alpha,
            "target_modules": [*self.target_modules] == [*PROJECTIONS],
        }
        odd = next((f"{name} {getattr(self, name)}" for name, is_default in at_default.items() if not is_default), None)
        require(
            odd is None,
            f"{name_option('model.adapter', FULL)} trains every weight in full, to which "
            f"{name_option(f'model.{odd}')} does not apply",
        )

    def _check_patterns_are_positive(self) -> None:
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            low = {key: value for key, value in pattern.items() if value < 1}
            require(not low, f"{name_option(f'model.{name}')} must be at least 1 everywhere, got {low}")

    def _check_compile(self, backend: str) -> None:
        check_backend(backend)
        require(
            self.lora_dropout == 0,
            f"{name_option('model.compile')} {backend} does not go with {name_option('model.lora_dropout')} "
            f"{self.lora_dropout}, whose random streams "
            "would break each graph into pieces; leave out one of them",
        )

    def _check_optimizer(self, choice: OptimizerChoice) -> None:
        _ = choice.traits  # takes a few steps
        if self.adapter in ("dora", FULL) or self.modules_to_save:
            choice.check_vectors()
        require(
            self.weight_decay == 0 or choice.takes_weight_decay,
            f"{name_option('model.optimizer', choice.name)} has no weight decay, and "
            f"{name_option('model.weight_decay')} is {self.weight_decay}",
        )

    # What follows from them

    @property
    def optimizer_choice(self) -> OptimizerChoice:
        """Return the class of the optimizer with its options."""
        return optimizer_choice(self.optimizer)

    def of_replica(self, own: ReplicaOptions) -> ModelOptions:
        """Return the options of a replica, which has some of its own.

        Raises:
            ValueError: for values out of range; the message names them.
        """
        found = replace(self, **own.swept)
        if own.rate_factor != 1:
            found = replace(found, learning_rate=found.learning_rate * own.rate_factor)
        if (factor := own.rank_factor) != 1:
            # rsLoRA divides by the root of the rank.
            alpha_factor = factor**0.5 if self.adapter == "rslora" else factor
            found = replace(
                found,
                r=found.r * factor,
                lora_alpha=found.lora_alpha * alpha_factor,
                rank_pattern={key: rank * factor for key, rank in found.rank_pattern.items()},
                alpha_pattern={key: alpha * alpha_factor for key, alpha in found.alpha_pattern.items()},
            )
        return found

    @property
    def base_path(self) -> str:
        """Return what ``from_pretrained`` takes for the base model of these adapters."""
        return resolve_base_model(self.base_model)

    @property
    def base_dtype(self) -> torch.dtype:
        """Return the dtype of the base weights; ``auto`` is what the machine multiplies fastest."""
        return DTYPES[self.dtype] or fast_dtype()

    @property
    def base_precision(self) -> str:
        """Describe the dtype of the base weights and what the linear layers are quantised to, for people."""
        dtype = str(self.base_dtype).removeprefix("torch.")
        return dtype if self.quantization == "none" else f"{self.quantization} and {dtype}"

    @property
    def base_note(self) -> str:
        """Say what to know of the base model that the adapters belong to, for people."""
        return base_note(self.adapter, self.quantization)

    @property
    def outline(self) -> Outline:
        """Return the base model without its weights; raises as :func:`seedlora.model.outline.outline`."""
        return outline(self.base_model)

    @property
    def starts_at_weights(self) -> bool:
        """Tell whether the adapters start at factors of the base weights: the same ones for every seed."""
        return self.adapter in STARTING_AT_WEIGHTS

    @property
    def is_full_finetuning(self) -> bool:
        """Tell whether every weight of the model is trained, and there are no adapters."""
        return self.adapter == FULL

    @property
    def adds_dense(self) -> bool:
        """Tell whether training adds updates of full rank to the weights, which take longer to merge than to score."""
        return self.is_full_finetuning or self.adapter == "dora"

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """Return the layers to adapt, with their shapes (D, K); raises as :func:`seedlora.model.outline.outline`."""
        return {} if self.is_full_finetuning else self.outline.matching_layers(self.target_modules)

    @property
    def full_modules(self) -> dict[str, int]:
        """Return the modules trained in full, with the number of their parameters; raises as :attr:`targets`."""
        model = self.outline
        if self.is_full_finetuning:
            model.check_row_order(model.modules, name_option("model.adapter", FULL))
            return model.modules
        return model.modules_trained_in_full(self.modules_to_save)

    @property
    def needs_whole_base(self) -> NeedsWholeBase:
        """Return the options that do not go with a base model whose parts are on different processes."""
        modules = f"modules_to_save {', '.join(self.modules_to_save)}" if self.modules_to_save else None
        full = f"adapter {FULL}" if self.is_full_finetuning else modules
        return {"quantization": self.quantization, "backend": self.compile, "full": full}

    @property
    def reason_not_to_pack(self) -> str | None:
        """Say why rows must not follow each other without padding in this model; None if they may."""
        compiled = self.compile is not None
        return reason_not_to_pack(self.outline.text_config, self.attention, compiled=compiled)

    @property
    def display_text(self) -> str:
        """Describe what is trained, for people."""
        by = "" if self.optimizer == ModelOptions.optimizer else f"; by {self.optimizer_choice.text}"
        if self.is_full_finetuning:
            return f"no adapter, every weight in full, in float32{by}"
        text = f"{self.adapter}, r {self.r}, lora_alpha {self.lora_alpha:g}"
        if self.rank_pattern or self.alpha_pattern:
            text += ", other ones by pattern"
        if self.lora_plus_ratio != 1:
            text += f", LoRA+ {self.lora_plus_ratio:g}"
        text += f", on {len(self.targets)} layers"
        if full := self.full_modules:
            text += f"; {', '.join(dict.fromkeys(path.rpartition('.')[2] for path in full))} in full"
        return text + by

    @property
    def averaged_text(self) -> str:
        """Say what a merge rule is not applied to, for people; empty if it is applied to everything."""
        if self.is_full_finetuning:
            return "vectors (norms, biases) are averaged"
        return "what is trained in full is averaged" if self.full_modules else ""

    # PEFT's configurations

    def rank(self, path: str) -> int:
        """Return the rank of an adapted layer in training."""
        return int(self.rank_pattern.get(pattern_key(self.rank_pattern, path), self.r))

    def lora_config(self) -> LoraConfig:
        """Make PEFT's configuration of one replica in training."""
        from peft import LoraConfig

        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        if self.is_full_finetuning:
            targets = no_target_modules()
        elif targets == ALL_LINEAR:
            targets = sorted({path.rpartition(".")[2] for path in self.targets})
        if self.outline.has_towers and not self.is_full_finetuning:
            targets = sorted(self.targets)  # by their ends PEFT would find layers of the towers too
        return LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.base_path,
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            # Whole paths: PEFT would take norm for the end of input_layernorm.
            modules_to_save=sorted(self.full_modules) or None,
            use_rslora=self.adapter == "rslora",
            use_dora=self.adapter == "dora",
            fan_in_fan_out=self.outline.transposed and self.quantization == "none",
        )

    def saved_config(self) -> LoraConfig:
        """Make PEFT's configuration of a replica as it is saved: for the original base model, without quantisation."""
        config = self.lora_config()
        config.fan_in_fan_out = self.outline.transposed
        if self.adapter == "pissa":
            # The start, with its sign turned, is beside what was trained.
            config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
            config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
            config.alpha_pattern = {key: 2 * alpha for key, alpha in config.alpha_pattern.items()}
        return config

    # What needs the base model's configuration

    def check(self) -> None:
        """Check what can be known without the weights: the model exists and has the layers to adapt.

        Raises:
            ValueError: if it has not.
            OSError: if it cannot be read.
        """
        config = load_config(self.base_model)
        check_base(self.base_model, config)
        check_attention(self.attention, config, self.base_dtype)
        targets = self.targets
        self._check_full_modules(targets)
        self._check_patterns_match(targets)
        if self.starts_at_weights:
            self._check_start_ranks(targets)

    def _check_full_modules(self, targets: Mapping[str, tuple[int, int]]) -> None:
        full = self.full_modules
        if both := [path for path in full if path in targets]:
            raise ValueError(
                f"{name_option('model.modules_to_save')}: {both[0]} is among {name_option('model.target_modules')} "
                "too; a layer has an adapter or is "
                "trained in full"
            )
        if self.quantization != "none" and (few := set(full) & set(self.outline.linear)):
            raise ValueError(
                f"{name_option('model.modules_to_save')}: {min(few)} would be quantised, and weights in "
                f"{self.quantization} take "
                "no gradient; embeddings, heads and norms are not quantised"
            )

    def _check_patterns_match(self, targets: Mapping[str, tuple[int, int]]) -> None:
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            used = {pattern_key(pattern, path) for path in targets}
            if unused := [key for key in pattern if key not in used]:
                raise ValueError(
                    f"{name_option(f'model.{name}')}: '{unused[0]}' matches no adapted layer, e.g. "
                    f"{next(iter(targets))}"
                )

    def _check_start_ranks(self, targets: Mapping[str, tuple[int, int]]) -> None:
        for path, shape in targets.items():
            rank = self.rank(path)
            if rank > min(shape):
                raise ValueError(
                    f"{name_option('model.r')} {rank}: {self.adapter} takes at most {min(shape)} directions of {path}"
                )
