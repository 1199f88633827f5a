from __future__ import annotations

import pytest
from tiny import make_metaspace_tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from fedex_scale.data.encode import encode
from fedex_scale.data.prompts import (
    COMMONSENSE_PROMPT,
    MATH_EVALUATION_PROMPT,
    MATH_PROMPT,
    SCHEMAS,
    Schema,
)
from fedex_scale.runtime.errors import UserError

TRAINING_TEXT = [
    MATH_PROMPT.format(instruction="How many apples? Response: none") + text
    for text in ("To find it, 2 + 3 = 5.\nThe answer is: 5", "Two", "the correct answer is true")
]


def make_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE whose pad token is its end token, as Llama users set it."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TRAINING_TEXT, trainer)
    if bos:
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=False)


ROW = {"query": "How many?", "response": "Two.\nThe answer is: 2"}
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nHow many?\n\n### Response:"
)


def test_the_templates():
    assert MATH_PROMPT.format(instruction="How many?") == PROMPT
    assert (
        MATH_EVALUATION_PROMPT.format(instruction="How many?")
        == PROMPT + " Let's think step by step."
    )
    assert COMMONSENSE_PROMPT.format(instruction="How many?") == PROMPT + "\n"


@pytest.mark.parametrize("bos", [False, True])
def test_the_response_and_the_end_token_are_trained(bos: bool):
    tokenizer = make_tokenizer(bos=bos)
    example = encode([ROW], SCHEMAS["metamath"], tokenizer, max_length=512)[0]
    text = PROMPT + ROW["response"] + "</s>"
    assert tokenizer.decode(example["input_ids"]) == ("<s>" if bos else "") + text
    trained = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(trained) == ROW["response"] + "</s>"
    assert example["labels"][-len(trained) :] == trained == example["input_ids"][-len(trained) :]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("response", ["Two", " Two", "\n\nTwo", "5", ":", "é"])
def test_training_sees_the_tokens_that_evaluation_prompts_with(bos: bool, response: str):
    tokenizer = make_tokenizer(bos=bos)
    rows = [{"query": "How many?", "response": response}]
    examples = encode(rows, SCHEMAS["metamath"], tokenizer, max_length=512)
    prompt = tokenizer(PROMPT)["input_ids"]
    assert examples[0]["input_ids"][: examples.prompt_lengths[0]] == prompt


@pytest.mark.parametrize("schema", ["metamath", "commonsense"])
@pytest.mark.parametrize("prepend", ["always", "first", "never"])
@pytest.mark.parametrize("response", ["Two", " Two", "\n\nTwo", "5", "$5", "the correct one"])
def test_prompt_and_response_are_one_text(prepend: str, response: str, schema: str):
    """SentencePiece would begin a response of its own with a space."""
    tokenizer = make_metaspace_tokenizer(prepend)
    rows = [{"query": "How many?", "response": response}]
    if schema == "commonsense":
        rows = [{"instruction": "How many?", "output": response}]
    prompt = SCHEMAS[schema].prompt.format(instruction="How many?")
    examples = encode(rows, SCHEMAS[schema], tokenizer, max_length=512)
    whole = tokenizer(prompt + response)["input_ids"]
    assert examples[0]["input_ids"] == [*whole, tokenizer.eos_token_id]
    asked = tokenizer(prompt)["input_ids"]
    assert examples[0]["input_ids"][: examples.prompt_lengths[0]] == asked


def test_no_token_reaches_over_the_seam(tokenizer: PreTrainedTokenizerFast):
    bare = Schema("query", "response", prompt="{instruction}")
    examples = encode([{"query": "5 app", "response": "les"}], bare, tokenizer, max_length=512)
    prompt, whole = tokenizer("5 app")["input_ids"], tokenizer("5 apples")["input_ids"]
    assert whole[: len(prompt)] != prompt
    assert examples[0]["input_ids"][: examples.prompt_lengths[0]] == prompt
    assert tokenizer.decode(examples[0]["input_ids"]) == "5 apples</s>"


def test_each_schema(tokenizer: PreTrainedTokenizerFast):
    gsm8k = {"question": "How many?", "answer": "1+1 = <<1+1=2>>2\n#### 1,002"}
    commonsense = {"instruction": "How many?", "input": "", "output": "answer2", "answer": "-"}
    for name, row, text in (
        ("gsm8k", gsm8k, "1+1 = <<1+1=2>>2\n#### 1,002\nThe answer is: 1002"),
        ("commonsense", commonsense, "\nanswer2"),
    ):
        example = encode([row], SCHEMAS[name], tokenizer, max_length=512)[0]
        assert tokenizer.decode(example["input_ids"]) == PROMPT + text + "</s>"


def test_over_long_examples_are_cut_without_an_end_token(tokenizer: PreTrainedTokenizerFast):
    full = encode([ROW], SCHEMAS["metamath"], tokenizer, max_length=512)
    length, prompt = int(full.lengths[0]), int(full.prompt_lengths[0])

    exact = encode([ROW], SCHEMAS["metamath"], tokenizer, max_length=length)
    assert (exact.num_truncated, exact[0]) == (0, full[0])

    for room in (length - 1, prompt + 1):
        cut = encode([ROW], SCHEMAS["metamath"], tokenizer, max_length=room)
        assert (cut.num_truncated, cut.num_dropped) == (1, 0)
        assert cut[0]["input_ids"] == full[0]["input_ids"][:room]
        assert tokenizer.eos_token_id not in cut[0]["input_ids"]

    with pytest.raises(UserError, match=f"got {prompt}, which no row fits"):
        encode([ROW], SCHEMAS["metamath"], tokenizer, max_length=prompt)


def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(tokenizer: PreTrainedTokenizerFast):
    long = {"query": "apples " * 100, "response": "Two"}
    examples = encode([long, ROW, long, ROW], SCHEMAS["metamath"], tokenizer, max_length=120)
    assert examples.rows.tolist() == [1, 3]
    assert (examples.num_dropped, examples.num_truncated, len(examples)) == (2, 0, 2)
    assert examples[0] == examples[1]


def test_many_rows_are_tokenized_in_batches(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    rows = [{"query": f"{i}?", "response": str(i)} for i in range(7)]
    whole = encode(rows, SCHEMAS["metamath"], tokenizer, max_length=512)
    monkeypatch.setattr("fedex_scale.data.encode.BATCH_ROWS", 3)
    batched = encode(iter(rows), SCHEMAS["metamath"], tokenizer, max_length=512)
    assert [batched[i] for i in range(7)] == [whole[i] for i in range(7)]
    assert batched.rows.tolist() == list(range(7))


def test_special_text_in_a_row_is_no_special_case(tokenizer: PreTrainedTokenizerFast):
    """The end token is masked by position: one in the prompt is not trained."""
    row = {"query": "a</s>b", "response": "c"}
    example = encode([row], SCHEMAS["metamath"], tokenizer, max_length=512)[0]
    assert example["labels"].count(tokenizer.eos_token_id) == 1


def test_a_tokenizer_without_an_end_token():
    tokenizer = make_tokenizer(bos=False)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="end token"):
        encode([ROW], SCHEMAS["metamath"], tokenizer, max_length=512)
