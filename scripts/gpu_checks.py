"""Check on a GPU what the tests hold on a CPU: exactness, experts implementations, packed input under flash attention.

    python scripts/gpu_checks.py docs/results/gpu-checks.json

One call, a few minutes, no network; the parent is the packaged all-MiniLM-L6-v2 (or `--parent FOLDER`), in float32 whatever
it was saved in. `--device cpu` tries the script itself. What cannot run here (no flash attention, say) is written down as
such, not left out; each check is written as it ends. Behind the first, experts are moved apart by noise: equal ones would
hide a token at the wrong one. The result carries a hash of the model's code, by which `fill_readme_tables.py` tells when it
is stale.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # where a GPU is, the package need not be installed

import torch
from fill_readme_tables import model_code_hash
from transformers import DataCollatorWithFlattening, PreTrainedModel, PreTrainedTokenizerBase

from hagmoe_hf import HagMoeModel, sentence, upcycle
from hagmoe_hf.demo import parent_folder, read_corpus
from hagmoe_hf.files import write_text

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flex_attention")  # the last compiles its own kernels
TEXTS = 64
NOISE = 0.2  # of experts moved apart, against the spread of their weights


class Encoded(NamedTuple):
    """What a model made of the real tokens of some texts, text after text."""

    states: torch.Tensor  # (T, D) float32
    choices: torch.Tensor  # (sparse layers, T, K) int64, each token's experts


@torch.inference_mode()
def encoded(model: PreTrainedModel, is_real: torch.Tensor, **inputs: Any) -> Encoded:
    """Encode a batch; (B, L) bool says which of its tokens are real."""
    seen: list[torch.Tensor] = []
    routers = [model.layers[layer].mlp.router for layer in model.config.sparse_layers]
    hooks = [router.register_forward_hook(lambda *call: seen.append(call[2].expert_index)) for router in routers]
    states = model(**inputs).last_hidden_state[is_real].float()
    for hook in hooks:
        hook.remove()
    nobody = model.config.num_experts  # at padding, where it was not left out
    return Encoded(states, torch.stack([index[(index < nobody).all(-1)] for index in seen]))


def padded(model: PreTrainedModel, batch: dict) -> Encoded:
    """A padded batch."""
    return encoded(model, batch["attention_mask"].bool(), **batch)


def packed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Encoded:
    """The same texts in one row, as sentence-transformers sends them under flash attention."""
    flatten = DataCollatorWithFlattening(return_position_ids=True, return_seq_idx=True, return_flash_attn_kwargs=True)
    rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True)["input_ids"]]
    batch = {name: value for name, value in flatten(rows).items() if name != "labels"}
    batch = {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    return encoded(model, torch.ones_like(batch["input_ids"], dtype=torch.bool), **batch)


def apart(one: Encoded, other: Encoded, text_T: torch.Tensor) -> dict[str, float | None]:
    """How far two runs lie apart, and how far where a near-tie sent no token of the text to another expert."""
    difference_T = (one.states - other.states).abs().amax(-1)
    moved_T = (one.choices != other.choices).any(-1).any(0)
    moved = torch.zeros(int(text_T.max()) + 1, dtype=torch.bool, device=text_T.device)
    moved[text_T[moved_T]] = True
    alike_T = difference_T[~moved[text_T]]
    return {
        "largest difference": float(difference_T.max()),
        "tokens at other experts": float(moved_T.float().mean()),
        "texts with such": float(moved.float().mean()),
        "largest difference in the other texts": float(alike_T.max()) if len(alike_T) else None,
    }


def attention_check(folder: str, tokenizer, texts: list[str], device: str, dtype: torch.dtype, attention: str) -> dict:
    """An attention function: padded against sdpa in the same dtype, and packed against padded."""
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
    text_T = batch["attention_mask"].nonzero()[:, 0]
    load = partial(HagMoeModel.from_pretrained, folder, dtype=dtype)
    reference = padded(load(attn_implementation="sdpa").to(device).eval(), batch)
    model = load(attn_implementation=attention).to(device).eval()
    in_rows = padded(model, batch)
    return {
        "padded against sdpa": apart(in_rows, reference, text_T),
        "packed against padded": apart(packed(model, tokenizer, texts), in_rows, text_T),
        "largest state": float(reference.states.abs().max()),
    }


@torch.inference_mode()
def experts_check(folder: str, device: str, dtype: torch.dtype) -> dict[str, float]:
    """grouped_mm against the eager loop, on one layer's experts: tokens of all experts but the last, and padding."""
    model = HagMoeModel.from_pretrained(folder, dtype=dtype).to(device).eval()
    experts = model.layers[model.config.sparse_layers[0]].mlp.experts
    count = model.config.num_experts
    index = (torch.arange(96, device=device) % count).unsqueeze(1)
    index[index == count - 1] = count  # nobody's: padding
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(len(index), model.config.hidden_size, generator=generator).to(device, dtype)
    weights = (index < count).to(dtype)
    outputs = []
    for implementation in ("grouped_mm", "eager"):
        model.set_experts_implementation(implementation)
        outputs.append(experts(states, index, weights).float())
    return {
        "largest difference": float((outputs[0] - outputs[1]).abs().max()),
        "largest output": float(outputs[1].abs().max()),
    }


@torch.no_grad()
def move_apart(encoder: HagMoeModel) -> None:
    """Give every expert weights of its own."""
    generator = torch.Generator().manual_seed(0)
    for name, stack in encoder.named_parameters():
        if ".experts." in name:
            stack += (NOISE * stack.std() * torch.randn(stack.shape, generator=generator).to(stack.device)).to(stack.dtype)


def check(parent_name: str, device: str, command: str, path: Path) -> dict:
    """Every check, as one result, in `path` as it grows."""
    torch.backends.cuda.matmul.allow_tf32 = False
    texts = [text for text in read_corpus()[0] if text.strip()][::8][:TEXTS]
    parent = sentence.load(parent_name, device=device, model_kwargs={"dtype": torch.float32})
    mixture = upcycle(parent)
    vectors = [model.encode(texts, convert_to_tensor=True).float() for model in (parent, mixture)]
    result: dict = {
        "command": command,
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        "code": model_code_hash(),
        "texts": len(texts),
        "exactness float32": float((vectors[0] - vectors[1]).abs().max()),
    }
    encoder = sentence.encoder_of(mixture)
    move_apart(encoder)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        encoder.save_pretrained(folder)
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        for name, dtype in dtypes.items():
            found = _or_why_not(partial(experts_check, folder, device, dtype))
            result[f"grouped_mm against eager {name}"] = found
        for attention in ATTENTION:
            for name, dtype in dtypes.items():
                run = partial(attention_check, folder, mixture.tokenizer, texts, device, dtype, attention)
                result.setdefault(f"attention {name}", {})[attention] = _or_why_not(run)
                write_text(path, json.dumps(result, indent=1) + "\n")
    return result


def _or_why_not(run: Callable[[], dict]) -> dict:
    """What a check found; what one cannot do must not cost the others."""
    try:
        return run()
    except Exception as error:
        return {"did not run": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def main() -> None:
    """Run every check and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--parent", type=Path, default=None)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    words = [f"--parent {args.parent}"] if args.parent else []
    command = " ".join([f"python scripts/gpu_checks.py {args.output} --device {args.device}", *words])
    result = check(str(args.parent or parent_folder()), args.device, command, args.output)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
