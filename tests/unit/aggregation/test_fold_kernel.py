"""The GPU kernel of a fold: its sums in Triton's interpreter, and that it compiles for GPUs.

The sums are checked by tests/gpu/fold_kernel_checks.py in a process apart, as the interpreter is
chosen when Triton is imported.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import run_apart

from fedex_scale.aggregation import fold_kernel

TESTS = Path(__file__).parents[2]
pytest.importorskip("triton", reason="Triton is not installed: pip install triton")


def test_it_folds_as_torch_does() -> None:
    run_apart(TESTS / "gpu" / "fold_kernel_checks.py", TRITON_INTERPRET="1")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("carries", [False, True])
def test_it_compiles_for_a_gpu(
    carries: bool, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With strides of 1 and small numbers, which Triton takes for constants."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fedex_scale.aggregation.fold_tile import fold_tile

    constants = {
        "CARRIES": carries,
        "H": fold_kernel.TILE_ROWS,
        "W": fold_kernel.TILE_COLUMNS,
        "STEP": fold_kernel.TILE_RANK,
        "left_column": 1,
        "right_column": 1,
        "start": 1,
        "across": 1,
    }
    types = {"flat": "*bf16", "left": "*fp32", "right": "*fp32", "sums": "*fp64", "numel": "i64"}
    types |= {"carry": "*fp32" if carries else "*bf16"} | dict.fromkeys(constants, "constexpr")
    made = triton.compile(
        ASTSource(fold_tile, {n: types.get(n, "i32") for n in fold_tile.arg_names}, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": fold_kernel.NUM_WARPS, "num_stages": fold_kernel.NUM_STAGES},
    )
    assert made.metadata.shared <= 96 * 1024, "what every card of Ampere or later has"
    assert made.asm["ptx"].count(".f32.tf32.tf32") >= 3, "three products on tensor cores"
