"""Real engines on two gloo ranks: clients do not see each other, and folds stay local."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_llama

from fedex_scale.runtime.distributed import free_port

ROOT = Path(__file__).parents[2]
SETTINGS = ["none", "zero2", "zero3", "zero3_offload", "zero3_nvme"]


def start_worker(model: Path, settings: str, clients: str, out: Path, *, ranks: int = 2) -> list:
    """Run the worker under torchrun and return what each rank wrote down."""
    (out / "nvme").mkdir(parents=True)
    file = "none" if settings == "none" else str(ROOT / "ds_configs" / f"{settings}.json")
    worker = str(Path(__file__).with_name("engine_worker.py"))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += [f"--master-port={free_port()}", worker, str(model), file, clients, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def equal(one: dict, other: dict) -> bool:
    return one["losses"] == other["losses"] and all(
        torch.equal(a, b)
        for name, pair in one["pairs"].items()
        for a, b in zip(pair, other["pairs"][name], strict=True)
    )


@pytest.fixture(scope="module", params=SETTINGS)
def ranks(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict]:
    """What two ranks wrote down that trained clients 0, 1, 0, folded and looked at the logits."""
    out = tmp_path_factory.mktemp("dist")
    if request.param != "zero3_nvme":
        return start_worker(tiny_llama, request.param, "0,1,0", out)
    if not aio_builds():
        pytest.skip("DeepSpeed's AIO op cannot be built; apt-get install libaio-dev")
    # Shards below 1 MiB stay in memory.
    wide = make_llama(tmp_path_factory.mktemp("wide") / "llama", width=768, inner=1536)
    results = start_worker(wide, request.param, "0,1,0", out)
    assert any(file.stat().st_size > 2**20 for file in (out / "nvme").rglob("*.swp"))
    plain = start_worker(wide, "none", "0,1,0", out / "plain")
    return [mine | {"plain": theirs} for mine, theirs in zip(results, plain, strict=True)]


def aio_builds() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible(verbose=False)


def test_a_client_does_not_see_who_trained_before(ranks: list[dict]) -> None:
    for results in ranks:
        first, between, again = results["clients"]
        assert equal(first, again)
        assert not equal(first, between)


def test_ranks_agree(ranks: list[dict]) -> None:
    assert [results["world_size"] for results in ranks] == [2, 2]
    for mine, theirs in zip(*(results["clients"] for results in ranks), strict=True):
        assert equal(mine, theirs)


def test_adapter_comes_back_as_it_was_set(ranks: list[dict]) -> None:
    assert all(results["round_trip"] for results in ranks)


def test_fold_is_local_and_equals_the_unsharded_one_bit_for_bit(
    ranks: list[dict], request: pytest.FixtureRequest
) -> None:
    settings = request.node.callspec.params["ranks"]
    for results in ranks:
        sharded = settings.startswith("zero3")
        expected = {"equal": True, "moved": True, "sharded": sharded, "collectives": 0}
        assert results["fold"] == expected


def test_side_adapter_and_fold_cancel(ranks: list[dict]) -> None:
    for results in ranks:
        assert results["shift"] > 1e-2
        assert results["side_error"] < 1e-5
        if "plain" in results:
            for key in ("shift", "side_error"):
                assert results[key] == results["plain"][key]


@pytest.mark.parametrize("settings", ["none", "zero3_offload"])
def test_client_trained_alone_in_a_fresh_process_is_bit_equal(
    settings: str, tiny_llama: Path, tmp_path: Path
) -> None:
    after_another = start_worker(tiny_llama, settings, "0,1", tmp_path / "two", ranks=1)
    alone = start_worker(tiny_llama, settings, "1", tmp_path / "one", ranks=1)
    assert equal(after_another[0]["clients"][1], alone[0]["clients"][0])
