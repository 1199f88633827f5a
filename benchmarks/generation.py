"""How fast answers are generated for scoring, against plain lm-eval on the same model.

    .venv/bin/python benchmarks/generation.py [--model models/SmolLM2-135M-Instruct] [--quick]

Both answer the same word problems, greedily, 64 tokens at most, in batches of 16, with the same
rank-32 adapter on the same base in float32: ours as a run's live score does it, the other as
`lm_eval --model hf --model_args pretrained=...,peft=...`. The texts must be equal.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import Figure, Ratio, in_turns, new_peft_model, quotients, report, start
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from fedex_scale.config.learning import LoraSection, ModelSection
from fedex_scale.config.settings import EvaluationSection
from fedex_scale.data.prompts import MATH_PROMPT, MATH_STOPS
from fedex_scale.data.word_problems import generate
from fedex_scale.engine import models
from fedex_scale.runtime import distributed
from fedex_scale.runtime.errors import UserError
from fedex_scale.scoring import post_hoc
from fedex_scale.scoring.spread import spread_requests

BATCH_SIZE = 16


def main(args: argparse.Namespace) -> None:
    num_prompts, new_tokens, repeats = (4, 8, 1) if args.quick else (48, 64, 5)
    _, rows = generate(0, train=1, heldout=num_prompts)
    options = {"until": list(MATH_STOPS), "do_sample": False, "max_gen_toks": new_tokens}
    requests = [
        Instance("generate_until", row, (MATH_PROMPT.format(instruction=row["query"]), options), 0)
        for row in rows
    ]
    with tempfile.TemporaryDirectory() as scratch:
        section = ModelSection(path=args.model, dtype="float32")
        models.load_tokenizer(section)  # a model that cannot be had is told before anything else
        new_peft_model(args.model, LoraSection()).save_pretrained(scratch)
        ours, plain = load_ours(section, Path(scratch)), load_plain(args.model, scratch)
    texts: dict[str, list[str]] = {}

    def measure(name: str, lm: HFLM) -> dict[str, float]:
        began = time.perf_counter()
        texts[name] = lm.generate_until(requests, disable_tqdm=True)
        return {name: time.perf_counter() - began}

    with torch.no_grad():
        times = in_turns(
            [lambda: measure("ours", ours), lambda: measure("lm-eval", plain)], repeats
        )
    if texts["ours"] != texts["lm-eval"]:
        raise UserError("ours and lm-eval: expected equal texts, got others; a score would differ")
    report(
        __file__,
        f"{num_prompts} word problems, {new_tokens} tokens at most, {args.model}",
        [Figure(name=name, values=values, unit="s") for name, values in times.items()],
        [Ratio(name="ours / lm-eval", values=quotients(*times.values()), at_most=1.05)],
    )


def load_ours(section: ModelSection, adapter: Path) -> HFLM:
    """Return what `fedex-scale evaluate` and a run's live score generate with."""
    subject = post_hoc.Subject(
        model=section, adapter=adapter, section=EvaluationSection(), out=Path()
    )
    model = post_hoc.load(subject).to(distributed.device())
    lm = HFLM(pretrained=model, tokenizer=models.load_tokenizer(section))
    spread_requests(lm, BATCH_SIZE)
    return lm


def load_plain(model: str, adapter: str) -> HFLM:
    device = str(distributed.device())
    return HFLM(
        pretrained=model, peft=adapter, dtype="float32", device=device, batch_size=BATCH_SIZE
    )


if __name__ == "__main__":
    start(__doc__, main)
