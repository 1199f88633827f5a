"""A run's model to talk to, before and after its training: one base, with its adapter on or off."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from fedex_scale.config.settings import Config
from fedex_scale.data.chat import render, template_of
from fedex_scale.data.encode import begin_tokens
from fedex_scale.data.prompts import schema_of
from fedex_scale.engine import models
from fedex_scale.files import checked, kinds
from fedex_scale.files.run_dir import RunDir
from fedex_scale.runtime import distributed
from fedex_scale.runtime.errors import UserError, reading
from fedex_scale.scoring import post_hoc

FORMS = ("auto", "trained", "chat", "none")
WHEN = ("after", "before")


class Talker:
    """A conversation with a run's model.

    Args:
        run: a finished one.
        form: what is put around a question: `trained`, the prompt of the training data; `chat`, the
            tokenizer's own template, with the turns before; `none`; `auto`, what it was trained on.
        max_new_tokens: of an answer.
        temperature: 0: the likeliest token each time.

    Raises:
        UserError: a model that cannot be had, or no such template.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        form: str = "auto",
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        dtype: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if form not in FORMS:
            raise UserError(f"--prompt: expected one of {', '.join(FORMS)}, got {form}")
        self.name = run.path.resolve().name
        self._trained, template = _trained_on(run, run.config())
        self.has_before, adapter = _adapter_for(run)
        subject = post_hoc.find_model(
            str(run.path), adapter, {}, dtype=dtype, trust_remote_code=trust_remote_code
        )
        self._tokenizer = models.load_tokenizer(subject.model)
        self._tokenizer.chat_template = template or self._tokenizer.chat_template
        self.form = self._form(form)
        self._template = template_of(None, self._tokenizer) if self.form == "chat" else ""
        self._model = post_hoc.load(subject).eval()
        if subject.model.quantization == "none":
            self._model.to(distributed.device())
        sampled = {"temperature": temperature} if temperature else {"temperature": None}
        none = {"top_p": None, "top_k": None} if not temperature else {}
        self._options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        self._options |= sampled | none
        self._turns: list[dict[str, str]] = []
        self.stopped = False

    def ask(self, question: str, when: str, write: Callable[[str], None]) -> str:
        """Answer a question, and keep both for the next one where the form has turns.

        Args:
            when: `after`, or `before` its training.
            write: told of the answer's text, as it comes.

        Raises:
            UserError: the model from before is not at hand, or the question is too long.
        """
        if when == "before" and not self.has_before:
            raise UserError(
                f"{self.name}: its folds changed the base, and no adapter of all rounds is there "
                "to take off; the model from before is the base that the run was given"
            )
        tokens = self._tokens(question)
        self.stopped = False
        off = self._model.disable_adapter() if when == "before" else nullcontext()
        streamer = _Writer(self._tokenizer, write)
        with torch.no_grad(), off:
            self._model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                pad_token_id=self._tokenizer.pad_token_id,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Stop(self)]),
                **self._options,
            )
        answer = "".join(streamer.parts)
        if self.form == "chat":
            self._turns += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        return answer

    def take_back(self) -> None:
        """Forget the last question and its answer."""
        del self._turns[-2:]

    def forget(self) -> None:
        """Begin a new conversation."""
        self._turns.clear()

    def stop(self) -> None:
        """End the answer that is being written; may be called from a signal's handler."""
        self.stopped = True

    def _form(self, form: str) -> str:
        """Return the form that is meant, which the tokenizer must have."""
        if form == "auto":
            form = "chat" if self._trained is None else "trained"
        if form == "trained" and self._trained is None:
            form = "chat"
        if form == "chat" and not self._tokenizer.chat_template:
            raise UserError(
                "--prompt: expected a tokenizer with a chat template, got one without; use "
                "--prompt none" + (" or trained" if self._trained else "")
            )
        return form

    def _tokens(self, question: str) -> torch.Tensor:
        """Return the tokens to go on from; of a long conversation, its last turns."""
        limit = getattr(self._model.config, "max_position_embeddings", 2**20)
        limit -= min(self._options["max_new_tokens"], limit // 2)
        while True:
            ids = self._encoded(question)
            if len(ids) <= limit:
                return torch.tensor([ids], device=self._model.device)
            if not self._turns:
                raise UserError(
                    f"question: expected at most {limit:,} tokens, which the model has room for, "
                    f"got {len(ids):,}; shorten it"
                )
            del self._turns[:2]

    def _encoded(self, question: str) -> list[int]:
        tokenizer = self._tokenizer
        if self.form == "chat":
            turns = [*self._turns, {"role": "user", "content": question}]
            text = render(turns, self._template, tokenizer, ask=True)
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        text = question
        if self.form == "trained":
            text = self._trained.format(instruction=question, context="")
        return begin_tokens(tokenizer) + tokenizer(text, add_special_tokens=False)["input_ids"]


def _trained_on(run: RunDir, config: Config) -> tuple[str | None, str | None]:
    """Return the prompt around an instruction of the training data, None where it was a chat, and
    the chat template, None where it was the tokenizer's."""
    data, file = config.data, run.path / "partition.json"
    with reading(file, "restore the files of this run"):
        told = checked.read(kinds.PartitionFile, file).model_dump()
    name = told.get("schema", data.schema)
    if name == "auto":  # a server that never saw the sites' rows
        return "{instruction}", None
    known = schema_of(data, name)
    if known.as_chat:
        return None, told.get("chat_template")
    return known.prompt if known.instruction else "{instruction}", None


def _adapter_for(run: RunDir) -> tuple[bool, Path | None]:
    """Return whether taking the adapter off gives the model from before, and the adapter."""
    exact = run.final / "exact_adapter"
    if not run.base_changed():
        return True, None
    return (True, exact) if exact.is_dir() else (False, None)


class _Writer(TextStreamer):
    """Hands on the answer's text as soon as it is sure what it is."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.parts: list[str] = []
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.parts.append(text)
        self._write("".join(c for c in text if c.isprintable() or c in "\n\t"))


class _Stop(StoppingCriteria):
    def __init__(self, talker: Talker) -> None:
        self._talker = talker

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._talker.stopped, device=input_ids.device)
