"""The page of a sweep's report: one HTML file that needs nothing else."""

import base64
import html
from collections.abc import Mapping, Sequence

from bsvae_jax.config import to_dict
from bsvae_jax.sweeps.results import SweepResults, display_rows

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; max-width: 70rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; display: block; }
figcaption { color: #555; font-size: .9rem; margin-top: .4rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums; }
th { border-bottom: 2px solid #888; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td.failed { color: #b00; text-align: left; white-space: normal; }
pre { overflow-x: auto; background: #f5f5f5; padding: .6rem; font-size: .8rem; }
@media (max-width: 40rem) {
  th:first-child, td:first-child { max-width: 8.5rem; white-space: normal; }
  figure img { max-width: none; width: 46rem; }
}
"""


def page(results: SweepResults, sentences: Sequence[str], images: Mapping[str, bytes], captions: Mapping[str, str]) -> str:
    """`report.html`: one file that needs nothing else, readable on a phone; the sentences come first, then the PNG images."""
    info = results.info
    title = f"{info.data_name}: {len(results.members)} models over β"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [f"<p>{html.escape(sentence)}</p>" for sentence in sentences]
    for name, picture in images.items():
        data, caption = base64.b64encode(picture).decode(), html.escape(captions[name])
        parts.append(
            f'<figure><div class="scroll"><img src="data:image/png;base64,{data}" alt="{html.escape(name)}"></div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    for split, heading in (("test", "Test set"), ("train", "Training set")):
        headings, rows = display_rows(results, split)
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headings)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        parts.append(f"<h2>{heading}</h2><p>Mean ± standard deviation over seeds.</p>")
        parts.append(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')
    if results.failures:
        rows_of = "".join(
            f'<tr><td>{html.escape(name)}</td><td class="failed">{html.escape(error)}</td></tr>'
            for name, error in results.failures.items()
        )
        parts.append(f'<h2>Diverged</h2><div class="scroll"><table>{rows_of}</table></div>')
    settings = html.escape("\n".join(_lines(to_dict(info.config))))
    parts.append(f"<h2>Base config</h2><pre>{settings}</pre>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _lines(values: Mapping[str, object], prefix: str = "") -> list[str]:
    """`optimizer.learning_rate = 0.001`, a line per field, without what the sweep varies."""
    lines = []
    for name, value in values.items():
        if not prefix and name in ("beta", "seed", "decoder_variance", "prior"):
            continue
        dotted = f"{prefix}{name}"
        lines += _lines(value, f"{dotted}.") if isinstance(value, Mapping) else [f"{dotted} = {value}"]
    return lines
