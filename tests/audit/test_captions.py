import torch

from sd_memguard.audit.captions import choose_captions
from sd_memguard.audit.images import Pictures


def make_set(num_pictures, repeats):
    """A set of noise pictures, picture i in it repeats.get(i, 1) times, and the number of the picture in each row."""
    noise = torch.randint(256, (num_pictures, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    numbers = [number for number in range(num_pictures) for _ in range(repeats.get(number, 1))]
    files, captions = [f"{number}.png" for number in numbers], [f"caption {number}" for number in numbers]
    return Pictures(files, captions, noise[numbers]), numbers


def test_repeated_and_single_pictures_are_told_apart_in_order():
    pictures, numbers = make_set(20, {3: 4, 7: 2})
    chosen = choose_captions(pictures, 5)
    assert [numbers[row] for row in chosen.repeated] == [3, 7]
    assert [numbers[row] for row in chosen.single] == [0, 1, 2, 4, 5]
    assert chosen.repeated[0] == numbers.index(3)


def test_look_alikes_are_left_out():
    pictures, _ = make_set(20, {})
    pictures.pixels[4] = pictures.pixels[2]
    pictures.pixels[4, 0, 0, 0] ^= 1
    assert choose_captions(pictures, 20).single == [row for row in range(20) if row not in (2, 4)]


def test_a_repeated_picture_with_several_captions_is_of_neither_kind():
    pictures, numbers = make_set(20, {3: 2, 7: 2})
    pictures.captions[numbers.index(3)] = "something else"
    chosen = choose_captions(pictures, 30)
    assert [numbers[row] for row in chosen.repeated] == [7]
    assert 3 not in [numbers[row] for row in chosen.single]
