"""``fusion.json``: how a fused adapter, or a whole model, was made."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from seedlora.names import FUSION_NAME
from seedlora.records.json_file import JSONFile


class UseRecord(TypedDict, total=False):
    """Describe the options that every merge method has, as far as they are set.

    Attributes:
        layers: the layers that the method was applied to: `all`, `attention`, `ffn`, or a regular expression.
        rest: what the other layers took: `soup` or `nothing`.
        rank: the rank that every layer was compressed to.
        match_norm: whether what was compressed was scaled to the norm that it had before.
        svd: how dense results were compressed.
        seed: seed of methods that draw at random.
    """

    layers: str
    rest: str
    rank: int
    match_norm: bool
    svd: str
    seed: int


class AppliedRule(TypedDict):
    """Describe a merge rule with everything about its use.

    Attributes:
        method: name of the merge method.
        options: options that it was given.
        use: options that every method has.
    """

    method: str
    options: dict[str, object]
    use: NotRequired[UseRecord]


class InputRecord(TypedDict):
    """Describe one of the inputs.

    Attributes:
        name: folder or hub id; of a run's own adapters relative to the run's folder.
        sha256: checksum of the weights.
    """

    name: str
    sha256: str


class CompressionRecord(TypedDict):
    """Tell what compressing the result to its rank has cost.

    Attributes:
        relative_error_mean: relative Frobenius error, mean over the layers.
        relative_error_max: the largest error of a layer.
        svd: number of layers by the kind of SVD that compressed them.
        layers: error of each layer.
    """

    relative_error_mean: float
    relative_error_max: float
    svd: dict[str, int]
    layers: dict[str, float]


class InputCompression(TypedDict):
    """Tell what compressing the inputs has cost, for a method that works on factors.

    Attributes:
        relative_error_max: the largest relative Frobenius error of an input's layer.
        layers: the largest error in each layer.
    """

    relative_error_max: float
    layers: dict[str, float]


class GainRecord(TypedDict):
    """Tell how much longer the fused updates are than the mean updates, over the layers.

    Attributes:
        mean: mean over the layers.
        min: the smallest of a layer.
        max: the largest of a layer.
    """

    mean: float
    min: float
    max: float


class FusionRecord(AppliedRule):
    """Tell how a fused adapter, or a whole model, was made.

    Attributes:
        source: paper and equation of the method.
        inputs: what was merged, in this order.
        base_model: name or path of the base model.
        seedlora: version of this package.
        compression: what compressing the result to a rank has cost; only there where it was compressed.
        inputs_compressed: what compressing the inputs has cost; only there for methods that work on factors, where
            inputs are none.
        dtype: dtype of the result; only there where it was asked for.
        base: the base model; only there where it was given.
        kinds: what the inputs are besides plain LoRA; `whole models` for these.
        averaged: what was averaged whatever the method: biases, full weights, vectors.
        incomplete_groups: layers that some servers want too and whose shape is not known.
        gain: how many times as long the fused updates are as the mean updates; only there for several inputs.
        into_base: the base model that the result was added to.
        dequantised: how that base model was stored before it was dequantised.
        changes_nothing: only there, and true, where the result is zero in all layers.
        differing: files of prompt and tokenizer that the inputs differ in, so that the result has none of them.
    """

    source: NotRequired[str]
    inputs: list[InputRecord]
    base_model: str
    seedlora: NotRequired[str]
    compression: NotRequired[CompressionRecord]
    inputs_compressed: NotRequired[InputCompression]
    dtype: NotRequired[str]
    base: NotRequired[str]
    kinds: NotRequired[list[str]]
    averaged: NotRequired[list[str]]
    incomplete_groups: NotRequired[list[str]]
    gain: NotRequired[GainRecord]
    into_base: NotRequired[str]
    dequantised: NotRequired[str]
    changes_nothing: NotRequired[bool]
    differing: NotRequired[list[str]]


FUSION = JSONFile(FUSION_NAME, FusionRecord, default=str, hides_home=True)
