"""Scores of generated texts against references, as the E2E challenge computes them.

BLEU by sacrebleu; NIST after its formula; METEOR, ROUGE-L and CIDEr by pycocoevalcap, whose
tokenizer and METEOR need Java. Source of the settings: github.com/tuetschek/e2e-metrics.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence

from fedex_scale.runtime.errors import UserError

Texts = Sequence[str]
MAX_NGRAM = 5
# A text of two thirds of the references' length has half of its score: Doddington 2002.
_BETA = math.log(0.5) / math.log(1.5) ** 2
_TREEBANK = re.compile(
    r"\w+(?:[-.,/&]\w+)*(?=n't)|n't|\w+(?:[-.,]\w+)*|'(?:s|re|ll|ve|d|m)\b|[^\w\s]"
)
_PUNCTUATION = frozenset("'' ' `` ` . ? ! , : - -- ... ; ( ) [ ] { }".split())


def check_libraries() -> None:
    """Raise a UserError where the texts could be written, but not scored."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise UserError("task.kind: generate is scored by sacrebleu; pip install sacrebleu")


def text_scores(
    outputs: Texts, references: Sequence[Texts]
) -> tuple[dict[str, float], list[dict[str, float]], tuple[str, ...]]:
    """Return the scores of all texts, those of each that have one, and what was left out.

    Args:
        references: one or more of each output.
    """
    values = {"bleu": bleu(outputs, references), "nist": nist(outputs, references)}
    if importlib.util.find_spec("pycocoevalcap") is None:
        note = "meteor, rouge_l, cider: left out, as pycocoevalcap is not installed"
        return values, [{} for _ in outputs], (note,)
    found, notes = _coco(outputs, references)
    each = [{name: own[i] for name, (_, own) in found.items()} for i in range(len(outputs))]
    return values | {name: score for name, (score, _) in found.items()}, each, notes


def bleu(outputs: Texts, references: Sequence[Texts]) -> float:
    """Return the corpus' BLEU-4, from 0 to 1: lower case, 13a, no smoothing."""
    from sacrebleu.metrics import BLEU

    most = max(map(len, references))
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    metric = BLEU(lowercase=True, tokenize="13a", smooth_method="none")
    return metric.corpus_score(list(outputs), streams).score / 100


def nist(outputs: Texts, references: Sequence[Texts]) -> float:
    """Return NIST: matched n-grams up to 5, each by the information that it carries.

    An n-gram's information is log2 of how often its first n-1 words are in all references over how
    often it is; of a single word, of how often all words are. The brevity penalty is by the mean
    length of each text's references. Source: Doddington, HLT 2002, as e2e-metrics' pymteval.
    """
    told = [[_words(text) for text in own] for own in references]
    counts = Counter(gram for own in told for words in own for gram in _all_ngrams(words))
    total = sum(count for gram, count in counts.items() if len(gram) == 1)
    matched, possible = [0.0] * MAX_NGRAM, [0] * MAX_NGRAM
    length = wanted = 0.0
    for output, own in zip(outputs, told, strict=True):
        words = _words(output)
        length += len(words)
        wanted += sum(map(len, own)) / len(own)
        most: Counter = Counter()
        for reference in own:
            most |= Counter(_all_ngrams(reference))
        for gram, count in (Counter(_all_ngrams(words)) & most).items():
            before = counts[gram[:-1]] if len(gram) > 1 else total
            matched[len(gram) - 1] += count * math.log2(before / counts[gram])
        for n in range(MAX_NGRAM):
            possible[n] += max(0, len(words) - n)
    if not length:
        return 0.0
    gained = sum(m / p for m, p in zip(matched, possible, strict=True) if p)
    return gained * math.exp(_BETA * math.log(min(1.0, length / wanted)) ** 2)


def _coco(
    outputs: Texts, references: Sequence[Texts]
) -> tuple[dict[str, tuple[float, list[float]]], tuple[str, ...]]:
    """Return ROUGE-L, CIDEr and METEOR: of all texts, and of each."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    java, notes = shutil.which("java") is not None, ()
    tokens = _by_java if java else _without_java
    wanted, got = tokens(references), tokens([[output] for output in outputs])
    scorers = {"rouge_l": Rouge(), "cider": Cider()}
    if java:
        from pycocoevalcap.meteor.meteor import Meteor

        scorers["meteor"] = Meteor()
    else:
        notes = ("meteor: left out, as there is no Java; rouge_l and cider by another tokenizer",)
    found = {}
    for name, scorer in scorers.items():
        score, each = scorer.compute_score(wanted, got)
        found[name] = (float(score), [float(x) for x in each])
    return found, notes


def _by_java(texts: Sequence[Texts]) -> dict[int, list[str]]:
    """Return tokenized texts, by the Penn Treebank's rules, without punctuation."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = {i: [{"caption": text} for text in own] for i, own in enumerate(texts)}
    with contextlib.redirect_stdout(io.StringIO()), _quiet():
        return PTBTokenizer().tokenize(captions)


@contextlib.contextmanager
def _quiet():
    """Let a child process' lines on stderr go nowhere."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _without_java(texts: Sequence[Texts]) -> dict[int, list[str]]:
    """Return texts parted about as the Penn Treebank's rules do: ROUGE-L and CIDEr within 0.001."""
    return {i: [" ".join(_parted(text)) for text in own] for i, own in enumerate(texts)}


def _parted(text: str) -> list[str]:
    return [word for word in _TREEBANK.findall(text.lower()) if word not in _PUNCTUATION]


def _words(text: str) -> list[str]:
    """Return a text's words in lower case, as NIST's mteval-v13a parts them."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()(text).lower().split()


def _all_ngrams(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [
        tuple(words[i : i + n]) for n in range(1, MAX_NGRAM + 1) for i in range(len(words) - n + 1)
    ]
