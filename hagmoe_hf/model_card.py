"""Model cards, filled from what the code knows; no number in them is typed by hand.

A card is written when a model is upcycled, made true when it was trained, replaced by a whole one when it was measured
(`hagmoe card`), and completed when it is published.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration_hagmoe import HagMoeConfig

TEMPLATE = Path(__file__).with_suffix(".md")
TAGS = ("sentence-transformers", "mixture-of-experts", "hagmoe")

USAGE = """```python
import hagmoe_hf  # registers the architecture, once per process
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/or/hub-id/of/this/model")
vectors = model.encode(["a text", "another one"])
```"""


ENCODER_USAGE = """```python
import hagmoe_hf  # registers the architecture, once per process
from transformers import AutoModel

model = AutoModel.from_pretrained("path/or/hub-id/of/this/model")
```"""
REGISTERED = "import hagmoe_hf  # registers the architecture, once per process\n"
STOCK_INSTALL = "pip install -U sentence-transformers"
STOCK_IMPORT = "from sentence_transformers import SentenceTransformer\n"
SOURCES = {  # option -> the file that it takes, the command that writes it, and what a card needs of it
    "data": ("data_report.json", "hagmoe train", ("read", "kept", "skipped", "domains", "stated")),
    "evaluation": ("report.json", "hagmoe evaluate", ("command", "date", "versions", "models")),
    "benchmark": (
        "benchmark.json",
        "hagmoe benchmark",
        ("command", "date", "versions", "processor", "threads", "workloads"),
    ),
}
MODEL_KEYS = ("label", "macro", "worst_domain", "tasks", "domains", "languages")  # of each model of an evaluation
PLACEHOLDERS = ("path/or/hub-id/of/this/model", "sentence_transformers_model_id")


def usage_of(model_type: str) -> str:
    """How a model of a sentence-transformers class, such as "CrossEncoder", is loaded and called: a block of Python."""
    usage = USAGE.replace("SentenceTransformer", model_type)
    if model_type == "CrossEncoder":
        usage = re.sub(r"vectors = .*", 'scores = model.predict([("a text", "another one")])', usage)
    return usage


def published_card(card: str, repo_id: str, model_type: str | None) -> str:
    """A saved model's card, with the repository's name in its snippets and a way to load it without this package.

    Args:
        card: The card that was saved with the model, "" where there was none.
        repo_id: "owner/name" on the Hub.
        model_type: Its sentence-transformers class, such as "SentenceTransformer"; None for a bare transformers model.

    Returns:
        Markdown with a YAML head.
    """
    usage = usage_of(model_type) if model_type else ENCODER_USAGE
    if not card.strip():
        head = ModelCardData(library_name="transformers", tags=["mixture-of-experts", "hagmoe"])
        card = f"---\n{head.to_yaml()}\n---\n\n# HAG-MoE\n\nA mixture-of-experts text encoder.\n"
    if "import hagmoe_hf" not in card:
        card = f"{card.rstrip()}\n\n## Load\n\n{usage}\n"
    without_package = usage.replace(REGISTERED, "")
    without_package = without_package.replace('of/this/model")', 'of/this/model", trust_remote_code=True)')
    card = re.sub(
        r"^## Load without hagmoe_hf\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL
    )  # published before
    card = f"{card.rstrip()}\n\n## Load without hagmoe_hf\n\nThe code beside the weights needs `requirements.txt`.\n\n"
    card += f"{without_package}\n"
    for placeholder in PLACEHOLDERS:
        card = card.replace(placeholder, repo_id)
    return card


def upcycled_card(
    report: str,
    parent_card: str,
    model_type: str = "SentenceTransformer",
    pipeline_tag: str | None = "sentence-similarity",
) -> str:
    """The card of a mixture that was upcycled and not trained yet.

    Args:
        report: The printed upcycling report.
        parent_card: The parent's card, "" where there is none; its licence, languages and data apply to the mixture, too.
        model_type: The sentence-transformers class.
        pipeline_tag: What the Hub lists it under.

    Returns:
        Markdown with a YAML head.
    """
    parent = ModelCard(parent_card, ignore_metadata_errors=True)
    inherited = {key: value for key, value in parent.data.to_dict().items() if key in ("license", "language", "datasets")}
    head = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag=pipeline_tag,
        tags=list(TAGS),
        **inherited,
    )
    body = f"""# HAG-MoE, upcycled

A mixture-of-experts text encoder made from a dense one by copying and splitting its weights. It has not been trained since:
its {"scores" if model_type == "CrossEncoder" else "vectors"} are its parent's, and its router has learned nothing yet.

```
{report}
```

{usage_of(model_type)}
"""
    if parent.text.strip():
        body += f"\n# The parent's model card\n\n{parent.text.strip()}\n"
    return f"---\n{head.to_yaml()}\n---\n\n{body}"


def trained_card(card: str, rows: str) -> str:
    """sentence-transformers' own card of a trained model, with what loading a HAG-MoE needs, and what was read to train it.

    Args:
        card: What sentence-transformers generated.
        rows: The printed report of the rows.
    """
    if REGISTERED not in card:
        card = card.replace(STOCK_INSTALL, 'pip install "hagmoe_hf[sentence]"', 1)
        card = card.replace(STOCK_IMPORT, REGISTERED + STOCK_IMPORT, 1)
        card = f"{card.rstrip()}\n\n## Rows trained on\n\n```\n{rows}\n```\n"
    return card


def measured_card(
    config: HagMoeConfig,
    *,
    name: str,
    command: str,
    base_model: str | None = None,
    license: str | None = None,
    training: Mapping[str, Any] | None = None,
    notes: str | None = None,
    data: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    benchmark: Mapping[str, Any] | None = None,
) -> str:
    """The whole card of a trained mixture; of what was not given it says that it was not measured or not stated.

    Args:
        config: The mixture's.
        name: What the card calls the model.
        command: What was typed to make the card.
        base_model: The parent's Hub id.
        license: Of the weights, as the Hub abbreviates it, such as "apache-2.0".
        training: Options of `hagmoe train`, as in its YAML file.
        notes: Markdown about the training, for what none of the other files says.
        data: A run's `data_report.json`.
        evaluation: The report.json of `hagmoe evaluate`, the model first; what it is bad at is said beside the others in it.
        benchmark: The benchmark.json of `hagmoe benchmark`, of a mixture of this shape.

    Returns:
        Markdown with a YAML head, in which the Hub finds the scores (`model-index`).

    Raises:
        ValueError: `data`, `evaluation` or `benchmark` is not what its command writes.
    """
    from jinja2 import Environment, StrictUndefined

    for option, content in (("data", data), ("evaluation", evaluation), ("benchmark", benchmark)):
        if content is not None:
            _refuse_other_files(option, content)
    head = ModelCardData(
        language=sorted(evaluation["models"][0]["languages"]) if evaluation else None,
        license=license,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        base_model=base_model,
        tags=list(TAGS),
        model_name=name,
        eval_results=_eval_results(evaluation) if evaluation else None,
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        head=head.to_yaml(),
        usage=USAGE,
        config=config,
        counts=config.parameter_counts(),
        name=name,
        command=command,
        base_model=base_model,
        license=license,
        training=training,
        notes=notes.strip() if notes else None,
        data=data,
        evaluation=evaluation,
        comparisons=[_compared(evaluation, other) for other in evaluation["models"][1:]] if evaluation else [],
        benchmark=benchmark,
        speeds=_speeds(benchmark) if benchmark else {},
    )


def _refuse_other_files(option: str, content: Mapping[str, Any]) -> None:
    file, command, keys = SOURCES[option]
    missing = [key for key in keys if key not in content]
    if option == "evaluation" and not missing:
        missing = [f"models/{key}" for model in content["models"] or [{}] for key in MODEL_KEYS if key not in model]
    if missing:
        raise ValueError(f"{option} without {missing[0]!r} is not possible; allowed: the {file} that `{command}` writes.")


def _eval_results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """The scores of an evaluation's first model, as the Hub lists them."""
    return [
        EvalResult(
            task_type=task["type"],
            dataset_type="hagmoe-kit",
            dataset_name=f"{task_name} ({task['domain']})",
            dataset_config=task_name,
            dataset_revision=task["revision"],
            metric_type=task["metric"],
            metric_value=task["score"],
        )
        for task_name, task in evaluation["models"][0]["tasks"].items()
    ]


def _compared(evaluation: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """How the first model of an evaluation stands beside another one, worst first.

    Returns:
        `label`, `macro` and `tasks`: scores and differences; `verdict` is "worse" or "better" where the interval leaves out
        0, "lower" or "level" where it does not.
    """
    model, gaps = evaluation["models"][0], other["difference"]
    tasks = [
        {
            "name": name,
            "metric": model["tasks"][name]["metric"],
            "score": model["tasks"][name]["score"],
            "other": other["tasks"][name]["score"],
            "verdict": _verdict(gap),
            **gap,
        }
        for name, gap in sorted(gaps["tasks"].items(), key=lambda item: item[1]["value"])
    ]
    macro = {**gaps["macro"], "verdict": _verdict(gaps["macro"])}
    return {"label": other["label"], "macro": macro, "tasks": tasks}


def _verdict(gap: Mapping[str, float | None]) -> str:
    value, low, high = gap["value"] or 0.0, gap["low"], gap["high"]
    if high is not None and high < 0:
        return "worse"
    if low is not None and low > 0:
        return "better"
    return "lower" if value < 0 else "level"


def _speeds(benchmark: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Workload -> the default mixture's speed against its parent: median and quartiles."""
    key = "speed against the parent"
    return {
        result["what"]: result[key]["mixture"]
        for result in benchmark["workloads"].values()
        if "mixture" in result.get(key, {})
    }
