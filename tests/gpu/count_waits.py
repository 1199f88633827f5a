"""Print for what an optimizer step waits on a card, by torch's own word."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import torch
from engines import build
from tiny import make_llama

from fedex_scale.config.learning import LoraSection
from fedex_scale.engine.training import train_step


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = make_llama(Path(folder) / "llama")
        engine = build(path, lora=LoraSection(rank=8, alpha=8), dtype="bfloat16")
    tokens = torch.arange(5, 133).view(2, 64)
    batches = [{"input_ids": tokens, "labels": tokens} for _ in range(4)]
    for _ in range(3):  # the first makes the optimizer's state and tries out kernels
        train_step(engine, batches, units=504, lr=1e-4)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train_step(engine, batches, units=504, lr=1e-4)
    torch.cuda.set_sync_debug_mode("default")
    waits = [str(x.message) for x in seen if "synchroniz" in str(x.message)]
    print(json.dumps({"step": len(waits), "told": waits}))


if __name__ == "__main__":
    main()
