"""What a run looks at between rounds: held-out loss, answers to the user's prompts, scores."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from fedex_scale.config.settings import Config
from fedex_scale.data.prompts import schema_of
from fedex_scale.files.run_dir import RunDir
from fedex_scale.runtime import distributed
from fedex_scale.runtime.progress import Monitor
from fedex_scale.scoring import asked, evaluation, held_out
from fedex_scale.scoring.loss import held_out_loss
from fedex_scale.scoring.spread import Tell
from fedex_scale.tasks.all import Lesson


@dataclass(frozen=True, kw_only=True)
class Look:
    """A run's ways to see how its model does; every rank must take part.

    Fields:
        tokenizer: None for a model that writes nothing.
        prompts: to be answered before and after.
    """

    config: Config
    lesson: Lesson
    tokenizer: PreTrainedTokenizerBase | None
    prompts: Sequence[str]
    run: RunDir

    def is_due(self, round: int) -> bool:
        section = self.config.evaluation
        anything = section.tasks or self.lesson.clients.held_out or self.prompts
        anything = anything or self.lesson.score is not None
        return bool(anything) and section.due(round, self.config.federation.rounds)

    def at(self, model: nn.Module, round: int, monitor: Monitor, tell: Tell) -> None:
        """Look at the model as it is after a round, and write and tell what is seen.

        Args:
            tell: told how far lm-eval has come.
        """
        if self.lesson.clients.held_out:
            began = time.perf_counter()
            size = self.config.train.at_once(self.config.data.max_length)
            found = held_out_loss(model, self.lesson.clients.held_out, micro_batch_size=size)
            monitor.log("held_out", round=round, took_s=time.perf_counter() - began, **found)
        began = time.perf_counter()
        results: dict[str, Any] = {}
        if self.config.evaluation.tasks:
            results = evaluation.evaluate(model, self.tokenizer, self.config.evaluation, tell)
        if self.lesson.score is not None:
            own = held_out.evaluate(model, self.lesson.score, self.config.evaluation)
            results = held_out.merged(results, own)
        if self.config.evaluation.tasks or self.lesson.score is not None:  # on every rank
            folder = self.run.evaluation(round)
            # A run that was killed may have written it before its place was saved.
            distributed.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
            evaluation.write_results(results, folder)
            seconds = time.perf_counter() - began
            monitor.log("eval", round=round, took_s=seconds, **evaluation.scores(results))
            for warning in evaluation.warnings(results):
                monitor.say(f"warning: {warning}")
        if self.prompts:  # beside the scores
            self._answer(model, round)

    def _answer(self, model: nn.Module, round: int) -> None:
        schema = schema_of(self.config.data, self.lesson.clients.schema)
        texts = asked.texts_of(self.prompts, schema, self.tokenizer)
        size = self.config.evaluation.batch_size
        given = asked.answers(model, self.tokenizer, texts, as_chat=schema.as_chat, batch_size=size)
        asked.write_answers(self.run, round, self.prompts, given)
