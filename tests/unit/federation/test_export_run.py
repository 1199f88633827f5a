"""`fedex-scale export`: a run as one adapter for the untouched base, or as a merged model."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import logits
from transformers import AutoModelForCausalLM
from two_rounds import RANK, assert_same_logits, dense_model, load, two_rounds

from fedex_scale.cli import main
from fedex_scale.config.section import to_dict
from fedex_scale.federation.export import export_run
from fedex_scale.files.adapters import Adapter
from fedex_scale.runtime.errors import UserError


def export(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["export", *map(str, arguments)])
    return caught.value.code


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("tiny_llama", ["aggregate.fold=round"]),
        ("tiny_gpt2", ["aggregate.fold=side"]),
        ("tiny_llama", ["method.name=flora", "aggregate.side_rank=18"]),
        ("tiny_llama", ["method.assign=reinit", "aggregate.fold=round"]),
        ("tiny_llama", ["method.assign=svd"]),
        ("tiny_llama", ["method.name=fedit"]),
    ],
)
def test_the_adapter_holds_the_whole_run(request, tmp_path, capsys, model, options) -> None:
    base = request.getfixturevalue(model)
    run = two_rounds(base, tmp_path, *options)
    out = tmp_path / "out"
    assert export(run.directory.path, "--out", out) == 2, "no config.yaml yet"
    finish(run, base)
    assert export(run.directory.path, "--out", out) == 0
    assert "2 rounds" in capsys.readouterr().out
    if "fedit" in options[0]:
        expected = run.engine.model
    else:
        expected = dense_model(base, run.updates)
        if "flora" in options[0] or "reinit" in options[0]:
            expected = run.engine.model
    assert_same_logits(load(base, out), expected, 1e-5)
    assert export(run.directory.path, "--out", out) == 2, "never overwritten"


def test_a_lower_rank_states_its_error(tiny_llama: Path, tmp_path: Path) -> None:
    run = two_rounds(tiny_llama, tmp_path)
    finish(run, tiny_llama)
    errors = []
    for rank in (2, 5, 3 * 3 * RANK):
        out = tmp_path / str(rank)
        errors.append(export_run(run.directory.path, out, rank=rank).error)
        adapter = Adapter(out)
        assert adapter.rank == rank
        lost = total = 0.0
        for layer, delta in run.updates.items():
            pair = adapter.pair(layer).double()
            lost += (pair.B_OR @ pair.A_RI - delta).square().sum().item()
            total += delta.square().sum().item()
        assert errors[-1] == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-6)
    assert errors[0] > errors[1] > 0.01
    assert errors[2] < 1e-6
    with pytest.raises(UserError, match="--rank: expected at most"):
        export_run(run.directory.path, tmp_path / "wide", rank=10**6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_a_merged_model(request, tmp_path, model, dtype, tolerance) -> None:
    base = request.getfixturevalue(model)
    run = two_rounds(base, tmp_path)
    finish(run, base)
    out = tmp_path / "out"
    done = export_run(run.directory.path, out, merged=True, dtype=dtype)
    assert (done.error < 1e-6) == (dtype is None)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == (torch.bfloat16 if dtype else torch.float32)
    assert_same_logits(merged, dense_model(base, run.updates), tolerance)
    assert not torch.equal(logits(merged), logits(load(base)))
    kept = {file.name for file in base.iterdir()}
    assert {file.name for file in out.iterdir()} == kept
    assert load_file(next(out.glob("*.safetensors")))


def test_a_run_that_cannot_be_exported(tiny_llama: Path, tmp_path: Path) -> None:
    run = two_rounds(tiny_llama, tmp_path)
    finish(run, tiny_llama)
    path, out = run.directory.path, tmp_path / "out"
    for message, options in (
        ("leave it out with --merged", {"merged": True, "rank": 3}),
        ("at least 1", {"rank": 0}),
        ("merged model", {"dtype": "float32"}),
        ("float32 or bfloat16", {"merged": True, "dtype": "int8"}),
    ):
        with pytest.raises(UserError, match=message):
            export_run(path, out, **options)
    shutil.rmtree(run.directory.residual(1))
    with pytest.raises(UserError, match="round 1 had too many clients"):
        export_run(path, out)
    (run.directory.server(1) / "aggregate.json").unlink()
    with pytest.raises(UserError, match="finished round"):
        export_run(path, out)
    assert not out.exists()


@pytest.mark.parametrize(
    "options", [(), ("--rank", 2), ("--merged",), ("--merged", "--dtype", "bfloat16")]
)
@pytest.mark.parametrize("number", [math.nan, math.inf, 3e38])
def test_numbers_that_are_not_finite_never_leave(
    number: float, options: tuple, tiny_llama: Path, tmp_path: Path, capsys
) -> None:
    run = two_rounds(tiny_llama, tmp_path)
    finish(run, tiny_llama)
    file = run.directory.adapter(2) / "adapter_model.safetensors"
    tensors = load_file(file)
    next(t for name, t in tensors.items() if "lora_B" in name)[0] = number
    save_file(tensors, file, metadata={"format": "pt"})
    capsys.readouterr()
    assert export(run.directory.path, "--out", tmp_path / "out", *options) == 2
    told = capsys.readouterr().err
    assert "NaN or Inf" in told
    assert told.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))


def finish(run, base: Path) -> None:
    """Write what a run writes at its start."""
    text = yaml.safe_dump(to_dict(run.config) | {"model": {"path": str(base)}})
    (run.directory.path / "config.yaml").write_text(text, encoding="utf-8")
