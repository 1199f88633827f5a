"""Answer a prompt: the response's tokens are trained, and the prompt's are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedex_scale.config.settings import Config
from fedex_scale.data import batching
from fedex_scale.data.clients import Clients, count_rows, digest_of, read_clients


def read(config: Config, tokenizer: PreTrainedTokenizerBase) -> Clients:
    """Return each client's examples, ready for batches."""
    clients = read_clients(config, tokenizer)
    pad_id, packing = tokenizer.pad_token_id, config.train.packing
    return replace(
        clients,
        train=[Tokens(examples, pad_id, packing) for examples in clients.train],
        held_out={name: Tokens(examples, pad_id) for name, examples in clients.held_out.items()},
    )


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
        return {**count_rows(self.examples), "sha256": digest_of(self.examples)}

    def select(self, indices: Sequence[int]) -> Tokens:
        return replace(self, examples=self.examples.select(indices))

    def batch(self, indices: Sequence[int], *, fallback: int) -> dict[str, Tensor]:
        if self.packing:
            return batching.pack(self.examples, indices, fallback=fallback)
        return batching.collate(self.examples, indices, fallback=fallback, pad_id=self.pad_id)
