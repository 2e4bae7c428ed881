"""Foreign text becomes one harmless line."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_memguard.inspection.text_table import display_width, one_line, table


@given(st.text(), st.integers(8, 40), st.sampled_from(["start", "end"]))
def test_a_line_is_printable_and_not_too_wide(text, width, keep):
    line = one_line(text, width, keep=keep)
    assert display_width(line) <= width
    assert all(letter.isprintable() for letter in line)
    assert not any(unicodedata.category(letter).startswith("C") for letter in line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a plain caption", "a plain caption"),
        ("two\nlines\t and\r\nmore", "two lines and more"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("[bold]markup[/bold] <script>alert(1)</script>", "[bold]markup[/bold] <script>alert(1)</script>"),
        ("back\u202ewards", "back\\u202ewards"),
        ("猫の絵", "猫の絵"),
    ],
)
def test_what_becomes_of(text, line):
    assert one_line(text, 80) == line


def test_a_megabyte_is_shortened_from_either_end():
    text = "first " + "x" * 1_000_000 + " last"
    assert one_line(text, 20) == "first xxxxxxxxxxx..."
    assert one_line(text, 20, keep="end") == "...xxxxxxxxxxxx last"
    assert one_line("a" * 5000, 6000).endswith("...")  # nobody reads on


def test_columns_stand_below_each_other():
    lines = table(["n", "word"], [["1", "cat"], ["22", "猫"]], left=["word"])
    assert lines == [" n  word", " 1  cat", "22  猫"]
