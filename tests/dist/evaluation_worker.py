"""One rank that scores a real engine's model, and writes down what came out.

torchrun --nproc-per-node 2 evaluation_worker.py MODEL DEEPSPEED_JSON|none DATA_DIR OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from fedex_scale.runtime import distributed
from fedex_scale.config.learning import LoraSection
from fedex_scale.engine.build import build_engine
from fedex_scale.config.learning import EngineSection
from fedex_scale.scoring.evaluation import evaluate
from fedex_scale.config.settings import EvaluationSection
from fedex_scale.engine.models import load_tokenizer
from fedex_scale.config.learning import ModelSection
from fedex_scale.data.encode import encode
from fedex_scale.data.prompts import SCHEMAS
from fedex_scale.scoring.asked import answers
from fedex_scale.scoring.loss import held_out_loss
from fedex_scale.tasks.instruct import Tokens
from fedex_scale.scoring.spread import spread_requests


def main(model: str, deepspeed: str, data_dir: str, out: str) -> None:
    chosen = None if deepspeed == "none" else deepspeed
    distributed.join_group(required=chosen is not None)
    section = ModelSection(path=model, dtype="float32")
    engine = build_engine(
        section,
        LoraSection(rank=4, alpha=8),
        EngineSection(deepspeed=chosen),
        trains=frozenset("AB"),
        side_rank=2,
        optimizer="adamw",
        micro_batch_size=2,
        accumulation=2,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    tokenizer = load_tokenizer(section)
    # Five batches of two, of two lengths: one rank has a batch more than the other.
    tasks = ("fedex_word_problems", "fedex_boolq", "fedex_piqa", "fedex_siqa")
    results = evaluate(
        engine.model,
        tokenizer,
        EvaluationSection(tasks=tasks, data_dir=data_dir, batch_size=2),
    )
    lm = HFLM(pretrained=engine.model, tokenizer=tokenizer)
    spread_requests(lm, 2)
    with torch.no_grad():
        likelihoods = lm.loglikelihood([request(*pair) for pair in PAIRS])
    written = {name: results.get(name) for name in ("results", "samples")}
    written["likelihoods"] = likelihoods
    examples = Tokens(
        encode(ROWS, SCHEMAS["text"], tokenizer, max_length=512), tokenizer.pad_token_id
    )
    parts = {"a": examples.select([0, 1, 2, 3]), "b": examples.select([4])}
    written["held_out"] = held_out_loss(engine.model, parts, micro_batch_size=2)
    texts = [row["text"] for row in ROWS[:3]]
    written["answers"] = answers(
        engine.model, tokenizer, texts, as_chat=False, batch_size=2
    )
    torch.save(written, Path(out) / f"rank{distributed.rank()}.pt")
    distributed.leave(0)


ROWS = [
    {"text": "Tom has 12 apples."},
    {"text": "A box holds 6 pens. How many pens are in 4 boxes?"},
    {"text": "24"},
    {"text": "Is the sky blue on a clear day? the correct answer is true"},
    {"text": "Mia had 35 coins"},
]
PAIRS = [("Tom has", " 12"), ("Tom has", " 7 more"), ("A box", " holds"), ("The sky is", " blue")]


def request(context: str, continuation: str) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
