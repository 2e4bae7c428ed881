"""What is published agrees with itself: versions, addresses, archives."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from sd_memguard import __version__

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def release_metadata(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.delitem(sys.modules, "release_metadata", raising=False)
    import release_metadata

    return release_metadata


def test_the_version_stands_in_one_place_and_the_changelog_begins_with_it():
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "sd_memguard.__version__"}
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == __version__
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_a_release_names_the_repository_and_its_files(release_metadata):
    where = ("https://host/owner/name", f"v{__version__}")
    urls = tomllib.loads(release_metadata.with_urls((ROOT / "pyproject.toml").read_text(encoding="utf-8"), *where))
    assert urls["project"]["urls"] == {
        "Repository": "https://host/owner/name",
        "Documentation": f"https://host/owner/name/tree/v{__version__}/docs",
        "Changelog": f"https://host/owner/name/blob/v{__version__}/CHANGELOG.md",
        "Issues": "https://host/owner/name/issues",
        **PYPROJECT["project"]["urls"],
    }
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    after = release_metadata.with_absolute_links(before, *where)
    assert not re.findall(r"\]\((?!https://|#)", after)
    assert "![The audit report: verdict, models side by side, nearest pairs](https://host/owner/name/raw/" in after
    links = re.findall(r"\(https://host/owner/name/(?:raw|blob)/v[^/]+/([^)#]+)", after)
    assert len(links) == len(re.findall(r"\]\((?!https?://|#)", before)) > 20
    assert all((ROOT / file).exists() for file in links)


def test_a_tag_of_another_version_is_refused(release_metadata, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["release_metadata", "--repository", "https://host/o/n", "--tag", "v99.0"])
    with pytest.raises(SystemExit):
        release_metadata.main()
    assert f"--tag must be v{__version__}, the package's version, got v99.0" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda file: file.name)
def test_workflows_and_forms_name_files_that_exist(file):
    content = file.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(content), dict)
    for name in re.findall(r"(?<![\w./-])((?:tools|\.ci)/[\w.-]+)", content):
        assert (ROOT / name).is_file(), name


def test_declared_pythons_are_those_that_the_workflow_tests():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    tested = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: 3."
    declared = [one.removeprefix(prefix) for one in PYPROJECT["project"]["classifiers"] if one.startswith(prefix)]
    assert declared[0] == tested[0].removeprefix("3.")
    assert declared[-1] == tested[-1].removeprefix("3.")
    assert PYPROJECT["project"]["requires-python"] == f">={tested[0]}"


def test_the_lowest_versions_are_those_that_are_declared():
    extras = PYPROJECT["project"]["optional-dependencies"]
    declared = {}
    for requirement in (*PYPROJECT["project"]["dependencies"], *extras["train"], *extras["audit"]):
        name, floor, version = requirement.partition(">=")
        if floor:
            assert declared.setdefault(name, version) == version, f"{name} has two floors"
    for file, names in (("lowest-versions.txt", set(declared)), ("lowest-versions-core.txt", {"torch"})):
        lines = (ROOT / "tools" / file).read_text(encoding="utf-8").splitlines()
        pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
        assert names <= set(pinned)
        for name in names:
            padded = (declared[name] + ".0.0").split(".")[:3]
            assert pinned[name].split(".") == padded, f"{file}: {name}"
