"""What the records say of the samples of a script."""

from argparse import Namespace
from pathlib import Path

from sd_memguard.launcher.records import sample_table


class Instances:
    """A dataset as DreamBooth's scripts make it, which repeats its images."""

    def __init__(self, paths: list[Path], repeats: int) -> None:
        self.instance_images_path, self.repeats = paths, repeats

    def __len__(self) -> int:
        return len(self.instance_images_path) * self.repeats


def test_files_are_named_for_one_folder_of_images_and_for_several(tmp_path):
    paths = [tmp_path / "a" / "1.png", tmp_path / "b" / "2.png"]
    dataset = Instances(paths, repeats=2)
    one = sample_table(dataset, Namespace(instance_data_dir=str(tmp_path), instance_prompt="a cat"), None)
    assert list(one.files) == ["a/1.png", "b/2.png"] * 2
    assert list(one.captions) == ["a cat"] * 4
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    several = sample_table(dataset, Namespace(train_data_dir=folders), None)
    assert list(several.files) == [str(path) for path in paths] * 2
    assert list(several.captions) == [None] * 4
