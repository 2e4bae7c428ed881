"""One image against the bundled training images."""

import pytest
from PIL import Image, ImageOps

from sd_memguard.assets import demo_data_path, demo_heldout_path
from sd_memguard.audit import AuditError
from sd_memguard.audit.command import main
from sd_memguard.audit.one_image import TrainingIndex


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Thirty training images, and their folder."""
    folder = tmp_path_factory.mktemp("train")
    files = {file.read_bytes(): file for file in sorted(demo_data_path().rglob("*.png"))}
    for file in list(files.values())[:30]:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder, TrainingIndex(folder, folder.parent / "cache")


def test_a_changed_training_image_is_named_and_another_one_is_not_a_copy(index):
    folder, images = index
    for file in sorted(folder.glob("*.png"))[::10]:
        image = ImageOps.mirror(Image.open(file).convert("RGB")).crop((2, 1, 62, 63))
        first, *others = images.nearest(image)
        assert (first.file, first.is_copy) == (file.name, True)
        assert len(others) == 4
        assert all(first.distance <= other.distance for other in others)
    unseen = sorted(demo_heldout_path().rglob("*.png"))[3]
    assert not any(one.is_copy for one in images.nearest(Image.open(unseen)))


def test_the_command_says_so_and_gives_a_status(index, tmp_path, capsys):
    folder, _ = index
    file = sorted(folder.glob("*.png"))[4]
    flags = ["--train_data_dir", str(folder), "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main(["--image", str(file), *flags])
    assert ended.value.code == 1
    assert f"is a copy of {file.name} (distance at most" in capsys.readouterr().out
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(AuditError, match=r"`--image` .*no.png cannot be read"):
        main(["--image", str(tmp_path / "no.png"), *flags])
