"""Two ranks score each example once, and get what one process gets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rows import write_data

from fedex_scale.runtime.distributed import free_port

ROOT = Path(__file__).parents[2]


def score(model: Path, settings: str, folder: Path, *, ranks: int) -> list[dict]:
    """Run the worker under torchrun and return what each rank wrote down."""
    out = folder / f"{settings}{ranks}"
    out.mkdir(parents=True)
    file = "none" if settings == "none" else str(ROOT / "ds_configs" / f"{settings}.json")
    worker = str(Path(__file__).with_name("evaluation_worker.py"))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += [f"--master-port={free_port()}", worker, str(model), file]
    command += [str(folder / "data"), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def outputs(results: dict) -> dict[tuple, tuple]:
    """Return what was written and read, by task, filter and example; each must be there once."""
    found = {}
    for task, samples in results["samples"].items():
        for sample in samples:
            key = (task, sample["filter"], sample["doc_id"])
            assert key not in found
            found[key] = (sample["resps"], sample["filtered_resps"])
    return found


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("scores")
    write_data(folder / "data")
    return folder, score(tiny_llama, "none", folder, ranks=1)[0]


@pytest.mark.parametrize("settings", ["none", "zero3"])
def test_two_ranks_give_what_one_gives(
    settings: str, tiny_llama: Path, alone: tuple[Path, dict]
) -> None:
    folder, expected = alone
    main, other = score(tiny_llama, settings, folder, ranks=2)
    assert outputs(main) == outputs(expected)
    assert len(outputs(main)) == 5 + 3
    assert main["results"] == expected["results"]
    for mine in (main, other):
        assert mine["answers"] == expected["answers"]
        for key in ("examples", "tokens"):
            assert mine["held_out"][key] == expected["held_out"][key]
        assert mine["held_out"]["loss"] == pytest.approx(expected["held_out"]["loss"], rel=1e-6)
        assert mine["held_out"]["clients"] == pytest.approx(
            expected["held_out"]["clients"], rel=1e-6
        )
        assert mine["held_out"].keys() == expected["held_out"].keys()
        for (value, greedy), (value_alone, greedy_alone) in zip(
            mine["likelihoods"], expected["likelihoods"], strict=True
        ):
            assert value == pytest.approx(value_alone, abs=1e-4)
            assert greedy == greedy_alone
