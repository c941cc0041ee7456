"""The train command: from options to a folder that holds a model."""

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch import nn
from transformers import TrainerCallback, set_seed

from .. import sentence
from ..files import new_folder
from ..modeling_hagmoe import HagMoePreTrainedModel
from ..translations import fit_translations
from ..upcycling import freeze_preserved, upcycle
from .arguments import NO_RECIPE, RECIPES, TrainOptions, parse, refuse_to_move_preserved
from .curriculum import CurriculumCallback, read_curriculum
from .data import LABEL, WITHOUT_DOMAINS, DataReport, load_rows, refuse_too_small, text_length
from .interpolation import interpolate, weights_to_learn
from .lora import add_lora, merge_lora
from .losses import LOSSES, TaughtLoss, build_loss, with_teacher_vectors
from .mlm import train_masked_lm
from .output import MODEL_FOLDER, CardCallback, alone_in_output, save_whole, say, where_to_begin, write_report
from .parameters import freeze
from .sampling import DomainBatchSampler
from .slow_experts import SlowExpertsCallback

DICTIONARY_COLUMNS = ("anchor", "positive")
BASE_FOLDER = "base"  # what adapters are for, where the model was upcycled in this run


def main(arguments: list[str]) -> None:
    """Train as the command line says; a mistake raises what `parse` and `train` raise."""
    train(*parse(arguments))
    # A process group that is alive at a rank's exit may abort it, its model written; what trained holds it, in cycles
    gc.collect()
    PartialState().destroy_process_group()


def train(options: TrainOptions, arguments: SentenceTransformerTrainingArguments) -> Path:
    """Train a model and save it.

    Args:
        options: What to train, on what and how.
        arguments: The trainer's settings; `output_dir` is a new or empty folder, or with `resume` one that this function
            wrote. It receives the checkpoints, `data_report.json` and, last, `model/`.

    Returns:
        The folder of the trained model, a `SentenceTransformer`.

    Raises:
        FileExistsError: `output_dir` holds something already.
        BlockingIOError: Another run writes there.
        ValueError: Options, data or model that do not fit together.
        ImportError: An optional library is missing.
    """
    if arguments.resume_from_checkpoint:
        raise ValueError(
            f"resume_from_checkpoint={arguments.resume_from_checkpoint!r} is not possible; allowed: --resume, which goes on "
            "from the newest checkpoint in output_dir."
        )
    final = Path(str(arguments.output_dir)) / MODEL_FOLDER
    with alone_in_output(arguments, options.resume):
        with arguments.main_process_first(desc="looking at output_dir"):
            checkpoint = where_to_begin(arguments)
        PartialState().wait_for_everyone()  # before the first process writes there
        if final.exists():
            say(arguments, f"{final} is there already: nothing to do.")
            return final
        set_seed(arguments.seed)  # new weights are made before the trainer does this
        if options.objective == "mlm":
            train_masked_lm(options, arguments, callbacks(options), checkpoint, final)
        else:
            _train_embeddings(options, arguments, checkpoint, final)
    return final


def callbacks(options: TrainOptions) -> list[TrainerCallback]:
    """The callbacks that the options ask for."""
    wanted: list[TrainerCallback] = []
    router_callback = None
    if options.balance and options.sparse_layers != []:
        from .router_callback import RouterCallback

        names = ("bias_update_rate", "aux_loss_coef", "z_loss_coef")
        given = {name: value for name in names if (value := getattr(options, name)) is not None}
        router_callback = RouterCallback(**given)
        wanted.append(router_callback)
    if options.preserved_rate and options.sparse_layers != []:
        wanted.append(SlowExpertsCallback(options.preserved_rate))
    if options.curriculum:  # first, so that a phase is in force when its first step begins for the others
        wanted.insert(0, CurriculumCallback(read_curriculum(options.curriculum), router_callback))
    return wanted


class HagMoeTrainer(SentenceTransformerTrainer):
    """The stock trainer, with rows of several domains in an order that a resumed run finds again.

    Args:
        temperature: As for `DomainBatchSampler`.
        one_domain_batches: As for `DomainBatchSampler`.
        mix_at: As for `DomainBatchSampler`.
        kwargs: As for `SentenceTransformerTrainer`; `train_dataset` is a `DatasetDict`.
    """

    def __init__(
        self,
        *,
        temperature: float,
        one_domain_batches: bool,
        mix_at: Callable[[int], Mapping[str, float] | None] | None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.temperature = temperature
        self.one_domain_batches = one_domain_batches
        self.mix_at = mix_at

    def get_multi_dataset_batch_sampler(self, dataset, batch_samplers, generator=None, seed=0):
        """The sampler of the training rows (evaluation goes domain by domain and never asks)."""
        return DomainBatchSampler(
            dataset,
            batch_samplers,
            generator,
            seed,
            domains=list(cast(DatasetDict, self.train_dataset)),
            temperature=self.temperature,
            one_domain_batches=self.one_domain_batches,
            steps_done=lambda: self.state.global_step,
            batches_per_step=self.args.world_size * self.args.gradient_accumulation_steps,
            processes=self.args.world_size,
            mix_at=self.mix_at,
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As always, domain by domain, and their mean as `eval_loss`, by which the best checkpoint is known."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        losses = [value for name, value in metrics.items() if name.endswith("_loss")]
        if losses and f"{metric_key_prefix}_loss" not in metrics:
            mean = {f"{metric_key_prefix}_loss": sum(losses) / len(losses)}
            self.log(mean)
            metrics |= mean
        return metrics

    def _save(self, output_dir=None, state_dict=None):
        # transformers calls this on every process, sentence-transformers writes without asking which one it is on
        if self.args.should_save:
            super()._save(output_dir, state_dict)


def _train_embeddings(
    options: TrainOptions, arguments: SentenceTransformerTrainingArguments, checkpoint: str | None, final: Path
) -> None:
    if not options.one_domain_batches and arguments.batch_sampler != "batch_sampler":
        raise ValueError(
            f"batch_sampler={str(arguments.batch_sampler)!r} with one_domain_batches=False; allowed: 'batch_sampler', or "
            "batches of one domain."
        )
    train_data, report = _load_data(options, arguments, options.train_data, max_rows=options.max_rows)
    words: list[list[str]] = []
    if options.dictionaries:
        entries, about_words = load_rows(options.dictionaries, DICTIONARY_COLUMNS)
        words = _texts_of(entries[WITHOUT_DOMAINS])
        report = report.with_dictionaries(about_words)
    wanted = callbacks(options)
    curriculum = next((callback for callback in wanted if isinstance(callback, CurriculumCallback)), None)
    for domain, rows in train_data.items():
        compares_rows = LOSSES[options.loss_of(domain)].compares_rows
        refuse_too_small({domain: rows}, arguments.train_batch_size, arguments.dataloader_drop_last, compares_rows)
    for phase in curriculum.curriculum.phases if curriculum else ():
        _refuse_unknown_domains(f"Phase {phase.name!r}: mix", phase.mix or {}, train_data)
    _refuse_unknown_domains("domain_losses", options.losses_by_domain, train_data)
    eval_data = None
    if options.eval_data:
        eval_data, eval_report = _load_data(options, arguments, options.eval_data, max_rows=None)
        say(arguments, f"For evaluation: {eval_report}")
    everything = {**train_data, **(eval_data or {})}
    dotted = [domain for domain in everything if "." in domain]
    if options.losses_by_domain and dotted:  # sentence-transformers makes modules of the losses, by these names
        raise ValueError(f"domain_losses with the domain {dotted[0]!r}; allowed: domains without a dot.")
    _check_prompts(arguments.prompts, everything)
    write_report(arguments, report)

    if options.recipe in RECIPES:
        say(arguments, f"Recipe: {options.recipe}")
    assert options.model is not None
    model = sentence.load(options.model, device=str(arguments.device))
    longest = model.max_seq_length or 0
    model = _mixture_to_train(options, arguments, model, train_data, words, final.parent)
    own_teacher = None
    if options.teacher is None and any(LOSSES[name].needs_teacher for name in options.losses):
        own_teacher = _as_it_was(options.model, str(arguments.device))
    elif options.teacher:
        teacher = sentence.load(options.teacher, device=str(arguments.device))
        width = model.get_embedding_dimension() or 0
        for data in filter(None, (train_data, eval_data)):
            for domain in data:
                name = options.loss_of(domain)
                if LOSSES[name].needs_teacher:
                    data[domain] = with_teacher_vectors(data[domain], teacher, name, width, arguments.train_batch_size)
        del teacher  # its vectors are all that is needed of it

    trainer = HagMoeTrainer(
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        loss=_build_losses(options, arguments, model, own_teacher, list(everything)),
        callbacks=[*wanted, CardCallback(report)],
        temperature=options.temperature,
        one_domain_batches=options.one_domain_batches,
        mix_at=curriculum.mix_at if curriculum else None,
    )
    started = weights_to_learn(model) if options.interpolation < 1 else {}
    trainer.train(resume_from_checkpoint=checkpoint)
    interpolate(model, started, options.interpolation)
    if options.lora_rank:
        merge_lora(sentence.encoder_of(model))
    if options.max_length is not None:  # a limit of training, not of what comes after
        model.max_seq_length = max(longest, options.max_length)
    save_whole(arguments, final, trainer.save_model, report)


def _load_data(
    options: TrainOptions,
    arguments: SentenceTransformerTrainingArguments,
    sources: list[str],
    max_rows: int | None,
    where: Mapping[str, str] | None = None,
) -> tuple[DatasetDict, DataReport]:
    """Rows as the options want them, and as `where` does."""
    kind = LOSSES[options.loss]
    return load_rows(
        sources,
        options.columns or kind.columns,
        label_column=(options.label_column or "label") if kind.needs_label else None,
        domain_column=options.domain_column,
        where={**options.conditions, **(where or {})},
        where_not=options.exclusions,
        split=options.train_split,
        max_rows=max_rows,
        seed=arguments.seed,
    )


def _build_losses(
    options: TrainOptions,
    arguments: SentenceTransformerTrainingArguments,
    model: SentenceTransformer,
    own_teacher: SentenceTransformer | None,
    domains: Sequence[str],
) -> nn.Module | dict[str, nn.Module]:
    """The loss, or one for each domain; domains with the same loss share it."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None

    def build(name: str, *more: Any) -> nn.Module:
        loss = build_loss(name, model, *more)
        if own_teacher is None or not LOSSES[name].needs_teacher:
            return loss
        return TaughtLoss(loss, own_teacher, LOSSES[name].first_column_only, dtype)

    own = build(options.loss, options.loss_keywords, options.matryoshka_dims)
    if not options.losses_by_domain:
        return own
    losses = {name: own if name == options.loss else build(name) for name in options.losses}
    return {domain: losses[options.loss_of(domain)] for domain in domains}


def _as_it_was(name_or_path: str, device: str) -> SentenceTransformer:
    """The model before training as its own teacher, in this package's code, which reads whatever the student reads."""
    model = sentence.load(name_or_path, device=device)
    if not isinstance(sentence.encoder_of(model), HagMoePreTrainedModel):
        model = upcycle(model, sparse_layers=[])
    return model.requires_grad_(False)


def _refuse_unknown_domains(where: str, named: Mapping[str, Any], train_data: DatasetDict) -> None:
    unknown = sorted(set(named) - set(train_data))
    if unknown:
        raise ValueError(f"{where} names the domain {unknown[0]!r}; allowed: {sorted(train_data)} (from domain_column).")


def _check_prompts(prompts: Any, data: Mapping[str, Dataset]) -> None:
    """Refuse prompts for what is no column and no domain: nothing would get them, without a word."""
    columns = list(dict.fromkeys(name for rows in data.values() for name in rows.column_names))
    for name, prompt in prompts.items() if isinstance(prompts, Mapping) else ():
        if name not in columns and name not in data:
            raise ValueError(f"prompts names {name!r}; allowed: a column of {columns}, or a domain of {list(data)}.")
        is_by_column = isinstance(prompt, Mapping)
        for column in prompt if is_by_column else ():
            if column not in columns:
                raise ValueError(f"prompts[{name!r}] names {column!r}; allowed: a column of {columns}.")
        for text in prompt.values() if is_by_column else (prompt,):
            if not isinstance(text, str):
                raise ValueError(f"prompts[{name!r}] holds {text!r}; allowed: texts.")


def _texts_to_start_from(
    options: TrainOptions,
    arguments: SentenceTransformerTrainingArguments,
    train_data: DatasetDict,
    translated: list[str],
    words: list[list[str]],
) -> dict[str, Any]:
    """The options of `upcycle` that hold texts: what gates and memory start from, and what stays."""
    # Which texts stay, translations tell, and `preserve_where`; of others nobody says what language they are in
    is_told = options.preserves and (translated or options.preserve_where)
    data = {domain: train_data[domain] for domain in (translated if is_told else train_data)}
    found: dict[str, Any] = {"calibration_texts": _calibration_texts(options, arguments.seed, data)}
    if not options.preserves and not options.ngram_memory_size:
        return found
    rows = [row for texts in data.values() for row in _texts_of(texts)] + words
    first = int(options.preserves)  # column of what is learned
    learned = [text for row in rows for text in row[first:]]
    kept = [row[0] for row in rows]
    if options.preserve_where:
        of_one_kind = {domain: texts for domain, texts in train_data.items() if domain not in translated}
        column, value = options.preserve_where.split("=", 1)
        same, _ = _load_data(options, arguments, options.train_data, None, {column: value})
        staying = dict.fromkeys(text for domain in of_one_kind for row in _texts_of(same.get(domain, ())) for text in row)
        kept += staying
        learned += [
            text for texts in of_one_kind.values() for row in _texts_of(texts) for text in row if text not in staying
        ]
    if options.preserves:
        found["preserved_texts"] = kept
        found["calibration_texts"] = found["calibration_texts"] or learned
    if options.ngram_memory_size:
        found |= {"ngram_texts": learned, "ngram_memory_size": options.ngram_memory_size}
    return found


def _calibration_texts(options: TrainOptions, seed: int, data: Mapping[str, Dataset]) -> list[tuple[str, ...]] | None:
    """All texts of a sample, so many rows of the largest domain and of others as training draws them; None for no rows.

    The first two texts of a row belong together, unless a label says how much they do; further ones are negatives. Where
    the first column's kind of text stays, it is left out.
    """
    if not options.calibration_rows:
        return None
    items: list[tuple[str, ...]] = []
    largest = max(map(len, data.values()))
    for rows in data.values():
        together = 1 if LABEL in rows.column_names else 2
        wanted = math.ceil(options.calibration_rows * (len(rows) / largest) ** (1 / options.temperature))
        for row in rows.shuffle(seed=seed).select(range(min(wanted, len(rows)))):
            texts = [text for text in row.values() if isinstance(text, str)]
            if options.preserves:
                items += [(text,) for text in texts[1:]]
            else:
                items += [tuple(texts[:together]), *((text,) for text in texts[together:])]
    return items


def _texts_of(data: Iterable[dict]) -> list[list[str]]:
    return [[text for text in row.values() if isinstance(text, str)] for row in data]


def _mixture_to_train(
    options: TrainOptions,
    arguments: SentenceTransformerTrainingArguments,
    model: SentenceTransformer,
    train_data: DatasetDict,
    words: list[list[str]],
    output: Path,
) -> SentenceTransformer:
    """The mixture to train, frozen and adapted as wanted; `words` are those of dictionaries, each with a translation."""
    if not isinstance(sentence.encoder_of(model), HagMoePreTrainedModel):
        if options.max_length is not None:  # so that the gates start from what training sees of a text; checked below
            model.max_seq_length = max(3, options.max_length)
        translated = [domain for domain in train_data if LOSSES[options.loss_of(domain)].first_column_only]
        texts = _texts_to_start_from(options, arguments, train_data, translated, words)
        model = upcycle(model, seed=arguments.seed, **texts, **options.upcycling)
        say(arguments, str(model.upcycling_report))
        if options.fit_translations:
            pairs = [row for domain in translated for row in _texts_of(train_data[domain])]
            say(arguments, str(fit_translations(model, pairs + words)))
        if options.lora_rank:  # an adapter names the weights it belongs to, so they must lie somewhere
            model = _saved_base(model, arguments, output / BASE_FOLDER)
    elif options.recipe in RECIPES:
        raise ValueError(
            f"recipe={options.recipe!r} with model={options.model!r}, a mixture already; allowed: a dense model, or "
            f"recipe={NO_RECIPE!r}."
        )
    elif given := options.only_for_upcycling:
        raise ValueError(f"{given} with model={options.model!r}, a mixture already; allowed: a dense model.")
    if options.max_length is not None:
        model.max_seq_length = text_length(options.max_length, sentence.encoder_of(model).config)
    if sentence.encoder_of(model).config.preserve_first_group:
        refuse_to_move_preserved(options, arguments.weight_decay)
        freeze_preserved(model, experts_only=options.preserve_experts)
        if options.preserved_rate:
            sentence.encoder_of(model).config.preserve_first_group = False  # nothing holds them any more
    elif options.preserves:
        name = "preserve" if options.preserve else "preserve_experts"
        raise ValueError(
            f"{name}=True with model={options.model!r}, a mixture that preserves nothing; allowed: a dense model, or a "
            "mixture that was upcycled with preserved_texts."
        )
    if options.bias_update_rate and not sentence.encoder_of(model).config.balance_routing:
        raise ValueError(
            f"bias_update_rate={options.bias_update_rate} is not possible with a mixture whose groups are for kinds of text "
            "(balance_routing=False in its configuration); allowed: 0, or not given."
        )
    if options.lora_rank:
        add_lora(sentence.encoder_of(model), options.lora_rank, options.lora_alpha, options.lora_targets)
    if options.freeze:
        frozen = freeze(model, options.freeze)
        say(arguments, f"Frozen: {len(frozen)} parameters")
    return model


def _saved_base(
    model: SentenceTransformer, arguments: SentenceTransformerTrainingArguments, base: Path
) -> SentenceTransformer:
    with arguments.main_process_first(desc="saving the upcycled model"):
        if arguments.should_save and not base.exists():
            with new_folder(base) as folder:
                model.save_pretrained(str(folder))
    return sentence.load(str(base), device=str(arguments.device))
