"""Put one of several labels, or a number, on a text or a pair of texts, by a new head."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from fedex_scale.config.settings import Config
from fedex_scale.data.batching import MASKED
from fedex_scale.runtime.errors import UserError
from fedex_scale.tasks import rows as reading
from fedex_scale.tasks.interface import ModelKind, Scores, Task
from fedex_scale.tasks.labels import class_scores, number_scores
from fedex_scale.tasks.predict import predictions

SEQUENCE = {"auto": "AutoModelForSequenceClassification", "task_type": "SEQ_CLS"}


def open_task(config: Config, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Read the rows, learn their labels, and tokenize the texts.

    Raises:
        UserError: as `rows.read` does; a label unseen in training, one label only, or for a number
            a text that is none.
    """
    section, regress = config.task, config.task.kind == "regress"
    rows, test = reading.read(config, [*section.text_columns, section.label_column])
    source, test_source = config.data.path, reading.test_source(config)
    column = section.label_column
    if regress:
        settings: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
        values = [_numbers(rows, column, source)]
        values += [_numbers(test, column, test_source)] if test is not None else []
    else:
        names = reading.names_of(rows, column)
        labels = reading.labels_of(config, rows, names, source)
        settings, index = reading.label_settings(labels), {x: i for i, x in enumerate(labels)}
        values = [[index[name] for name in names]]
        if test is not None:
            names = reading.names_of(test, column)
            reading.check_known(names, labels, test_source)
            values.append([index[name] for name in names])
    kind = ModelKind(
        **SEQUENCE,
        loss=squared_loss if regress else class_loss,
        settings=settings | {"pad_token_id": tokenizer.pad_token_id},
        has_head=True,
        head=section.head,
    )
    make = partial(_encode, config, tokenizer)
    score = None
    if test is not None:
        score = partial(_score, make(test, values[1]), list(settings.get("label2id", ())))
    return Task(model=kind, rows=rows, examples=make(rows, values[0]), score=score)


def class_loss(model: nn.Module, batch: dict[str, Tensor], units: int) -> Tensor:
    """Return the cross-entropy of the examples that have a label."""
    labels = batch["labels"]
    logits = logits_of(model, batch).float()
    return functional.cross_entropy(logits, labels, reduction="sum", ignore_index=MASKED) / units


def squared_loss(model: nn.Module, batch: dict[str, Tensor], units: int) -> Tensor:
    """Return the squared error of the examples that have a number."""
    wanted, got = batch["labels"], logits_of(model, batch).float().squeeze(-1)
    there = wanted.isfinite()
    return ((got - wanted.nan_to_num()).square() * there).sum() / units


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return what the head says of a batch."""
    return model(**{name: x for name, x in batch.items() if name != "labels"}).logits


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Tokenized texts with a label each, in flat arrays; a selection shares them with the whole.

    Fields:
        tokens, types: of all examples, one after another; types tell a pair's texts apart, and
            are none where the tokenizer gives none.
        values: labels by their place, int64, or numbers, float32.
        num_truncated: texts cut to the maximum length.
    """

    tokens: np.ndarray
    types: np.ndarray | None
    starts: np.ndarray
    lengths: np.ndarray
    values: np.ndarray
    pad_id: int
    num_truncated: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def units(self) -> np.ndarray:
        return np.ones(len(self), dtype=np.int64)

    @property
    def largest_token(self) -> int:
        return int(self.tokens.max(initial=0))

    @property
    def notes(self) -> Mapping[str, Any]:
        """Return the count, and the SHA-256 of tokens and labels."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.lengths, self.values):
            digest.update(np.ascontiguousarray(array).tobytes())
        return {"truncated": self.num_truncated, "dropped": 0, "sha256": digest.hexdigest()}

    def select(self, indices: Sequence[int]) -> Labelled:
        chosen = np.asarray(indices, dtype=np.int64)
        fields = ("starts", "lengths", "values")
        return replace(self, **{name: getattr(self, name)[chosen] for name in fields})

    def batch(self, indices: Sequence[int], *, fallback: int) -> dict[str, Tensor]:
        """Return tensors (examples, longest), padded on the right, and the labels."""
        chosen = list(indices) or [fallback]
        shape = len(chosen), int(self.lengths[chosen].max())
        inputs = {"input_ids": torch.full(shape, self.pad_id)}
        inputs["attention_mask"] = torch.zeros(shape, dtype=torch.int64)
        if self.types is not None:
            inputs["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
        for row, example in enumerate(chosen):
            start, length = self.starts[example], self.lengths[example]
            inputs["input_ids"][row, :length] = _ints(self.tokens[start : start + length])
            inputs["attention_mask"][row, :length] = 1
            if self.types is not None:
                inputs["token_type_ids"][row, :length] = _ints(self.types[start : start + length])
        labels = torch.from_numpy(self.values[chosen])
        if not len(indices):
            labels = torch.full_like(labels, torch.nan if labels.is_floating_point() else MASKED)
        return inputs | {"labels": labels}


def _encode(
    config: Config, tokenizer: PreTrainedTokenizerBase, rows: Dataset, values: Sequence[float]
) -> Labelled:
    """Tokenize the texts, cut to the maximum length."""
    texts = [[str(text) for text in rows[column]] for column in config.task.text_columns]
    longest = config.data.max_length
    tokens = tokenizer(*texts, truncation=True, max_length=longest, return_overflowing_tokens=False)
    lengths = np.array([len(ids) for ids in tokens["input_ids"]])
    types = tokens.get("token_type_ids")
    number = np.float32 if config.task.kind == "regress" else np.int64
    return Labelled(
        tokens=np.concatenate([np.array(x, dtype=np.int32) for x in tokens["input_ids"]]),
        types=np.concatenate([np.array(x, dtype=np.int32) for x in types]) if types else None,
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        values=np.array(values, dtype=number),
        pad_id=tokenizer.pad_token_id,
        num_truncated=int((lengths == longest).sum()),
    )


def _score(examples: Labelled, labels: list[str], model: nn.Module, batch_size: int) -> Scores:
    """Return the scores of a labelling, or of numbers where there are no labels."""
    outputs = predictions(model, examples, logits_of, batch_size)
    if not labels:
        return number_scores("regress", outputs[:, 0], examples.values)
    return class_scores("classify", outputs.argmax(1), examples.values, labels)


def _numbers(rows: Dataset, column: str, source: str) -> list[float]:
    numbers = []
    for value in rows[column]:
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(float("nan"))
    wrong = [i for i, number in enumerate(numbers) if not np.isfinite(number)]
    if wrong:
        raise UserError(
            f"{source}: expected numbers in column {column}, got {rows[column][wrong[0]]!r:.60} in "
            f"row {wrong[0] + 1}; use task.kind=classify for labels"
        )
    return numbers


def _ints(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
