import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

from hagmoe_hf.analysis import plots
from hagmoe_hf.analysis.probes import TokenView
from hagmoe_hf.analysis.stats import LabelLoad

LONG = [f"a rather long name of domain {number}" for number in range(30)]
WORDS = ["[CLS]", "a", "$x$", "internationalisation", "##s", "\u2581word", "漢字", "[SEP]"] * 12


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that was saved."""
    figures, save = [], plots._save

    def keep(figure, path):
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def overlapping_labels(figure) -> list[tuple[str, str]]:
    """Pairs of visible texts that cover each other by more than a hair."""
    figure.draw_without_rendering()
    found = []
    sides = [side for axes in figure.axes for side in (axes.xaxis, axes.yaxis)]
    # Matplotlib keeps ticks beyond the axis, which are never drawn
    unseen = {
        label
        for side in sides
        for tick in side.get_major_ticks()
        for label in (tick.label1, tick.label2)
        if not min(side.get_view_interval()) <= tick.get_loc() <= max(side.get_view_interval())
    }
    for text in figure.findobj(Text):
        is_shown = text.get_visible() and (text.axes is None or text.axes.get_visible())
        if is_shown and text not in unseen and text.get_text().strip():
            box = text.get_window_extent()
            if box.width > 1:
                found.append((text.get_text(), box.padded(-1)))
    return [(one, other) for (one, a), (other, b) in itertools.combinations(found, 2) if a.overlaps(b)]


def load(labels, layers=2, experts=8, groups=4) -> LabelLoad:
    counts = np.random.default_rng(0).integers(0, 99, size=(layers, len(labels), experts))
    return LabelLoad("domain", tuple(labels), tuple(range(layers)), groups, counts)


def view(gates: bool = True) -> TokenView:
    length = len(WORDS)
    weights = np.random.default_rng(0).dirichlet(np.ones(length), size=2).astype(np.float32)
    return TokenView(tuple(WORDS), np.arange(2 * length).reshape(2, length) % 8, weights if gates else None)


def unit(*shape):
    return np.random.default_rng(1).random(shape)


def experts(count):
    return [str(number) for number in range(count)]


CASES = {
    "heatmap": lambda path: plots.label_expert_heatmap(load(LONG), path),
    "heatmap of one": lambda path: plots.label_expert_heatmap(load(["a"], 1, 4, 1), path),
    "heatmap, six layers of 8": lambda path: plots.label_expert_heatmap(load(["en", "pt_BR"], 6, 8, 1), path),
    "load": lambda path: plots.load_bars(unit(2, 8), (1, 3), 4, path),
    "load, four layers of 32": lambda path: plots.load_bars(unit(4, 32), range(4), 8, path),
    "names on both sides": lambda path: plots.matrix_heatmaps(
        [unit(12, 12)] * 2, ["a", "b"], LONG[:12], LONG[:12], "bits", "x", path
    ),
    "experts": lambda path: plots.matrix_heatmaps([unit(8, 8)] * 5, list("abcde"), experts(8), experts(8), "CKA", "x", path),
    "one matrix": lambda path: plots.matrix_heatmaps([np.ones((1, 1))], ["a"], ["en"], ["en"], "cosine", "A headline", path),
    "information": lambda path: plots.information_bars(
        {f"I(expert;{name})": [(0.3, 0.1, 0.15)] * 6 for name in ("domain", "language", "token", "position")}, range(6), path
    ),
    "saturation": lambda path: plots.saturation_curves(unit(9, 6), [f"checkpoint-{n}000" for n in range(9)], range(6), path),
    "maps": lambda path: plots.text_maps(unit(300, 2), {"by domain": LONG * 10, "by group": ["g0", "g1", "g2"] * 100}, path),
    "tokens": lambda path: plots.token_experts(view(), (1, 3), path),
    "gates": lambda path: plots.gate_weights(view(), (1, 3), path),
    "curves": lambda path: plots.training_curves(LOG, path),
}
LOG = [{"loss": 1 / step, "step": step} for step in range(1, 9)]
LOG += [{"router/layer1/max_vio": 1.0, "router/layer3/max_vio": 0.5, "router/drift": 0.1, "step": 4}]


@pytest.mark.parametrize("name", CASES)
def test_a_picture_is_drawn_and_its_labels_never_overlap(name, tmp_path, drawn):
    """Names and shapes at the edges of what a user has: long, many, one."""
    path = CASES[name](tmp_path / "picture.png")
    assert imread(path).std() > 0.02
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"], "no half-written picture may stay"
    assert overlapping_labels(drawn[0]) == []


def test_the_check_for_overlaps_can_fail(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 2))
    figure.text(0.5, 0.5, "one label")
    figure.text(0.55, 0.5, "another label")
    assert overlapping_labels(figure) == [("one label", "another label")]


def test_neighbouring_colours_differ_in_grey():
    """Experts 0 and 1 share a group and are seen side by side; a print has no colours."""
    grey = [np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) for colour in plots.COLOURS]
    assert all(abs(a - b) > 0.1 for a, b in itertools.pairwise(grey))


def test_of_many_labels_the_largest_are_drawn(tmp_path, drawn):
    given = load(LONG)
    given.counts[:, 7] = 0
    plots.label_expert_heatmap(given, tmp_path / "map.png")
    shown = [text.get_text() for text in drawn[0].axes[0].get_yticklabels()]
    assert len(shown) == plots.MAX_LABELS
    assert LONG[7] not in shown


def test_what_cannot_be_drawn_is_an_error(tmp_path):
    """An empty picture would be taken for a result."""
    with pytest.raises(ValueError, match="1 log entries hold none of"):
        plots.training_curves([{"eval_loss": 1.0, "step": 1}], tmp_path / "none.png")
    with pytest.raises(ValueError, match="gate_weight=None"):
        plots.gate_weights(view(gates=False), (1, 3), tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
