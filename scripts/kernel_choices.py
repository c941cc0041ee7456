"""Measure on this machine what four constants of the CPU kernels stand on, each way against the plain one, in turns.

    python scripts/kernel_choices.py docs/results/kernel-choices.json

- `FEW_TOKENS`, `FEWEST_THREADS` (kernels_hagmoe.py): for how many tokens `weight @ states.T` beats `states @ weight.T`, at
  MiniLM's shapes, and on how many threads.
- `MOST_REAL` (modeling_hagmoe.py): from which share of real tokens on leaving padding out of a batch costs more than it
  saves, on the upcycled all-MiniLM-L6-v2.
- `ROUND_ROWS` (kernels_hagmoe.py): to which multiple an expert's rows are rounded up outside of float32, where every shape
  that was not seen lately is prepared anew; forward and backward of one layer's experts.
"""

import argparse
import json
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hagmoe_hf import kernels_hagmoe, modeling_hagmoe, sentence, upcycle
from hagmoe_hf.benchmark.measure import interleave, machine, paired_ratio
from hagmoe_hf.demo import parent_folder
from hagmoe_hf.files import write_text

SHAPES = ((384, 768), (768, 384), (384, 384))  # (in, out): an expert's two products, and a projection
TOKENS = (1, 2, 4, 5, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96)
REAL = (0.8, 0.9, 0.94, 0.96, 0.97, 0.98, 0.99)  # shares of a batch's tokens
BATCH, LENGTH = 32, 64
MULTIPLES = (1, 16, 32, 64, 128)
CALLS = 50  # of a product in one measurement


def turned_around(rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """How many times as fast a linear layer is turned around, by shape and number of tokens."""
    found: dict[str, dict] = {}
    # Every product has its own weight, as in a model: one that stays in the cache would flatter both ways
    for width_in, width_out in tqdm(SHAPES, desc="products"):
        weights = [torch.randn(width_out, width_in) for _ in range(CALLS)]
        bias = torch.randn(width_out)
        of_shape = found[f"{width_in} -> {width_out}"] = {}
        for tokens in TOKENS:
            states = torch.randn(tokens, width_in)
            ways = {
                "plain": partial(_products, F.linear, states, weights, bias),
                "turned": partial(_products, kernels_hagmoe.linear, states, weights, bias),
            }
            seconds = _turning(range(1, tokens + 1), partial(interleave, ways, rounds))
            of_shape[str(tokens)] = paired_ratio(seconds["turned"], seconds["plain"])
    return found


def _products(linear: Callable[..., Tensor], states: Tensor, weights: list[Tensor], bias: Tensor) -> None:
    for weight in weights:
        linear(states, weight, bias)


def padding_left_out(rounds: int) -> dict[str, dict[str, float]]:
    """How many times as fast a batch is without its padding, by its share of real tokens."""
    encoder = sentence.encoder_of(upcycle(str(parent_folder()))).eval()
    found = {}
    for share in tqdm(REAL, desc="batches"):
        mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
        padding = round((1 - share) * BATCH * LENGTH)  # spread evenly over the rows
        for row in range(BATCH):
            own = padding // BATCH + (row < padding % BATCH)
            mask[row, LENGTH - own :] = 0
        run = partial(encoder, input_ids=torch.randint(1000, 20000, (BATCH, LENGTH)), attention_mask=mask)
        seconds = interleave({"with": partial(_at, 0.0, run), "without": partial(_at, 1.1, run)}, rounds)
        found[str(share)] = paired_ratio(seconds["without"], seconds["with"])
    return found


@torch.inference_mode(False)
def rounded_rows(rounds: int) -> dict[str, dict[str, float]]:
    """How many times as fast a layer's experts train in bfloat16 with their rows rounded up, by the multiple."""
    encoder = sentence.encoder_of(upcycle(str(parent_folder())))
    experts = encoder.layers[encoder.config.sparse_layers[0]].mlp.experts.to(torch.bfloat16)
    states = torch.randn(BATCH * LENGTH, encoder.config.hidden_size, dtype=torch.bfloat16)
    weights = torch.ones(len(states), 1, dtype=torch.bfloat16)

    def train(multiple: int) -> None:
        before, kernels_hagmoe.ROUND_ROWS = kernels_hagmoe.ROUND_ROWS, multiple
        load = torch.rand(experts.num_experts)  # every batch has its own
        try:
            experts(states, load.multinomial(len(states), replacement=True).unsqueeze(1), weights).sum().backward()
        finally:
            kernels_hagmoe.ROUND_ROWS = before

    ways = {str(multiple): partial(train, multiple) for multiple in MULTIPLES}
    seconds = interleave(ways, 10 * rounds, warm_up=20)
    return {name: paired_ratio(seconds[name], seconds["1"]) for name in ways if name != "1"}


def whole_query(rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """How many times as fast one text is on so many threads with products turned around, by its number of tokens."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    encoder = sentence.encoder_of(upcycle(str(parent_folder()))).eval()
    found = {}
    for tokens in tqdm([tokens for tokens in TOKENS if tokens > 2], desc="queries"):
        run = partial(encoder, input_ids=torch.randint(1000, 20000, (1, tokens)))
        ways = {"plain": partial(_turning, range(0), run), "turned": partial(_turning, range(1, tokens + 1), run)}
        seconds = interleave(ways, 10 * rounds, warm_up=5)
        found[str(tokens)] = paired_ratio(seconds["turned"], seconds["plain"])
    torch.set_num_threads(before)
    return found


def _turning(few_tokens: range, run: Callable[[], Any]) -> Any:
    before = kernels_hagmoe.FEW_TOKENS, kernels_hagmoe.FEWEST_THREADS
    kernels_hagmoe.FEW_TOKENS, kernels_hagmoe.FEWEST_THREADS = few_tokens, 1
    try:
        return run()
    finally:
        kernels_hagmoe.FEW_TOKENS, kernels_hagmoe.FEWEST_THREADS = before


def _at(most_real: float, run: Callable[[], object]) -> None:
    before, modeling_hagmoe.MOST_REAL = modeling_hagmoe.MOST_REAL, most_real
    try:
        run()
    finally:
        modeling_hagmoe.MOST_REAL = before


@torch.inference_mode()
def main() -> None:
    """Measure them and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result = {
        "command": f"python scripts/kernel_choices.py {args.output} --rounds {args.rounds} --threads {args.threads}",
        "date": date.today().isoformat(),
        **machine(),
        "constants": {
            "FEW_TOKENS": [kernels_hagmoe.FEW_TOKENS.start, kernels_hagmoe.FEW_TOKENS.stop],
            "FEWEST_THREADS": kernels_hagmoe.FEWEST_THREADS,
            "MOST_REAL": modeling_hagmoe.MOST_REAL,
            "ROUND_ROWS": kernels_hagmoe.ROUND_ROWS,
        },
        "times as fast turned around, by tokens": turned_around(args.rounds),
        "times as fast turned around, one query, by tokens": whole_query(args.rounds, args.threads),
        "times as fast turned around, one query on one thread, by tokens": whole_query(args.rounds, 1),
        "times as fast without padding, by share of real tokens": padding_left_out(args.rounds),
        "times as fast in bfloat16, by the multiple of rows": rounded_rows(args.rounds),
    }
    write_text(args.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
