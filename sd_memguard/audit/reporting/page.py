"""The audit's report: one page that needs nothing beside itself, made from what the audit left in its folder."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sd_memguard.audit.report import Audit, read_audit
from sd_memguard.audit.reporting.charts import Histograms, background_similarities, histograms, packed, similarities
from sd_memguard.audit.reporting.sentences import KIND_WORDS, percent, tell
from sd_memguard.audit.reporting.tables import (
    DEFINITIONS,
    GROUPS,
    cards,
    evidence_rows,
    measure_rows,
    settings_tables,
    short_name,
)
from sd_memguard.audit.reporting.thumbnails import Shown, Thumbnails, choose_pairs, worst_of

PAGE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
CAPTION_LETTERS = 240
"""Longer captions are cut in the page; pairs.parquet has them whole."""


def write_page(output_dir: Path, train_data_dir: Path | None) -> Path:
    """Write ``report.html`` from the files of an audit, and return its path.

    The page holds its images, style and script, loads nothing and sends nothing (its Content-Security-Policy allows
    neither). The same files give the same bytes.

    Args:
        output_dir: Holds ``report.json``, ``pairs.parquet``, ``background.parquet`` and the generated.
        train_data_dir: What the files of training images are relative to; None: they are not at hand, and the page
            shows empty frames with their names.

    Raises:
        AuditError: Where one of the three files is missing, broken or of another format. An image that is missing or
            cannot be read is an empty frame instead.
    """
    audit = read_audit(output_dir)
    shown = choose_pairs(audit, Thumbnails(output_dir, train_data_dir))
    path = output_dir / PAGE
    path.write_bytes(_render(audit, shown).encode("utf-8", errors="replace"))
    return path


def _render(audit: Audit, shown: Shown) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "short_name": short_name, "caption": _cut, "code": _code}
    charts = histograms(audit)
    style, script = (_source(name) for name in ("report.css", "report.js"))
    return environment.get_template("report.html.j2").render(
        audit=audit.report,
        pairs=audit.pairs,
        told=tell(audit.report),
        evidence=evidence_rows(audit.report),
        cards=cards(audit.report),
        worst=[worst_of(shown.pairs, index) for index in range(len(audit.report.models))],
        measures=measure_rows(audit.report),
        groups=GROUPS,
        kind_words=KIND_WORDS,
        charts=charts,
        shown=shown,
        settings=settings_tables(audit.report),
        definitions=DEFINITIONS,
        style=style,
        script=script,
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        data=_json_block(_script_data(audit, charts)),
    )


def _source(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _csp_hash(source: str) -> str:
    """Return the source expression that lets exactly this inline style or script pass."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _script_data(audit: Audit, charts: Histograms) -> dict[str, Any]:
    """Return what the page's script counts on: all similarities, not only those of the pairs that are shown."""
    return {
        "threshold": audit.report.threshold.similarity,
        "low": charts.low,
        "high": charts.high,
        "models": [model.name for model in audit.report.models],
        "similarities": {f"{index}.{kind}": packed(values) for (index, kind), values in similarities(audit).items()},
        "background": {kind: packed(values) for kind, values in background_similarities(audit).items()},
    }


def _json_block(data: dict[str, Any]) -> str:
    """Return JSON that no text in it can end or open a tag with: all but ASCII and ``<``, ``>``, ``&`` are escaped."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _code(line: str) -> Markup:
    """Return a sentence whose parts in backticks are code."""
    parts = line.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else part for index, part in enumerate(parts)
    )


def _cut(caption: str) -> str:
    return caption if len(caption) <= CAPTION_LETTERS else f"{caption[:CAPTION_LETTERS].rstrip()}…"
