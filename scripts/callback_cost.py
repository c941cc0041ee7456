"""Measure what RouterCallback adds to a training step: on and off in turn, within one run of the stock trainer.

    python scripts/callback_cost.py PAIRS.parquet docs/results/callback-cost.json

Blocks of steps with and without the callback's taps alternate (A B A B ...), logging every tenth step as one would. The
result is the median ratio of neighbouring blocks with its quartiles: noise of the machine hits both sides alike.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from hagmoe_hf import upcycle
from hagmoe_hf.demo import parent_folder
from hagmoe_hf.files import write_text
from hagmoe_hf.training.router_callback import RouterCallback

BLOCK, BLOCKS, LOGGING_STEPS = 10, 20, 10


class Alternating(RouterCallback):
    """RouterCallback that is off in every second block of steps, and takes the time of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:  # noqa: D102
        super().on_train_begin(args, state, control, **kwargs)
        self._observers = [block.routing_observer for _, block in self._layers]

    def on_step_begin(self, args, state, control, **kwargs) -> None:  # noqa: D102
        block, step = divmod(state.global_step, BLOCK)
        if step == 0:
            now = time.perf_counter()
            if block:
                self.seconds.append(now - self._start)
            self._start = now
            for (_, module), observer in zip(self._layers, self._observers, strict=True):
                module.routing_observer = observer if block % 2 == 0 else None

    def on_step_end(self, args, state, control, **kwargs) -> None:  # noqa: D102
        if (state.global_step - 1) // BLOCK % 2 == 0:
            super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, **kwargs) -> None:  # noqa: D102
        if (state.global_step - 1) // BLOCK % 2 == 0:
            super().on_log(args, state, control, **kwargs)


def main() -> None:
    """Train for `BLOCK * BLOCKS` steps and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    batch_size = 32
    steps = BLOCK * (BLOCKS + 1) + 1  # the first block warms up
    pairs = pd.read_parquet(args.pairs, columns=["anchor", "positive", "split"]).query("split == 'train'")
    pairs = pairs.sample(batch_size * steps, random_state=0)
    data = Dataset.from_dict({"anchor": pairs.anchor.tolist(), "positive": pairs.positive.tolist()})
    model = upcycle(str(parent_folder()))
    model.max_seq_length = 48
    callback = Alternating()
    with tempfile.TemporaryDirectory() as folder:
        SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                logging_steps=LOGGING_STEPS,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
            ),
            train_dataset=data,
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[callback],
        ).train()
    measured = callback.seconds[1:]  # block 1 is off, 2 on, ...
    ratios = [on / off for off, on in zip(measured[::2], measured[1::2], strict=False)]
    low, median, high = statistics.quantiles(ratios, n=4)
    result = {
        "command": f"python scripts/callback_cost.py PAIRS.parquet {args.output}",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "steps_per_block": BLOCK,
        "ratio_with_over_without": {"lower quartile": low, "median": median, "upper quartile": high},
        "seconds_per_step_without": statistics.median(measured[::2]) / BLOCK,
        "ratios": ratios,
    }
    write_text(args.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "ratios"}, indent=1))


if __name__ == "__main__":
    main()
