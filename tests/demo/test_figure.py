import pytest
from PIL import Image, ImageColor

from sd_memguard.demo.figure import COPY, FRAME, IMAGE, WIDTH, Block, Column, Table, comparison_image

RED, GREEN = ImageColor.getrgb(COPY), (0, 160, 0)
TABLE = Table(("copies", "held-out loss"), [("Plain", ("77%", "0.0712")), ("Guarded", ("0%", "0.0688"))])


def make_column(prompt="a prompt", framed=(False, False, False)):
    return Column(prompt, [Image.new("RGB", (64, 64), GREEN)] * 3, framed)


def make_image(*columns):
    return comparison_image(
        "Title", "Subtitle", TABLE, [Block("Prompts", "A remark.", "Training image", columns)], "Note."
    )


def count(image, color):
    return sum(number for number, found in image.getcolors(maxcolors=1 << 24) if found == color)


@pytest.mark.parametrize("number", [1, 3, 8])
def test_every_image_of_every_column_is_shown_whole(number):
    image = make_image(*[make_column()] * number)
    assert (image.mode, image.width) == ("RGB", WIDTH)
    assert count(image, GREEN) == number * 3 * IMAGE * IMAGE


def test_only_what_is_to_be_framed_is():
    frame = (IMAGE + 2 * FRAME) ** 2 - IMAGE**2
    for framed in ((0, 0, 0), (0, 1, 0), (0, 1, 1)):
        assert count(make_image(make_column(framed=framed)), RED) == sum(framed) * frame


def test_long_and_foreign_prompts_stay_in_their_column():
    prompts = [
        "",
        "x" * 400,
        "a long prompt " * 40,
        "piñata São Tomé",
        "日本語の説明 🙂",
        "<script>&",
        "tab\tand\nline",
    ]
    image = make_image(*map(make_column, prompts))
    assert count(image, GREEN) == len(prompts) * 3 * IMAGE * IMAGE
