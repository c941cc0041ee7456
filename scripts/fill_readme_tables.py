"""Fill the tables of the README and of the guides from committed result files, so that no figure is typed by hand.

    python scripts/fill_readme_tables.py

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; `TABLES` says how NAME is made from which JSON.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import hagmoe_hf
from hagmoe_hf.benchmark.report import markdown

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "docs/results"
# Of the ablation's columns
LEFT_OUT = {"rate", "active M", "crossover at", "loss", "MaxVio groups", "s/step"}


def exactness() -> str:
    """Largest difference from the parent, by way of routing."""
    result = json.loads((RESULTS / "exactness.json").read_text(encoding="utf-8"))
    rows = ["| routing | largest difference | parameters, total | active, against the parent |", "|---|---|---|---|"]
    for mode, row in result["modes"].items():
        total = f"{row['total_parameters'] / 1e6:.1f} M"
        rows.append(f"| {mode} | {row['largest_difference']:.1e} | {total} | {row['active_over_parent']:.3f}x |")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    rows.append(f"\n{result['texts']} real texts; {versions}; {result['date']}; `{result['command']}`")
    return "\n".join(rows)


def exactness_summary() -> str:
    """The worst of that table, in a sentence."""
    result = json.loads((RESULTS / "exactness.json").read_text(encoding="utf-8"))
    worst = max(row["largest_difference"] for row in result["modes"].values())
    return (
        f"Upcycled all-MiniLM-L6-v2 differs from all-MiniLM-L6-v2 by at most {worst:.1e} in any number of any vector, over "
        f"{result['texts']} real texts and {len(result['modes'])} ways of routing: [table](docs/upcycling.md#how-exact), "
        f"`{result['command']}`."
    )


def quality() -> str:
    """The first fine-tuned mixture beside its parent on the shipped kit."""
    result = json.loads((RESULTS / "first-run-kit.json").read_text(encoding="utf-8"))
    mixture, parent = result["models"]
    rows = ["| shipped kit | metric | parent | mixture | difference, 95 % interval |", "|---|---|---|---|---|"]

    def cell(one: dict) -> str:
        text = f"{100 * one['value']:+.1f} [{100 * one['low']:+.1f}, {100 * one['high']:+.1f}]"
        return text if one["low"] <= 0 <= one["high"] else f"**{text}**"

    differences = parent["difference"]["tasks"]
    for task, score in mixture["tasks"].items():
        values = [f"{100 * row['tasks'][task]['score']:.1f}" for row in (parent, mixture)]
        rows.append(f"| {task} | {score['metric']} | {' | '.join(values)} | {cell(differences[task])} |")
    macros = " | ".join(f"{100 * row['macro']:.1f}" for row in (parent, mixture))
    rows.append(f"| **mean of {len(differences)}** | | {macros} | {cell(parent['difference']['macro'])} |")
    better = sum(one["low"] > 0 for one in differences.values())
    worse = sum(one["high"] < 0 for one in differences.values())
    rows.append(
        f"\nBeyond its interval better on {better} sets, worse on {worse}. Trained by `hagmoe train --config "
        f"docs/results/first-run.yaml --model all-MiniLM-L6-v2 --output_dir run` and scored by `{result['command']}` on "
        f"{result['date'][:10]}; intervals are a paired bootstrap over queries and items."
    )
    return "\n".join(rows)


def ablation() -> str:
    """What the largest budget that was run says about the same pairs for all."""
    return _ablation([f"ablation/{budget}/table{number}.md" for budget in ("long", "full", "medium") for number in (1, 3)])


def ablation_languages() -> str:
    """The same where an English parent learns other languages."""
    return _ablation([f"ablation/{budget}.md" for budget in ("mixed/table8", "translations/table7")])


def _ablation(tables: list[str]) -> str:
    """The first of these tables that is there, in the columns that a reader of the README wants."""
    found = next((table for table in tables if (RESULTS / table).exists()), None)
    if found is None:
        return "Not measured yet: [the ablation](docs/ablation.md) does it."
    text = (RESULTS / found).read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n\n")[2].splitlines()]
    headings = rows[0]
    shown = [place for place, heading in enumerate(headings) if heading not in LEFT_OUT]
    lines = [f"| {' | '.join(row[place] for place in shown)} |" for row in rows]
    setting, arms = text.split("\n\n")[1], text.split("\n\n")[3]
    return "\n".join([*lines, "", arms, "", f"{setting} More: [table](docs/results/{found}), [log](docs/log.md)."])


def times(page: str) -> str:
    """How long the commands of a page took."""
    path = RESULTS / "command-times.json"
    pages = json.loads(path.read_text(encoding="utf-8"))["pages"] if path.exists() else {}
    if not pages.get(page):
        return "Not timed yet: `python scripts/time_commands.py build/fresh docs/results/command-times.json` does it."
    rows = ["| in a fresh clone | seconds |", "|---|---|"]
    for name, entry in pages[page].items():
        code = "" if name.startswith("Python") else "`"
        rows.append(f"| {code}{name}{code} | {entry['seconds']:.0f} |")
    machines = sorted({f"{entry['machine']}, {entry['date']}" for entry in pages[page].values()})
    rows.append(f"\n{'; '.join(machines)}; `python scripts/time_commands.py build/fresh docs/results/command-times.json`")
    return "\n".join(rows)


def model_code_hash() -> str:
    """Twelve hex digits of the code that computes vectors: the files that travel to the Hub."""
    files = sorted(Path(hagmoe_hf.__file__).parent.glob("*_hagmoe.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def gpu() -> str:
    """What was checked on a GPU, or that nothing was, or that the model's code is newer."""
    path = RESULTS / "gpu-checks.json"
    command = "`python scripts/gpu_bench.py docs/results`"
    if not path.exists():
        return f"Not checked on a GPU yet: {command} does it in one call."
    result = json.loads(path.read_text(encoding="utf-8"))
    columns = ("padded against sdpa", "packed against padded")
    rows = [f"| attention | dtype | {' | '.join(columns)} | largest state |", "|---|---|---|---|---|"]
    for dtype in ("float32", "bfloat16"):
        for attention, row in result.get(f"attention {dtype}", {}).items():
            if "did not run" in row:
                values = [row["did not run"], "", ""]
            else:
                values = [*(_how_far(row[name]) for name in columns), f"{row['largest state']:.1e}"]
            rows.append(f"| {attention} | {dtype} | {' | '.join(values)} |")
    experts = {dtype: result.get(f"grouped_mm against eager {dtype}", {}) for dtype in ("float32", "bfloat16")}
    differences = [
        f"{row['largest difference']:.1e} of {row['largest output']:.1e} in {dtype}"
        for dtype, row in experts.items()
        if "largest difference" in row
    ]
    stale = (
        ""
        if result["code"] == model_code_hash()
        else f" **Stale**: the model's code has changed since; run {command} again."
    )
    exact = f"upcycled against parent {result['exactness float32']:.1e}"
    grouped = f"grouped_mm against the eager loop, in one layer: {', '.join(differences) or 'not run'}"
    rows.append(f"\n{result['machine']}; {exact}; {grouped}; {result['date']}.{stale}")
    return "\n".join(rows)


def _how_far(difference: dict) -> str:
    """The largest difference of two runs; beside it that of texts in which every token took the same experts in both."""
    largest, alike = difference["largest difference"], difference["largest difference in the other texts"]
    moved = difference["tokens at other experts"]
    if not moved:
        return f"{largest:.1e}"
    return f"{largest:.1e} ({moved:.1%} of tokens at other experts; " + (
        "in every text)" if alike is None else f"{alike:.1e} in texts without such)"
    )


def gpu_speed() -> str:
    """Speed against the parent on a GPU, or that it was not measured, or that the model's code is newer."""
    path, command = RESULTS / "gpu-bench.json", "`python scripts/gpu_bench.py docs/results`"
    if not path.exists():
        return f"Not measured on a GPU yet: {command} does it in one call."
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = ["| on a GPU | contestant | times as fast as the parent |", "|---|---|---|"]
    for workload, measured in result["measured"].items():
        if "did not run" in measured:
            rows.append(f"| {workload} | all | did not run: {measured['did not run']} |")
        for name, ratio in measured.get("speed", {}).items():
            cell = f"{ratio['median']:.2f} [{ratio['lower quartile']:.2f}, {ratio['upper quartile']:.2f}]"
            rows.append(f"| {workload} | {name} | {cell} |")
    stale = "" if result["code"] == model_code_hash() else f" **Stale**: the model's code has changed since; run {command}."
    counts = [
        f"{name} {sum(places.values())} ({dtype})"
        for dtype in ("bfloat16", "float32")
        for name, places in result["measured"].get(f"what makes the host wait, {dtype}", {}).items()
        if name != "did not run"
    ]
    rows.append(f"\nWaits of the host in one forward pass: {', '.join(counts) or 'not counted'}.")
    rows.append(f"{result['machine']}; {result['date']}.{stale}")
    return "\n".join(rows)


def speed() -> str:
    """Speed against the parent by workload, from the benchmark's JSON."""
    path = RESULTS / "benchmark.json"
    if not path.exists():
        return "Not measured yet: `make benchmark` does it."
    report = json.loads(path.read_text(encoding="utf-8"))
    text = markdown(report)
    head, tables = text.split("\n\n", 1)
    return tables.split("\n\n")[0] + "\n\n" + head


def calibration() -> str:
    """Groups of gates that start from texts alone, and from pairs."""
    result = json.loads((RESULTS / "calibration-pairs.json").read_text(encoding="utf-8"))
    head = "| gates start from | layer | a pair's texts in one group | texts of two pairs in one group | "
    rows = [head + "I(group; domain), bits | largest group over the mean one |", "|---|---|---|---|---|---|"]
    for start, layers in result["ways"]["default"].items():
        for layer in layers:
            one = layer["one_group"]
            cells = [start.split()[-1], layer["layer"], f"{one['with_positive']:.0%}", f"{one['with_negatives']:.0%}"]
            rows.append(f"| {' | '.join(map(str, cells))} | {layer['information']:.2f} | {layer['largest_group']:.2f} |")
    rows.append(f"\nPairs of 15 domains that the gates did not start from; {result['date']}; `{result['command']}`")
    return "\n".join(rows)


def specialization() -> str:
    """What each expert knows of the domain before and after a short training."""
    result = json.loads((RESULTS / "specialization.json").read_text(encoding="utf-8"))
    head = "| mixture | layer | I(expert; domain), bits | with shuffled labels: mean, largest | effective experts | "
    rows = [head + "query and positive in one group, and negative |", "|---|---|---|---|---|---|"]
    for name in ("fresh", "trained"):
        for layer in result[name]["layers"]:
            one, pairs = layer["information"]["expert;domain"], layer["pairs"]
            cells = [
                f"{one['bits']:.3f}",
                f"{one['baseline']:.3f}, {one['highest']:.3f}",
                f"{layer['load']['effective_experts']:.1f} of 8",
                f"{pairs['with_positive']:.0%}, {pairs['with_negatives']:.0%}",
            ]
            rows.append(f"| {name} | {layer['layer']} | {' | '.join(cells)} |")
    training = result["training"]
    rows.append(
        f"\n{training['max_steps']} steps of {training['per_device_train_batch_size']} pairs from 15 domains; "
        f"{result['trained']['texts']} unseen texts; {result['date']}; `{result['command']}`"
    )
    return "\n".join(rows)


def planted() -> str:
    """Whether the statistics see a router that was forced to separate languages."""
    result = json.loads((RESULTS / "planted-languages.json").read_text(encoding="utf-8"))
    rows = ["| statistic, smallest over layers | fresh router | planted router | if perfect |", "|---|---|---|---|"]

    def row(name: str, value: Callable[[dict], float], perfect: float) -> str:
        cells = [f"{min(map(value, result[kind]['layers'])):.2f}" for kind in ("fresh", "planted")]
        return f"| {name} | {cells[0]} | {cells[1]} | {perfect:.2f} |"

    label_entropy = result["planted"]["layers"][0]["I(group;language)"]["label_entropy"]
    pairs, tokens = "same group: pairs of one language, others", "two tokens share an expert: of one text, of any"
    divergence = "smallest divergence of two languages"
    rows.append(row("I(group; language), bits", lambda layer: layer["I(group;language)"]["bits"], label_entropy))
    rows.append(row("I(expert; language), bits", lambda layer: layer["I(expert;language)"]["bits"], label_entropy))
    rows.append(row("I(group; random label), bits", lambda layer: layer["I(group;random label)"]["bits"], 0))
    rows.append(row("Jensen-Shannon divergence of the two nearest languages", lambda layer: layer[divergence], 1))
    rows.append(row("pairs of one language in one group", lambda layer: layer[pairs][0], 1))
    rows.append(
        row("two tokens of a text share an expert, beyond any two", lambda layer: layer[tokens][0] - layer[tokens][1], 1)
    )
    purity = [f"{result[kind]['neighbours']['language']['by_routing']:.2f}" for kind in ("fresh", "planted")]
    rows.append(f"| nearest text by routing alone has the same language | {purity[0]} | {purity[1]} | 1.00 |")
    rows.append(f"\n{result['texts']} texts in 3 languages; {result['date']}; `{result['command']}`")
    return "\n".join(rows)


def trace_speed() -> str:
    """What recording costs."""
    result = json.loads((RESULTS / "trace-speed.json").read_text(encoding="utf-8"))
    by_block = result["throughput_over_encode_by_block"]
    return (
        f"{result['tokens']:,} tokens recorded at {result['throughput_over_encode']:.2f}x the throughput of plain `encode` "
        f"(median of {result['blocks']} blocks {by_block['median']:.2f}x, smallest {by_block['smallest']:.2f}x), in "
        f"{result['trace_bytes_per_token']:.0f} bytes per token, vectors included; {result['machine']}; {result['date']}; "
        f"`{result['command']}`"
    )


def load() -> str:
    """The server under load, in a burst, and with a worker killed."""
    path = RESULTS / "load-test.json"
    if not path.exists():
        return "Not measured yet: `python scripts/load_test.py docs/results/load-test.json` does it."
    result = json.loads(path.read_text(encoding="utf-8"))
    head = "| | requests | statuses (0: connection broken) | wrong vectors | largest difference from `encode` | texts/s |"
    rows = [f"{head} p50, p95 of answers |", "|---|---|---|---|---|---|---|"]
    names = {"load": "mixed, one in ten broken", "burst": "burst at a short queue", "killed_worker": "workers killed"}
    for key, name in names.items():
        phase = result[key]
        statuses = ", ".join(f"{count} x {status}" for status, count in phase["statuses"].items())
        cells = [
            f"{phase['requests']:,}",
            statuses,
            str(phase["wrong_vectors"]),
            f"{phase['largest_difference_from_encode']:.1e}",
            f"{phase['texts_per_second']:.0f}",
            f"{phase['p50_seconds']:.2f} s, {phase['p95_seconds']:.2f} s",
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    rows.append(
        f"\n{result['clients']} clients (twice as many in the burst); statuses other than the right one for their request: "
        f"{result['load']['unexpected_statuses']}; {result['model']}; {result['machine']}; {result['date']}; "
        f"`{result['command']}`"
    )
    return "\n".join(rows)


def bulk() -> str:
    """A bulk encoding that was killed twice, against plain encoding."""
    path = RESULTS / "bulk-check.json"
    if not path.exists():
        return "Not measured yet: `python scripts/bulk_check.py PAIRS.parquet docs/results/bulk-check.json` does it."
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = ["| run | ended by | shards before | shards after | seconds |", "|---|---|---|---|---|"]
    for number, run in enumerate(result["runs"], start=1):
        end = "kill -9" if run["returncode"] < 0 else "its end"
        rows.append(f"| {number} | {end} | {run['shards_before']} | {run['shards_after']} | {run['seconds']:.0f} |")
    rows.append(
        f"\n{result['input_rows']:,} rows in, {result['output_rows']:,} out; numbered in order: "
        f"{result['rows_numbered_in_order']}; ids of all rows equal, in order: {result['ids_equal_in_order']}; "
        f"{result['vectors_compared']:,} vectors compared with plain `encode`: largest difference "
        f"{result['largest_difference_from_plain_encode']:.1e}. {result['model']}, {result['max_seq_length']} tokens; "
        f"last run: {result['runs'][-1]['printed'][0]}; {result['machine']}; {result['date']}; `{result['command']}`"
    )
    return "\n".join(rows)


def export() -> str:
    """Exported graphs against torch: loss on the kit, speed against the parent."""
    result = json.loads((RESULTS / "export.json").read_text(encoding="utf-8"))
    kit, speed, checks = result["kit"], result["speed"], result["export"]["checks"]
    names = {"model.onnx": "mixture, ONNX float32", "model_qint8.onnx": "mixture, ONNX int8"}
    rows = ["| graph | MB | smallest cosine to torch | `encode`, times as fast as the parent | kit's mean against torch |"]
    rows.append("|---|---|---|---|---|")
    for file, name in names.items():
        loss = f"{kit['int8_minus_float32']:+.2f} points" if "int8" in name else "not measured"
        ratios = speed["over_parent"][name]
        cell = f"{speed['median_over_parent'][name]:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        size, cosine = result["export"]["megabytes"][file], checks[file]["smallest_cosine"]
        rows.append(f"| `{file}` | {size} | {cosine:.4f} | {cell} | {loss} |")
    rows.append(
        f"\nSpeed: {speed['texts']} texts of {speed['tokens_mean']:.0f} tokens on average, batches of "
        f"{speed['batch_size']}, {speed['threads']} threads, smallest and largest ratio in "
        f"brackets; {speed['date']}; `{speed['command']}`. "
        f"Kit: {len(kit['scores']['int8'])} sets; {kit['date']}; `{kit['command']}`."
    )
    return "\n".join(rows)


TABLES: dict[str, Callable[[], str]] = {
    "ablation": ablation,
    "ablation_languages": ablation_languages,
    "bulk": bulk,
    "calibration": calibration,
    "export": export,
    "exactness": exactness,
    "exactness_summary": exactness_summary,
    "gpu": gpu,
    "gpu_speed": gpu_speed,
    "load": load,
    "planted": planted,
    "quality": quality,
    "specialization": specialization,
    "speed": speed,
    "times_quickstart": lambda: times("docs/quickstart.md"),
    "times_readme": lambda: times("README.md"),
    "trace_speed": trace_speed,
}
FILES = (README, *(ROOT / f"docs/{name}.md" for name in ("analysis", "export", "quickstart", "serving", "upcycling")))


def filled(text: str) -> str:
    """`text` with every table made anew.

    Raises:
        KeyError: A marker names a table that `TABLES` does not know.
    """
    pattern = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3], text)


if __name__ == "__main__":
    for file in FILES:
        file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")
