"""Result files become tables, pictures and a verdict. Nothing here runs a model, and no figure is typed.

Differences are paired: an arm's run minus the dense parent's run with the same seed, and so with the same data in the same
order. Scores are 0 to 100.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ablation.arms import DENSE, TABLES, Arm
from ablation.budgets import BUDGETS, Budget
from ablation.goal import UNSEEN, Difference, difference, kit_macro, kit_parts, kit_sets, verdict
from ablation.plots import Crossover, gain_curves, group_bars
from ablation.results import best_rate, held_out, read_results, run_name
from hagmoe_hf.files import write_text

BASELINE = DENSE.name
Reader = Callable[..., float | None]  # of a figure in a result
LEFT_OUT_HEADINGS = ("left-out MRR", "difference")  # only where a budget leaves domains out
HEADINGS = (
    "arm", "rate", "seeds", "active M", "total M", "held-out MRR", "difference", "crossover at", "loss",
    *LEFT_OUT_HEADINGS, "kit", "difference",
    "unseen sources", "MaxVio groups", "s/step", "pays?",
)  # fmt: skip


def crossover(points: list[tuple[int, float]]) -> Crossover | None:
    """Where a gain takes the side of 0 on which it ends; None where it was never on the other.

    Args:
        points: (pairs seen, gain), the first one before any training: most arms have no gain there, and none fell behind.
    """
    learned = points[1:]
    other = [place for place, (_, gain) in enumerate(learned) if (gain > 0) != (learned[-1][1] > 0)]
    return Crossover(learned[other[-1] + 1][0], learned[-1][1] > 0) if other else None


def write_reports(results: Path) -> list[Path]:
    """Write tableN.md and its pictures into the folder of every budget that has results; returns the tables."""
    written = []
    for budget in BUDGETS.values():
        done, before = read_results(results / budget.name), {}
        if budget.follows:
            before = read_results(results / budget.follows)
        for number, arms in TABLES.items():
            begun = [arm for arm in arms if run_name(arm, budget.learning_rates[0], budget.seeds[0]) in done]
            if len(begun) > 1 and begun[0].name == BASELINE:
                path = results / budget.name / f"table{number}.md"
                write_text(path, table(number, begun, budget, done, before))
                _pictures(path, begun, budget, done, before)
                written.append(path)
    return written


def runs_of(arm: Arm, budget: Budget, done: dict[str, dict]) -> dict[int, dict]:
    """Seed -> result, at the arm's best rate of those that are done."""
    rates = [rate for rate in budget.learning_rates if run_name(arm, rate, budget.seeds[0]) in done]
    best = best_rate(arm, rates, budget.seeds[0], done)
    return {seed: done[run_name(arm, best, seed)] for seed in budget.seeds if run_name(arm, best, seed) in done}


def gains(runs: dict[int, dict], baseline: dict[int, dict], read: Reader) -> Difference | None:
    """Paired difference of what `read` finds in a result, over the seeds where it finds something in both; None for none."""
    values = [(read(runs[seed]), read(baseline[seed])) for seed in runs if seed in baseline]
    differences = [one - other for one, other in values if one is not None and other is not None]
    return difference(differences) if differences else None


def curve_gains(runs: dict[int, dict], baseline: dict[int, dict]) -> list[tuple[int, float]]:
    """(pairs seen, mean gain of held-out macro MRR over common seeds) of every point; a memory may be ahead at the start."""
    points = range(min((len(run["curve"]) for seed, run in runs.items() if seed in baseline), default=0))
    found = {point: gains(runs, baseline, partial(held_out, point=point)) for point in points}
    pairs = next(iter(runs.values()))["curve"]
    return [(pairs[point]["pairs"], gain.mean) for point, gain in found.items() if gain is not None]


def whole_curve(arm: Arm, budget: Budget, done: dict[str, dict], before: dict[str, dict]) -> list[tuple[int, float]]:
    """`curve_gains` of an arm over `BASELINE`, from the start on, also where the runs go on from those of `before`."""
    runs, earlier = runs_of(arm, budget, done), []
    if before and not arm.branches:
        first = runs_of(arm, BUDGETS[budget.follows], before)
        runs_before = {seed: run for seed, run in first.items() if seed in runs}
        earlier = curve_gains(runs_before, runs_of(DENSE, BUDGETS[budget.follows], before))
    own = curve_gains(runs, runs_of(DENSE, budget, done))
    return earlier + own[1:] if earlier else own


def table(number: int, arms: list[Arm], budget: Budget, done: dict[str, dict], before: dict[str, dict]) -> str:
    """Markdown of one table; `before` are the results that those of this budget go on from."""
    baseline = runs_of(arms[0], budget, done)
    at = HEADINGS.index(LEFT_OUT_HEADINGS[0])
    headings = HEADINGS if budget.left_out else (*HEADINGS[:at], *HEADINGS[at + len(LEFT_OUT_HEADINGS) :])
    lines = [
        f"# Table {number}, budget {budget.name}",
        "",
        f"{budget.steps} steps of {budget.batch_size} pairs, at most {budget.max_length} tokens"
        f"{f', after those of `{budget.follows}`' if budget.follows else ''}; rates tried: "
        f"{', '.join(f'{rate:g}' for rate in budget.learning_rates)}. Differences are to `{BASELINE}`, paired by seed, mean "
        "± standard deviation over seeds, in points of 0 to 100. Held-out MRR ranks a pair's positive among its domain's; "
        "what the kit chose, if anything, is in the log. Made by `python scripts/ablation.py --report`.",
        "",
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
    ]
    for arm in arms:
        cross = None if arm.name == BASELINE else crossover(whole_curve(arm, budget, done, before))
        lines.append(_row(arm, baseline if arm.name == BASELINE else runs_of(arm, budget, done), baseline, budget, cross))
    lines += [
        "",
        *(f"- **{arm.name}**: {arm.about}{'' if arm.about.endswith('?') else '.'}" for arm in arms),
        "",
        *_domains(arms, baseline, budget, done),
        "",
    ]
    some = next(iter(baseline.values()))
    versions = ", ".join(f"{name} {number}" for name, number in some["versions"].items())
    lines.append(f"{some['device']}; {versions}; {some['date'][:10]}; `{some['command']}` at {some['commit']}.")
    return "\n".join(lines) + "\n"


def _row(arm: Arm, runs: dict[int, dict], baseline: dict[int, dict], budget: Budget, cross: Crossover | None) -> str:
    some = next(iter(runs.values()))
    is_baseline = arm.name == BASELINE
    loss = gains(runs, baseline, lambda run: run["curve"][-1]["loss"])
    kit, unseen = gains(runs, baseline, kit_macro), gains(runs, baseline, partial(kit_macro, names=UNSEEN))
    parts, sets = (_gains_by_name(runs, baseline, read) for read in (kit_parts, kit_sets))
    routing = some["curve"][-1]["routing"].values()
    cells = [
        arm.name,
        f"{some['learning_rate']:g}",
        str(len(runs)),
        f"{some['parameters']['active'] / 1e6:.1f}",
        f"{some['parameters']['total'] / 1e6:.1f}",
        *_mean_and_gain(held_out, runs, baseline),
        f"{cross.pairs:,}{'' if cross.is_ahead else ' (behind)'}" if cross else "",
        "" if is_baseline or loss is None else f"{loss:.4f}",
        *(_mean_and_gain(partial(held_out, left_out=True), runs, baseline) if budget.left_out else ()),
        *_mean_and_gain(kit_macro, runs, baseline),
        "" if is_baseline else _of_seeds(unseen, len(runs)),
        " ".join(f"{layer['max_vio_groups']:.2f}" for layer in routing),
        f"{np.mean([run['seconds'] for run in runs.values()]) / budget.steps:.3f}",
        "" if is_baseline else verdict(kit, parts, sets, len(budget.seeds)),
    ]
    return "| " + " | ".join(cells) + " |"


def _gains_by_name(
    runs: dict[int, dict], baseline: dict[int, dict], read: Callable[[dict], dict[str, float]]
) -> dict[str, Difference]:
    names = dict.fromkeys(name for run in runs.values() for name in read(run))
    found = {name: gains(runs, baseline, lambda run, n=name: read(run).get(n)) for name in names}
    return {name: gain for name, gain in found.items() if gain is not None}


def _mean_and_gain(read: Reader, runs: dict[int, dict], baseline: dict[int, dict]) -> tuple[str, str]:
    """Two cells: the mean over the seeds that have a value, and the paired difference; "" where there is none."""
    values = [value for value in map(read, runs.values()) if value is not None]
    gain = "" if runs is baseline else _of_seeds(gains(runs, baseline, read), len(runs))
    return (f"{np.mean(values):.2f}" if values else ""), gain


def _of_seeds(gain: Difference | None, seeds: int) -> str:
    """A difference, with its number of seeds where others were not scored; "" for none."""
    if gain is None:
        return ""
    return str(gain) if gain.seeds == seeds else f"{gain} ({gain.seeds} of {seeds} seeds)"


def domain_gains(runs: dict[int, dict], baseline: dict[int, dict]) -> dict[str, Difference]:
    """Domain -> difference of held-out MRR at the end."""
    domains = next(iter(runs.values()))["curve"][-1]["dev_mrr"]
    found = {name: gains(runs, baseline, lambda run, n=name: 100 * run["curve"][-1]["dev_mrr"][n]) for name in domains}
    return {name: gain for name, gain in found.items() if gain is not None}


def _domains(arms: list[Arm], baseline: dict[int, dict], budget: Budget, done: dict[str, dict]) -> list[str]:
    """Held-out MRR by domain: the baseline's at the start and at the end, and every other arm's difference to it."""
    others = [arm for arm in arms if arm.name != BASELINE]
    first = next(iter(baseline.values()))["curve"][0]["dev_mrr"]
    found = {arm.name: domain_gains(runs_of(arm, budget, done), baseline) for arm in others}
    lines = [
        "## Held-out MRR by domain",
        "",
        f"| {' | '.join(['domain', 'start', BASELINE, *(arm.name for arm in others)])} |",
        "|---" * (len(others) + 3) + "|",
    ]
    for domain in first:
        end = np.mean([100 * run["curve"][-1]["dev_mrr"][domain] for run in baseline.values()])
        cells = [str(found[arm.name].get(domain, "")) for arm in others]
        name = f"{domain} (left out)" if domain in budget.left_out else domain
        lines.append(f"| {name} | {100 * first[domain]:.1f} | {end:.1f} | " + " | ".join(cells) + " |")
    return lines


def _pictures(path: Path, arms: list[Arm], budget: Budget, done: dict[str, dict], before: dict[str, dict]) -> None:
    baseline = runs_of(arms[0], budget, done)
    others = {arm.name: runs_of(arm, budget, done) for arm in arms if arm.name != BASELINE}
    others = {name: runs for name, runs in others.items() if any(seed in baseline for seed in runs)}
    curves = {arm.name: whole_curve(arm, budget, done, before) for arm in arms if arm.name in others}
    crossovers = {name: crossover(points) for name, points in curves.items()}
    gain_curves(curves, crossovers, f"Table {path.stem[5:]}, {budget.name}", path.with_suffix(".png"))
    bars = {name: {d: gain.mean for d, gain in domain_gains(runs, baseline).items()} for name, runs in others.items()}
    group_bars(
        bars, f"Table {path.stem[5:]}, {budget.name}: held-out MRR by domain", path.with_name(f"{path.stem}_domains.png")
    )
