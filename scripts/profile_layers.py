"""What each layer of a model costs: parameters, active parameters, FLOPs per token, and memory.

    python scripts/profile_layers.py MODEL --length 128

FLOPs are two per weight that one token passes, and attention's products over the whole text; of the routed experts only
those chosen count. Memory is the weights', and the activations of a forward pass of one text at their highest point,
measured by torch's profiler. (Called profile.py, this file would hide Python's own module of that name, which torch.compile
needs, from every script beside it.)
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel

import hagmoe_hf  # noqa: F401  registers the architecture


def parameters(module: nn.Module) -> int:
    """Number of weights in a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def layer_costs(model: nn.Module, length: int) -> list[tuple[str, int, int, float]]:
    """(name, parameters, active parameters, FLOPs per token) of the embeddings, of every layer, and of the rest.

    Args:
        model: A `HagMoeModel`.
        length: Tokens of the text, which decides attention's share.

    Raises:
        ValueError: Another kind of model.
    """
    if getattr(model.config, "model_type", None) != "hagmoe":
        raise ValueError(f"{type(model).__name__} is no HAG-MoE; allowed: a folder or Hub id of one.")
    config = model.config
    rows = [("embeddings", parameters(model.embeddings), parameters(model.embeddings), 0.0)]
    for number, layer in enumerate(model.layers):
        total = active = parameters(layer)
        if layer.is_sparse:
            idle = 1 - config.num_experts_per_tok / config.num_experts
            active -= round(parameters(layer.mlp.experts) * idle)
        attention = 4 * length * config.hidden_size  # scores and their sum: two products over `length` states
        kind = "sparse" if layer.is_sparse else "dense"
        rows.append((f"layer {number} ({kind})", total, active, 2.0 * active + attention))
    rest = parameters(model) - sum(row[1] for row in rows)  # a final norm, and a pooler, which sees one token of a text
    return [*rows, ("final norm, pooler", rest, rest, 2.0 * rest / length)] if rest else rows


def peak_activations(model: nn.Module, length: int) -> int:
    """Bytes that a forward pass of one text of `length` tokens holds at once beside the weights, on CPU."""
    ids = torch.randint(10, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(input_ids=ids)
    held = most = 0
    # Each allocation and release, in time: the profiler's public events leave them out
    records = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for record in sorted(records, key=lambda event: event.start_ns()):
        held += record.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    model = AutoModel.from_pretrained(args.model).eval()
    print(f"{'':<20}{'parameters':>12}{'active':>12}{'MFLOPs/token':>14}{'MiB':>8}")
    rows = layer_costs(model, args.length)
    rows.append(("all", *(sum(row[column] for row in rows) for column in (1, 2, 3))))
    for name, total, active, flops in rows:
        print(f"{name:<20}{total:>12,}{active:>12,}{flops / 1e6:>14.2f}{4 * total / 2**20:>8.1f}")
    print(f"activations of one text of {args.length} tokens: {peak_activations(model, args.length) / 2**20:.1f} MiB at most")


if __name__ == "__main__":
    main()
