"""Write a text from a prompt, such as a table's row, by beam search; scored against references."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from fedex_scale.config.section import replace
from fedex_scale.config.settings import Config
from fedex_scale.config.task import TaskSection
from fedex_scale.data.batching import MASKED
from fedex_scale.data.encode import begin_tokens, encode
from fedex_scale.data.prompts import Schema
from fedex_scale.runtime import distributed
from fedex_scale.tasks import nlg
from fedex_scale.tasks import rows as reading
from fedex_scale.tasks.instruct import Tokens
from fedex_scale.tasks.interface import ModelKind, Scores, Task, causal_loss
from fedex_scale.tasks.labels import sample
from fedex_scale.tasks.predict import batches_of, dealt, is_partitioned

NAME = "generate"


def open_task(config: Config, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Read and tokenize the rows; held-out rows of one prompt are references of one text."""
    data, section = config.data, config.task
    columns = [str(data.prompt_column), str(data.response_column)]
    whole = replace(config, task=replace(section, test_examples=None))  # rows of a prompt stay
    rows, test = reading.read(whole, columns)
    nlg.check_libraries()
    prompt = "{instruction}".join(_escaped(part) for part in section.prompt.split("{}"))
    schema = Schema(*columns, prompt=prompt, convert=" {}".format)
    examples = encode(rows, schema, tokenizer, max_length=data.max_length)
    tokens = Tokens(examples, pad_id=tokenizer.pad_token_id, packing=config.train.packing)
    loss = partial(smoothed_loss, section.label_smoothing) if section.label_smoothing else None
    score = partial(_score, _prompts(section, tokenizer, test, columns)) if test else None
    return Task(
        model=ModelKind(loss=loss or causal_loss),
        rows=rows.select(examples.rows),
        examples=tokens,
        score=score,
    )


def smoothed_loss(
    smoothing: float, model: nn.Module, batch: dict[str, Tensor], units: int
) -> Tensor:
    """Return the cross-entropy of the trained tokens with labels of which a share is spread out."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    following = functional.pad(batch["labels"][:, 1:], (0, 1), value=MASKED)
    trained = following != MASKED
    logits = model(**inputs, use_cache=False).logits
    return (
        functional.cross_entropy(
            logits[trained].float(), following[trained], reduction="sum", label_smoothing=smoothing
        )
        / units
    )


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is to be written of the held-out rows, and what others wrote.

    Fields:
        tokens: of each prompt.
    """

    section: TaskSection
    tokenizer: PreTrainedTokenizerBase
    prompts: list[str]
    tokens: list[list[int]]
    references: list[list[str]]


def _prompts(
    section: TaskSection, tokenizer: PreTrainedTokenizerBase, rows: Dataset, columns: Sequence[str]
) -> Prompts:
    references: dict[str, list[str]] = {}
    for prompt, response in zip(*(rows[column] for column in columns), strict=True):
        references.setdefault(str(prompt), []).append(str(response))
    references = dict(islice(references.items(), section.test_examples))
    begin = begin_tokens(tokenizer)
    texts = [section.prompt.replace("{}", prompt) for prompt in references]
    tokens = [begin + x for x in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return Prompts(
        section=section,
        tokenizer=tokenizer,
        prompts=list(references),
        tokens=tokens,
        references=list(references.values()),
    )


def _score(task: Prompts, model: nn.Module, batch_size: int) -> Scores:
    """Write a text for each prompt, and compare it with the references."""
    lengths = np.array([len(tokens) for tokens in task.tokens])
    texts = dealt(model, batches_of(lengths, batch_size), partial(write, task, model))
    values, each, notes = nlg.text_scores(texts, task.references)
    samples = []
    for i, text in enumerate(texts):
        line = sample(NAME, i, task.references[i], text, each[i])
        digest = hashlib.sha256(task.prompts[i].encode()).hexdigest()
        samples.append(line | {"prompt": task.prompts[i], "doc_hash": digest})
    return Scores(values={NAME: values}, counts={NAME: len(texts)}, samples=samples, notes=notes)


def write(task: Prompts, model: nn.Module, chosen: Sequence[int]) -> list[str]:
    """Return the texts of some prompts, which are padded on the left: text follows on the right."""
    section, tokenizer = task.section, task.tokenizer
    longest = max(len(task.tokens[i]) for i in chosen)
    ids = torch.full((len(chosen), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, i in enumerate(chosen):
        own = torch.tensor(task.tokens[i])
        ids[row, longest - len(own) :] = own
        mask[row, longest - len(own) :] = 1
    options: dict[str, Any] = {
        "num_beams": section.num_beams,
        "do_sample": False,
        "max_new_tokens": section.max_new_tokens,
        "no_repeat_ngram_size": section.no_repeat_ngram or None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "synced_gpus": distributed.world_size() > 1 and is_partitioned(model),
    }
    if section.num_beams > 1:
        options["length_penalty"] = section.length_penalty
    device = distributed.device()
    output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
    texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
