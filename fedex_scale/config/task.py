"""What a client learns: the kind of its task, where a row holds what, and how it is scored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from fedex_scale.config.section import Count, Names, Number, Section, Share

TaskKind = Literal["instruct", "classify", "regress", "generate", "images"]


class TaskSection(Section, title="task"):
    """What a client learns; kinds but instruct are scored on held-out rows of their own."""

    kind: TaskKind = "instruct"
    """instruct: answer a prompt; classify, regress: a new head on a text or two; generate: write a
    text, scored against references; images: a new head on images (domain/class/file, or a hub id).
    """
    text_columns: Names = ("text",)
    """classify, regress: the column that holds the text, or the two that hold a pair."""
    label_column: str = "label"
    """classify, regress, images: the column that holds the label."""
    labels: Names = ()
    """classify, images: the labels' names in their order; none: those of the training rows."""
    image_column: str = "image"
    """images: the column of a hub dataset that holds the image."""
    domain_column: str = "domain"
    """images: the column of a hub dataset by which scores are told apart; a folder has one."""
    head: Names = ()
    """Modules that are trained whole; none: those that the model has beside its base model."""
    test: str | None = None
    """Rows to score on: a file (images: a folder), also below the data_dir where data.local is read
    from there, or a split of the hub's dataset."""
    test_examples: Count | None = None
    """Score on a draw of so many rows only (generate: on the first so many prompts); none: all."""
    holdout: Share = 0.0
    """In place of `test`: the share of the rows that is kept from training and scored on."""
    holdout_by: str | None = None
    """Rows that are alike in this column are held out together; images of a folder have `file`."""
    prompt: str = "{} ->"
    """generate: the prompt; {} stands for what data.prompt_column holds."""
    label_smoothing: Share = 0.0
    """generate: share of a label that is spread over the vocabulary."""
    num_beams: Count = 10
    """generate: beams of the search."""
    length_penalty: Number = Field(0.9, ge=-100, le=100)
    """generate: exponent of the length by which a beam's log-likelihood is divided."""
    no_repeat_ngram: Annotated[int, Field(ge=0)] = 4
    """generate: no n-gram of this size comes twice; 0: any may."""
    max_new_tokens: Count = 64
    """generate: tokens of a text at most."""

    @property
    def has_head(self) -> bool:
        """Return whether a new head is trained beside the adapter."""
        return self.kind in ("classify", "regress", "images")

    @property
    def is_scored(self) -> bool:
        """Return whether there are held-out rows."""
        return self.test is not None or self.holdout > 0

    def problems(self) -> Iterator[str]:
        if self.kind in ("classify", "regress") and len(self.text_columns) not in (1, 2):
            yield (
                "task.text_columns: expected one column or two, got "
                f"{len(self.text_columns)}; name the text, or the pair of texts"
            )
        if self.test is not None and self.holdout:
            yield "task.holdout: task.test names the rows already; set one of the two"
        if self.is_scored and self.kind == "instruct":
            yield (
                "task.test: instruct is scored by evaluation.tasks; leave task.test and "
                "task.holdout out, or choose another task.kind"
            )
        if self.holdout_by is not None and not self.holdout:
            yield "task.holdout_by: expected a task.holdout as well, got none; set task.holdout=0.2"
        if self.head and not self.has_head:
            yield f"task.head: {self.kind} has no head of its own; leave task.head out"
        if len(set(self.labels)) < len(self.labels):
            yield "task.labels: a label is there twice; name each once"
        if self.kind == "generate" and self.prompt.count("{}") != 1:
            yield f"task.prompt: expected one {{}}, got {self.prompt!r:.80}; try '{{}} ->'"
