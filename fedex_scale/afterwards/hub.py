"""`fedex-scale push`: a run's adapter, card and report, as a model of the Hugging Face hub."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from fedex_scale.federation import checkpoint
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.run_dir import RunDir
from fedex_scale.reporting import card
from fedex_scale.reporting.page import write_report
from fedex_scale.runtime.errors import UserError

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def push(run: RunDir, hub_id: str, *, base: str | None = None, private: bool = False) -> str:
    """Upload a finished run in one commit, and return its address.

    The adapter lies at the top, so that PEFT and vLLM take the hub's id for a path.

    Args:
        hub_id: OWNER/NAME; made if it is not there.
        base: the base's hub id, where the run had it from a local directory.
        private: make a new one visible to its owner only.

    Raises:
        UserError: a damaged file, an adapter that needs a changed base, a base that nobody else
            has, no token, or what the hub answers; nothing is changed there, unless it took the
            name and not the files.
    """
    adapter = _adapter(run)
    _check_whole(run, adapter)
    config = Adapter(adapter).config
    base = base or config["base_model_name_or_path"]
    _check_ids(hub_id, base)
    if get_token() is None:
        raise UserError("push: expected a token of the hub, got none; hf auth login, or HF_TOKEN")
    with tempfile.TemporaryDirectory() as scratch:
        report = write_report([run.path], Path(scratch))
        files = {
            "README.md": card.text(run, base=base, adapter=hub_id).encode(),
            "adapter_config.json": json.dumps(
                config | {"base_model_name_or_path": base}, indent=2
            ).encode(),
            "adapter_model.safetensors": adapter / "adapter_model.safetensors",
            "report.html": report,
        }
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        try:
            api = HfApi()
            api.create_repo(hub_id, private=private, exist_ok=True)
            done = api.create_commit(
                hub_id, operations, commit_message=f"fedex_scale: {run.path.resolve().name}"
            )
        except Exception as error:  # also of the network, in the words of whatever sends
            if getattr(error, "response", None) is not None:
                raise UserError(f"push: the hub refuses {hub_id}: {_reason(error)}") from None
            raise UserError(
                f"push: the hub does not answer ({error!s:.200}); check the network, HF_ENDPOINT "
                "and HF_HUB_OFFLINE, and try again"
            ) from None
    return done.commit_url.partition("/commit/")[0]


def _adapter(run: RunDir) -> Path:
    """Return the adapter for the untouched base."""
    exact = run.final / "exact_adapter"
    if exact.is_dir():
        return exact
    if run.base_changed():
        raise UserError(
            f"{run.path}: its folds changed the base, and there is no {exact}; upload a whole "
            f"model: fedex-scale export {run.path} --merged --out merged, and "
            "hf upload OWNER/NAME merged"
        )
    return run.final / "adapter"


def _check_whole(run: RunDir, adapter: Path) -> None:
    """Raise a UserError where the adapter, or what the report is made of, is not as it was written.

    Where the run's checkpoints were taken away, nobody knows.
    """
    for number in checkpoint.numbers(run)[-1:]:
        last = checkpoint.read(run, number)
        folder = adapter.relative_to(run.path)
        own = {name: entry for name, entry in last.files.items() if Path(name).parent == folder}
        for problem in checkpoint.damaged(run, replace(last, files=own), deep=True).values():
            raise UserError(f"{problem}; fedex-scale run --resume makes it again")


def _check_ids(hub_id: str, base: str) -> None:
    if not _is_id(hub_id):
        raise UserError(f"push: expected OWNER/NAME of the hub, such as me/mine, got {hub_id}")
    if not _is_id(base) or Path(base).is_dir():
        raise UserError(
            f"push: expected the base's OWNER/NAME of the hub, got {base}, which nobody else has; "
            "name it: --base mistralai/Mistral-7B-v0.1"
        )


def _is_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


def _reason(error: Any) -> str:
    """Return what the hub says in an answer that is an error, and what to do about it."""
    code = error.response.status_code
    told = (getattr(error, "server_message", None) or str(error)).strip().splitlines()[0][:200]
    remedy = {
        401: "log in once more (hf auth login)",
        403: "use a token that may write there",
    }.get(code, "look at https://status.huggingface.co, or try again")
    return f"{code} {told}; {remedy}"
