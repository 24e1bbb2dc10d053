"""Know the layers of a base model from its own classes: names, shapes, and how each stores its weight.

Shape legend: ``D`` output features, ``K`` input features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from seedlora.model.layer_names import LayerNames
from seedlora.utils.files import atomic_file
from seedlora.utils.hub import local_folder
from seedlora.utils.places import user_cache
from seedlora.utils.plain_data import from_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: PEFT's task types, and the class of transformers that loads a base model for each.
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
#: Of what is kept in the cache; another number for another form of it.
_FORM = 1


@dataclass(frozen=True)
class BaseLayers:
    """The layers of a base model that can carry factors.

    Args:
        shapes: ``(D, K)`` by the path of the layer; of an embedding, ``D`` is the width and ``K`` the vocabulary.
        transposed: paths of the layers that store their weight as ``(K, D)``: ``Conv1D`` of GPT-2. Embeddings do so
            too, and are not among them.
        modules: the names of all modules.
    """

    shapes: Mapping[str, tuple[int, int]]
    transposed: frozenset[str]
    modules: LayerNames

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> BaseLayers:
        """Return the layers of a description, as :func:`_describe` makes it."""
        shapes = {str(path): (int(d), int(k)) for path, (d, k) in description["shapes"].items()}
        return cls(shapes, frozenset(map(str, description["transposed"])), LayerNames(map(str, description["modules"])))


def base_layers(source: str | Path, task_type: str | None = None) -> BaseLayers | None:
    """Describe the layers of a base model, if its configuration is on this machine and transformers knows its class.

    Nothing is downloaded, no weight is read, and no code of the folder is run. The model is made without memory, which
    takes 3 s with the import of transformers; what it is like is kept in the user's cache.

    Args:
        source: a folder or a hub id.
        task_type: PEFT's, which says which class the model is loaded by. Default: the one that its configuration names.

    Returns:
        None if it is not known.
    """
    try:
        folder = local_folder(source, "model folder", ("config.json",), cached=True)
    except ValueError:
        return None
    file = folder / "config.json"
    if not file.is_file():
        return None
    return _known(folder.absolute(), file.stat().st_mtime_ns, task_type)


@cache
def _known(folder: Path, _changed: int, task_type: str | None) -> BaseLayers | None:
    """Describe the layers of a folder's model, from the cache if a model of this configuration was described before."""
    try:
        says = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        key = hashlib.sha256(json.dumps([_FORM, version("transformers"), task_type, says]).encode()).hexdigest()
        file = user_cache() / "base_layers" / f"{key}.json"
    except (OSError, ValueError):  # nowhere to keep it
        file = None
    if file is not None:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or not whole
            return BaseLayers.of(from_json(file.read_text(encoding="utf-8")))
    if (description := _describe(folder, task_type)) is None:
        return None
    if file is not None:
        with suppress(OSError), atomic_file(file) as temporary:
            temporary.write_text(json.dumps(description), encoding="utf-8")
    return BaseLayers.of(description)


def _describe(folder: Path, task_type: str | None) -> dict[str, Any] | None:
    """Return shapes, transposed layers and names of modules of a folder's model; None if its class is not known."""
    from transformers import AutoConfig
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = _make_model(config, task_type)
    except Exception:  # configurations of strangers fail in whatever way, and a model that is not known is no error
        return None
    shapes, transposed = dict[str, tuple[int, int]](), list[str]()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            shapes[name] = layer.out_features, layer.in_features
        elif isinstance(layer, Conv1D):
            shapes[name] = layer.nf, layer.nx
            transposed.append(name)
        elif isinstance(layer, nn.Embedding):
            shapes[name] = layer.embedding_dim, layer.num_embeddings
    return {"shapes": shapes, "transposed": transposed, "modules": [name for name, _ in model.named_modules()]}


def _make_model(config: PretrainedConfig, task_type: str | None) -> PreTrainedModel:
    """Make the model of a configuration by the class of a task, or else by the class that it names."""
    import transformers

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if task_type in _AUTO_CLASSES:
        return getattr(transformers, _AUTO_CLASSES[task_type]).from_config(config, trust_remote_code=False)
    kind = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind(config)
    return transformers.AutoModel.from_config(config, trust_remote_code=False)
