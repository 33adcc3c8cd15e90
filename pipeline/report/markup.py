"""HTML written by functions, so that no text gets into the page unescaped."""

import html
import unicodedata
from collections.abc import Iterable

JOINERS = "\u200c\u200d"  # invisible, but spelling in Persian and Hindi, and glue in emoji
VOID = ("br", "col", "hr", "link", "meta", "wbr")


class Html(str):
    """Text that is HTML already. Any other string is escaped where it is put into HTML."""


Child = str | int | Iterable["Child"] | None


def el(tag: str, *children: Child, **attributes: str | int | bool | None) -> Html:
    """Return an element.

    Args:
        children: What is in it; strings that are not `Html` are escaped, null is left out, iterables are unrolled.
        attributes: A trailing underscore is dropped and others become hyphens (`class_`, `stroke_width`); null and
            false are left out, true stands alone.
    """
    opening = tag + "".join(_attribute(name, value) for name, value in attributes.items())
    return Html(f"<{opening}>" if tag in VOID else f"<{opening}>{join(children)}</{tag}>")


def join(children: Iterable[Child]) -> Html:
    """Return children one after another, escaped like those of `el`."""
    return Html("".join(_child(child) for child in children))


def spell_out(text: str) -> str:
    """Return text in which characters that would be invisible stand as their code, such as ‹U+202E›."""
    return "".join(_spell(c) if _is_invisible(c) else c for c in text)


def shown(text: str) -> Html:
    """Return text as HTML in which characters that would be invisible are spelled out and set apart."""
    return join(el("span", _spell(c), class_="ctl") if _is_invisible(c) else Html(html.escape(c)) for c in text)


def _child(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str | int):
        return html.escape(spell_out(str(child)))
    return join(child)


def _attribute(name: str, value: str | int | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(spell_out(str(value)))}"'


def _is_invisible(character: str) -> bool:
    """Return whether a character is a control, a format (such as a change of direction) or half a surrogate pair."""
    if character in "\n\t" or character in JOINERS:
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs")


def _spell(character: str) -> str:
    return f"‹U+{ord(character):04X}›"
