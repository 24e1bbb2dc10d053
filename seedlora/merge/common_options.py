"""Define the options that every merge method has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

#: Names for sets of layers; any other value of ``layers`` is a regular expression, searched for in the layer's path.
LAYER_SETS: Mapping[str, str] = {
    "all": "",
    "attention": r"(^|\.)(self_attn|self_attention|attn|attention|cross_attn|encoder_attn|linear_attn|SelfAttention|"
    r"EncDecAttention)(\.|$)"
    r"|(^|\.)(q|k|v|o|qkv)_proj$",
    "ffn": r"(^|\.)(mlp|ffn|feed_forward|block_sparse_moe|experts|DenseReluDense)(\.|$)"
    r"|(^|\.)(gate_proj|up_proj|down_proj|gate_up_proj|c_fc|fc1|fc2|fc_in|fc_out)$",
}
REST_CHOICES = ("soup", "nothing")


@dataclass(frozen=True)
class CommonOptions:
    """Options that every method has.

    Args:
        layers: to which layers the method is applied: ``all``, ``attention``, ``ffn``, or a regular expression that is
            searched for in a layer's path.
        rest: what the other layers take: ``soup`` or ``nothing``. Must be said when ``layers`` is not ``all``.
        rank: compress every layer to it. Default: factors stay exact, dense results get rank ``N*R``.
        match_norm: scale what was compressed to the norm it had. Default: as the method's row says.
        svd: how dense results are compressed: ``auto``, ``exact`` or ``randomized``.
        seed: of random rules. Each layer has its own stream, which depends on the seed and the layer's path alone.
    """

    layers: str = "all"
    rest: str | None = None
    rank: int | None = None
    match_norm: bool | None = None
    svd: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        # They need torch, and the names and defaults of these options do not.
        from seedlora.updates.algebra import checked_choice
        from seedlora.updates.compression import SVD_KINDS

        if not isinstance(self.layers, str):
            raise ValueError(f"layers must be text: all, attention, ffn or a regular expression, got {self.layers!r}")
        try:
            re.compile(LAYER_SETS.get(self.layers, self.layers))
        except re.error as error:
            raise ValueError(
                f"layers must be all, attention, ffn or a regular expression, got {self.layers!r}: {error}"
            ) from None
        if self.rest is not None:
            checked_choice("rest", self.rest, REST_CHOICES)
        elif self.layers != "all":
            raise ValueError(
                f"layers={self.layers!r} leaves layers out: say rest='soup' (they are averaged) or rest='nothing'"
            )
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"rank must be a positive integer, got {self.rank!r}")
        if not (self.match_norm is None or isinstance(self.match_norm, bool)):
            raise ValueError(f"match_norm must be true or false, got {self.match_norm!r}")
        checked_choice("svd", self.svd, SVD_KINDS)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number, 0 or more, got {self.seed!r}")


COMMON_DEFAULTS: Mapping[str, Any] = {f.name: f.default for f in fields(CommonOptions)}
