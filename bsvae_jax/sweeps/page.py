"""The page of a sweep's report: one HTML file that needs nothing else; its links lead to what lies beside it."""

import base64
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple
from urllib.parse import quote

from matplotlib.figure import Figure

import bsvae_jax
from bsvae_jax.config import to_dict
from bsvae_jax.data.image_set import SPLIT_NAMES
from bsvae_jax.sweeps.results import SweepResults
from bsvae_jax.sweeps.table import display_rows, error_bars

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; max-width: 76rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
figure { margin: 1.5rem 0; } .plot { position: relative; } img { width: 100%; height: auto; display: block; }
.plot i { position: absolute; width: 1rem; height: 1rem; margin: -.5rem; border-radius: 50%; }
.plot i:hover { box-shadow: 0 0 0 2px #222; }
figcaption, .made { color: #555; font-size: .9rem; margin-top: .4rem; } code { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .8rem; }
th, td { padding: .3rem .4rem; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums; }
th { border-bottom: 2px solid #888; vertical-align: bottom; cursor: pointer; }
th[aria-sort=ascending]::after { content: " ▲"; } th[aria-sort=descending]::after { content: " ▼"; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
.members :is(th, td) { text-align: left; }
pre { overflow-x: auto; background: #f5f5f5; padding: .6rem; font-size: .8rem; }
@media (max-width: 40rem) { th:first-child, td:first-child { max-width: 8.5rem; white-space: normal; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = [...body.rows];
  const filter = Object.assign(document.createElement("input"), {type: "search", placeholder: "rows with …"});
  filter.setAttribute("aria-label", "show only rows with this text");
  filter.oninput = () => rows.forEach(row => row.hidden = !row.textContent.toLowerCase().includes(filter.value.toLowerCase()));
  table.parentNode.before(filter);
  const number = text => isNaN(parseFloat(text)) ? Infinity : parseFloat(text);
  [...table.tHead.rows[0].cells].forEach((head, column, heads) => head.onclick = () => {
    const order = head.ariaSort == "ascending" ? "descending" : "ascending", sign = order == "ascending" ? 1 : -1;
    heads.forEach(other => other.ariaSort = other == head ? order : null);
    const compare = (a, b) => number(a) - number(b) || a.localeCompare(b);
    rows.sort((a, b) => sign * compare(a.cells[column].textContent, b.cells[column].textContent));
    body.append(...rows);
  });
}
"""


class Picture(NamedTuple):
    """A figure with what it shows."""

    figure: Figure
    alt: str
    """For those who do not see it."""
    caption: str
    points: Sequence[tuple[float, float, str]] = ()
    """What is said where it is pointed at: percent from the left and from the top, text."""


def page(results: SweepResults, sentences: Sequence[str], pictures: Mapping[str, Picture], images: Mapping[str, bytes]) -> str:
    """`report.html`, readable on a phone: the sentences, the pictures with their PNG files, the tables.

    Links lead to the tables, the figures and the members' folders, as they lie beside the page.
    """
    info = results.info
    count = len(results.members)
    title = html.escape(f"{info.data_name}: {'1 model' if count == 1 else f'{count} models over β'}")
    parts = [f"<h1>{title}</h1>", *(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)]
    tables = ", ".join(_link(name, name) for name in ("table.csv", "table.md", "members.csv"))
    made = f"Report of {datetime.now(UTC):%Y-%m-%d} by bsvae_jax {bsvae_jax.__version__}; the numbers: {tables}."
    for call in info.calls:
        made += html.escape(f" Begun {call.date} on {call.devices} with {call.versions}: ")
        made += f"<code>{html.escape(call.command)}</code>"
    parts.append(f'<p class="made">{made}</p>')
    for name, picture in pictures.items():
        data = base64.b64encode(images[name]).decode()
        points = "".join(
            f'<i style="left:{left:.2f}%;top:{top:.2f}%" title="{html.escape(text)}"></i>' for left, top, text in picture.points
        )
        files = ", ".join(_link(f"figures/{name}.{suffix}", suffix.upper()) for suffix in ("png", "pdf"))
        parts.append(
            f'<figure><div class="plot"><img src="data:image/png;base64,{data}" alt="{html.escape(picture.alt)}">{points}</div>'
            f"<figcaption>{html.escape(picture.caption)} {files}</figcaption></figure>"
        )
    for split in results.splits:
        headings, rows = display_rows(results, split)
        about = f"{error_bars(headings)} A click on a heading sorts the rows."
        parts.append(f"<h2>{SPLIT_NAMES[split].capitalize()}</h2><p>{about}</p>")
        cells = [[html.escape(cell).replace("± ", "±&nbsp;") for cell in row] for row in rows]
        parts.append(_table(headings, cells))
    parts += ["<h2>Members</h2>", _table(["folder", "state", "found"], _members(results), "members")]
    settings = html.escape("\n".join(_lines(to_dict(info.config))))
    parts.append(f"<h2>Base config</h2><pre>{settings}</pre>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


def _link(path: str, text: str) -> str:
    return f'<a href="{quote(path)}">{html.escape(text)}</a>'


def _table(headings: Sequence[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table that scrolls by itself where it is wider than the page; headings are text, cells HTML."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _members(results: SweepResults) -> Iterator[tuple[str, str, str]]:
    """Folder, state and what was found of every member, as HTML."""
    for member in results.members:
        yield _link(f"members/{member.name}/", member.name), "finished", html.escape(", ".join(member.findings))
    for name, error in results.failures.items():
        yield _link(f"members/{name}/", name), "diverged", html.escape(error)
    for name in results.unfinished:
        yield html.escape(name), "still to be trained", ""


def _lines(values: Mapping[str, object], prefix: str = "") -> list[str]:
    """`optimizer.learning_rate = 0.001`, a line per field, without what the sweep varies."""
    lines = []
    for name, value in values.items():
        if not prefix and name in ("beta", "seed", "decoder_variance", "prior", "beta_schedule"):
            continue
        dotted = f"{prefix}{name}"
        lines += _lines(value, f"{dotted}.") if isinstance(value, Mapping) else [f"{dotted} = {value}"]
    return lines
