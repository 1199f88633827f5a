"""Scores of texts: against the official ones where the data is at hand, by hand otherwise."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from pathlib import Path

import pytest

from fedex_scale.tasks import nlg

GOLDEN = Path(os.environ.get("FEDEX_SCALE_DATA", "nowhere")) / "e2e_scores"
# Of e2e-metrics, with pymteval for BLEU and NIST.
SCORES = {
    ("baseline-output", "devel-conc"): (0.7203, 7.7889, 0.4801, 0.7910, 2.3039),
    ("dev100-first-reference", "dev100-other-references"): (0.5991, 7.7816, 0.4541, 0.6645, 1.7179),
}
with_coco = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not installed"
)


def read(pair: tuple[str, str]) -> tuple[list[str], list[list[str]]]:
    if not GOLDEN.is_dir():
        pytest.skip("FEDEX_SCALE_DATA has no e2e_scores")
    outputs, references = ((GOLDEN / f"{name}.txt").read_text(encoding="utf-8") for name in pair)
    return outputs.strip().split("\n"), [x.split("\n") for x in references.strip().split("\n\n")]


@pytest.mark.parametrize("pair", SCORES)
def test_bleu_and_nist_are_the_official_ones(pair) -> None:
    outputs, references = read(pair)
    bleu, nist, *_ = SCORES[pair]
    assert nlg.bleu(outputs, references) == pytest.approx(bleu, abs=5e-5)
    assert nlg.nist(outputs, references) == pytest.approx(nist, abs=1e-3)


@with_coco
@pytest.mark.slow
@pytest.mark.parametrize("pair", SCORES)
def test_the_others_are_the_official_ones(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, references = read(pair)
    _, _, meteor, rouge, cider = SCORES[pair]
    if shutil.which("java"):
        values, each, notes = nlg.text_scores(outputs, references)
        got = [values[name] for name in ("meteor", "rouge_l", "cider")]
        assert got == pytest.approx([meteor, rouge, cider], abs=5e-5)
        assert notes == ()
        mean = sum(own["rouge_l"] for own in each) / len(each)
        assert mean == pytest.approx(values["rouge_l"])
    monkeypatch.setattr(nlg.shutil, "which", lambda name: None)
    values, _, (note,) = nlg.text_scores(outputs, references)
    assert "meteor: left out, as there is no Java" in note
    assert "meteor" not in values
    assert [values["rouge_l"], values["cider"]] == pytest.approx([rouge, cider], abs=1.5e-3)


def test_nist_by_hand() -> None:
    """Two texts of two words: each word is one of four, and so is each pair of one of two."""
    references = [["red house"], ["blue car"]]
    whole = nlg.nist(["red house", "blue car"], references)
    assert whole == pytest.approx(math.log2(4) + math.log2(1))
    half = nlg.nist(["red", "blue"], references)  # words as before, and half the length
    penalty = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(0.5) ** 2)
    assert half == pytest.approx(math.log2(4) * penalty)
    assert nlg.nist(["", ""], references) == 0.0


def test_bleu_takes_as_many_references_as_there_are() -> None:
    references = [["a b c d e", "f g h i j"], ["k l m n o"]]
    assert nlg.bleu(["F g h i J", "k l m n o"], references) == pytest.approx(1.0)
    assert nlg.bleu(["k l m n o", "a b c d e"], references) == 0.0


def test_without_the_library_what_is_left_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nlg.importlib.util, "find_spec", lambda name: None)
    values, each, (note,) = nlg.text_scores(["a b"], [["a b"]])
    assert set(values) == {"bleu", "nist"}
    assert each == [{}]
    assert note.startswith("meteor, rouge_l, cider: left out")
