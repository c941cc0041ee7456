"""Draw the default mixture: its layers, a sparse block, and the router inside, as the configuration has them.

    python scripts/draw_architecture.py docs/architecture.svg

The picture has a background of its own, so that it reads the same on a light and on a dark page.
"""

import sys
from html import escape
from pathlib import Path

from hagmoe_hf import HagMoeConfig
from hagmoe_hf.files import write_text

WIDTH, HEIGHT = 1060, 560
INK, QUIET, PAPER = "#1f2933", "#52606d", "#f7f8fa"
DENSE, SPARSE, GATE, CHOSEN = "#d9e2ec", "#fbd38d", "#b2ddf7", "#f6ad55"
STYLE = f"""
text {{ font: 14px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: {INK}; }}
.title {{ font-size: 16px; font-weight: 600; }}
.small {{ font-size: 12px; fill: {QUIET}; }}
.middle {{ text-anchor: middle; }}
rect {{ stroke: {INK}; stroke-width: 1; }}
.frame {{ fill: none; stroke: {QUIET}; stroke-dasharray: 5 4; }}
path {{ fill: none; stroke: {INK}; stroke-width: 1.4; }}
.zoom {{ stroke: {QUIET}; stroke-dasharray: 2 4; }}
"""


def text(x: float, y: float, line: str, style: str = "") -> str:
    """One line, its baseline's left end at (x, y), or its middle with the style "middle"."""
    return f'<text x="{x:g}" y="{y:g}" class="{style}">{escape(line)}</text>'


def box(x: float, y: float, width: float, height: float, lines: tuple[str, ...], fill: str) -> str:
    """A rounded box; the first line is its name, the others are small."""
    first = y + height / 2 + 5 - 8 * (len(lines) - 1)
    rows = [
        text(x + width / 2, first + 17 * row, line, "middle small" if row else "middle") for row, line in enumerate(lines)
    ]
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}"/>'
    return "\n".join([shape, *rows])


def frame(x: float, y: float, width: float, height: float) -> str:
    """A dashed frame around what belongs together."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" class="frame"/>'


def arrow(*points: tuple[float, float]) -> str:
    """A line through the points, with a head at its end."""
    return f'<path d="M{" L".join(f"{x:g} {y:g}" for x, y in points)}" marker-end="url(#head)"/>'


def encoder(config: HagMoeConfig) -> list[str]:
    """The stack of layers at the left, the first at the bottom."""
    layers = config.num_hidden_layers
    pitch = 340 / layers
    parts = [text(40, 44, "The encoder", "title"), box(40, 470, 150, 34, ("embeddings",), DENSE)]
    parts += [text(115, 536, "tokens of a text", "middle small"), arrow((115, 522), (115, 506))]
    for layer in range(layers):
        is_sparse = layer in config.sparse_layers
        y = 452 - pitch * (layer + 1) + 10
        name = f"layer {layer}: {'sparse' if is_sparse else 'dense'}"
        parts.append(box(40, y, 150, pitch - 12, (name,), SPARSE if is_sparse else DENSE))
        parts.append(arrow((115, y + pitch + (8 if layer == 0 else 0)), (115, y + pitch - 10)))
    parts += [box(40, 66, 150, 34, ("pooling: a vector",), DENSE), arrow((115, 122), (115, 102))]
    top = 452 - pitch * (max(config.sparse_layers) + 1) + 10
    parts += [
        f'<path class="zoom" d="M192 {top:g} L240 24"/>',
        f'<path class="zoom" d="M192 {top + pitch - 12:g} L240 536"/>',
    ]
    return parts


def sparse_block(config: HagMoeConfig) -> list[str]:
    """What takes the place of a sparse layer's feed-forward block."""
    shared, routed = config.shared_expert_intermediate_size, config.moe_intermediate_size
    parts = [frame(240, 24, 800, 512), text(260, 48, "Feed-forward block of a sparse layer", "title")]
    parts += [box(260, 250, 92, 62, ("states x", "tokens of", "a text"), DENSE)]
    parts += [
        box(560, 64, 260, 48, ("shared expert", f"{shared} of the parent's {config.intermediate_size} neurons"), SPARSE)
    ]
    parts += [arrow((306, 250), (306, 88), (556, 88)), arrow((820, 88), (921, 88))]
    parts += ['<circle cx="936" cy="88" r="14" fill="#ffffff" stroke="#1f2933"/>', text(936, 93, "+", "middle")]
    parts += [arrow((951, 88), (990, 88)), text(994, 92, "out")]
    parts += router(config)
    parts += experts(config, f"routed experts: {routed} neurons each, at first copies of the parent's others")
    return parts


def router(config: HagMoeConfig) -> list[str]:
    """The two gates, and how a choice is made of them."""
    groups, chosen = config.n_group, config.num_experts_per_tok
    opened = f"{config.topk_group} of {groups} groups opens for the text"
    taken = f"each token takes {chosen} expert inside"
    return [
        frame(390, 136, 560, 196),
        text(404, 156, "router: float32, no noise, only this text's real tokens"),
        box(404, 172, 240, 62, ("attention gate", "s = Σ softmax(q · xₜ / √D) xₜ", "one summary of the text"), GATE),
        box(694, 172, 240, 62, ("group gate", "P(group | text)", opened), GATE),
        box(404, 254, 240, 62, ("expert gate", "P(expert | group, token)"), GATE),
        box(694, 254, 240, 62, ("choice", "log P(group) + log P(expert | group)", taken), CHOSEN),
        arrow((352, 281), (372, 281), (372, 203), (400, 203)),
        arrow((372, 281), (400, 281)),
        arrow((644, 203), (690, 203)),
        arrow((814, 234), (814, 250)),
        arrow((644, 285), (690, 285)),
    ]


def experts(config: HagMoeConfig, caption: str) -> list[str]:
    """The groups in a row; one of them is open, one of its experts chosen."""
    groups, members = config.n_group, config.num_experts // config.n_group
    open_group = groups - 1
    pitch = 560 / groups
    parts = [text(390, 370, caption, "small")]
    left = 390 + pitch * open_group + 6 + (pitch - 24) / members / 2
    for group in range(groups):
        x = 390 + pitch * group
        is_open = group == open_group
        label_x = left + 8 if is_open else x + 10  # beside the arrow
        parts += [frame(x, 382, pitch - 12, 108), text(label_x, 402, f"group {group}", "small")]
        width = (pitch - 24) / members
        for member in range(members):
            is_chosen = is_open and member == 0
            expert = str(group * members + member)
            fill = CHOSEN if is_chosen else SPARSE if is_open else "#ffffff"
            parts.append(box(x + 6 + width * member + 2, 414, width - 4, 62, ("expert", expert), fill))
    parts.append(arrow((left, 316), (left, 410)))
    parts.append(arrow((306, 312), (306, 445), (386, 445)))
    parts += [arrow((left, 476), (left, 514), (992, 514), (992, 130), (946, 98)), text(308, 465, "x", "small")]
    return parts


def drawing() -> str:
    """The whole picture, of the default configuration."""
    config = HagMoeConfig()
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    description = "A text opens one expert group through attention pooling; each of its tokens chooses an expert inside it."
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{description}">',
        f"<style>{STYLE}</style>",
        f'<defs>{head}<path d="M0 0 L8 4 L0 8 Z" style="fill:{INK};stroke:none"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{PAPER}" style="stroke:none"/>',
        *encoder(config),
        *sparse_block(config),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), drawing())
