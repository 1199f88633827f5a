"""The methods: each a short pure function of one layer's factors, in its own file."""

from __future__ import annotations

from fedex_scale.config.federation import MethodConfig
from fedex_scale.methods import fedex, fedit, ffa, flexlora, flora, lora_fair
from fedex_scale.methods.interface import LayerUpdate, Method, fresh_pair

__all__ = ["METHODS", "LayerUpdate", "Method", "MethodConfig", "fresh_pair"]

METHODS: dict[str, Method] = {
    "fedit": Method(fedit.update),
    "fedex": Method(fedex.update),
    "ffa": Method(ffa.update, trains=frozenset("B")),
    "flora": Method(flora.update),
    "flexlora": Method(flexlora.update),
    "lora_fair": Method(lora_fair.update),
    "centralized": Method(fedit.update, one_client=True),
    "full": Method(fedit.update, trains=frozenset()),  # of no layer: weights are averaged whole
}
