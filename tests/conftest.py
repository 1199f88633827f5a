"""What every test starts from: no hub, repeatable property tests, GPU tests only on a GPU."""

from __future__ import annotations

import os
from pathlib import Path

# Read when huggingface_hub is first imported, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not (torch.cuda.is_available() or os.environ.get("FEDEX_SCALE_TRY")):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import make_llama  # transformers takes seconds to import

    return make_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import make_gpt2

    return make_gpt2(tmp_path_factory.mktemp("tiny") / "gpt2")


@pytest.fixture(scope="session")
def tiny_config(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from launching import write_tiny_config

    return write_tiny_config(tiny_llama, tmp_path_factory.mktemp("e2e"))
