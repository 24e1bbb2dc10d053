"""Write an adapter as a GGUF file, which llama.cpp and Ollama load beside a base model in that format.

Tensor names are those of the ``gguf`` package. What else the file must say was read in llama.cpp's loader
(``llama-adapter.cpp``) and its converter of adapters, and is checked against both in ``tests/serving``.

Shape legend: ``D`` output features, ``K`` input features, ``R`` rank, ``H`` heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from seedlora.adapters.adapter import BASE_NAME, Adapter, AdapterError
from seedlora.updates.factors import LoRAFactors
from seedlora.utils.files import atomic_file

if TYPE_CHECKING:
    from gguf import GGUFWriter, TensorNameMap
    from transformers import PretrainedConfig

#: The first bytes of every GGUF file.
MAGIC = b"GGUF"
#: llama.cpp's name for each architecture of transformers that is written here.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Phi3ForCausalLM": "phi3",
}
#: Rotates neighbouring rows of a head, where transformers rotates its first half with its second: rows are reordered.
_INTERLEAVED = {"llama"}
#: What a model with images calls the part that is a language model.
_TEXT_PART = "language_model."
_EMBEDDING = "token_embd"


@dataclass(frozen=True)
class GGUFModel:
    """Name what the file of an adapter depends on in its base model.

    Args:
        architecture: llama.cpp's name of it.
        layers: how many decoder layers it has.
        heads: of the queries.
        kv_heads: of keys and values.
        tied: whether the head is the input embedding.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool


def gguf_model(config: PretrainedConfig) -> GGUFModel | None:
    """Return what has to be known of a base model; None for an architecture that is not written here."""
    name = next(iter(config.architectures or ()), "")
    if name not in ARCHITECTURES:
        return None
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    return GGUFModel(
        architecture=ARCHITECTURES[name],
        layers=int(text.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        tied=bool(text.tie_word_embeddings),
    )


def write_gguf(path: Path, adapter: Adapter, model: GGUFModel) -> None:
    """Write an adapter in float32, whole or not at all.

    llama.cpp multiplies the product of a layer's factors by ``adapter.lora.alpha / R``. The file says the adapter's
    largest rank as alpha; ``B`` of a layer of a smaller rank is scaled for it.

    Args:
        path: the file; an older one is replaced.
        adapter: read with its scaling folded into ``B``.
        model: its base model.

    Raises:
        AdapterError: if the adapter holds what llama.cpp cannot load: layers that the base model does not have there,
            an embedding, a tied head, more than factors.
        OSError: if it cannot be written; an older file is then untouched.
    """
    from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, Keys, LlamaFileType

    tensors = _tensors(adapter, model)
    with atomic_file(path) as temporary:
        writer = GGUFWriter(temporary, model.architecture)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(_largest_rank(adapter)))
        writer.add_name(path.stem)
        writer.add_file_type(LlamaFileType.ALL_F32)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.contiguous().numpy())
        _write(writer)


def _write(writer: GGUFWriter) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _largest_rank(adapter: Adapter) -> int:
    return max(factors.rank for factors in adapter.layers.values())


def _tensors(adapter: Adapter, model: GGUFModel) -> dict[str, Tensor]:
    """Return the file's tensors by name: ``A`` of shape (R, K) and ``B`` of shape (D, R)."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    _check_plain(adapter)
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == model.architecture)
    names, rank = get_tensor_name_map(MODEL_ARCH(number), model.layers), _largest_rank(adapter)
    found: dict[str, Tensor] = {}
    for path, factors in adapter.layers.items():
        name = _tensor_name(path, names, model)
        a, b = factors.A[0].float(), factors.B[0].float() * (factors.rank / rank)
        if model.architecture in _INTERLEAVED and (heads := _heads(path, model)):
            _check_heads(path, factors, heads)
            b = interleave_rows(b, heads)
        found |= {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b}
    return found


def interleave_rows(b_DR: Float[Tensor, "D R"], heads: int) -> Float[Tensor, "D R"]:
    """Reorder the rows of a query or key projection from transformers' rotation to llama.cpp's.

    transformers rotates row ``i`` of a head with row ``i + D/2H``, llama.cpp row ``2i`` with row ``2i + 1``.
    """
    rows = torch.arange(b_DR.shape[0]).view(heads, 2, -1).transpose(1, 2).reshape(-1)
    return b_DR[rows]


def _check_plain(adapter: Adapter) -> None:
    more = [name for name, held in (("DoRA's magnitudes", adapter.magnitudes), ("biases", adapter.biases)) if held]
    more += [f"the full weights of {name}" for name in adapter.modules_to_save]
    more += ["factors of an embedding"] if adapter.embeddings else []
    if more:
        raise AdapterError(
            f"the adapter holds {more[0]}, which llama.cpp does not load beside a base model; add --into_base, which "
            "writes the whole model"
        )
    if adapter.quantization != "none":
        raise AdapterError(
            f"the adapter belongs on its base model in {adapter.quantization} alone, as its {BASE_NAME} says, and "
            "llama.cpp quantises otherwise; merge it with --into_base a folder of that base"
        )


def _tensor_name(path: str, names: TensorNameMap, model: GGUFModel) -> str:
    """Return llama.cpp's name of a layer."""
    name: str | None = names.get_name(path.replace(_TEXT_PART, ""))
    if name is None or name.split(".")[0] == _EMBEDDING:
        raise AdapterError(f"llama.cpp's {model.architecture} of {model.layers} layers has no adapter for '{path}'")
    if name == "output" and model.tied:
        raise AdapterError(
            f"'{path}' is tied to the input embedding, so llama.cpp has no such weight; add --into_base, which writes "
            "the whole model"
        )
    return name


def _heads(path: str, model: GGUFModel) -> int:
    """Return how many heads a query or key projection has; 0 for all other layers."""
    return {"q_proj": model.heads, "k_proj": model.kv_heads}.get(path.rpartition(".")[2], 0)


def _check_heads(path: str, factors: LoRAFactors, heads: int) -> None:
    if factors.shape[0] % (2 * heads):
        raise AdapterError(
            f"'{path}' has {factors.shape[0]} output features, which {heads} heads of an even size do not share; is it "
            "an adapter of this base model?"
        )
