"""Fill the blanks of a text with a masked-LM head, the surest first: what generation means for an encoder.

    python scripts/generate.py MODEL "Paris is the [MASK] of [MASK]." --steps 2

An encoder sees both sides of a blank, so it does not write from left to right. All blanks are predicted at once; the surest
ones are filled, and the others are predicted again with those in place, over `--steps` rounds (mask-predict, arXiv
1904.09324).
"""

import argparse
from collections.abc import Iterator

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

import hagmoe_hf  # noqa: F401  registers the architecture


@torch.inference_mode()
def fill(model, tokenizer, text: str, steps: int) -> Iterator[list[int]]:
    """The text's token ids after each round, with more of its blanks filled.

    Args:
        model: A masked language model.
        tokenizer: Its tokenizer.
        text: Holds the tokenizer's mask token once or more.
        steps: Rounds, at least 1.

    Raises:
        ValueError: No blank, or no round.
    """
    batch = tokenizer(text, return_tensors="pt")
    ids = batch["input_ids"][0]
    blanks = int((ids == tokenizer.mask_token_id).sum())
    if not blanks or steps < 1:
        raise ValueError(
            f"{blanks} blanks and steps={steps} are not possible; allowed: one {tokenizer.mask_token} or more in the text, "
            "and 1 step or more."
        )
    for step in range(steps):
        open_now = (ids == tokenizer.mask_token_id).nonzero().flatten()
        if not len(open_now):
            return
        logits = model(**{**batch, "input_ids": ids.unsqueeze(0)}).logits[0, open_now]
        logits[:, tokenizer.all_special_ids] = float("-inf")  # a blank stands for a word
        sureness, best = logits.softmax(dim=-1).max(dim=-1)
        left = blanks * (steps - step - 1) // steps
        chosen = sureness.argsort(descending=True)[: max(len(open_now) - left, 1)]
        ids[open_now[chosen]] = best[chosen]
        yield ids.tolist()


def main() -> None:
    """Print the text after each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    model = AutoModelForMaskedLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for ids in fill(model, tokenizer, args.text, args.steps):
        print(tokenizer.decode(ids))


if __name__ == "__main__":
    main()
