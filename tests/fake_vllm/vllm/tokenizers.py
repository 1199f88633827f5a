from transformers import AutoTokenizer


def get_tokenizer(name, **_):
    return AutoTokenizer.from_pretrained(name)
