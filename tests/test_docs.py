"""The documentation names what exists: its flags, its links, its page of flags."""

import re
import sys
from pathlib import Path

import pytest

from sd_memguard.audit.arguments import AuditSettings
from sd_memguard.audit.one_image import OneImageSettings
from sd_memguard.check.command import build_parser as check_parser
from sd_memguard.config import ALIASES, REFUSED, SETTINGS
from sd_memguard.demo.command import DemoSettings
from sd_memguard.export.command import build_parser as export_parser
from sd_memguard.migrate.command import build_parser as migrate_parser
from sd_memguard.settings import settings_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "examples").rglob("*.md"))
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))
OTHERS = {
    option.removeprefix("--")
    for parser in (check_parser(), export_parser(), migrate_parser())
    for action in parser._actions
    for option in action.option_strings
}
OTHERS |= {one.name for owner in (AuditSettings, OneImageSettings, DemoSettings) for one in settings_of(owner)}
KNOWN = {*SETTINGS, *ALIASES, *REFUSED, *OTHERS, "config", "help"}
# Flags of other programs, and those that the text says are refused or do not exist yet.
FOREIGN = {"plot", "work_dir", "num_processes", "images_per_caption", "steps", "num_images"}
# Flags of diffusers' scripts that the launcher runs.
FOREIGN |= {"do_edm_style_training", "use_dora", "output_kohya_format", "aspect_ratio_buckets"}
FOREIGN |= {"denoiser", "train_text_encoder", "fused_backward_pass", "min_snr_gamma", "debiased_estimation_loss"}
FOREIGN |= {"loss_type", "weighting_scheme", "cache_latents", "train_text_encoder_ti", "use_lpl"}
FOREIGN |= {"datasets", "variants", "duplicates", "seeds", "points", "results"}  # of benchmarks.memorization
FOREIGN |= {"extractors", "models"}  # of benchmarks.verification and inference_guards
FOREIGN |= {"latent_size", "seconds"}  # of benchmarks.gate and gpu_acceptance
FOREIGN |= {"base_channels", "profile", "size", "upstream_script", "turns", "device", "shards", "clock"}
FOREIGN |= {"demo", "most", "window", "check", "list", "diffusers_examples", "no-deps", "find-links", "no-index"}
FOREIGN |= {"refused"}  # of benchmarks.upstream_scripts
FOREIGN |= {"config_file", "network_train_unet_only", "config-path"}  # of kohya's scripts and OneTrainer
# Flags of the programs that start several processes.
FOREIGN |= {"nproc_per_node", "nnodes", "standalone", "multi_gpu", "rdzv_id"}
FOREIGN |= {"signals_to_handle", "shutdown_timeout", "rdzv_backend", "rdzv_endpoint"}
FOREIGN |= {"signal", "time", "nodes", "gpus-per-node", "job-name", "cpus-per-task", "ntasks-per-node"}

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--([a-zA-Z][\w-]*)")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The names under which GitHub links to the headings of a page."""
    headings = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_page_of_flags_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.delitem(sys.modules, "make_flags_doc", raising=False)
    from make_flags_doc import TARGET, flags_document

    assert TARGET.read_text(encoding="utf-8") == flags_document(), "run tools/make_flags_doc.py"


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=relative)
def test_every_flag_that_is_named_exists(path):
    named = set(FLAG.findall(path.read_text(encoding="utf-8")))

    assert named - KNOWN - FOREIGN == set()


def test_every_setting_is_on_the_page_of_flags():
    assert set(FLAG.findall((ROOT / "docs" / "flags.md").read_text(encoding="utf-8"))) >= set(SETTINGS)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_relative_links_resolve(page):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{relative(page)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{relative(page)} links to {link}"


def test_flag_pattern_finds_flags_and_nothing_else():
    text = "`--skip_threshold 0`, (--rank) a--b --- x --checkpoint-like"
    assert FLAG.findall(text) == ["skip_threshold", "rank", "checkpoint-like"]
