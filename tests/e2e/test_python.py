"""docs/python.md is a program: it runs from top to bottom, on a small model in place of SmolLM2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fedex_scale
from fedex_scale.data.word_problems import generate, write_jsonl

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_page_runs_and_prints_what_it_says(tiny_llama: Path, tmp_path: Path) -> None:
    train, heldout = generate(0, train=210, heldout=4)
    write_jsonl(train, tmp_path / "data" / "word_problems" / "train.jsonl")
    write_jsonl(heldout, tmp_path / "data" / "word_problems" / "heldout.jsonl")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "SmolLM2-135M-Instruct").symlink_to(tiny_llama)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert all(f"fedex_scale.{name}(" in "".join(blocks) for name in functions())
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert "runs/first 0.0" in lines
    assert any(line.startswith("does not fit; would do: engine.deepspeed=") for line in lines)
    assert any(line.startswith("an adapter of rank 32, within ") for line in lines)
    assert "96 100.0000%" in lines  # three clients of rank 32, whose residual has 64 columns
    assert lines[-1] in PAGE
    for made in ("runs/first/final/adapter", "first_adapter", "merged/adapter"):
        assert (tmp_path / made / "adapter_config.json").is_file()


def test_the_page_names_every_function() -> None:
    assert re.findall(r"^\| `(\w+)\(", PAGE, flags=re.MULTILINE) == [
        "run",
        "plan",
        "evaluate",
        "export",
        "aggregate",
        "aggregate_layer",
    ]
    assert "fedex_scale.UserError" in PAGE


def functions() -> list[str]:
    return [name for name in fedex_scale.__all__ if name != "UserError"]
