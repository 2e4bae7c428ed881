from PIL import Image, ImageColor

from sd_memguard.demo.figure import COPY, WIDTH, Arm, Block, GeneratedImage, Row, comparison_image

RED, GREEN = ImageColor.getrgb(COPY), (0, 160, 0)


def make_row(caption="a caption", copies=(False, False), is_own=True):
    image = Image.new("RGB", (64, 64), GREEN)
    return Row(caption, image, [GeneratedImage(image, 0.3 if copy else 0.8, copy, is_own) for copy in copies])


def make_image(rows, single=(), shares=(0, 0)):
    arms = [Arm("Plain", shares, 0.0738), Arm("Guarded", (0, 0), 0.0741)]
    blocks = [Block("repeated", "16 times", rows), Block("single", "once", single)]
    return comparison_image("Title", "Subtitle", blocks, arms, "A note. " * 60)


def count(image, colour):
    return sum(number for number, found in image.getcolors(maxcolors=1 << 24) if found == colour)


def test_a_row_adds_its_images_and_its_height():
    one, two = make_image([make_row()]), make_image([make_row(), make_row()])
    assert one.mode == "RGB"
    assert one.width == two.width == WIDTH
    assert two.height - one.height == 128 + 44
    assert count(one, GREEN) == 3 * 128 * 128
    assert count(two, GREEN) == 6 * 128 * 128


def test_only_copies_are_framed():
    none, one, two = (count(make_image([make_row(copies=copies)]), RED) for copies in ((0, 0), (1, 0), (1, 1)))
    frame = 136 * 136 - 128 * 128
    assert none == 0
    assert frame < one < frame + 500
    assert 2 * frame < two < 2 * (frame + 500)


def test_bars_are_as_long_as_the_shares():
    half, whole = (count(make_image([make_row()], shares=(share, 0)), RED) for share in (0.5, 1.0))
    assert abs(whole - half - 105 * 10) < 300


def test_a_copy_of_another_image_is_called_that():
    own, other = (make_image([make_row(copies=(1, 0), is_own=is_own)]) for is_own in (True, False))
    assert own.tobytes() != other.tobytes()


def test_long_and_foreign_captions_stay_in_their_column():
    captions = [
        "",
        "x" * 400,
        "a long caption " * 40,
        "piñata São Tomé",
        "日本語の説明 🙂",
        "<script>&",
        "tab\tand\nline",
    ]
    image = make_image([make_row(caption) for caption in captions], [make_row("💥" * 100)])
    assert count(image, GREEN) == 8 * 3 * 128 * 128
    accented, bare = (make_image([make_row(text)]) for text in ("piñata", "pinata"))
    assert accented.tobytes() == bare.tobytes()
