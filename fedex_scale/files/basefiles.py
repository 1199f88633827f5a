"""A base model's files: where a layer's weight lies in them, and how to write a changed copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedex_scale.files.tensorfile import SafetensorsReader, SafetensorsWriter
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError

if TYPE_CHECKING:
    from fedex_scale.files.conversion import Loaded

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Weights in other formats would be stale beside changed ones; so would hidden files be.
_NOT_COPIED = shutil.ignore_patterns(
    *"*.safetensors *.bin *.pt *.pth *.gguf *.h5 *.msgpack *.onnx* *.ot .*".split()
)
# Architectures whose layers are Conv1D, stored as (I, O).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_MAX_JSON_BYTES = 2**24
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def base_directory(path: str, revision: str | None = None) -> Path:
    """Return the directory of a model: itself, or the hub's snapshot, from the cache if it can be.

    Raises:
        UserError: neither a directory nor to be had from the hub.
    """
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{path}: expected a model directory or a hub id, found neither")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    for cached in (True, False):
        try:
            found = snapshot_download(
                path, revision=revision, allow_patterns=wanted, local_files_only=cached
            )
            return Path(found)
        except LocalEntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be had from the hub ({error}); name a directory"
            ) from None
    raise UserError(
        f"{path}: not a directory, not in the cache, and the hub cannot be reached; "
        "name a model directory"
    )


class BaseFiles:
    """The safetensors files of a model directory, of which only the headers are read.

    Attributes:
        path: the directory.
        config: config.json.
        files: by file name, those that hold the model: one, or as the index says.
        names: of all weights.

    Raises:
        UserError: no config or no safetensors, or a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_json(path / "config.json")
        self.files = {name: self._open(name) for name in self._file_names()}
        self._where = {name: file for file in self.files.values() for name in file.entries}
        self.names = self._where.keys()

    def _file_names(self) -> list[str]:
        if (self.path / WEIGHTS_FILE).is_file():
            return [WEIGHTS_FILE]
        if (self.path / INDEX_FILE).is_file():
            places = _read_json(self.path / INDEX_FILE).get("weight_map")
            if isinstance(places, dict) and places and all(map(_is_file_name, places.values())):
                return sorted(set(places.values()))
            raise UserError(f"{self.path / INDEX_FILE}: expected a weight_map of file names here")
        raise UserError(
            f"{self.path}: expected {WEIGHTS_FILE} or {INDEX_FILE}, found neither; "
            "save the base model as safetensors"
        )

    def _open(self, name: str) -> SafetensorsReader:
        try:
            return SafetensorsReader(self.path / name)
        except OSError as error:
            raise UserError(
                f"{self.path / name}: cannot be read ({error.strerror}); fetch the model again"
            ) from None

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        return sum(e.end - e.start for file in self.files.values() for e in file.entries.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._where[name].entries[name].dtype

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """Return one weight; in the memory of `out`, bytes, if given."""
        return self._where[name].read(name, out)

    def blocks(self, name: str, span: tuple[int, int], buffer: Tensor) -> Iterator[Tensor]:
        """Yield the elements of a span of a flattened weight, in parts; see `tensorfile`."""
        return self._where[name].blocks(name, span, buffer)

    def find(self, layer: str, kind: str = "weight") -> str | None:
        """Return the name of a layer's weight in the files, or None if they have none of its own.

        Names may differ by the model's prefix, or by what transformers makes of them.
        """
        found = _match(f"{layer}.{kind}", self._where)
        if found is None:
            loaded = self.loaded_as(layer, kind)
            found = loaded.source if loaded else None
        return found

    def loaded_as(self, layer: str, kind: str = "weight") -> Loaded | None:
        """Return how transformers loads a layer's weight, or None if it cannot."""
        name = _match(f"{layer}.{kind}", self._loaded)
        return self._loaded[name] if name else None

    @cached_property
    def _loaded(self) -> dict[str, Loaded]:
        from fedex_scale.files.conversion import loaded_weights

        return loaded_weights(self.path, self.names)

    def is_tied(self, layer: str) -> bool:
        """Return whether a layer's weight is the embedding's, so that no fold may change it."""
        if layer.rsplit(".", 1)[-1] not in ("lm_head", "embed_out"):
            return False
        if "tie_word_embeddings" in self.config:
            return bool(self.config["tie_word_embeddings"])
        own = self.find(layer)  # without another of its shape, it is the embedding as well
        return own is None or [self.shape(n) for n in self.names].count(self.shape(own)) == 1

    def is_transposed(
        self,
        name: str,
        shape: tuple[int, int],
        fan_in_fan_out: bool,
        stored: tuple[int, ...] | None = None,
    ) -> bool:
        """Return whether a weight is stored as (I, O), where `shape` is the layer's (O, I).

        Args:
            stored: its shape; None: that in the files.

        Raises:
            UserError: it has neither shape.
        """
        stored, flipped = stored or self.shape(name), shape[::-1]
        if stored not in (shape, flipped):
            raise UserError(
                f"{self.path}, {name}: expected shape {shape} or {flipped}, which the clients' "
                f"adapters have, got {stored}; were they trained on another base model?"
            )
        if shape != flipped:
            return stored == flipped
        return fan_in_fan_out or self.config.get("model_type") in _CONV1D_MODELS


class BaseWriter:
    """Writes a model's files anew with some weights changed; the rest is copied in blocks.

    Same files, same names, same order; nothing is on disk before the first weight is written.

    Args:
        out: the directory to make.
        changed: names of the weights that will be written.
        dtype: to convert all floating-point weights to; None: each keeps its own.
        on_bytes: called with the number of bytes written, for progress.
    """

    def __init__(
        self,
        base: BaseFiles,
        out: Path,
        changed: set[str],
        *,
        dtype: torch.dtype | None = None,
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.base, self.out, self._changed, self._dtype = base, out, changed, dtype
        self._on_bytes = on_bytes
        self._writers: dict[str, SafetensorsWriter] = {}
        self._buffer: Tensor | None = None
        self._home = {name: file for file, r in base.files.items() for name in r.entries}

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a weight is written in."""
        stored = self.base.dtype(name)
        return self._dtype if self._dtype and stored in _FLOATS else stored

    @property
    def num_bytes(self) -> int:
        """Size of the weights that will have been written in the end."""
        return sum(
            self.dtype(name).itemsize * (entry.end - entry.start) // entry.dtype.itemsize
            for file in self.base.files.values()
            for name, entry in file.entries.items()
        )

    @contextmanager
    def lend(self, name: str) -> Iterator[Tensor]:
        """Give a weight of the base, flat, and write it as it then is."""
        weight = self.base.read(name, self._scratch()).to(self.dtype(name))
        yield weight.view(-1)
        self.write(name, weight)

    def write(self, name: str, weight: Tensor) -> None:
        file = self._home[name]
        if not self._writers:
            self.out.mkdir(parents=True, exist_ok=True)
        if file not in self._writers:
            self._writers[file] = self._open(file)
        self._writers[file].write(name, weight.view(self.base.shape(name)))
        self._on_bytes(weight.numel() * weight.element_size())

    def finish(self) -> None:
        """Copy what was not written, and all other files of the base but stale weights."""
        self._copy_rest(self.base.path)
        for file, reader in self.base.files.items():
            if file not in self._writers and self._dtype is None:
                size = door.copy_file(reader.path, self.out / file, inside=self.base.path)
                self._on_bytes(size)
                continue
            with self._writers.pop(file, None) or self._open(file) as writer:
                for name in sorted(writer.missing, key=lambda n: reader.entries[n].start):
                    writer.write_blocks(name, self._counted(reader.blocks(name)))
        if self._dtype is not None:
            self._note_dtype()

    def _copy_rest(self, folder: Path) -> None:
        """Copy files that are no weights, and the directories that hold them; no link out."""
        to = self.out / folder.relative_to(self.base.path)
        to.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in sorted(folder.iterdir())]
        for name in names:
            path = folder / name
            if name in _NOT_COPIED(str(folder), names) or (path.is_symlink() and path.is_dir()):
                continue
            if path.is_dir():
                self._copy_rest(path)
            else:
                door.copy_file(path, to / name, inside=self.base.path)

    def discard(self) -> None:
        """Delete what was written: nothing changed after all."""
        self.close()
        shutil.rmtree(self.out, ignore_errors=True)

    def close(self) -> None:
        """Close the files that were not finished."""
        for writer in self._writers.values():
            writer.__exit__(True)

    def _open(self, file: str) -> SafetensorsWriter:
        entries = self.base.files[file].entries
        in_order = sorted(entries, key=lambda name: entries[name].start)
        specs = {name: (self.dtype(name), entries[name].shape) for name in in_order}
        return SafetensorsWriter(self.out / file, specs, self.base.files[file].metadata)

    def _scratch(self) -> Tensor:
        """Return memory for the largest changed weight: fresh pages cost as much as reading."""
        if self._buffer is None:
            sizes = [
                self.base.dtype(n).itemsize * _numel(self.base.shape(n)) for n in self._changed
            ]
            self._buffer = torch.empty(max(sizes), dtype=torch.uint8)
        return self._buffer

    def _counted(self, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        for block in blocks:
            yield block
            self._on_bytes(block.numel() * block.element_size())

    def _note_dtype(self) -> None:
        """Let config and index say what was written."""
        settings: dict[str, object] = dict(self.base.config)
        settings.pop("torch_dtype", None)
        settings["dtype"] = str(self._dtype).removeprefix("torch.")
        (self.out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if (self.out / INDEX_FILE).exists():
            index = _read_json(self.out / INDEX_FILE)
            known = index.get("metadata")
            known = known if isinstance(known, dict) else {}
            index["metadata"] = {**known, "total_size": self.num_bytes}
            (self.out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _match(name: str, names: Collection[str]) -> str | None:
    """Return which of the names means a weight; they may differ by the model's prefix.

    The hub's gpt2 has `h.0...` where the model says `transformer.h.0...`, and an adapter of a bare
    backbone leaves out the `model.`.
    """
    for candidate in (name, name.partition(".")[2]):
        if candidate in names:
            return candidate
    longer = [other for other in names if other.partition(".")[2] == name]
    return longer[0] if len(longer) == 1 else None


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _read_json(file: Path) -> Mapping:
    remedy = "fetch the model again"
    try:
        value = door.read_json(file, remedy, most=_MAX_JSON_BYTES, inside=file.parent)
    except OSError:
        raise UserError(
            f"{file.parent}: expected a model directory, found no {file.name}"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected settings by name, got {value!r:.80}")
    return value
