"""Compare step rules of the balancing bias on the real parent's routers and real texts, without training.

    python scripts/bias_steps.py docs/results/bias-steps.json

The states that reach the routers of the upcycled all-MiniLM-L6-v2 are computed once; then batches are drawn, routed with the
current biases, and the biases moved, 300 times. Starts: fresh gates, and gates pushed by 5 nats towards one expert, at full
and at 0.3 of their size. Reported for the last 50 steps: MaxVio of all together, and the mean of the single batches' own,
which cannot reach 0, since a batch is a small sample of texts.
"""

import argparse
import json
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from hagmoe_hf import upcycle
from hagmoe_hf.demo import parent_folder, read_corpus
from hagmoe_hf.files import write_text
from hagmoe_hf.modeling_hagmoe import HagMoeRouter
from hagmoe_hf.routing_hagmoe import attention_pool, route
from hagmoe_hf.training.balance import BiasSteps, bias_step
from hagmoe_hf.training.monitor import max_violation

STEPS, WINDOW = 300, 50
STARTS = {"fresh gates": (1.0, 0.0), "collapsed": (1.0, 5.0), "collapsed, gates x 0.3": (0.3, 5.0)}  # (gate size, push)
BATCHES = (16, 128)


class FixedSteps(BiasSteps):
    """The fixed step of arXiv 2408.15664."""

    GROW = SHRINK = 1.0


class ShorterSteps(BiasSteps):
    """A shorter shortest step: noise makes the steps so short that a trained model's drift outruns them."""

    SMALLEST = 0.002


RULES = {
    "fixed 0.05": (FixedSteps, 0.05),
    "fixed 0.02": (FixedSteps, 0.02),
    "fixed 0.005": (FixedSteps, 0.005),
    "adaptive 0.05": (BiasSteps, 0.05),
    "adaptive 0.05, shortest 0.002": (ShorterSteps, 0.05),
}


@torch.no_grad()
def router_inputs() -> dict[int, tuple[HagMoeRouter, torch.Tensor, torch.Tensor]]:
    """By sparse layer: the router, its input states (texts, L, D), and which tokens are real (texts, L)."""
    model = upcycle(str(parent_folder()))
    texts, _ = read_corpus()
    batch = model.tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    encoder, caught = model[0].model, {}
    for layer in encoder.config.sparse_layers:
        router = encoder.layers[layer].mlp.router
        router.register_forward_pre_hook(lambda module, inputs, layer=layer: caught.update({layer: (module, *inputs[:2])}))
    encoder(**batch, output_hidden_states=True)  # asked for these, the encoder keeps padding in its place
    return caught


@torch.no_grad()
def simulate(router, states, mask, gate_size: float, push: float, batch_size: int, rule, rate: float) -> dict[str, float]:
    """Move the biases for `STEPS` steps; MaxVio over the last `WINDOW` of them."""
    mean = states[mask].mean(0)
    direction = push * mean / mean.square().sum()
    group_gate, expert_gate = router.group_gate.weight * gate_size, router.expert_gate.weight * gate_size
    group_gate[0] += direction
    expert_gate[:: router.config.experts_per_group] += direction
    group_logits = (attention_pool(states, router.attention_query, mask) @ group_gate.T).unsqueeze(1)
    expert_logits = states @ expert_gate.T
    num_groups, num_experts = router.config.n_group, router.config.num_experts
    biases = [torch.zeros(1, num_groups), torch.zeros(1, num_experts)]
    steps = [rule(1, num_groups, states.device), rule(1, num_experts, states.device)]
    generator = torch.Generator().manual_seed(0)
    window, single = torch.zeros(1, num_experts), []
    for step in range(STEPS):
        drawn = torch.randint(len(states), (batch_size,), generator=generator)
        routing = route(
            group_logits[drawn],
            expert_logits[drawn],
            mask[drawn],
            group_bias=biases[0][0],
            expert_bias=biases[1][0],
            topk_group=1,
            top_k=1,
            combine_rule="selection",
            dtype=torch.float32,
        )
        counts = torch.bincount(routing.expert_index.flatten(), minlength=num_experts + 1)[None, :num_experts].double()
        if step >= STEPS - WINDOW:
            window += counts
            single.append(float(max_violation(counts)))
        for bias, own_steps, way in zip(biases, steps, bias_step(counts, num_groups), strict=True):
            bias += own_steps.take(way, rate).float()
    return {"max_vio": float(max_violation(window)), "max_vio_batch": sum(single) / len(single)}


def main() -> None:
    """Simulate every rule from every start, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    inputs = router_inputs()
    rows = []
    for start, (gate_size, push) in tqdm(STARTS.items()):
        for batch_size in BATCHES:
            for name, (rule, rate) in RULES.items():
                for layer, (router, states, mask) in inputs.items():
                    result = simulate(router, states, mask, gate_size, push, batch_size, rule, rate)
                    rows.append({"start": start, "texts_per_step": batch_size, "rule": name, "layer": layer, **result})
    result = {"command": f"python scripts/bias_steps.py {output}", "date": date.today().isoformat(), "rows": rows}
    write_text(output, json.dumps(result, indent=1) + "\n")
    for row in rows:
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    main()
