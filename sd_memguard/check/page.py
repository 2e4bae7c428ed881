"""The page of a check: one file, without scripts, with the images that it is about."""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape

from PIL import Image, ImageOps

from sd_memguard.check.findings import Findings, repeated_captions
from sd_memguard.data.image_check import ImageError, decode_image

MAX_GROUPS, MAX_MEMBERS, MAX_EQUAL, MAX_LISTED = 200, 12, 3, 500
"""What the page shows at most; check.json has everything."""

_EDGE = 128
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; color-scheme: light dark;
  overflow-wrap: anywhere }
h1 { font-size: clamp(1.4rem, 1rem + 2vw, 2rem); line-height: 1.2; margin-bottom: .5rem }
.quiet, .group > p { color: GrayText }
.group { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .75rem;
  padding: .75rem 0; border-top: 1px solid #8884 }
.group > p { align-self: center; margin: 0 }
figure { margin: 0; font-size: .8rem }
figure img { display: block; width: 8rem; max-width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff;
  border: 1px solid #8884 }
figure.kept img { outline: 3px solid #2a7 }
h3 { grid-column: 1 / -1; margin: 0; font-size: 1rem }
li { max-width: 46rem; margin-bottom: .25rem }
code { white-space: nowrap }
td, th { text-align: left; vertical-align: top; padding: .15rem 1rem .15rem 0 }
@media print { body { max-width: none; padding: 0; font-size: 10pt; print-color-adjust: exact }
  figure, tr { break-inside: avoid } h2, h3 { break-after: avoid }
  .group { grid-template-columns: repeat(6, 1fr) } }
"""


def page(findings: Findings, headline: str) -> str:
    """Return the page as HTML.

    Args:
        findings: What was found.
        headline: The summary in a sentence.
    """
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Check of {escape(findings.source.name)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(headline)}</h1>",
            f'<p class="quiet">sd-memguard check of {escape(findings.source.name)}</p>',
            *_advice(findings),
            *_table("Samples that cannot be used", findings, findings.unusable),
            *_duplicates(findings),
            *_parts(findings),
            *_table("Odd images and captions", findings, findings.odd),
            *_captions(findings),
            "</body></html>\n",
        ]
    )


def _advice(findings: Findings) -> Iterator[str]:
    """Yield what was found means, and what to do about it."""
    told = {
        "Samples that cannot be used stop a training, or are passed over by <code>--on_bad_sample skip</code>. Repair "
        "or remove them.": findings.unusable,
        "An image that is there many times is shown to the model many times, and is the first that it gives back. Keep "
        "one of each group: <code>--write_filtered keep.jsonl</code> lists what is left. Near-duplicates may be "
        "different images; look at them below. The training of sd-memguard counts each group as one image without "
        "that.": findings.groups,
        "Images that share a part repeat that part: a crop of an image, or an image within another. Keep the one that "
        "you want to train on.": findings.parts,
        "Odd images and captions are trained on, but seldom as meant: small ones are enlarged, long ones cropped, "
        "a caption that says little lets the model guess.": findings.odd,
    }
    lines = [words for words, found in told.items() if found]
    yield "<h2>What this means, and what you can do</h2>"
    yield f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else "<p>There is nothing to mend.</p>"


def _table(heading: str, findings: Findings, faults: dict[int, str]) -> Iterator[str]:
    if not faults:
        return
    yield f"<h2>{heading} ({len(faults):,})</h2><table>"
    for row, words in list(faults.items())[:MAX_LISTED]:
        yield f"<tr><td>{escape(findings.file(row))}</td><td>{escape(words)}</td></tr>"
    yield "</table>" + _more(len(faults) - MAX_LISTED)


def _duplicates(findings: Findings) -> Iterator[str]:
    if not findings.groups:
        return
    yield f"<h2>Duplicates ({len(findings.groups):,} groups)</h2>"
    yield "<p>The one that is outlined is kept by <code>--write_filtered</code>.</p>"
    for group in findings.groups[:MAX_GROUPS]:
        kind = "equal files" if group.is_exact else "near-duplicates"
        yield f'<div class="group"><h3>{len(group.rows):,} {kind}</h3>'
        most = MAX_EQUAL if group.is_exact else MAX_MEMBERS
        shown = [group.kept, *(row for row in group.rows if row != group.kept)][:most]
        yield from (_figure(findings, row, row == group.kept) for row in shown)
        yield _more(len(group.rows) - most) + "</div>"
    yield _more(len(findings.groups) - MAX_GROUPS)


def _parts(findings: Findings) -> Iterator[str]:
    if not findings.parts:
        return
    yield f"<h2>Images that share a part ({len(findings.parts):,} pairs)</h2>"
    for part in findings.parts[:MAX_GROUPS]:
        yield f'<div class="group"><h3>{part.num_matches:,} local features match</h3>'
        yield from (_figure(findings, row, is_kept=False) for row in part.rows)
        yield "</div>"
    yield _more(len(findings.parts) - MAX_GROUPS)


def _figure(findings: Findings, row: int, is_kept: bool) -> str:
    captions = findings.captions(row)
    width, height = findings.sizes[row]
    text = f"{findings.file(row)}, {width}x{height}" + (f": {captions[0]}" if captions else "")
    return (
        f'<figure{" class=kept" if is_kept else ""}><img loading="lazy" alt="" src="{_thumbnail(findings, row)}">'
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )


def _thumbnail(findings: Findings, row: int) -> str:
    try:
        image = decode_image(findings.source.images.read(row))
    except (ImageError, OSError):
        image = Image.new("RGB", (1, 1))
    file = io.BytesIO()
    ImageOps.contain(image, (_EDGE, _EDGE)).save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _captions(findings: Findings) -> Iterator[str]:
    repeated = repeated_captions(findings)
    if not repeated:
        return
    yield f"<h2>Captions that different images share ({len(repeated):,})</h2>"
    yield "<p>Not a fault; but what a caption does not say, a model learns to guess.</p><table>"
    yield from _counted(repeated[:MAX_LISTED])
    yield "</table>" + _more(len(repeated) - MAX_LISTED)


def _counted(repeated: Sequence[tuple[str, int]]) -> Iterator[str]:
    for caption, count in repeated:
        yield f"<tr><td>{count:,}</td><td>{escape(caption)}</td></tr>"


def _more(count: int) -> str:
    return f"<p>and {count:,} more; <code>check.json</code> has them</p>" if count > 0 else ""
