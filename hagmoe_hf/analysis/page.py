"""The page of a report: findings first, pictures inside, tables folded; no script, nothing from the network."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from .pictures import Section
from .summary import Summary

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1b1b1b; background: #fafaf8; }
body { max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { margin-top: 2.6rem; border-bottom: 1px solid #d8d8d2; padding-bottom: .2rem; }
.about { color: #555; }
ol.findings { padding-left: 1.4rem; }
ol.findings li { margin: .7rem 0; font-size: 1.05rem; }
figure { margin: 1.4rem 0; padding: .8rem; background: #fff; border: 1px solid #e2e2dc; border-radius: 6px; }
figure, .wide { overflow-x: auto; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { color: #444; font-size: .92rem; margin-top: .6rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e2e2dc; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td.words { text-align: left; font-family: ui-monospace, monospace; }
code { background: #eee; padding: .05rem .3rem; overflow-wrap: anywhere; }
summary { cursor: pointer; color: #0059a8; margin: .6rem 0; }
""".strip()


def page(summary: Summary, sections: Sequence[Section], folder: Path) -> str:
    """One HTML page with everything inside: no script, nothing from the network.

    Args:
        summary: As `analyze` makes it, with `findings`.
        sections: Headline, and pictures in `folder` with their captions.
        folder: Where the pictures are.
    """
    text = html.escape
    name = Path(summary["model"]).name or summary["model"]
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>Inside {text(name)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>Inside {text(name)}</h1>",
        f'<p class="about">{_counted(summary["texts"], "text")}, {_counted(summary["tokens"], "token")}, '
        f"{_counted(len(summary['layers']), 'sparse layer')} of {summary['num_experts']} experts in "
        f"{_counted(summary['num_groups'], 'group')}.</p>",
        '<ol class="findings">',
        *(f"<li>{text(finding)}</li>" for finding in summary["findings"]),
        "</ol>",
    ]
    for number, (headline, pictures) in enumerate(sections):
        parts.append(f"<h2>{text(headline)}</h2>")
        for file, caption in pictures:
            data = base64.b64encode((folder / file).read_bytes()).decode()
            parts.append(
                f'<figure><img src="data:image/png;base64,{data}" alt="{text(caption)}"><figcaption>{text(caption)}'
                "</figcaption></figure>"
            )
        if number == 0:
            parts.append(_load_table(summary))
    parts += ["<h2>Numbers</h2>", _information_table(summary), _pair_table(summary), _neighbour_table(summary)]
    parts += [_vocabulary_table(summary), _ngram_table(summary)]
    if summary["missing"]:
        parts.append("<h2>What could not be said</h2><ul>")
        parts += [f"<li>{text(reason)}</li>" for reason in summary["missing"].values()]
        parts.append("</ul>")
    skipped = "; ".join(f"{count} rows skipped: {reason}" for reason, count in summary["skipped"].items())
    versions = ", ".join(f"{package} {number}" for package, number in summary["versions"].items())
    parts.append(f'<p class="about">{text(summary["date"])}; {text(versions)}. {text(skipped)}</p>')
    if summary["command"]:
        parts.append(f"<p><code>{text(summary['command'])}</code></p>")
    parts.append("<p>Every number is in <code>report.json</code> beside this page.</p></body></html>")
    return "\n".join(part for part in parts if part) + "\n"


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str, *, words: bool = False) -> str:
    if not rows:
        return ""
    kind = ' class="words"' if words else ""
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for first, *others in rows:
        cells = "".join(f"<td{kind}>{html.escape(cell)}</td>" for cell in others)
        lines.append(f"<tr><td>{html.escape(first)}</td>{cells}</tr>")
    return (
        f'<details><summary>{html.escape(title)}</summary><div class="wide"><table>{"".join(lines)}</table></div></details>'
    )


def _load_table(summary: Summary) -> str:
    head = ("layer", "effective experts", "entropy (1 is even)", "CV", "MaxVio", "idle experts", "mean P(chosen)")
    rows = []
    for layer in summary["layers"]:
        load = layer["load"]
        numbers = (load["effective_experts"], load["entropy"], load["cv"], load["max_vio"])
        cells = [*(f"{number:.3f}" for number in numbers), str(load["dead_experts"]), f"{layer['confidence']:.3f}"]
        rows.append([str(layer["layer"]), *cells])
    return _table(head, rows, "The load in numbers")


def _information_table(summary: Summary) -> str:
    head = ("", "layer", "bits", "shuffled: mean", "shuffled: largest", "at most", "above chance", "of what could be known")
    rows = []
    for layer in summary["layers"]:
        for key, one in layer["information"].items():
            most = min(one["choice_entropy"], one["label_entropy"])
            numbers = [f"{one[name]:.4f}" for name in ("bits", "baseline", "highest")] + [f"{most:.4f}"]
            above = "yes" if one["is_above_chance"] else "no"
            rows.append([f"I({key})", str(layer["layer"]), *numbers, above, f"{one['explained']:.1%}"])
    return _table(head, sorted(rows), "Mutual information")


def _pair_table(summary: Summary) -> str:
    head = ("layer", "pairs", "same group as its positive", "same group as a negative")
    rows = [
        [str(layer["layer"]), str(pairs["pairs"]), f"{pairs['with_positive']:.1%}", f"{pairs['with_negatives']:.1%}"]
        for layer in summary["layers"]
        if (pairs := layer["pairs"])
    ]
    return _table(head, rows, "Queries and their positives")


def _neighbour_table(summary: Summary) -> str:
    head = ("nearest text has the same", "by sentence vector", "by routing alone", "by chance")
    rows = [
        [kind, *(f"{found[key]:.1%}" for key in ("by_vector", "by_routing", "chance"))]
        for kind, found in summary["neighbours"].items()
    ]
    return _table(head, rows, "Routing as an embedding")


def _vocabulary_table(summary: Summary) -> str:
    rows = []
    for layer in summary["layers"]:
        for one in layer["vocabulary"]:
            pairs = zip(one["tokens"], one["shares"], strict=True)
            rows.append(
                [
                    f"layer {layer['layer']}, expert {one['expert']}",
                    "  ".join(f"{token} {share:.0%}" for token, share in pairs),
                ]
            )
    even = f"(even: {1 / summary['num_experts']:.0%})"
    head = ("", f"its own tokens, and the share of them that it takes {even}")
    return _table(head, rows, "Vocabulary of each expert", words=True)


def _ngram_table(summary: Summary) -> str:
    rows = [[f"{one['shift']:.2f}", one["text"], f"{one['count']:,}"] for one in summary["ngrams"]]
    return _table(("shift", "n-gram", "occurrences"), rows, "What the memory learned most of", words=True)
