"""The rows of the acceptance command, on a machine with whatever it has."""

import json
import sys

import pytest
import torch

from benchmarks.gpu_acceptance.__main__ import WINDOWS, main
from benchmarks.gpu_acceptance.rows import Check, Place, require, run_checks


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, torch.device("cpu"), None)


def fails(place):
    require(False, "the claim does not hold")


def test_each_check_has_a_row_that_says_how_it_went(place, tmp_path, capsys):
    checks = [
        Check("holds", lambda place: {"seconds": 1.25}),
        Check("fails", fails),
        Check("breaks", lambda place: {"seconds": 1 / 0}),
        Check("on_gpu", fails, ("cuda",)),
        Check("scripts", fails, ("scripts",)),
        Check("library", fails, ("a_library_that_nobody_has",)),
    ]
    rows = run_checks(checks, place, tmp_path / "report.json", 60)
    assert [row["status"] for row in rows] == ["PASS", "FAIL", "FAIL", "SKIP", "SKIP", "SKIP"]
    assert rows[0]["figures"] == {"seconds": 1.25}
    assert rows[1]["note"] == "the claim does not hold"
    assert "ZeroDivisionError" in rows[2]["note"]
    assert [row["note"] for row in rows[3:]] == [
        "no CUDA device here",
        "--diffusers_examples is not given",
        "a_library_that_nobody_has is not installed",
    ]
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == rows
    assert capsys.readouterr().out.splitlines()[0] == "PASS  holds  seconds 1.25"


def test_what_would_begin_too_late_is_left_open(place, tmp_path):
    (row,) = run_checks([Check("late", fails)], place, tmp_path / "report.json", -1)
    assert (row["status"], row["note"]) == ("SKIP", "the window is over")


def test_every_check_can_be_named(monkeypatch, capsys, tmp_path):
    for window, checks in WINDOWS.items():
        names = [check.name for check in checks]
        assert len(set(names)) == len(names)
        monkeypatch.setattr(sys, "argv", ["x", "--window", str(window), "--list", "--output_dir", str(tmp_path)])
        main()
        assert capsys.readouterr().out.split() == names


def test_checks_run_alone_and_their_status_is_that_of_the_program(monkeypatch, tmp_path, capsys):
    names = ["fused_step", "bank_updates", "switch"]
    chosen = [text for name in names for text in ("--check", name)]
    arguments = ["--window", "1", *chosen, "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    rows = json.loads((tmp_path / "window-1.json").read_text())["rows"]
    assert [(row["check"], row["status"]) for row in rows] == [(name, "PASS") for name in names]
