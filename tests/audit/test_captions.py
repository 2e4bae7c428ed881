import torch

from sd_memguard.audit.captions import choose_captions
from sd_memguard.audit.images import Images


def make_set(num_images, repeats):
    """A set of noise images, image i in it repeats.get(i, 1) times, and the number of the image in each row."""
    noise = torch.randint(256, (num_images, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    numbers = [number for number in range(num_images) for _ in range(repeats.get(number, 1))]
    files, captions = [f"{number}.png" for number in numbers], [f"caption {number}" for number in numbers]
    return Images(files, captions, noise[numbers]), numbers


def test_duplicated_and_unique_images_are_told_apart_in_order():
    images, numbers = make_set(20, {3: 4, 7: 2})
    chosen = choose_captions(images, 5)
    assert [numbers[row] for row in chosen.duplicated] == [3, 7]
    assert [numbers[row] for row in chosen.unique] == [0, 1, 2, 4, 5]
    assert chosen.duplicated[0] == numbers.index(3)


def test_look_alikes_are_left_out():
    images, _ = make_set(20, {})
    images.pixels[4] = images.pixels[2]
    images.pixels[4, 0, 0, 0] ^= 1
    assert choose_captions(images, 20).unique == [row for row in range(20) if row not in (2, 4)]


def test_a_duplicated_image_with_several_captions_is_of_neither_kind():
    images, numbers = make_set(20, {3: 2, 7: 2})
    images.captions[numbers.index(3)] = "something else"
    chosen = choose_captions(images, 30)
    assert [numbers[row] for row in chosen.duplicated] == [7]
    assert 3 not in [numbers[row] for row in chosen.unique]
