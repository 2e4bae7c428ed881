from functools import partial

import pytest

from sd_memguard.audit import attribute_probe
from sd_memguard.audit.metrics.attributes import train_classifier


@pytest.fixture(scope="session", autouse=True)
def quick_classifier(tmp_path_factory):
    """Audits of the bundled images, whose attributes are known, learn them in few steps, kept for these tests alone."""
    kept = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attribute_probe, "user_cache_folder", lambda: kept)
        patch.setattr(attribute_probe, "train_classifier", partial(train_classifier, num_steps=3))
        yield
