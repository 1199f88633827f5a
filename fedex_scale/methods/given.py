"""A caller's own tensors, checked before a method takes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fedex_scale.methods.algebra import Clients, Pair, all_finite, normalise_weights
from fedex_scale.methods.all import METHODS
from fedex_scale.methods.interface import LayerUpdate, MethodConfig
from fedex_scale.runtime.errors import UserError


def aggregate_given(
    pairs: Iterable[Any],
    *,
    scaling: float,
    weights: Iterable[float] | None,
    previous: Any,
    seed: int,
    method: Mapping[str, Any],
) -> LayerUpdate:
    """Aggregate one layer's pairs; `fedex_scale.aggregate_layer` tells of the arguments."""
    config = MethodConfig(**method)
    if not (isinstance(scaling, int | float) and math.isfinite(scaling) and scaling > 0):
        raise UserError(f"scaling: expected a number above 0, alpha / R, got {scaling}")
    if METHODS[config.name].one_client or config.name == "full":
        raise UserError(f"method.name: {config.name} aggregates no adapters; choose another")
    if not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise UserError(f"seed: expected a whole number from 0 to 2**63 - 1, got {seed}")
    given = [_pair(pair, f"client {k}") for k, pair in enumerate(pairs)]
    if not given:
        raise UserError("pairs: expected at least one client's A and B, got none")
    for k, pair in enumerate(given):
        _check_pair(f"client {k}", pair, given[0])
    weight_K = normalise_weights([1.0] * len(given) if weights is None else weights)
    if len(weight_K) != len(given):
        raise UserError(f"weights: expected one a client ({len(given)}), got {len(weight_K)}")
    before = None if previous is None else _pair(previous, "previous")
    if before is not None:
        _check_pair("previous", before, given[0])
    generator = torch.Generator().manual_seed(seed)
    clients = Clients(given, weight_K, scaling)
    with torch.no_grad():
        return METHODS[config.name].update(clients, before, config, generator)


def _pair(given: Any, name: str) -> Pair:
    """Return a pair without its history; of 8 bits in float32, as torch computes with no others."""
    factors = tuple(given) if isinstance(given, Iterable) else ()
    if len(factors) != 2 or not all(isinstance(x, torch.Tensor) for x in factors):
        raise UserError(f"{name}: expected two tensors, A and B, got {type(given).__name__}")
    if any(x.is_sparse or x.is_meta for x in factors):
        raise UserError(f"{name}: expected dense tensors with numbers, got {factors}; make them so")
    if not all(x.is_floating_point() for x in factors):
        raise UserError(f"{name}: expected tensors of a float dtype, got {factors[0].dtype}")
    A_RI, B_OR = (x.detach().float() if x.itemsize == 1 else x.detach() for x in factors)
    return Pair(A_RI, B_OR)


def _check_pair(name: str, pair: Pair, like: Pair) -> None:
    """Raise a UserError unless a pair is finite, and of the same shapes as another."""
    (A_shape, B_shape), expected = ([tuple(x.shape) for x in two] for two in (pair, like))
    if len(A_shape) != 2 or len(B_shape) != 2 or A_shape[0] != B_shape[1]:
        raise UserError(f"{name}: expected A (R, I) and B (O, R), got {A_shape} and {B_shape}")
    if [A_shape, B_shape] != expected:
        raise UserError(
            f"{name}: expected A and B of {expected[0]} and {expected[1]} as of client 0, got "
            f"{A_shape} and {B_shape}; fill a lower rank up with zeros"
        )
    if not all_finite(*pair):
        raise UserError(f"{name}: expected finite numbers, got NaN or Inf; leave it out")
