"""Documents that hold what was measured: the part between two marks is written by a program, the rest by people."""

from __future__ import annotations

Marks = tuple[str, str]


def between(text: str, marks: Marks, content: str) -> str:
    """Return a text with the content between two marks, in place of what stands there.

    Raises:
        ValueError: the marks are not there, or more than once.

    """
    begin, end = marks
    before, _, rest = text.partition(begin)
    old, _, after = rest.partition(end)
    if (text.count(begin), text.count(end)) != (1, 1) or text != f"{before}{begin}{old}{end}{after}":
        raise ValueError(f"expected {begin} and, below it, {end}, each once; put them back")
    return f"{before}{begin}\n{content}\n{end}{after}"
