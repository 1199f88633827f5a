"""The GPU kernel of `fold_kernel`, apart: what imports this imports Triton.

Legend: H, W sides of a tile; K columns of the factors that one step takes.
"""

import triton
import triton.language as tl


@triton.jit
def _round(x, dtype: tl.constexpr):
    """Round float32 to the nearest 16-bit number, ties to even.

    In integers for bfloat16, as Triton's interpreter cuts the lower bits off. A NaN stays one.
    """
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def fold_tile(
    flat,
    left,
    right,
    carry,
    sums,
    rows,
    columns,
    rank,
    left_row,
    left_column,
    right_row,
    right_column,
    start,
    numel,
    first,
    across,
    CARRIES: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    STEP: tl.constexpr,
):
    """Fold into one tile; `fold_kernel.fold_into` has the arguments. Strides are in elements."""
    tile = tl.program_id(0)
    row_H = (first + tile // across) * H + tl.arange(0, H).to(tl.int64)
    column_W = (tile % across) * W + tl.arange(0, W).to(tl.int64)
    is_row_H, is_column_W = row_H < rows, column_W < columns
    delta_HW = tl.zeros((H, W), dtype=tl.float32)
    for step in range(0, rank, STEP):
        k = step + tl.arange(0, STEP).to(tl.int64)
        left_HK = tl.load(
            left + row_H[:, None] * left_row + k[None, :] * left_column,
            mask=is_row_H[:, None] & (k < rank)[None, :],
            other=0.0,
        )
        right_KW = tl.load(
            right + k[:, None] * right_row + column_W[None, :] * right_column,
            mask=(k < rank)[:, None] & is_column_W[None, :],
            other=0.0,
        )
        delta_HW = tl.dot(left_HK, right_KW, delta_HW, input_precision="tf32x3")

    at_HW = row_H[:, None] * columns + column_W[None, :] - start
    here_HW = is_row_H[:, None] & is_column_W[None, :] & (at_HW >= 0) & (at_HW < numel)
    before_HW = tl.load(flat + at_HW, mask=here_HW, other=0.0).to(tl.float32)
    wanted_HW = delta_HW
    if CARRIES:
        wanted_HW = delta_HW + tl.load(carry + at_HW, mask=here_HW, other=0.0)
    sum_HW = before_HW + wanted_HW
    stored_HW = _round(sum_HW, flat.dtype.element_ty)
    tl.store(flat + at_HW, stored_HW, mask=here_HW)
    # As `weights._add`: with a carry, what is missed is taken from the change, which is exact.
    missed_HW = sum_HW - stored_HW.to(tl.float32)
    kept_out = 0.0
    if CARRIES:
        minus_change_HW = before_HW - stored_HW.to(tl.float32)
        carry_HW = wanted_HW + minus_change_HW
        tl.store(carry + at_HW, carry_HW, mask=here_HW)
        missed_HW = minus_change_HW + delta_HW
        kept_out = tl.sum(tl.where(here_HW, carry_HW * carry_HW, 0.0))
    place = sums + tile.to(tl.int64) * 3
    intended = tl.sum(tl.where(here_HW, delta_HW * delta_HW, 0.0))
    missed = tl.sum(tl.where(here_HW, missed_HW * missed_HW, 0.0))
    tl.store(place, intended.to(tl.float64))
    tl.store(place + 1, missed.to(tl.float64))
    if CARRIES:
        tl.store(place + 2, kept_out.to(tl.float64))
    else:
        tl.store(place + 2, 0.0)
