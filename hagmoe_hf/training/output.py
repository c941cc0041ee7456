"""The folder of a run: where to begin in it, and how the trained model appears in it whole or not at all."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..files import new_folder, write_text
from ..model_card import trained_card
from .data import DataReport

MODEL_FOLDER = "model"
DATA_REPORT = "data_report.json"
LOCK = ".lock"


class CardCallback(TrainerCallback):
    """Makes the card of every checkpoint true.

    Args:
        report: What was read to train.
    """

    def __init__(self, report: DataReport):
        self.report = report

    def on_save(self, args, state, control, **kwargs):
        """Rewrite the card of the checkpoint that was just written."""
        path = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / "README.md"
        if args.should_save and path.exists():
            write_text(path, trained_card(path.read_text(encoding="utf-8"), str(self.report)))


@contextmanager
def alone_in_output(arguments: TrainingArguments, resume: bool) -> Iterator[None]:
    """Keep other runs out of `output_dir` until this one ends, however it ends: they would write the same checkpoints.

    Args:
        arguments: Its `output_dir` is made where it is not there.
        resume: Whether there may be something already.

    Raises:
        FileExistsError: `output_dir` holds something, and `resume` is False.
        BlockingIOError: Another run writes there.
    """
    output = Path(str(arguments.output_dir))
    _refuse_what_is_there(output, resume)
    if arguments.process_index != 0:  # the first process holds it for all
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / LOCK).acquire(timeout=0):
            yield
    except Timeout:
        raise BlockingIOError(f"Another run is writing to output_dir={output}; allowed: one at a time.") from None


def _refuse_what_is_there(output: Path, resume: bool) -> None:
    """A run that was refused for a wrong option leaves no more than what it read; its next try may go on from there."""
    if resume or not output.exists() or {entry.name for entry in output.iterdir()} <= {DATA_REPORT, LOCK}:
        return
    raise FileExistsError(
        f"output_dir={output} is not empty; allowed: a new name, an empty folder, or --resume to go on with it."
    )


def where_to_begin(arguments: TrainingArguments) -> str | None:
    """The newest whole checkpoint of an interrupted run, None to start anew.

    Args:
        arguments: Its `output_dir` is looked at. A checkpoint that a killed process left half written is set aside there as
            `.incomplete-*`; nothing is deleted.
    """
    output = Path(str(arguments.output_dir))
    if not output.exists():
        return None
    while checkpoint := get_last_checkpoint(str(output)):
        if _is_whole(Path(checkpoint)):
            return checkpoint
        os.replace(checkpoint, output / f".incomplete-{Path(checkpoint).name}-{os.getpid()}")
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether the trainer's state, which is written last, is there and readable."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


def write_report(arguments: TrainingArguments, report: DataReport) -> None:
    """Show what was read, and keep it as `data_report.json`."""
    say(arguments, str(report))
    if arguments.should_save:
        write_text(Path(str(arguments.output_dir)) / DATA_REPORT, json.dumps(report.__dict__, indent=2) + "\n")


def save_whole(arguments: TrainingArguments, folder: Path, save: Callable[[str], None], report: DataReport) -> None:
    """Save a model so that `folder` appears whole or not at all; every process must call it.

    Args:
        arguments: Of the trainer.
        folder: The new folder.
        save: Writes into the folder it is given; on other processes than the first it may only take part.
        report: What was read, for the card.
    """
    if not arguments.should_save:
        save(str(folder))
        return
    with new_folder(folder) as partial:
        save(str(partial))
        (partial / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, which `hagmoe push` refuses
        card = partial / "README.md"
        card.write_text(trained_card(card.read_text(encoding="utf-8"), str(report)), encoding="utf-8")
    say(arguments, f"Written: {folder}")


def say(arguments: TrainingArguments, text: str) -> None:
    """Print on the first process."""
    if arguments.should_save:
        print(text, flush=True)
