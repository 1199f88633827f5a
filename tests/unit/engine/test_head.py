"""The loss in pieces is the model's own: loss, gradients, and all else that the model does."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from tiny import SIZES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedex_scale.config.learning import LoraSection, ModelSection
from fedex_scale.data.batching import MASKED
from fedex_scale.engine import head, lora_model, models
from fedex_scale.engine.models import CONFIGS

VOCABULARY, TRAINED = SIZES["vocab_size"], 23


def make_model(kind: str) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **SIZES)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).requires_grad_(False)


def adapted(model: PreTrainedModel, targets: str = "all-linear"):
    torch.manual_seed(1)
    lora = LoraSection(rank=4, target_modules=targets)
    peft_model = lora_model.add_adapters(model, lora, trains=frozenset("AB")).eval()
    for layer in lora_model.lora_layers(peft_model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return peft_model


def make_batch() -> dict[str, torch.Tensor]:
    """Three examples of unlike lengths with prompts; 4 + 12 + 7 trained tokens."""
    torch.manual_seed(2)
    tokens = torch.randint(3, VOCABULARY, (3, 20))
    mask, labels = torch.ones_like(tokens), torch.full_like(tokens, MASKED)
    for row, (prompt, length) in enumerate(((6, 10), (8, 20), (2, 9))):
        mask[row, length:] = 0
        labels[row, prompt:length] = tokens[row, prompt:length]
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, batch: dict, *, divisor: int | None = 40) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**batch, use_cache=False, num_items_in_batch=divisor).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def own_code(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel):
    """Return the same with transformers' loss."""
    with monkeypatch.context() as patch:
        patch.setattr(lora_model, "compute_loss_in_pieces", lambda model: None)
        return adapted(model)


@pytest.mark.parametrize("divisor", [40, None])
@pytest.mark.parametrize("rows", [1, 5, TRAINED, 1000])
@pytest.mark.parametrize("kind", head.TYPES)
def test_the_loss_and_its_gradients_are_the_models_own(
    kind: str, rows: int, divisor: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "PIECE", rows * VOCABULARY)
    model, batch = make_model(kind), make_batch()
    own = loss_and_gradients(own_code(monkeypatch, copy.deepcopy(model)), batch, divisor=divisor)
    ours = loss_and_gradients(adapted(model), batch, divisor=divisor)
    assert own[0] > 1
    assert all(gradient.abs().max() > 0 for gradient in own[1:])
    for one, other in zip(own, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_type_whose_loss_is_another_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite divides its logits, which is not done here; so it is not among the types."""
    model, batch = make_model("granite"), make_batch()
    model.config.logits_scaling = 3.0
    own = loss_and_gradients(own_code(monkeypatch, copy.deepcopy(model)), batch)
    assert loss_and_gradients(adapted(copy.deepcopy(model)), batch)[0] == own[0]
    monkeypatch.setattr(head, "TYPES", ("granite",))
    assert (loss_and_gradients(adapted(model), batch)[0] - own[0]).abs() > 0.01


def test_a_micro_batch_without_labels_takes_part_with_nothing() -> None:
    model, batch = adapted(make_model("llama")), make_batch()
    batch["labels"].fill_(MASKED)
    loss, *gradients = loss_and_gradients(model, batch)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_bfloat16_is_summed_in_float32() -> None:
    model, batch = adapted(make_model("gemma2").to(torch.bfloat16)), make_batch()
    loss, *gradients = loss_and_gradients(model, batch)
    assert loss.dtype == torch.float32
    whole = loss_and_gradients(adapted(make_model("gemma2")), batch)
    assert loss == pytest.approx(float(whole[0]), rel=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_logits_and_generation_are_as_before() -> None:
    plain, model = make_model("gemma2").eval(), adapted(make_model("gemma2"))
    ids = make_batch()["input_ids"][:1]
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        texts = [m.generate(input_ids=ids, max_new_tokens=5) for m in (model, plain)]
    assert torch.equal(*texts)
    theirs, ours = (inspect.signature(m.forward) for m in (plain, model.get_base_model()))
    assert ours == theirs


def test_an_adapted_output_layer_is_left_alone() -> None:
    model = adapted(make_model("llama"), ["q_proj", "lm_head"])
    assert model(**make_batch()).logits is not None


def test_the_recipes_models_are_among_the_types() -> None:
    for file in CONFIGS.glob("*.json"):
        assert models.base_config(ModelSection(config=file.stem, random=True)).model_type in (
            head.TYPES
        )
