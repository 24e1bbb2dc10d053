"""Load the base model and put the adapters of the replicas on it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from seedlora.adapters.stack import AdapterStack
from seedlora.adapters.stacked_forward import StartFactors
from seedlora.distributed.sharded import decoder_layers, is_partitioned, is_sharded
from seedlora.model.compilation import compile_layers
from seedlora.model.loading import load_model
from seedlora.model.recomputation import SELECTIVE, recompute_activations
from seedlora.training.replicas import Replica
from seedlora.training.starting_points import FrozenBase, prepare_base
from seedlora.training.whole_models import WholeModels

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from seedlora.training.model_options import ModelOptions


@dataclass(frozen=True)
class StackedModel:
    """Holds a base model with the adapters of replicas on it.

    Args:
        model: PEFT's.
        stack: of the adapters.
        starts: as in :class:`FrozenBase`.
        replicas: whose adapters they are.
    """

    model: PeftModel
    stack: AdapterStack
    starts: Mapping[str, StartFactors]
    replicas: Sequence[Replica]

    def without_adapters(self, options: ModelOptions) -> FrozenBase | None:
        """Take the adapters off again; None where the base model must be loaded anew for others.

        So it is where FSDP2 has split the layers, and where ZeRO-3 has dealt the weights out and DoRA's magnitudes
        start at their norms.
        """
        if is_sharded(self.model) or (options.adapter == "dora" and is_partitioned(self.model)):
            return None
        return FrozenBase(self.stack.remove(), self.starts)


def load_base(options: ModelOptions) -> FrozenBase:
    """Load the base model, quantise it, and find where adapters start on it."""
    return prepare_base(
        load_model(options.base_model, dtype=options.base_dtype, attention=options.attention),
        options.lora_config(),
        adapter=options.adapter,
        quantization=options.quantization,
    )


def stack_replicas(base: FrozenBase, replicas: Sequence[Replica], options: ModelOptions) -> StackedModel:
    """Create the adapters of replicas on a base model, ready to be trained.

    Args:
        base: to which the adapters are added.
        replicas: in the order of their blocks of rows.
        options: of the model, those of each replica as far as it has none of its own.
    """
    model = _add_adapters(base.model, replicas, options)
    keeps_products = options.gradient_checkpointing == SELECTIVE
    stack = AdapterStack(model, starts=base.starts, keeps_products=keeps_products)
    if options.is_full_finetuning:
        WholeModels(stack, options).start_at_files(replica.name for replica in replicas)
    for replica in replicas:
        for parameter in stack.parameters(replica.name):
            parameter.requires_grad_(True)
    recompute_activations(model, options.gradient_checkpointing)
    if options.compile is not None:
        compile_layers(decoder_layers(model), options.compile)
    return StackedModel(model, stack, base.starts, tuple(replicas))


def _add_adapters(base: PreTrainedModel, replicas: Sequence[Replica], options: ModelOptions) -> PeftModel:
    """Let PEFT initialise each adapter under its own seed, whatever it is stacked with.

    The global random state is left as it was.
    """
    from peft import get_peft_model

    (first, config), *others = ((replica, options.of_replica(replica.options).lora_config()) for replica in replicas)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # The stack ties what the base model ties.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        seed_cpu = torch.default_generator.manual_seed  # and no GPU
        seed_cpu(first.init_seed)
        model = get_peft_model(base, config, adapter_name=first.name)
        for replica, config in others:
            seed_cpu(replica.init_seed)
            model.add_adapter(replica.name, config)
    return model
