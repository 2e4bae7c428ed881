"""Checks, their rows of PASS, FAIL or SKIP, and the file that they are written to."""

import json
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "xformers")


class NotMetError(AssertionError):
    """What is claimed does not hold; the text says what was found."""


class Place(NamedTuple):
    """Where checks run.

    Attributes:
        folder: for whatever they write.
        device: the GPU, or the CPU where there is none.
        scripts: diffusers' `examples` folder, None where it is not given.
    """

    folder: Path
    device: torch.device
    scripts: Path | None

    def new_folder(self, name: str) -> Path:
        """Return the path of a folder that no other check uses."""
        return self.folder / f"{name}-{time.monotonic_ns()}"


class Check(NamedTuple):
    """One claim.

    Attributes:
        name: by which it can be run alone.
        run: returns its figures, or raises ``NotMetError``.
        needs: what it cannot do without: "cuda", "scripts", or the name of a package.
    """

    name: str
    run: Callable[[Place], dict[str, Any]]
    needs: tuple[str, ...] = ()

    def missing(self, place: Place) -> str:
        """Return what is missing here, nothing where all is there."""
        for need in self.needs:
            if need == "cuda" and place.device.type != "cuda":
                return "no CUDA device here"
            if need == "scripts" and place.scripts is None:
                return "--diffusers_examples is not given"
            if need not in {"cuda", "scripts"} and find_spec(need) is None:
                return f"{need} is not installed"
        return ""


def require(holds: bool, text: str) -> None:
    """Raise ``NotMetError`` unless something holds."""
    if not holds:
        raise NotMetError(text)


def run_checks(checks: Sequence[Check], place: Place, report: Path, seconds: float) -> list[dict[str, Any]]:
    """Run the checks one after another, print a row for each, and keep the file up to date.

    Args:
        checks: in their order; those that would begin after ``seconds`` are skipped.
        place: where they run.
        report: the JSON file.
        seconds: of the window.
    """
    rows: list[dict[str, Any]] = []
    begun = time.monotonic()
    for check in checks:
        missing = check.missing(place) or ("the window is over" if time.monotonic() - begun > seconds else "")
        row: dict[str, Any] = {"check": check.name, "status": "SKIP", "note": missing}
        row = row if missing else _run(check, place)
        rows.append(row)
        figures = ", ".join(f"{name} {_short(value)}" for name, value in row.get("figures", {}).items())
        print(f"{row['status']}  {check.name}  {figures or row['note']}", flush=True)
        report.write_text(json.dumps({"machine": machine(place.device), "rows": rows}, indent=1) + "\n")
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _run(check: Check, place: Place) -> dict[str, Any]:
    start = time.monotonic()
    row: dict[str, Any] = {"check": check.name, "status": "PASS", "note": ""}
    try:
        row["figures"] = check.run(place)
    except NotMetError as error:
        row |= {"status": "FAIL", "note": str(error)}
    except Exception as error:  # a check that breaks is a claim that is not kept
        row |= {"status": "FAIL", "note": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return {**row, "seconds": round(time.monotonic() - start, 1)}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on."""
    found = {"device": str(device), "python": platform.python_version()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
