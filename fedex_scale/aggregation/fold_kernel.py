"""A fold in one pass over the weight, for GPUs: read, add the product, round, store, measure.

`weights.fold` is the reference, and takes over wherever this cannot be used. Tiles are aligned to
the whole matrix and made whole whatever slice is stored, so that shards get the unsharded bits.

Legend: P, Q stored rows and columns; R columns of all pieces together.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fedex_scale.methods.lowrank import LowRank, stack

TILE_ROWS, TILE_COLUMNS, TILE_RANK = 64, 128, 32
"""Of the tile that one program makes, and of the product's step. Constant, and not tuned where it
runs: the bits of a product may depend on them."""
NUM_WARPS, NUM_STAGES = 8, 2
"""Of a program; as compiled for sm_80 and sm_90, four warps would spill their registers."""
TENSOR_CORES = (8, 0)
"""The first compute capability with bfloat16 and TF32; older cards fold as torch does."""


def can_fold(flat: Tensor) -> bool:
    """Return whether the kernel takes a stored matrix: 16 bits, on a GPU that can."""
    return flat.dtype in (torch.bfloat16, torch.float16) and _runs_on(flat.device)


def fold_into(
    flat: Tensor,
    pieces: Sequence[LowRank],
    carry: Tensor | None,
    *,
    shape: tuple[int, int],
    start: int,
    transposed: bool,
) -> Tensor:
    """Add sum_j U_j V_j to the stored matrix, in place, without a wait for the device.

    The product is float32 by three TF32 products, whose error is that of float32, or by float32
    arithmetic where a card has no such tensor cores. It runs on torch's current stream, as does
    all that torch does with these tensors next. ZeRO-3 gathers on a stream of its own, which does
    not wait for this one: whoever folds must read the sums before the weights are gathered.

    Args:
        flat: the elements that are stored here, 16 bits, contiguous.
        carry: float32, like `flat`, added as well, and left with what rounding keeps out.
        shape: (P, Q) of the whole matrix.
        start: index of the first stored element in the flattened whole.
        transposed: the matrix is (I, O) and not (O, I).

    Returns:
        The squared norms, over what is stored here, of the product, of what the change of the
        weight lacks of it, and of the new carry (0 without one); float64, on the device.
    """
    U_OR, V_RI = pieces[0] if len(pieces) == 1 else stack(*pieces)
    left_PR, right_RQ = (V_RI.T, U_OR.T) if transposed else (U_OR, V_RI)
    rows, columns = shape
    first = start // columns // TILE_ROWS
    last = (start + flat.numel() - 1) // columns // TILE_ROWS
    across = -(-columns // TILE_COLUMNS)
    num_tiles = (last - first + 1) * across
    from fedex_scale.aggregation.fold_tile import fold_tile  # imports Triton

    sums = torch.empty(num_tiles, 3, dtype=torch.float64, device=flat.device)
    with torch.cuda.device_of(flat):  # where Triton launches
        fold_tile[(num_tiles,)](
            flat,
            left_PR,
            right_RQ,
            flat if carry is None else carry,
            sums,
            rows,
            columns,
            left_PR.shape[1],
            *left_PR.stride(),
            *right_RQ.stride(),
            start,
            flat.numel(),
            first,
            across,
            CARRIES=carry is not None,
            H=TILE_ROWS,
            W=TILE_COLUMNS,
            STEP=TILE_RANK,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return sums.sum(0)


@cache
def _runs_on(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda" and torch.version.cuda:
        return torch.cuda.get_device_capability(device) >= TENSOR_CORES
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
