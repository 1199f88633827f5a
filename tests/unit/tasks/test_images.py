"""Images by domain: a folder becomes clients, a head is trained, and each domain is scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from fedex_scale.files.run_dir import RunDir
from fedex_scale.run import run_config
from fedex_scale.runtime.errors import UserError
from fedex_scale.tasks import images

DOMAINS, CLASSES, EACH = ("clipart", "photo", "sketch"), ("bird", "car"), 5
SIZE = 16


def make_vit(folder: Path) -> Path:
    """Write a 2-layer ViT with a head of three labels, which are not ours, and its processor."""
    config = ViTConfig(
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        num_labels=3,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def make_folder(root: Path) -> Path:
    draw = np.random.default_rng(0)
    for d, domain in enumerate(DOMAINS):
        for c, label in enumerate(CLASSES):
            (root / domain / label).mkdir(parents=True)
            for i in range(EACH):
                pixels = draw.integers(0, 60, (SIZE, SIZE, 3)) + 60 * d + 90 * c
                image = Image.fromarray(pixels.astype(np.uint8))
                mode = ("RGB", "L", "P", "RGBA")[i % 4]
                image.convert(mode).save(root / domain / label / f"{label}{i}.png")
    return root


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    sections = {
        "run": {"dir": str(folder / "runs"), "overwrite": True},
        "model": {"path": str(make_vit(folder / "vit")), "dtype": "float32"},
        "lora": {"rank": 2, "alpha": 4},
        "task": {"kind": "images", "holdout": 0.4, "holdout_by": "file"},
        "data": {"path": str(make_folder(folder / "data"))},
        "partition": {"kind": "natural", "column": "domain", "num_clients": 3},
        "federation": {"rounds": 2},
        "train": {
            "optimizer": "sgd",
            "batch_size": 4,
            "micro_batch_size": 4,
            "learning_rate": 0.05,
            "local_epochs": 2,
        },
    }
    path = folder / "images.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def test_a_client_is_a_domain_and_each_is_scored(config: Path) -> None:
    run = RunDir(run_config(config, []))
    clients = json.loads((run.path / "partition.json").read_text())["clients"]
    assert [set(client["counts"]) for client in clients] == [{domain} for domain in DOMAINS]
    results = json.loads((run.evaluation(2) / "results.json").read_text())
    scores = {name: own["accuracy,none"] for name, own in results["results"].items()}
    assert set(scores) == {"images", *(f"images_{domain}" for domain in DOMAINS)}
    assert scores["images"] == pytest.approx(
        np.mean([scores[f"images_{domain}"] for domain in DOMAINS])
    )
    held = results["n-samples"]["images"]["effective"]
    assert held + sum(client["num_examples"] for client in clients) == len(DOMAINS) * 2 * EACH
    labels = json.loads((run.final / "config.json").read_text())["id2label"]
    assert labels == {"0": "bird", "1": "car"}


def test_thirty_clients_of_which_some_are_drawn(config: Path) -> None:
    changes = ["run.name=drawn", "partition.kind=dirichlet", "partition.column=label"]
    changes += ["partition.num_clients=5", "partition.alpha=0.5", "federation.client_fraction=0.6"]
    run = RunDir(run_config(config, [*changes, "method.name=lora_fair", "federation.rounds=1"]))
    assert len(list((run.path / "clients/round-0001").iterdir())) == 3


def test_files_of_one_name_are_held_out_together(config: Path) -> None:
    rows = images.read_folder(config.parent / "data")
    from fedex_scale.tasks.rows import held_out

    held = held_out(rows, 0.4, "file", 0, "data")
    by_file: dict[str, set] = {}
    for name, out in zip(rows["file"], held, strict=True):
        by_file.setdefault(name, set()).add(bool(out))
    assert all(len(found) == 1 for found in by_file.values())
    assert 0 < sum(True in found for found in by_file.values()) < len(by_file)


def test_an_image_is_the_same_by_way_of_any_mode(tmp_path: Path) -> None:
    grey = Image.fromarray(np.full((4, 4), 90, dtype=np.uint8))
    for mode in ("L", "LA", "P", "RGB", "RGBA"):
        assert np.array(images._rgb(grey.convert(mode))).tolist() == [[[90] * 3] * 4] * 4
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert np.array(images._rgb(clear)).min() == 255


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "photo/car/car0.png").write_bytes(b"no image"), "cannot be opened"),
        (
            lambda d: Image.new("CMYK", (4, 4)).save(d / "photo/car/x.jpg"),
            "x.jpg: expected an image of one, three or four channels of 8 bits, got mode CMYK",
        ),
        (lambda d: (d / "empty/car").mkdir(parents=True), "empty: expected images in this domain"),
        (lambda d: (d / "none").mkdir(), "none: expected a folder a class"),
    ],
)
def test_folders_that_cannot_be_used(spoil, message: str, config: Path, tmp_path: Path) -> None:
    spoil(make_folder(tmp_path / "data"))
    with pytest.raises(UserError, match=message):
        run_config(config, ["run.name=bad", f"data.path={tmp_path / 'data'}"])
    assert not (config.parent / "runs/bad").exists()


def test_labels_of_the_test_folder_must_be_known(config: Path, tmp_path: Path) -> None:
    Path(make_folder(tmp_path / "data") / "photo/car").rename(tmp_path / "data/photo/boat")
    changes = ["run.name=bad", "task.holdout=0", "task.holdout_by=null"]
    with pytest.raises(UserError, match=r"expected labels among 'bird', 'car', got 'boat'"):
        run_config(config, [*changes, f"task.test={tmp_path / 'data'}"])
