"""Masked-language-model training: from scratch with a tokenizer trained on the user's texts, or from a given model."""

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from datasets import Dataset, DatasetDict, concatenate_datasets
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from tokenizers import BertWordPieceTokenizer
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.trainer import TRAINING_ARGS_NAME

from ..configuration_hagmoe import HagMoeConfig
from ..files import new_folder
from ..modeling_hagmoe import HagMoeForMaskedLM, HagMoePreTrainedModel
from ..upcycling import upcycle
from .arguments import PRESET_FOLDER, TrainOptions, refuse_to_move_preserved
from .curriculum import CurriculumCallback
from .data import load_rows, text_length
from .output import save_whole, say, write_report
from .parameters import freeze

TOKENIZER_FOLDER = "tokenizer"


class MaskingByContent(DataCollatorForLanguageModeling):
    """Masks drawn from the seed and the batch itself.

    Batches are collated ahead of the step that uses them, so masks from a running generator would differ after a resume. A
    text gets other masks in other epochs, unless it meets the very same texts there.
    """

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """Pad and mask a batch."""
        content = hashlib.sha256(repr([example["input_ids"] for example in examples]).encode()).digest()
        self.generator = torch.Generator().manual_seed((self.seed or 0) + int.from_bytes(content[:4], "big"))
        return super().torch_call(examples)


def train_masked_lm(
    options: TrainOptions,
    arguments: SentenceTransformerTrainingArguments,
    callbacks: Sequence[TrainerCallback],
    checkpoint: str | None,
    final: Path,
) -> None:
    """Train a masked language model; `final` becomes its encoder with mean pooling, checkpoints keep the head.

    Args:
        options: What to train, on what and how; every text column is a text of its own ("text" by default).
        arguments: The trainer's settings.
        callbacks: Added to the trainer's.
        checkpoint: Go on from there.
        final: The new folder of the trained model.

    Raises:
        ValueError: A phase with a mix or a length, which only embedding training has.
    """
    for phase in (phase for c in callbacks if isinstance(c, CurriculumCallback) for phase in c.curriculum.phases):
        given = next((name for name in ("mix", "max_length") if getattr(phase, name) is not None), None)
        if given:
            raise ValueError(f"Phase {phase.name!r}: {given} with objective='mlm'; allowed: only with 'embedding'.")
    rows, report = _load_texts(options, options.train_data, arguments.seed)
    write_report(arguments, report)
    tokenizer = _tokenizer(options, arguments, rows["text"], final.parent / TOKENIZER_FOLDER)
    model = _load_model(options, arguments, tokenizer)
    if model.config.preserve_first_group:
        refuse_to_move_preserved(options, arguments.weight_decay)
    if options.freeze:
        say(arguments, f"Frozen: {len(freeze(model, options.freeze))} parameters")
    length = text_length(options.max_length, model.config)

    def tokenized(texts: Dataset) -> Dataset:
        return texts.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=length, return_special_tokens_mask=True),
            batched=True,
            remove_columns=["text"],
            desc="Tokenize",
        )

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=tokenized(rows),
        eval_dataset=tokenized(_load_texts(options, options.eval_data, 0)[0]) if options.eval_data else None,
        data_collator=MaskingByContent(tokenizer, mlm_probability=options.mlm_probability, seed=arguments.seed),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    with_head = final.parent / "mlm"
    trainer.save_model(str(with_head))
    if arguments.should_save:
        (with_head / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, which `hagmoe push` refuses
    save_whole(arguments, final, lambda folder: _save_as_sentence_transformer(arguments, model, tokenizer, folder), report)


def _load_texts(options: TrainOptions, sources: list[str], seed: int) -> tuple[Dataset, Any]:
    columns = options.columns or ["text"]
    rows, report = load_rows(
        sources,
        columns,
        where=options.conditions,
        where_not=options.exclusions,
        split=options.train_split,
        max_rows=options.max_rows,
        seed=seed,
    )
    return _one_column(rows, columns), report


def _one_column(rows: DatasetDict, columns: Sequence[str]) -> Dataset:
    parts = [data.select_columns([name]).rename_columns({name: "text"}) for data in rows.values() for name in columns]
    return concatenate_datasets(parts)


def _tokenizer(
    options: TrainOptions, arguments: SentenceTransformerTrainingArguments, texts: Iterable[str], folder: Path
) -> PreTrainedTokenizerBase:
    """The model's own, or one trained on `texts` and kept in `folder`, so that a resumed run has the same."""
    if options.model is not None:
        return AutoTokenizer.from_pretrained(options.model)
    with arguments.main_process_first(desc="training the tokenizer"):
        if arguments.should_save and not folder.exists():
            with new_folder(folder) as partial:
                train_tokenizer(texts, options.vocab_size).save_pretrained(partial)
    return AutoTokenizer.from_pretrained(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A BERT tokenizer (WordPiece, lower case) for `texts`.

    Args:
        texts: What to learn it from.
        vocab_size: Most entries it may have; few texts give fewer.
    """
    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    return BertTokenizer(vocab=learner.get_vocab())


def _load_model(
    options: TrainOptions, arguments: SentenceTransformerTrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    if options.model is None:
        sizes = yaml.safe_load((PRESET_FOLDER / f"{options.preset}.yaml").read_text(encoding="utf-8"))
        given = {name: value for name, value in options.upcycling.items() if value is not None}
        routing = {name: value for name, value in given.items() if name in HagMoeConfig.__dataclass_fields__}
        config = HagMoeConfig(**sizes, **routing, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        return HagMoeForMaskedLM(config)
    model = AutoModelForMaskedLM.from_pretrained(options.model)
    if not isinstance(model, HagMoePreTrainedModel):
        model = upcycle(model, seed=arguments.seed, **options.upcycling)
        say(arguments, str(model.upcycling_report))
    return model


def _save_as_sentence_transformer(
    arguments: SentenceTransformerTrainingArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
) -> None:
    if not arguments.should_save:
        return
    with tempfile.TemporaryDirectory() as encoder:
        encoder_model = cast(PreTrainedModel, model.base_model)
        encoder_model.save_pretrained(encoder)
        tokenizer.save_pretrained(encoder)
        SentenceTransformer(encoder, device="cpu").save_pretrained(folder)
