"""A caller's own tensors, checked before a method takes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fedex_scale.methods.algebra import Pair
from fedex_scale.runtime.errors import UserError


def pair_of(given: Any, name: str) -> Pair:
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


def check_pair(name: str, pair: Pair, like: Pair) -> None:
    """Raise a UserError unless a pair is finite, and of the same shapes as another."""
    (A_shape, B_shape), expected = ([tuple(x.shape) for x in two] for two in (pair, like))
    if len(A_shape) != 2 or len(B_shape) != 2 or A_shape[0] != B_shape[1]:
        raise UserError(f"{name}: expected A (R, I) and B (O, R), got {A_shape} and {B_shape}")
    if [A_shape, B_shape] != expected:
        raise UserError(
            f"{name}: expected A and B of {expected[0]} and {expected[1]} as of client 0, got "
            f"{A_shape} and {B_shape}; fill a lower rank up with zeros"
        )
    if not (pair.A_RI.isfinite().all() and pair.B_OR.isfinite().all()):
        raise UserError(f"{name}: expected finite numbers, got NaN or Inf; leave it out")
