"""What a client learns, and how: the model, its adapter, the data, the training, the engine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedex_scale.config.section import MOST, AsTuple, Count, Number, Positive, Section, Share
from fedex_scale.config.shipped import locate
from fedex_scale.config.words import named, shown
from fedex_scale.runtime.errors import UserError

ModuleNames = Annotated[tuple[str, ...], Field(min_length=1), AsTuple]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd"]


class ModelSection(Section, title="model"):
    """The base model, which stays frozen."""

    path: str = ""
    """Hub id or directory of a causal language model."""
    config: str | None = None
    """Instead of a path, with random: a config.json, or the name of one that comes along:
    mistral-7b, gemma2-9b, llama32-3b, smollm2-135m. Its tokens are bytes."""
    random: bool = False
    """Draw the weights and load none: for trying out sizes."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16, but float32 on a CPU that does not multiply bfloat16 fast."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """auto: eager for Gemma-2, whose soft-capping rules out sdpa; sdpa otherwise; and packed
    examples each by itself. Any other: as transformers does it, sdpa and eager with a mask of all
    tokens by all for packed ones."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more compute."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Hold the frozen base in 8 or 4 bits (bitsandbytes)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose authors you trust."""

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_config(cls, values: Any) -> Any:
        """Let a model without weights be known by its config's name."""
        if isinstance(values, dict) and not values.get("path") and values.get("config"):
            return values | {"path": values["config"]}
        return values

    def problems(self) -> Iterator[str]:
        if not (self.path or self.config):
            yield "model.path: missing; add it to the config"
        if self.config and (not self.random or self.path != self.config):
            yield (
                f"model.config: {named(self.config)} has no weights; use it with random: true and "
                "without a path"
            )
        if self.random and self.quantization != "none":
            yield f"model.random: expected quantization: none, got {self.quantization}; drop one"


class LoraSection(Section, title="lora"):
    """The adapter that every client trains."""

    rank: Annotated[int, Field(ge=1, le=65_536)] = 32
    """R, the rank of every adapted layer."""
    alpha: Number = Field(16.0, ge=1e-12, le=MOST)
    """The update is applied times alpha / rank."""
    dropout: Number = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: Annotated[str, Field(min_length=1)] | ModuleNames = "all-linear"
    """Module names, or `all-linear`: every attention and MLP projection."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


with warnings.catch_warnings():  # BaseModel has a deprecated method of the name `schema`
    warnings.filterwarnings("ignore", message='Field name "schema"')

    class DataConfig(Section, title="data"):
        """The training rows: which, how many, and how they become examples."""

        path: str = ""
        """A hub id such as meta-math/MetaMathQA, or a .json, .jsonl, .csv or .parquet file or
        glob; none where partition.files names the data."""
        name: str | None = None
        """Configuration of a hub dataset, such as main of openai/gsm8k."""
        split: str = "train"
        """Split of a hub dataset."""
        local: str | None = None
        """File or glob below `data_dir`, read instead of `path` where a data_dir is set."""
        data_dir: str | None = None
        """Where `local` lies; none: the environment variable FEDEX_SCALE_DATA, if set."""
        schema: Literal[
            "auto",
            "chat",
            "alpaca",
            "prompt_completion",
            "text",
            "metamath",
            "gsm8k",
            "commonsense",
            "columns",
        ] = "auto"
        """What a row is: chat (messages or conversations), alpaca (instruction, input, output),
        prompt_completion, text, metamath (query, response), gsm8k, commonsense, or columns: the
        two named below. auto: told by the columns, where they leave no doubt."""
        template: Literal["auto", "alpaca", "chat", "none"] = "auto"
        """What is put around a row: Alpaca's sentence, a chat template, or nothing; auto: as the
        schema has it (prompt_completion and text: none; columns: alpaca)."""
        chat_template: str | None = None
        """For chats: chatml, zephyr, or a Jinja file; none: the model's own."""
        prompt_column: str | None = None
        """For columns: the instruction; template says what is put around it."""
        response_column: str | None = None
        """For columns: the response that is trained."""
        num_examples: Count | None = None
        """Rows to use; none: all."""
        select: Literal["first", "random"] = "first"
        """Which rows, where num_examples is fewer than there are."""
        max_length: Count = 512
        """Tokens of an example, prompt and end token included; longer ones are cut."""
        max_dropped: Share = 0.05
        """Share of the rows that may be empty, cut, or left out; more stop the run."""
        holdout: Share | str = "auto"
        """Rows of each client to hold out for the loss: a share, or a file; auto: 2% of those with
        50 or more, where no task is scored; 0: none."""

        def problems(self) -> Iterator[str]:
            if self.data_dir is not None and self.local is None:
                yield (
                    f"data.local: expected a file below data.data_dir ({named(self.data_dir)}), "
                    "got none; set data.local, or leave out data_dir and give the whole path as "
                    "data.path"
                )
            given = self.prompt_column is not None, self.response_column is not None
            if any(given) != (self.schema == "columns") or any(given) != all(given):
                yield (
                    "data.prompt_column, data.response_column: expected both with schema: columns "
                    f"and neither with another, got {shown(self.prompt_column)}, "
                    f"{shown(self.response_column)} with {self.schema}; set both and "
                    "data.schema=columns"
                )


class TrainSection(Section, title="train"):
    """How every client trains in a round."""

    local_epochs: Count = 1
    """Passes over the client's examples."""
    max_steps: Count | None = None
    """Stop a client after so many optimizer steps; none: after its epochs."""
    batch_size: Count = 32
    """Examples per optimizer step, over all ranks: the same result on one GPU and on eight."""
    micro_batch_size: Count = 1
    """Examples per forward pass on one rank; what memory allows."""
    micro_batch_tokens: Count | Literal["auto"] | None = None
    """Instead: tokens per forward pass on one rank, padding included, of as many examples as they
    hold. auto: as many as `fedex-scale plan` finds room for where the run begins."""
    learning_rate: Positive = 5e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From the peak to 0 over the client's steps, after the warmup."""
    warmup_ratio: Number = Field(0.02, ge=0, lt=1)
    """Share of a client's steps in which the learning rate rises from 0."""
    weight_decay: Number = Field(0.0, ge=0, le=MOST)
    """AdamW's decoupled weight decay; SGD's plain one."""
    max_grad_norm: Number = Field(1.0, ge=0, le=MOST)
    """Gradients are clipped to this norm; 0 for never."""
    optimizer: Optimizer = "adamw"
    """adamw; bitsandbytes' 8-bit ones, which hold moments in a quarter of the memory; sgd: plain,
    without moments."""
    group_by_length: bool = False
    """Batch examples of like length together: less padding, a less random order."""
    packing: bool = False
    """Lay a micro-batch's examples end to end in one row, blind to each other: no padding, and the
    same loss. Pays where lengths differ much; needs a model that `models.PACKABLE` names."""

    def at_once(self, longest: int) -> int:
        """Return how many examples of `longest` tokens share a forward pass; of auto the fewest."""
        if self.micro_batch_tokens is None:
            return self.micro_batch_size
        return 1 if self.micro_batch_tokens == "auto" else -(-self.micro_batch_tokens // longest)

    def problems(self) -> Iterator[str]:
        if self.micro_batch_tokens is not None and self.micro_batch_size != 1:
            yield (
                "train.micro_batch_size: expected to be left out beside micro_batch_tokens "
                f"({self.micro_batch_tokens}), got {self.micro_batch_size}; leave it out, or set "
                "train.micro_batch_tokens=null"
            )


class EngineSection(Section, title="engine"):
    """What the model runs on."""

    deepspeed: str | None = None
    """A DeepSpeed file: the name of one that comes along, such as zero3_offload, or a path to a
    JSON; none: plain PyTorch."""
    nvme_path: str | None = None
    """Directory on a local NVMe, for zero3_nvme."""
    fused_lora: bool = True
    """Train each adapted layer as one function, with fewer and larger operations; false: as PEFT
    does. Layers that are packed (nf4, int8) or GPT-2's always train as PEFT does."""

    def problems(self) -> Iterator[str]:
        try:
            if self.deepspeed is not None:
                locate("ds_configs", self.deepspeed, "engine.deepspeed")
        except UserError as error:
            yield str(error)
