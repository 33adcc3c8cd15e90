"""Characters on whose category two tokenizer libraries may disagree, found in text at the speed of memory.

A pre-tokenizer splits text by what is a letter, a number or a space, and every library has the Unicode tables of its
day. gigatoken 0.10 has those of Unicode 17, tokenizers 0.22 and 0.23 those of Unicode 16.
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.text.flat import Texts

# What Unicode 17.0 added (DerivedAge.txt): letters and digits; and marks, symbols and punctuation, with U+0295, which
# became another kind of letter.
LETTERS_17 = """
088F 0C5C 0CDC A7CE-A7CF A7D2 A7D4 A7F1 10940-10959 10EC5-10EC7 11DB0-11DDB 11DE0-11DE9 16EA0-16EB8 16EBB-16ED3
16FF2-16FF6 187F8-187FF 18D09-18D1E 18D80-18DF2 1E6C0-1E6DE 1E6E0-1E6E2 1E6E4-1E6E5 1E6E7-1E6ED 1E6F0-1E6F4
1E6FE-1E6FF 2B73A-2B73F 2CEA2-2CEAD 323B0-33479
"""
OTHERS_17 = """
0295 1ACF-1ADD 1AE0-1AEB 20C1 2B96 FBC3-FBD2 FD90-FD91 FDC8-FDCE 10ED0-10ED8 10EFA-10EFB 11B60-11B67 1CCFA-1CCFC
1CEBA-1CED0 1CEE0-1CEF0 1E6E3 1E6E6 1E6EE-1E6EF 1E6F5 1F6D8 1F777-1F77A 1F8D0-1F8D8 1FA54-1FA57 1FA8A 1FA8E
1FAC8 1FACD 1FAEA 1FAEF 1FBFA
"""


@cache
def _tables(spans: str) -> tuple[npt.NDArray[np.bool_], dict[int, npt.NDArray[np.bool_]]]:
    """Return which code points are listed, and which second bytes of their UTF-8 there are, by the first."""
    listed = np.zeros(0x110000, np.bool_)
    seconds: dict[int, npt.NDArray[np.bool_]] = {}
    for span in spans.split():
        first, _, last = span.partition("-")
        for number in range(int(first, 16), int(last or first, 16) + 1):
            listed[number] = True
            lead, second = chr(number).encode()[:2]
            seconds.setdefault(lead, np.zeros(256, np.bool_))[second] = True
    return listed, seconds


def disputed(texts: Texts, spans: str = LETTERS_17 + OTHERS_17) -> list[int]:
    """Return the positions of the texts that hold a character of `spans`, in their order."""
    places = _places(texts.data, spans)
    if not places:
        return []
    return np.unique(np.searchsorted(texts.starts, places, side="right") - 1).tolist()  # type: ignore[no-any-return]


def _places(raw: npt.NDArray[np.uint8], spans: str) -> list[int]:
    """Return where in UTF-8 text a character of `spans` begins."""
    listed, seconds = _tables(spans)
    places: list[int] = []
    data = raw.tobytes() if len(raw) and raw.max() >= 0x80 else b""
    for lead, second in seconds.items():
        if lead not in data:  # at the speed of memory; most text has few of the leads
            continue
        at = np.flatnonzero(raw == lead)
        at = at[second[raw[at + 1]]]
        if at.size:
            places += at[listed[_code_points(raw, at, lead)]].tolist()
    return places


def _code_points(raw: npt.NDArray[np.uint8], at: npt.NDArray[Any], lead: int) -> npt.NDArray[np.int64]:
    """Return the characters whose UTF-8 begins with the byte `lead` at each place."""
    length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    points = np.full(len(at), lead & (0xFF >> (length + 1)), np.int64)
    for step in range(1, length):
        points = points << 6 | (raw[at + step] & 0x3F)
    return points
