"""Answer a prompt: the response's tokens are trained, and the prompt's are not."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedex_scale.config.settings import Config
from fedex_scale.data import batching
from fedex_scale.data.prompts import encode
from fedex_scale.data.sources import load_rows, schema_of
from fedex_scale.runtime.seeds import derive_seed
from fedex_scale.tasks.interface import CAUSAL, Task


def open_task(config: Config, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Read the rows and tokenize them."""
    rows = load_rows(config.data, derive_seed(config.run.seed, "rows"))
    examples = encode(rows, schema_of(config.data), tokenizer, max_length=config.data.max_length)
    tokens = Tokens(examples, pad_id=tokenizer.pad_token_id, packing=config.train.packing)
    return Task(model=CAUSAL, rows=rows.select(examples.rows), examples=tokens)


@dataclass(frozen=True)
class Tokens:
    """Prompts and responses, padded or packed."""

    examples: batching.Examples
    pad_id: int
    packing: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> np.ndarray:
        return self.examples.lengths

    @property
    def units(self) -> np.ndarray:
        return self.examples.num_trained

    @property
    def largest_token(self) -> int:
        return int(self.examples.tokens.max(initial=0))

    @property
    def notes(self) -> Mapping[str, Any]:
        """Return counts, and the SHA-256 of the tokens: another tokenizer is another run."""
        own, digest = self.examples, hashlib.sha256()
        for array in (own.tokens, own.lengths, own.prompt_lengths):
            digest.update(np.ascontiguousarray(array).tobytes())
        counts = {"truncated": own.num_truncated, "dropped": own.num_dropped}
        return counts | {"sha256": digest.hexdigest()}

    def select(self, indices: Sequence[int]) -> Tokens:
        return replace(self, examples=self.examples.select(indices))

    def batch(self, indices: Sequence[int], *, fallback: int) -> dict[str, Tensor]:
        if self.packing:
            return batching.pack(self.examples, indices, fallback=fallback)
        return batching.collate(self.examples, indices, fallback=fallback, pad_id=self.pad_id)
