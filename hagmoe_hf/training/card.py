"""The card of a trained model: sentence-transformers' own, made true for a mixture."""

from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .data import DataReport

STOCK_INSTALL = "pip install -U sentence-transformers"
STOCK_IMPORT = "from sentence_transformers import SentenceTransformer\n"


def trained_card(card: str, report: DataReport) -> str:
    """Add to a generated card what loading a HAG-MoE needs, and what was read to train it.

    Args:
        card: What sentence-transformers generated.
        report: What was read.
    """
    registered = "import hagmoe_hf  # registers the architecture, once per process\n"
    if registered not in card:
        card = card.replace(STOCK_INSTALL, 'pip install "hagmoe_hf[sentence]"', 1)
        card = card.replace(STOCK_IMPORT, registered + STOCK_IMPORT, 1)
        card = f"{card.rstrip()}\n\n## Rows trained on\n\n```\n{report}\n```\n"
    return card


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
            path.write_text(trained_card(path.read_text(encoding="utf-8"), self.report), encoding="utf-8")
