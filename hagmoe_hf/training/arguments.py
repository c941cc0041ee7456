"""The train command's options: a dataclass beside the trainer's own, from defaults, a YAML file and the command line."""

import argparse
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from inspect import formatannotation
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import HfArgumentParser

from .losses import LOSSES
from .yaml_files import read_yaml

OBJECTIVES = ("embedding", "mlm")
PRESET_FOLDER = Path(__file__).parent / "presets"
PRESETS = tuple(sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml")))
RECIPE_FOLDER = Path(__file__).parent / "recipes"
RECIPES = tuple(sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml")))
NO_RECIPE = "none"
# Options that say which recipe, and what it gives
_RECIPE_FOLLOWS = ("recipe", "domain_losses", "learning_rate", "ngram_memory_size")
LORA_TARGETS = ("experts", "router")


def _help(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


@dataclass
class TrainOptions:
    """What to train, on what and how; the trainer's own settings are `SentenceTransformerTrainingArguments`.

    A recipe acts where `parse` reads options; whoever makes this object gives all of them.

    Raises:
        ValueError: Options that are not possible, alone or together; the message names option, value and what is allowed.
    """

    model: str | None = field(
        default=None, metadata=_help("Folder or Hub id: a HAG-MoE, or a dense model, which is upcycled first.")
    )
    objective: str = field(
        default="embedding", metadata=_help("Train text embeddings, or a masked language model.", choices=OBJECTIVES)
    )
    recipe: str | None = field(
        default=None,
        metadata=_help(
            "Defaults of the other options that were measured together: by default 'languages' where domain_losses names "
            "'translation', and none otherwise.",
            choices=(NO_RECIPE, *RECIPES),
        ),
    )
    train_data: list[str] = field(
        default_factory=list, metadata=_help("Files (.parquet, .jsonl, .csv), or names for datasets.load_dataset.")
    )
    train_split: str = field(default="train", metadata=_help("The split of datasets.load_dataset."))
    eval_data: list[str] = field(
        default_factory=list, metadata=_help("As train_data, for the loss on data that is not trained on.")
    )
    columns: list[str] = field(
        default_factory=list, metadata=_help("Text columns in the loss's order; by default those that fit the loss.")
    )
    label_column: str | None = field(default=None, metadata=_help("Column of numbers; 'label' for losses that need one."))
    domain_column: str | None = field(default=None, metadata=_help("Column of names; each becomes a dataset of its own."))
    where: list[str] = field(
        default_factory=list,
        metadata=_help("COLUMN=VALUE that rows must have, such as split=train, or COLUMN!=VALUE that they must not have."),
    )
    max_rows: int | None = field(default=None, metadata=_help("Train on a random sample of so many rows."))
    temperature: float = field(
        default=1.0, metadata=_help("T of the domains' weights n^(1/T): 1 in proportion, inf uniform.")
    )
    one_domain_batches: bool = field(default=True, metadata=_help("Make each batch of one domain, instead of rows of all."))

    loss: str = field(default="multiple_negatives_ranking", metadata=_help("The loss.", choices=tuple(LOSSES)))
    loss_options: dict | str | None = field(
        default=None, metadata=_help('Its keyword arguments as JSON, such as {"scale": 20}.')
    )
    domain_losses: dict | str | None = field(
        default=None,
        metadata=_help('Domains with another loss than the others, as JSON, such as {"bitext": "translation"}.'),
    )
    matryoshka_dims: list[int] = field(default_factory=list, metadata=_help("Widths at which the loss is taken as well."))
    teacher: str | None = field(
        default=None,
        metadata=_help(
            "Folder or Hub id of the teacher, for the distill losses; for 'translation' and 'ranking_distill_kl' by default "
            "the model itself, as it is before training."
        ),
    )

    sparse_layers: list[int] | None = field(
        default=None,
        metadata=_help(
            "Upcycling: layers that become mixtures, in a file also [] for none (a memory alone); by default every second "
            "one but the last, or all where texts stay."
        ),
    )
    n_group: int | None = field(default=None, metadata=_help("Upcycling: expert groups; 4, or 2 where texts stay."))
    num_experts: int | None = field(
        default=None, metadata=_help("Upcycling: routed experts per sparse layer; 8, or one per group where texts stay.")
    )
    num_experts_per_tok: int = field(default=1, metadata=_help("Upcycling: routed experts that each token passes."))
    topk_group: int = field(default=1, metadata=_help("Upcycling: groups that stay open for a text."))
    shared_expert_fraction: float | None = field(
        default=None,
        metadata=_help("Upcycling: share of neurons that every token passes; 0.5, or 0 where texts stay."),
    )
    group_routing: str = field(
        default="sequence", metadata=_help("Upcycling: who opens groups.", choices=("sequence", "token"))
    )
    group_input: str | None = field(
        default=None,
        metadata=_help(
            "Upcycling: what a text's groups are chosen from; by default word embeddings where texts stay.",
            choices=("hidden_states", "word_embeddings"),
        ),
    )
    combine_rule: str = field(
        default="selection", metadata=_help("Upcycling: weights of experts.", choices=("selection", "normalized"))
    )
    calibration_rows: int = field(
        default=0,
        metadata=_help(
            "Upcycling: start the gates from so many rows of the largest domain, and of the others as training draws them; "
            "where texts stay and some have translations, from these."
        ),
    )
    ngram_memory_size: int = field(
        default=0,
        metadata=_help(
            "Upcycling: so many n-grams that are frequent in train_data get a memory, where texts stay and some have "
            "translations those of these; 0 for none."
        ),
    )
    fit_translations: bool = field(
        default=False,
        metadata=_help("Upcycling, loss 'translation': start the memory from the translations, by least squares."),
    )
    dictionaries: list[str] = field(
        default_factory=list,
        metadata=_help(
            "Upcycling, with fit_translations: files like train_data of words (column anchor) and their translations "
            "(positive). The memory knows them and starts from them; nothing is trained on them."
        ),
    )

    preserve: bool = field(
        default=False,
        metadata=_help(
            "Upcycling: texts like those of the first column keep the parent's vectors; what the others teach goes into "
            "other groups and the memory."
        ),
    )
    preserve_experts: bool = field(
        default=False,
        metadata=_help(
            "Upcycling: as preserve, but only the experts and the gates of such texts stay: their vectors move little, and "
            "the others learn more."
        ),
    )
    preserve_where: str | None = field(
        default=None,
        metadata=_help(
            "With preserve or preserve_experts: COLUMN=VALUE, such as lang=en, of rows whose texts are of the kind that "
            "stays; those of other rows are not. Translations speak for themselves."
        ),
    )
    preserved_rate: float = field(
        default=0.0,
        metadata=_help("With preserve_experts: factor on the learning rate of these experts; over 0 they learn slowly."),
    )

    interpolation: float = field(
        default=1.0,
        metadata=_help(
            "Part of their way at which the weights are left after training, but for a memory's; under 1 a model keeps more "
            "of what it knew."
        ),
    )

    balance: bool = field(default=True, metadata=_help("Balance the experts and log how they do (RouterCallback)."))
    bias_update_rate: float | None = field(
        default=None, metadata=_help("Step of the balancing bias; RouterCallback's own where not given.")
    )
    aux_loss_coef: float = field(default=0.0, metadata=_help("Coefficient of the load-balance term."))
    z_loss_coef: float = field(default=0.0, metadata=_help("Coefficient of the router z-loss."))
    curriculum: str | None = field(default=None, metadata=_help("YAML file of phases."))
    freeze: list[str] = field(
        default_factory=list, metadata=_help("Patterns of encoder parameters to hold still, such as 'embeddings.*'.")
    )
    lora_rank: int = field(
        default=0, metadata=_help("Train low-rank adapters of this rank instead of the weights; 0 for none.")
    )
    lora_alpha: float = field(default=16.0, metadata=_help("The adapters' scale is lora_alpha / lora_rank."))
    lora_targets: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS), metadata=_help("What gets adapters.", choices=LORA_TARGETS)
    )

    preset: str | None = field(
        default=None, metadata=_help("mlm: size of a model from scratch, instead of a model.", choices=PRESETS)
    )
    vocab_size: int = field(
        default=30522, metadata=_help("mlm: size of the tokenizer that is trained on the texts of a model from scratch.")
    )
    mlm_probability: float = field(default=0.3, metadata=_help("mlm: share of tokens that are masked."))
    max_length: int | None = field(
        default=None,
        metadata=_help(
            "Longest text in tokens while training, the model's own where not given; the trained model reads at least as "
            "much of a text as before."
        ),
    )
    resume: bool = field(default=False, metadata=_help("Go on from the newest whole checkpoint in output_dir."))

    def __post_init__(self):
        _require(isinstance(self.loss_keywords, dict), "loss_options", self.loss_options, "a JSON object")
        _require(isinstance(self.losses_by_domain, dict), "domain_losses", self.domain_losses, "a JSON object")
        for name, allowed in (
            ("objective", OBJECTIVES),
            ("loss", LOSSES),
            ("preset", (None, *PRESETS)),
            ("recipe", (None, NO_RECIPE, *RECIPES)),
        ):
            _require(getattr(self, name) in allowed, name, getattr(self, name), f"one of {list(allowed)}")
        _require(bool(self.train_data), "train_data", self.train_data, "at least one file or dataset name")
        _require(self.temperature >= 1, "temperature", self.temperature, "1 (in proportion) or more")
        _require(self.max_rows is None or self.max_rows >= 1, "max_rows", self.max_rows, "at least 1")
        _require(self.calibration_rows >= 0, "calibration_rows", self.calibration_rows, "0 (random gates) or more")
        _require(self.ngram_memory_size >= 0, "ngram_memory_size", self.ngram_memory_size, "0 (no memory) or more")
        _require(0 < self.mlm_probability < 1, "mlm_probability", self.mlm_probability, "a share between 0 and 1")
        _require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "0 or more")
        for condition in self.where:
            _require("=" in condition, "where", condition, "COLUMN=VALUE or COLUMN!=VALUE")
        wanted = [condition for condition in self.where if not _excludes(condition)]
        _require(len(self.conditions) == len(wanted), "where", self.where, "one value of each column")
        from_scratch = self.objective == "mlm" and self.model is None
        _require(bool(self.model) or from_scratch, "model", self.model, "a folder or Hub id")
        _require(
            (self.preset is not None) == from_scratch,
            "preset",
            self.preset,
            f"one of {list(PRESETS)} for mlm without a model",
        )
        self._check_domain_losses()
        self._check_teacher()
        if self.calibration_rows and self.objective == "mlm":
            _require(False, "calibration_rows", self.calibration_rows, "0 with objective='mlm'")
        if self.ngram_memory_size and self.objective == "mlm":
            _require(False, "ngram_memory_size", self.ngram_memory_size, "0 with objective='mlm'")
        if self.fit_translations:
            has_translations = any(LOSSES[name].first_column_only for name in self.losses)
            _require(
                has_translations, "loss", self.loss, "'translation', here or in domain_losses, with fit_translations=True"
            )
            size = self.ngram_memory_size
            _require(size > 0, "ngram_memory_size", size, "an integer of at least 1 with fit_translations=True")
        given = self.dictionaries
        _require(self.fit_translations or not given, "dictionaries", given, "none without fit_translations=True")
        if self.preserve and self.preserve_experts:
            _require(False, "preserve_experts", True, "False with preserve=True, which keeps more")
        told = self.preserve_where
        _require(told is None or self.preserves, "preserve_where", told, "None without preserve or preserve_experts")
        _require(told is None or ("=" in told and not _excludes(told)), "preserve_where", told, "COLUMN=VALUE")
        _require(
            told is None or not self.calibration_rows, "calibration_rows", self.calibration_rows, "0 with preserve_where"
        )
        rate = self.preserved_rate
        _require(0 <= rate <= 1, "preserved_rate", rate, "a number from 0 to 1")
        _require(self.preserve_experts or not rate, "preserved_rate", rate, "0 without preserve_experts=True")
        part = self.interpolation
        _require(0 < part <= 1, "interpolation", part, "a number over 0, up to 1")
        _require(self.objective == "embedding" or part == 1, "interpolation", part, "1 with objective='mlm'")
        _require(not self.lora_rank or part == 1, "interpolation", part, "1 with adapters, which have lora_alpha")
        if self.preserves:
            refuse_to_move_preserved(self)
        if self.columns and self.objective == "embedding":
            least = len(LOSSES[self.loss].columns)
            _require(len(set(self.columns)) == len(self.columns), "columns", self.columns, "each column once")
            _require(len(self.columns) >= least, "columns", self.columns, f"{least} or more with loss={self.loss!r}")
        if "translation" in self.losses and self.columns:
            _require(len(self.columns) == 2, "columns", self.columns, "two with loss='translation': text, translation")
        if self.lora_rank and self.objective == "mlm":
            _require(False, "lora_rank", self.lora_rank, "0 with objective='mlm'")

    @property
    def preserves(self) -> bool:
        """Whether texts like those of the first column have experts that stay."""
        return self.preserve or self.preserve_experts

    def _check_teacher(self) -> None:
        taught = [name for name in self.losses if LOSSES[name].needs_teacher and self.objective == "embedding"]
        _require(self.teacher is None or bool(taught), "teacher", self.teacher, "None with this loss or objective")
        lacking = [f"loss={name!r}" for name in taught if not LOSSES[name].teaches_itself and self.teacher is None]
        _require(not lacking, "teacher", None, f"a folder or Hub id for {' and '.join(lacking)}")

    def _check_domain_losses(self) -> None:
        for domain, name in self.losses_by_domain.items():
            is_known = isinstance(name, str) and name in LOSSES
            _require(is_known, f"domain_losses[{domain!r}]", name, f"one of {list(LOSSES)}")
            same = [other for other in LOSSES if self._rows_of(other) == self._rows_of(self.loss)]
            allowed = f"with loss={self.loss!r}, which has the same columns, {same}"
            _require(name in same, f"domain_losses[{domain!r}]", name, allowed)
        if self.losses_by_domain:
            _require(self.objective == "embedding", "domain_losses", self.domain_losses, "None with objective='mlm'")
            _require(self.domain_column is not None, "domain_column", self.domain_column, "a column, with domain_losses")
            _require(self.one_domain_batches, "one_domain_batches", self.one_domain_batches, "True with domain_losses")
            _require(not self.matryoshka_dims, "matryoshka_dims", self.matryoshka_dims, "none with domain_losses")

    @staticmethod
    def _rows_of(loss: str) -> tuple[tuple[str, ...], bool]:
        return LOSSES[loss].columns, LOSSES[loss].needs_label

    @property
    def loss_keywords(self) -> dict[str, Any]:
        """`loss_options` as a dictionary; a YAML file holds one already."""
        return _json("loss_options", self.loss_options)

    @property
    def losses_by_domain(self) -> dict[str, str]:
        """`domain_losses` as a dictionary."""
        return _json("domain_losses", self.domain_losses)

    @property
    def losses(self) -> tuple[str, ...]:
        """Every loss that is taken somewhere, `loss` first."""
        return tuple(dict.fromkeys([self.loss, *self.losses_by_domain.values()]))

    def loss_of(self, domain: str) -> str:
        """The loss of a domain."""
        return self.losses_by_domain.get(domain, self.loss)

    @property
    def conditions(self) -> dict[str, str]:
        """Of `where` what rows must have, as column -> value."""
        return dict(one.split("=", 1) for one in self.where if not _excludes(one))

    @property
    def exclusions(self) -> dict[str, list[str]]:
        """Of `where` what rows must not have, as column -> values."""
        found: dict[str, list[str]] = {}
        for column, value in (one.split("!=", 1) for one in self.where if _excludes(one)):
            found.setdefault(column, []).append(value)
        return found

    @property
    def upcycling(self) -> dict[str, Any]:
        """The options of `upcycle`."""
        names = ("n_group", "num_experts", "num_experts_per_tok", "topk_group", "shared_expert_fraction")
        options = {name: getattr(self, name) for name in (*names, "group_routing", "group_input", "combine_rule")}
        return {"sparse_layers": self.sparse_layers, **options}

    @property
    def only_for_upcycling(self) -> str:
        """The first option, as NAME=VALUE, that is given and means nothing for a mixture; "" where there is none.

        Not `sparse_layers`: an empty list also says that there are no experts to balance.
        """
        names = {"fit_translations", "calibration_rows", "ngram_memory_size", *self.upcycling} - {"sparse_layers"}
        defaults = {field.name: field.default for field in fields(self)}
        given = (name for name in defaults if name in names and getattr(self, name) != defaults[name])
        return next((f"{name}={getattr(self, name)!r}" for name in given), "")


def parse(arguments: Sequence[str]) -> tuple[TrainOptions, SentenceTransformerTrainingArguments]:
    """Read options: the command line overrides the YAML file of `--config`, which overrides the recipe and the defaults.

    Args:
        arguments: What follows the command's name.

    Raises:
        ValueError: An option of the YAML file that does not exist or has the wrong type, or a value that is not possible.
        OSError: The YAML file cannot be read.
        SystemExit: argparse refused the command line, or was asked for help.
    """
    kinds: Any = [TrainOptions, SentenceTransformerTrainingArguments]
    usage = "hagmoe train [--config FILE] [--OPTION VALUE ...]"
    parser = HfArgumentParser(kinds, usage=usage, description="Train a HAG-MoE.", allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of the options below.")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS, usage=usage)
    for name in ("config", *_RECIPE_FOLLOWS):
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    given = vars(first.parse_known_args(list(arguments))[0])
    in_file = _read_config(given["config"]) if given.get("config") else {}
    recipe = _recipe({**in_file, **given})
    parser.set_defaults(**recipe)
    parser.set_defaults(**{name: value for name, value in in_file.items() if name != "recipe" or value is not None})
    try:
        options, training = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)[:2]
    except ValueError as error:
        if not recipe:
            raise
        hint = f"(Recipe {recipe['recipe']!r} gives what you do not give; recipe={NO_RECIPE!r} turns it off.)"
        raise ValueError(f"{error} {hint}") from error
    for pattern, rate in (training.learning_rate_mapping or {}).items():
        is_rate = isinstance(rate, int | float) and not isinstance(rate, bool)
        _require(is_rate, f"learning_rate_mapping[{pattern!r}]", rate, "a number")
    return options, training


def _recipe(given: dict[str, Any]) -> dict[str, Any]:
    """The defaults of the recipe that is asked for, or that fits the losses; none where it is to be none, or is unknown.

    Its rates of some parameters stand in their proportion to a learning rate that is given.
    """
    name = given.get("recipe")
    if name is None:
        losses = _json("domain_losses", given.get("domain_losses"))
        name = "languages" if isinstance(losses, dict) and "translation" in losses.values() else NO_RECIPE
    if name not in RECIPES:
        return {}
    recipe = {**_read_config(str(RECIPE_FOLDER / f"{name}.yaml")), "recipe": name}
    if str(given.get("ngram_memory_size")) == "0":  # nothing there to freeze
        recipe["freeze"] = [pattern for pattern in recipe["freeze"] if not pattern.startswith("ngram_memory")]
    if given.get("sparse_layers") == []:  # no experts there to have a rate
        del recipe["learning_rate_mapping"]
        return recipe
    with contextlib.suppress(TypeError, ValueError):  # what is no number is refused by the parser
        times = float(given.get("learning_rate", recipe["learning_rate"])) / recipe["learning_rate"]
        recipe["learning_rate_mapping"] = {part: times * rate for part, rate in recipe["learning_rate_mapping"].items()}
    return recipe


def _read_config(path: str) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config={path} is not YAML ({error}); allowed: a YAML mapping of options.") from error
    if not isinstance(content, dict):
        raise ValueError(f"config={path} is not a mapping; allowed: a YAML mapping of options.")
    types: dict[str, Any] = {}
    for kind in (TrainOptions, SentenceTransformerTrainingArguments):
        hints = get_type_hints(kind)
        types |= {f.name: hints[f.name] for f in fields(kind) if f.init}
    for name, value in content.items():
        if name not in types:
            raise ValueError(f"{path}: unknown option {name!r}; allowed: {', '.join(sorted(types))}.")
        fitting = [candidate for candidate in (value, [value]) if _fits(candidate, types[name])]
        if not fitting:
            raise ValueError(f"{path}: {name}={value!r} is not possible; allowed: {formatannotation(types[name])}.")
        content[name] = fitting[0]
    return content


def _fits(value: Any, kind: Any) -> bool:
    """Whether a YAML value is of a type; enumerations and what YAML cannot hold, such as functions, are not looked at."""
    origin = get_origin(kind) or kind
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if origin is list:
        of = get_args(kind)
        return isinstance(value, list) and (of not in ((int,), (str,)) or all(type(item) in of for item in value))
    if origin in (bool, int, float):  # argparse converts texts
        return type(value) in (origin, str) or (origin is float and type(value) is int)
    return origin not in (str, dict, NoneType) or type(value) is origin


def _json(option: str, value: Any) -> Any:
    """An option that is JSON on the command line and a mapping in a YAML file; an empty dictionary where not given."""
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option}={value!r} is not possible; allowed: a JSON object.") from error


def _excludes(condition: str) -> bool:
    """Whether it is COLUMN!=VALUE; a value may hold anything."""
    return condition.partition("=")[0].endswith("!")


def _require(holds: bool, option: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{option}={value!r} is not possible; allowed: {allowed}.")


def refuse_to_move_preserved(options: TrainOptions, weight_decay: float = 0.0) -> None:
    """Refuse what would move the experts of preserved texts.

    Args:
        options: Of a run on a mixture that preserves its first group.
        weight_decay: Of the optimizer, which shrinks weights without a gradient.

    Raises:
        ValueError: An objective, adapters, phases or a weight decay that would.
    """
    why = "a mixture that preserves texts"
    _require(options.objective == "embedding", "objective", options.objective, f"'embedding' for {why}")
    _require(not options.lora_rank, "lora_rank", options.lora_rank, f"0 for {why}")
    _require(options.curriculum is None, "curriculum", options.curriculum, f"None for {why}")
    _require(not weight_decay, "weight_decay", weight_decay, f"0 for {why}")
