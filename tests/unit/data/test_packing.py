"""Examples end to end in one row: loss and gradients of padded ones, and none sees another."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from tiny import SIZES
from torch.nn.attention import varlen
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, masking_utils

from fedex_scale.cli import main
from fedex_scale.data.batching import MASKED, Examples, collate, pack
from fedex_scale.engine.by_example import attending
from fedex_scale.engine.models import PACKABLE

LENGTHS = np.array([9, 1, 17, 5, 5, 12])
# Windows shorter than a row, so that they are seen to count from an example's own begin.
TYPES = [*PACKABLE, "mistral, window", "gemma2, window"]
CASES = [(name, "eager") for name in TYPES]
CASES += [(name, "sdpa") for name in TYPES if not name.startswith("gemma2")]  # it soft-caps


def make_model(name: str, attention: str) -> PreTrainedModel:
    kind, _, windowed = name.partition(", ")
    config = AutoConfig.for_model(kind, **SIZES)
    config.sliding_window = 4 if windowed else None if kind == "mistral" else 4096
    config._attn_implementation = attention
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train(kind != "gpt2")


@pytest.fixture(scope="module")
def examples() -> Examples:
    draw = np.random.default_rng(0)
    return Examples(
        tokens=draw.integers(3, 97, LENGTHS.sum()).astype(np.int32),
        starts=np.cumsum(LENGTHS) - LENGTHS,
        lengths=LENGTHS,
        prompt_lengths=np.minimum(LENGTHS - 1, 4),
        rows=np.arange(len(LENGTHS)),
    )


def by_example(model: PreTrainedModel, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    with attending(model, torch.device("cpu"), packed=True) as told:
        with patch.object(masking_utils, "find_packed_sequence_indices") as looked_for:
            found = loss_and_gradients(model, batch | told(batch))
        assert not looked_for.called, "a mask of all tokens by all"
        return found


def loss_and_gradients(model: PreTrainedModel, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch, use_cache=False, num_items_in_batch=40).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_the_loss_and_its_gradients_are_those_of_padded_examples(
    name: str, attention: str, examples: Examples
) -> None:
    model, everyone = make_model(name, attention), range(len(LENGTHS))
    padded = loss_and_gradients(model, collate(examples, everyone, fallback=0, pad_id=0))
    packed = loss_and_gradients(model, pack(examples, everyone, fallback=0))
    apart = by_example(model, pack(examples, everyone, fallback=0))
    for one, other, another in zip(padded, packed, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(another, other, rtol=1e-4, atol=1e-5)
    together = {
        k: v for k, v in pack(examples, everyone, fallback=0).items() if k != "position_ids"
    }
    assert (loss_and_gradients(model, together)[0] - packed[0]).abs() > 1e-3


@pytest.mark.parametrize("name", ["llama", "mistral, window", "gpt2"])
def test_torchs_varlen_attention_is_asked_for_the_same(name: str, examples: Examples) -> None:
    """In its place, as it needs a GPU, what its documentation says, by a mask of all by all."""
    model, batch = make_model(name, "sdpa"), pack(examples, range(len(LENGTHS)), fallback=0)
    expected = by_example(model, batch)
    asked = Mock(side_effect=as_documented)
    assert set(signature(varlen.varlen_attn).parameters) >= {"window_size", "enable_gqa", "scale"}
    with (
        patch.object(varlen, "varlen_attn", asked),
        patch("fedex_scale.engine.by_example._varlen_can", lambda query, dropout: True),
    ):
        found = by_example(model, batch)
    assert asked.called
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def as_documented(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
):
    ends, (back, ahead) = cu_seq_q.tolist(), window_size
    assert (max_q, max_k, ahead) == (max(LENGTHS), max(LENGTHS), 0)
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q.dtype == torch.int32
    whose = torch.repeat_interleave(torch.arange(len(ends) - 1), cu_seq_q.diff())
    place = torch.arange(len(whose))
    apart = place[:, None] - place[None]
    seen = (whose[:, None] == whose[None]) & (apart >= 0)
    seen &= apart <= (back if back >= 0 else len(whose))
    parts = (x.transpose(0, 1)[None] for x in (query, key, value))
    options = {"attn_mask": seen, "scale": scale, "enable_gqa": enable_gqa}
    out = torch.nn.functional.scaled_dot_product_attention(*parts, **options)
    return out[0].transpose(0, 1)


def test_a_row_holds_every_token_once(examples: Examples) -> None:
    batch = pack(examples, [3, 1, 2], fallback=0)
    assert {tuple(value.shape) for value in batch.values()} == {(1, 5 + 1 + 17)}
    assert batch["position_ids"][0].tolist() == [*range(5), 0, *range(17)]
    expected = [label for i in (3, 1, 2) for label in examples[i]["labels"]]
    assert batch["labels"][0].tolist() == [
        MASKED if position == 0 else label
        for position, label in zip(batch["position_ids"][0].tolist(), expected, strict=True)
    ]
    nobody = pack(examples, [], fallback=2)
    assert nobody["input_ids"].shape == (1, 17)
    assert set(nobody["labels"][0].tolist()) == {MASKED}


def test_a_model_that_was_not_tried_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoConfig.for_model("bloom").save_pretrained(tmp_path)
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {tmp_path}}}\ndata: {{path: {rows}}}\ntrain: {{packing: true}}\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["run", "--config", str(tmp_path / "run.yaml"), f"run.dir={tmp_path}"])
    assert ended.value.code == 2
    assert "expected a model of type gemma2" in capsys.readouterr().err
