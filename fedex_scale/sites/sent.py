"""What the server sends to every site for a round: a directory that tells of itself.

    server.json      the round, the model it is for, and size and SHA-256 of every other file
    adapter/         the server's adapter, a PEFT directory
    side/            the whole side adapter, if there is one yet

It is a client's whole state, so that a site that missed rounds needs no catching up.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedex_scale.config.federation import MethodName
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError

LARGEST = 1e6
"""No trained factor comes near; sums and products of these stay within float32."""
SERVER_FILE, CLIENT_FILE = "server.json", "client.json"
FORMAT = 1
ADAPTERS = ("adapter", "side")
_MAX_JSON_BYTES = 2**26
_BLOCK = 2**20

Whole = Annotated[int, Field(ge=0, lt=2**53)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Name = Annotated[str, Field(max_length=1000)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, lt=2**31)]


class _Told(BaseModel):
    """A JSON file that came from elsewhere: plain data within bounds."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class BaseModelTold(_Told):
    """What a base model is known by.

    Fields:
        config: its config.json, without what does not change the numbers.
        tokenizer: SHA-256 of its vocabulary and special tokens.
        weights: SHA-256 of samples of every adapted layer's weight; None where there are no files.
    """

    config: dict[str, Any]
    tokenizer: Digest
    weights: Digest | None = None


class Sent(_Told):
    """server.json.

    Fields:
        round: that clients train in, from 1.
        clients: how many sites the federation has.
        layers: (O, I) of each adapted layer.
        files: size and SHA-256 of the other files, by their place in the directory.
    """

    format: Literal[1]
    round: Annotated[int, Field(ge=1, le=100_000)]
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    clients: Annotated[int, Field(ge=1, le=1_000_000)]
    method: MethodName
    init: Literal["shared", "per_client"]
    rank: Annotated[int, Field(ge=1, lt=2**20)]
    alpha: Annotated[float, Field(gt=0, lt=1e30)]
    use_rslora: bool
    has_side: bool
    layers: dict[Name, tuple[Size, Size]]
    base: BaseModelTold
    files: dict[Name, tuple[Whole, Digest]]


class Returned(_Told):
    """client.json, as it leaves a site: how its training went, and from what it started.

    Fields:
        start: SHA-256 of the server.json that it was trained from.
    """

    format: Literal[1]
    start: Digest
    round: Annotated[int, Field(ge=1, le=100_000)]
    client: Annotated[int, Field(ge=0, lt=1_000_000)]
    num_examples: Annotated[int, Field(ge=1, lt=2**53)]
    num_steps: Whole
    num_tokens: Whole
    first_loss: Number
    last_loss: Number
    seconds: Annotated[float, Field(ge=0, le=1e300)]


T = TypeVar("T", bound=_Told)


def read_told(kind: type[T], path: Path, remedy: str) -> T:
    """Return what a JSON file from elsewhere says, or raise a UserError that names it."""
    try:
        tree = door.read_json(path, remedy, most=_MAX_JSON_BYTES, inside=path.parent)
        return kind.model_validate_json(json.dumps(tree))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where[:100]!r}: {first['msg']}; {remedy}") from None


def read_sent(directory: Path) -> tuple[Sent, str]:
    """Return what server.json says, and its SHA-256.

    Raises:
        UserError: no state, one that cannot be used, or files that it does not name.
    """
    remedy = "fetch the server's state again"
    path = directory / SERVER_FILE
    if not path.exists():
        raise UserError(
            f"--server: {directory}: expected a server's state, found no {SERVER_FILE}; {remedy}"
        )
    sent = read_told(Sent, path, remedy)
    expected = set(_file_names("adapter")) | (set(_file_names("side")) if sent.has_side else set())
    if set(sent.files) != expected:
        raise UserError(f"{path}: expected the files {sorted(expected)}; {remedy}")
    return sent, start_of(sent)


def start_of(sent: Sent) -> str:
    """Return the SHA-256 of a state, which what is trained from it is known by."""
    return hashlib.sha256(_text_of(sent).encode()).hexdigest()


def fetch(directory: Path, sent: Sent, into: Mapping[str, Path]) -> None:
    """Copy a state's adapters, and look at what was copied: a later change matters no more.

    Args:
        into: where `adapter` and `side` go, which are made.

    Raises:
        UserError: a file is missing or is another than server.json says.
    """
    for name, (size, digest) in sent.files.items():
        part, _, file = name.partition("/")
        into[part].mkdir(parents=True, exist_ok=True)
        found = _copy(directory / name, into[part] / file, size)
        if found != digest:
            raise UserError(
                f"{directory / name}: expected the file that {SERVER_FILE} names, got another; "
                "fetch the server's state again"
            )


def write_sent(directory: Path, fields: Mapping[str, Any]) -> Sent:
    """Write server.json beside the adapters in a directory, and return what it says."""
    files = {}
    for part in ADAPTERS:
        for path in sorted((directory / part).glob("*")):
            files[f"{part}/{path.name}"] = (path.stat().st_size, digest_of(path))
    sent = Sent(format=FORMAT, files=files, **fields)
    (directory / SERVER_FILE).write_text(_text_of(sent), encoding="utf-8")
    return sent


def digest_of(path: Path) -> str:
    """Return a file's SHA-256."""
    with door.opened(path) as file:
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def other_base(mine: BaseModelTold, layers: Mapping[str, tuple[int, int]], sent: Sent) -> str:
    """Return how a site's base model differs from the server's; nothing if it does not."""
    theirs = sent.base
    for key in sorted(mine.config.keys() | theirs.config.keys()):
        one, other = (json.dumps(x.config.get(key))[:100] for x in (theirs, mine))
        if one != other:
            return f"model.path: expected the server's model, whose {key} is {one}, got {other}"
    if mine.tokenizer != theirs.tokenizer:
        return "model.path: expected the server's tokenizer, got another; take the server's model"
    for layer in sorted(sent.layers.keys() - layers.keys()):
        return f"lora.target_modules: expected the server's layers, of which {layer} is not adapted"
    for layer in sorted(layers.keys() - sent.layers.keys()):
        return f"lora.target_modules: expected the server's layers, got {layer}, which it has not"
    for layer, shape in layers.items():
        if tuple(sent.layers[layer]) != shape:
            return f"layer {layer}: expected shape {tuple(sent.layers[layer])}, got {shape}"
    if None not in (mine.weights, theirs.weights) and mine.weights != theirs.weights:
        return "model.path: expected the server's weights, got others; take the server's model"
    return ""


def _file_names(part: str) -> tuple[str, str]:
    return f"{part}/adapter_config.json", f"{part}/adapter_model.safetensors"


def _text_of(sent: Sent) -> str:
    return json.dumps(sent.model_dump(mode="json"), sort_keys=True, indent=1) + "\n"


def _copy(source: Path, target: Path, size: int) -> str | None:
    """Copy a file of a size and return its SHA-256, or None if it is none of that size."""
    digest, left = hashlib.sha256(), size
    with suppress(FileNotFoundError, UserError):
        with door.opened(source, inside=source.parent) as file, target.open("wb") as out:
            if os.fstat(file.fileno()).st_size != size:
                return None
            while block := file.read(min(_BLOCK, left + 1)):
                left -= len(block)
                if left < 0:
                    return None
                digest.update(block)
                out.write(block)
        return digest.hexdigest()
    return None
