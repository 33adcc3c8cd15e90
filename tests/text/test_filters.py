import json
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.settings import decode
from pipeline.text.filters import (
    Length,
    Repetition,
    duplicate_fractions,
    duplicate_ngram_fraction,
    normalize,
    top_ngram_fraction,
)

MINI = Path(__file__).parents[1] / "data" / "mini.jsonl"
TEXTS = [json.loads(line)["text"] for line in MINI.read_text().splitlines()]
PROSE = max(TEXTS, key=len)
PARAGRAPHS = [paragraph for paragraph in PROSE.split("\n\n") if len(paragraph) > 100]


@pytest.mark.parametrize(
    ("text", "form", "expected"),
    [
        ("e\u0301\r\nx", "NFC", "é\nx"),
        ("\ufb01\u00a0", "NFKC", "fi "),
        ("\ufb01", "NFC", "\ufb01"),
        ("e\u0301\r\nx", None, "e\u0301\r\nx"),
        ("a\rb\r\n\r\n", "NFC", "a\rb\n\n"),
        ("plain", "NFC", "plain"),
    ],
)
def test_normalization(text, form, expected):
    assert normalize(text, form) == expected


def test_length_counts_characters():
    limits = Length(min_chars=3, max_chars=4)
    assert limits.check("漢字字") is None
    assert limits.check("ab") == ("too_short", "2 characters, wanted at least 3")
    assert limits.check("abcde") == ("too_long", "5 characters, wanted at most 4")
    assert Length().check("x" * 10**6) is None


def test_duplicate_fractions_count_repeats_only_and_ignore_rules():
    assert duplicate_fractions(["aa", "b", "aa", " aa ", "", "---", "---"]) == (2 / 4, 4 / 7)
    assert duplicate_fractions(["a", "b"]) == (0.0, 0.0)
    assert duplicate_fractions(["", "", "+--+", "+--+"]) == (0.0, 0.0)


def test_top_ngram_fraction_counts_repeats_of_one_ngram():
    assert top_ngram_fraction(list("abababc"), 2) == pytest.approx(4 / 7)
    assert top_ngram_fraction(list("abcd"), 2) == 0.0
    assert top_ngram_fraction(["a"], 2) == 0.0


def test_the_bound_of_top_ngrams_never_hides_one_above_the_limit():
    words = PROSE.split() + ["spam", "eggs"] * 150
    for n in (2, 3, 4):
        exact = top_ngram_fraction(words, n)
        for limit in (0.01, exact - 1e-9, exact, 0.5):
            assert (top_ngram_fraction(words, n, limit) > limit) == (exact > limit)


def test_duplicate_ngram_fraction_counts_each_character_once():
    assert duplicate_ngram_fraction(list("abcxabc"), 3) == pytest.approx(3 / 7)
    assert duplicate_ngram_fraction(list("aaaaaa"), 2) == pytest.approx(5 / 6)
    assert duplicate_ngram_fraction(list("ab"), 3) == 0.0


def test_fractions_of_longer_ngrams_only_fall():
    words = (PROSE + PROSE[:3000] + "one two three four five six " * 20).split()
    fractions = [duplicate_ngram_fraction(words, n) for n in range(2, 12)]
    assert fractions == sorted(fractions, reverse=True)


@pytest.mark.parametrize("text", TEXTS)
def test_verse_and_prose_stay(text):
    assert Repetition().check(text) is None


def test_a_table_stays():
    rows = [f"| {name:8} | {3 * n:6} | {n * n:8} |" for n, name in enumerate("abcdefghijklmnopqrstuvwxyz" * 2)]
    rule = "+----------+--------+----------+"
    assert Repetition().check("\n".join(line for row in rows for line in (rule, row))) is None


def test_short_texts_are_not_measured():
    assert Repetition().check("row, row, row your boat, " * 4) is None


@pytest.mark.parametrize(
    ("text", "reason", "detail"),
    [
        ("a line that says it all\n" * 60, "repeated_lines", "98% of the lines are repeats, wanted at most 50%"),
        (
            "\n".join([*(f"l{n}" for n in range(150)), *[PARAGRAPHS[0].replace("\n", " ")] * 4]),
            "repeated_lines",
            "of the characters are in repeated lines, wanted at most 30%",
        ),
        (
            " ".join(f"buy cheap pills {word}" for word in PROSE.split()[:200]),
            "repeated_ngrams",
            "repeats of one 2-gram are",
        ),
        (
            " ".join(PROSE.split()[:400] * 2),
            "repeated_ngrams",
            "50% of it are repeats of 5-grams, wanted at most 30%",
        ),
        ("我爱北京天安门，天安门上太阳升。" * 60, "repeated_ngrams", "repeats of one 2-gram are"),
    ],
)
def test_repetition_is_dropped_with_its_reason(text, reason, detail):
    verdict = Repetition().check(text)
    assert verdict is not None
    assert verdict[0] == reason
    assert detail in verdict[1]


def test_repeated_paragraphs_are_dropped():
    text = "\n\n".join([*PARAGRAPHS[:4], *PARAGRAPHS[:2] * 2])
    only = Repetition(max_duplicate_line_fraction=None, max_duplicate_line_char_fraction=None)
    assert only.check(text) == ("repeated_lines", "50% of the paragraphs are repeats, wanted at most 30%")


def test_every_measure_can_be_switched_off():
    off = Repetition(
        max_duplicate_line_fraction=None,
        max_duplicate_line_char_fraction=None,
        max_duplicate_paragraph_fraction=None,
        max_duplicate_paragraph_char_fraction=None,
        max_top_ngram_char_fraction=None,
        max_duplicate_ngram_char_fraction=None,
    )
    assert off.check("a line that says it all\n" * 60) is None


def test_words_of_scripts_without_spaces_are_two_characters():
    poem = "关关雎鸠在河之洲窈窕淑女君子好逑" * 6
    assert Repetition(min_words=49).check(poem) is None
    assert Repetition(min_words=48).check(poem) is not None


def test_settings_say_what_is_wrong():
    with pytest.raises(ConfigError, match=r"max_duplicate_line_fraction: wanted less than or equal to 1, found 30"):
        decode(Repetition, {"kind": "repetition", "max_duplicate_line_fraction": 30})
    found = decode(Repetition, {"kind": "repetition", "max_top_ngram_char_fraction": {2: 0.5}})
    assert found.max_top_ngram_char_fraction == {2: 0.5}
