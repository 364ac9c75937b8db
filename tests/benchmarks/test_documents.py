"""What programs write into documents stays between its marks."""

from __future__ import annotations

import pytest

from benchmarks.documents import between

MARKS = ("<!-- a -->", "<!-- /a -->")


def test_only_what_lies_between_the_marks_changes() -> None:
    assert between("x <!-- a -->old\n<!-- /a --> y", MARKS, "new") == "x <!-- a -->\nnew\n<!-- /a --> y"


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "<!-- a --> no end",
        "<!-- /a --> the wrong way round <!-- a -->",
        "<!-- a --> <!-- a --> <!-- /a -->",
        "<!-- a --> <!-- /a --> <!-- /a -->",
    ],
)
def test_a_document_without_them_is_left_as_it_is(text: str) -> None:
    with pytest.raises(ValueError, match="expected <!-- a --> and, below it, <!-- /a -->, each once; put them back"):
        between(text, MARKS, "new")
