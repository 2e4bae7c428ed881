"""The audit's section of a model card: the verdict and its figures, without captions, file names or paths."""

from collections.abc import Iterator
from pathlib import Path

from sd_memguard.audit.report import Report
from sd_memguard.audit.reporting.sentences import tell
from sd_memguard.audit.reporting.tables import evidence_rows
from sd_memguard.files import replace_text

BEGIN, END = "<!-- sd-memguard audit: begin -->", "<!-- sd-memguard audit: end -->"


def update_card(file: Path, report: Report) -> None:
    """Put the section into a Markdown file: in place of an earlier one, else at its end; makes the file if need be."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        before, after = (f"{text.rstrip()}\n\n" if text.strip() else ""), "\n"
    replace_text(file, f"{before}{BEGIN}\n{card_section(report)}\n{END}{after}")


def card_section(report: Report) -> str:
    """Return the section in Markdown."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    told = tell(report)
    yield "## Memorization audit"
    yield f"\n**{told.headline}**\n"
    yield from (f"- {line}" for line in told.found)
    rows = evidence_rows(report)
    if rows:
        names = [model.name for model in report.models]
        yield "\n| measure | " + " | ".join(names) + " |"
        yield "|---" * (1 + len(names)) + "|"
        for row in rows:
            cells = (
                "not measured" if cell is None else f"{cell.value}; background {cell.background}; {cell.p_value}"
                for cell in row.cells
            )
            yield f"| {row.label}{f', {row.kind}' if row.kind else ''} | {' | '.join(cells)} |"
    yield ""
    yield from told.sure
    heldout = "" if report.reference is None else f" and {report.reference.num_distinct:,} held-out ones"
    yield (
        f"\nMeasured by sd-memguard {report.version} with {report.train.num_distinct:,} distinct training images"
        f"{heldout}; features: {report.extractor.name}."
    )
