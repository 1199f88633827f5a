"""Put one of several labels on an image, by a new head; scored domain by domain."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional

from fedex_scale.config.settings import Config
from fedex_scale.data.batching import MASKED
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError
from fedex_scale.tasks import rows as reading
from fedex_scale.tasks.interface import ModelKind, Scores, Task
from fedex_scale.tasks.labels import class_scores
from fedex_scale.tasks.predict import predictions

IMAGES = {"auto": "AutoModelForImageClassification", "task_type": None}
MAX_BYTES = 2**28  # of an image's file
SUFFIXES = frozenset(".png .jpg .jpeg .webp .bmp .gif .tif .tiff".split())
# What an image is converted to three channels from, transparent parts becoming white.
MODES = frozenset("1 L LA P PA RGB RGBA".split())


def open_task(config: Config, processor: Any) -> Task:
    """Find the images, look at every one, and learn their labels.

    Raises:
        UserError: no folder of that form, an empty one, an image that cannot be opened or has
            other channels, a label unseen in training, or one label only.
    """
    section = config.task
    if Path(config.data.path).is_dir():
        rows = read_folder(Path(config.data.path))
        test = None if section.test is None else read_folder(Path(section.test))
        rows, test = reading.divide(config, config.data.path, rows, test)
        columns = ("image", "label", "domain")
    else:
        columns = (section.image_column, section.label_column, section.domain_column)
        rows, test = reading.read(config, columns)
        rows, test = (
            x and x.cast_column(columns[0], ImageColumn(decode=False)) for x in (rows, test)
        )
    source, test_source = config.data.path, reading.test_source(config)
    names = reading.names_of(rows, columns[1])
    labels = reading.labels_of(config, rows, names, source)
    make = partial(_examples, processor, columns, labels)
    kind = ModelKind(
        **IMAGES,
        loss=image_loss,
        settings=reading.label_settings(labels),
        has_head=True,
        head=section.head,
    )
    score = None
    if test is not None:
        reading.check_known(reading.names_of(test, columns[1]), labels, test_source)
        domains = [str(domain) for domain in test[columns[2]]]
        score = partial(_score, make(test, test_source), labels, domains)
    return Task(model=kind, rows=rows, examples=make(rows, source), score=score)


def read_folder(root: Path) -> Dataset:
    """Return the images of root/domain/class/file, by name: image, label, domain, file.

    Raises:
        UserError: no domain, no class in one, or no image in one.
    """
    found: dict[str, list[str]] = {"image": [], "label": [], "domain": [], "file": []}
    if not root.is_dir():
        raise UserError(f"task.test: expected a folder of images, found none at {root}; correct it")
    for domain in _folders(root, "a folder a domain"):
        before = len(found["image"])
        for label in _folders(domain, "a folder a class"):
            for file in sorted(label.iterdir()):
                if file.suffix.lower() in SUFFIXES:
                    for key, value in zip(found, (file, label, domain, file), strict=True):
                        found[key].append(str(value) if key == "image" else value.stem)
        if len(found["image"]) == before:
            raise UserError(f"{domain}: expected images in this domain, found none; remove it")
    return Dataset.from_dict(found)


def image_loss(model: nn.Module, batch: dict[str, Tensor], units: int) -> Tensor:
    """Return the cross-entropy of the images that have a label."""
    logits = logits_of(model, batch).float()
    return (
        functional.cross_entropy(logits, batch["labels"], reduction="sum", ignore_index=MASKED)
        / units
    )


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return what the head says of a batch, whose images take the base's dtype."""
    dtype = next(p.dtype for n, p in model.named_parameters() if ".lora_" not in n)
    return model(pixel_values=batch["pixel_values"].to(dtype)).logits


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images that are read as they are asked for, and their labels.

    Fields:
        sources: a path, or the bytes of a file.
        digest: of all images and labels.
    """

    sources: list[str | bytes]
    values: np.ndarray
    processor: Any
    digest: str

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self), dtype=np.int64)

    @property
    def units(self) -> np.ndarray:
        return np.ones(len(self), dtype=np.int64)

    @property
    def notes(self) -> Mapping[str, Any]:
        return {"truncated": 0, "dropped": 0, "sha256": self.digest}

    def select(self, indices: Sequence[int]) -> Images:
        sources = [self.sources[i] for i in indices]
        return replace(self, sources=sources, values=self.values[np.asarray(indices, dtype=int)])

    def batch(self, indices: Sequence[int], *, fallback: int) -> dict[str, Tensor]:
        """Return pixel_values, (images, channels, height, width), and the labels."""
        chosen = list(indices) or [fallback]
        images = [_rgb(_open(self.sources[i])) for i in chosen]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        labels = torch.from_numpy(self.values[chosen])
        return {
            "pixel_values": pixels,
            "labels": labels if len(indices) else torch.full_like(labels, MASKED),
        }


def _examples(
    processor: Any, columns: Sequence[str], labels: Sequence[str], rows: Dataset, source: str
) -> Images:
    """Look at every image, and return them with their labels."""
    index = {label: i for i, label in enumerate(labels)}
    values = np.array([index[name] for name in reading.names_of(rows, columns[1])])
    digest = hashlib.sha256(values.tobytes())
    sources: list[str | bytes] = []
    for i, image in enumerate(rows[columns[0]]):
        if isinstance(image, dict):
            image = image["bytes"] or image["path"]
        name = image if isinstance(image, str) else f"{source}: image {i + 1}"
        digest.update(_check(image, name))
        sources.append(image)
    return Images(sources=sources, values=values, processor=processor, digest=digest.hexdigest())


def _check(source: str | bytes, name: str) -> bytes:
    """Return the SHA-256 of a file, or raise a UserError where it is no image that can be used."""
    try:
        data = _bytes_of(source)
        with _open(data) as image:
            image.load()
            mode = image.mode
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(
            f"{name}: expected an image, got a file that cannot be opened; remove it, or fetch it "
            "again"
        ) from None
    if mode not in MODES:
        raise UserError(
            f"{name}: expected an image of one, three or four channels of 8 bits, got mode {mode}; "
            "convert it to RGB"
        )
    return hashlib.sha256(data).digest()


def _open(source: str | bytes) -> Image.Image:
    return Image.open(io.BytesIO(_bytes_of(source)))


def _bytes_of(source: str | bytes) -> bytes:
    return source if isinstance(source, bytes) else door.read_bytes(source, most=MAX_BYTES)


def _rgb(image: Image.Image) -> Image.Image:
    """Return three channels; what is transparent becomes white."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _score(
    examples: Images, labels: list[str], domains: list[str], model: nn.Module, batch_size: int
) -> Scores:
    """Return the scores of each domain, and their mean over the domains."""
    got = predictions(model, examples, logits_of, batch_size).argmax(1)
    parts, groups = [], sorted(set(domains))
    for domain in groups:
        here = np.array([own == domain for own in domains])
        name = f"images_{domain}"
        parts.append(class_scores(name, got[here], examples.values[here], labels))
    values = {name: own for part in parts for name, own in part.values.items()}
    means = {
        metric: float(np.mean([own[metric] for own in values.values()]))
        for metric in ("accuracy", "f1", "matthews")
    }
    counts = {name: count for part in parts for name, count in part.counts.items()}
    return Scores(
        values={"images": means} | values,
        counts={"images": len(got)} | counts,
        samples=[line for part in parts for line in part.samples],
    )


def _folders(path: Path, what: str) -> list[Path]:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir())
    if not folders:
        raise UserError(
            f"{path}: expected {what} (domain/class/file), found none; name the folder above"
        )
    return folders
