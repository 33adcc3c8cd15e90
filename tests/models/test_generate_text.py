"""Ids become text a whole character at a time, and end before a stop string."""

import itertools
import random

import pytest

from pipeline.models.generation.text import Text

BROKEN = "\N{REPLACEMENT CHARACTER}"


def by_byte(ids):
    """Every id is a byte."""
    return bytes(ids).decode("utf-8", "replace")


def by_word(ids):
    """As WordPiece: words are set apart by spaces, and one that begins with ## goes on with the word before."""
    words = ["the", "cat", "##s", "sat", "."]
    return " ".join(words[i] for i in ids).replace(" ##", "")


def feed(text, ids):
    """Give a text its ids and return what was certain after each."""
    steps = []
    for new_id in ids:
        stopped = text.add(new_id)
        steps.append(text.certain)
        if stopped:
            break
    text.close()
    return [*steps, text.text]


def test_only_whole_characters_appear():
    assert feed(Text(by_byte), "aé€😀".encode()) == [
        "a", "a", "aé", "aé", "aé", "aé€", "aé€", "aé€", "aé€", "aé€😀", "aé€😀",
    ]  # fmt: skip


def test_bytes_that_become_no_character_are_shown_as_such():
    steps = feed(Text(by_byte), [0x61, 0xE2, 0x82, 0x62, 0xE2])
    assert steps == ["a", "a", "a", f"a{BROKEN}b", f"a{BROKEN}b", f"a{BROKEN}b{BROKEN}"]


def test_what_a_token_says_depends_on_the_prompt_before_it():
    assert feed(Text(by_word), [1, 2, 3, 4])[-1] == "cats sat ."
    assert feed(Text(by_word, before=[0]), [1, 2, 3, 4])[-1] == " cats sat ."
    assert feed(Text(by_word, before=[0, 1]), [2, 3])[-1] == "s sat"


@pytest.mark.parametrize("seed", range(20))
def test_pieces_add_up_to_the_text_of_all(seed):
    draws = random.Random(seed)
    text = "".join(draws.choice("ab é€😀\n") for _ in range(40)).encode()
    ids = [byte if draws.random() < 0.9 else draws.randrange(256) for byte in text]
    steps = feed(Text(by_byte), ids)
    assert steps[-1] == by_byte(ids)
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(steps))


@pytest.mark.parametrize(
    ("stop", "text", "left", "read"),
    [
        (["b"], "abc", "a", 2),
        (["bcd"], "abcde", "a", 4),
        (["cd", "bcd"], "abcde", "a", 4),
        (["bx", "bcx"], "abcbc", "abcbc", 5),
        (["aab"], "aaab", "a", 4),
        (["é"], "xéy", "x", 3),
        (["é😀"], "xé😀y", "x", 7),
        (["\n\n"], "a\nb\n\nc", "a\nb", 5),
        (["abc"], "ab", "ab", 2),
    ],
)
def test_a_text_ends_before_its_stop_string(stop, text, left, read):
    made, ids = Text(by_byte, stop), text.encode()
    steps = feed(made, ids)
    assert steps[-1] == left
    assert len(steps) - 1 == read
    assert all(left.startswith(step) for step in steps)  # nothing that was certain is taken back


def test_a_stop_string_is_found_though_half_a_character_follows_it():
    tokens = [b"a", b"#\xc3", b"\xa9"]
    made = Text(lambda ids: b"".join(tokens[i] for i in ids).decode("utf-8", "replace"), ["#"])
    assert feed(made, [0, 1, 2]) == ["a", "a", "a"]
    assert made.stopped


def test_copies_go_their_own_ways():
    first = Text(by_byte, ["!!"])
    feed_both = "é".encode()
    first.add(feed_both[0])
    second = first.copy()
    first.add(feed_both[1])
    second.add(0x61)
    second.add(0x21)
    assert (first.text, second.text, second.certain) == ("é", f"{BROKEN}a!", f"{BROKEN}a")
    assert second.add(0x21)
    assert not first.stopped
