"""diffusers' own tests of its training scripts pass under the launcher as they do without it.

`DIFFUSERS_EXAMPLES` names the folder `examples` of a checkout; `python -m benchmarks.upstream_tests` runs all of them.
"""

import os
from pathlib import Path

import pytest

EXAMPLES = os.environ.get("DIFFUSERS_EXAMPLES")
FILES = ["test_text_to_image_lora.py", "test_dreambooth_lora_sd3.py", "test_unconditional.py"]


@pytest.mark.slow
@pytest.mark.skipif(EXAMPLES is None, reason="needs a checkout of diffusers, see DIFFUSERS_EXAMPLES")
def test_what_passes_without_the_launcher_passes_under_it(tmp_path):
    from benchmarks.upstream_tests import main

    runs = main([str(Path(EXAMPLES).parent), "--work", str(tmp_path), "--files", *FILES, "-k", "checkpoint"])
    assert runs.outcomes
    for test, ways in runs.outcomes.items():
        assert set(ways) == {"plain", "guarded"}, test
        assert ways["plain"] is not None or ways["guarded"] is None, (test, ways["guarded"])
    assert any(ways["guarded"] is None for ways in runs.outcomes.values())
