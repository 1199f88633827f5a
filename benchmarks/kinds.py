"""The settings of `methods.py` that are no text generation by instruction: what stands for what.

Each is sized for one core, and stands for an experiment of the papers whose model or data need a
hub; the recipe of the real thing is named beside it. Where rows or a model are not at hand, a
setting says why it is not run.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedex_scale.runtime.errors import UserError


class Kind(NamedTuple):
    """One setting.

    Fields:
        name: as its heading says it.
        recipe: what it stands for.
        rounds: of each method.
        metric: which of its scores is compared; a mean over examples.
        data: what has to lie below FEDEX_SCALE_DATA.
        model: what has to lie below models/, made by `substitutes.py` or `make model`.
        minutes: a method took on one core.
        overrides: of the config, from where the data lie and where the model does.
    """

    name: str
    recipe: str
    rounds: int
    metric: str
    data: str
    model: str
    minutes: float
    overrides: Callable[[Path, Path, Path], tuple[str, ...]]


def _qnli(data: Path, model: Path, out: Path) -> tuple[str, ...]:
    return (
        f"model.path={model}",
        "task.kind=classify",
        "task.text_columns=[question, sentence]",
        "task.holdout=0.5",
        "task.test_examples=400",
        f"data.path={data}",
        "data.num_examples=600",
        "data.max_length=128",
        "lora.rank=4",
        "lora.alpha=8",
        "lora.dropout=0.1",
        "lora.target_modules=[query, value]",
        "train.local_epochs=3",
        "train.batch_size=16",
        "train.micro_batch_size=16",
        "train.learning_rate=2e-3",
        "train.schedule=linear",
        "train.warmup_ratio=0.06",
        "evaluation.tasks=[]",
    )


def _e2e(data: Path, model: Path, out: Path) -> tuple[str, ...]:
    section = {"kind": "generate", "test": str(data.parent / "testset_w_refs.csv")}
    return (
        f"model.path={model}",
        f"task={json.dumps(section | {'label_smoothing': 0.1, 'test_examples': 40})}",
        f"data.path={data}",
        "data.schema=columns",
        "data.prompt_column=mr",
        "data.response_column=ref",
        "data.num_examples=360",
        "data.select=random",
        "lora.rank=4",
        "lora.alpha=32",
        "lora.target_modules=[q_proj, k_proj, v_proj, o_proj]",
        "train.learning_rate=2e-3",
        "train.schedule=linear",
        "train.warmup_ratio=0.1",
        "evaluation.tasks=[]",
        "evaluation.batch_size=8",
    )


def _images(data: Path, model: Path, out: Path, *more: str) -> tuple[str, ...]:
    folder = out / "data" / "emoji6"
    if not folder.is_dir():
        with zipfile.ZipFile(data) as archive:
            archive.extractall(folder)
    return (
        f"model.path={model}",
        "task.kind=images",
        "task.holdout=0.3",
        "task.holdout_by=file",
        f"data.path={folder}",
        "data.num_examples=640",
        "data.select=random",
        "lora.rank=16",
        "lora.alpha=16",
        "train.optimizer=sgd",
        "train.batch_size=16",
        "train.micro_batch_size=16",
        "train.learning_rate=0.01",
        "train.schedule=constant",
        "train.warmup_ratio=0",
        "train.max_grad_norm=0",
        "evaluation.tasks=[]",
        *(more or ("partition.kind=natural", "partition.column=domain", "partition.num_clients=6")),
    )


def _drawn(data: Path, model: Path, out: Path) -> tuple[str, ...]:
    kind = ("partition.kind=dirichlet", "partition.column=label", "partition.alpha=0.5")
    count = ("partition.num_clients=30", "federation.client_fraction=0.6")
    return _images(data, model, out, *kind, *count)


KINDS = (
    Kind(
        "QNLI, MiniLM-L6 for RoBERTa, 5 rounds",
        "roberta_base_glue",
        5,
        "accuracy",
        "glue/qnli_dev.jsonl",
        "minilm-l6",
        17,
        _qnli,
    ),
    Kind(
        "E2E, SmolLM2-135M for GPT-2, 3 rounds",
        "gpt2_e2e",
        3,
        "rouge_l",
        "e2e/trainset.csv",
        "SmolLM2-135M-Instruct",
        13,
        _e2e,
    ),
    Kind(
        "six domains of drawings, ViT-S/14, 5 rounds",
        "vit_domainnet",
        5,
        "accuracy",
        "vision/emoji6.zip",
        "vit-s14",
        5,
        _images,
    ),
    Kind(
        "six domains of drawings, 18 of 30 clients, ViT-S/14, 5 rounds",
        "vit_domainnet",
        5,
        "accuracy",
        "vision/emoji6.zip",
        "vit-s14",
        5,
        _drawn,
    ),
)
NOT_HERE = {
    "CoLA, RTE, MRPC, SST-2, QNLI and STS-B on RoBERTa-base": "roberta_base_glue",
    "the same on RoBERTa-large": "roberta_large_glue",
    "E2E on GPT-2": "gpt2_e2e",
    "DomainNet on ViT-B/16": "vit_domainnet",
    "DomainNet on MLP-Mixer-B/16": "mixer_domainnet",
    "NICO++ on ViT-B/16": "vit_nico",
    "NICO++ on MLP-Mixer-B/16": "mixer_nico",
    "MetaMathQA on Mistral-7B": "mistral_7b_metamath",
    "MetaMathQA on Gemma-2 9B": "gemma2_9b_metamath",
    "Commonsense170K on Llama-3.2 3B": "llama32_3b_commonsense",
}
"""What the papers ran, and the recipe that does."""


def overrides_of(kind: Kind, data_dir: Path | None, models: Path, out: Path) -> tuple[str, ...]:
    """Return a setting's overrides.

    Raises:
        UserError: its rows or its model are not at hand.
    """
    data = data_dir / kind.data if data_dir is not None else None
    if data is None or not data.is_file():
        raise UserError(f"{kind.name}: no {kind.data} below FEDEX_SCALE_DATA")
    model = models / kind.model
    if not (model / "config.json").is_file():
        raise UserError(f"{kind.name}: no {model}; python benchmarks/substitutes.py makes it")
    return kind.overrides(data.resolve(), model.resolve(), out)
