"""The quickstart in short, on the real pretrained model: what comes out is what PEFT loads."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from browser import BROWSER, make_report, visit
from launching import ROOT, start
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedex_scale.data.word_problems import generate, write_jsonl

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
CONFIG = ROOT / "launch" / "quickstart.yaml"


@pytest.mark.skipif(not MODEL.is_dir(), reason="no model; `make model` fetches it")
def test_quickstart_in_short(tmp_path: Path) -> None:
    train, heldout = generate(1, train=200, heldout=4)
    write_jsonl(train, tmp_path / "train.jsonl")
    write_jsonl(heldout, tmp_path / "heldout.jsonl")
    done = start(
        [sys.executable],
        CONFIG,
        f"run.dir={tmp_path}",
        f"model.path={MODEL}",
        f"data.path={tmp_path / 'train.jsonl'}",
        f"evaluation.data={{fedex_word_problems: {tmp_path / 'heldout.jsonl'}}}",
        "partition.min_examples=32",
        "train.max_steps=3",
        "evaluation.before=false",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"kept (100\.0000|99\.999\d)%", done.stdout), done.stdout
    run = tmp_path / "quickstart"
    events = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [event["event"] for event in events].count("step") == 9
    (lap,) = (x for x in events if x["event"] == "phases" and x["round"] == 1)
    known = sum(x["seconds"] for name, x in lap["phases"].items() if name != "other")
    assert known > 0.98 * lap["wall_s"], lap
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        untouched = base(input_ids=ids).logits
        exact = PeftModel.from_pretrained(base, run / "final" / "exact_adapter")
        by_exact = exact(input_ids=ids).logits
        exact.load_adapter(run / "final" / "adapter", "final")
        exact.set_adapter("final")
        by_final = exact(input_ids=ids).logits
    assert (by_exact - untouched).abs().max() > 0.1
    assert (by_exact - by_final).abs().max() < 1e-3
    page = make_report(run)
    assert "SmolLM2-135M-Instruct" in page.read_text(encoding="utf-8")
    if BROWSER:
        seen = visit(page, tmp_path)
        assert (seen.console, seen.requests) == ([], [])
