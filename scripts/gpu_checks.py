"""Check on a GPU what the tests hold on a CPU: exactness, experts implementations, packed input under flash attention.

    python scripts/gpu_checks.py docs/results/gpu-checks.json

One call, a few minutes, no network; the parent is the packaged all-MiniLM-L6-v2 (or `--parent FOLDER`). `--device cpu` tries
the script itself. What cannot run here (no flash attention, say) is written down as such, not left out. The result carries a
hash of the model's code, by which `fill_readme_tables.py` tells when it is stale.
"""

import argparse
import json
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from fill_readme_tables import model_code_hash
from transformers import DataCollatorWithFlattening, PreTrainedModel, PreTrainedTokenizerBase

from hagmoe_hf import HagMoeModel, sentence, upcycle
from hagmoe_hf.demo import parent_folder, read_corpus
from hagmoe_hf.files import write_text

ATTENTION = ("sdpa", "eager", "flex_attention", "flash_attention_2")
TEXTS = 64


@torch.inference_mode()
def padded_states(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """(real tokens, D) float32 states of a padded batch, text after text."""
    return model(**batch).last_hidden_state[batch["attention_mask"].bool()].float()


@torch.inference_mode()
def packed_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """(tokens, D) float32 states of the same texts in one row, as sentence-transformers sends them under flash attention."""
    flatten = DataCollatorWithFlattening(return_position_ids=True, return_seq_idx=True, return_flash_attn_kwargs=True)
    rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True)["input_ids"]]
    batch = {name: value for name, value in flatten(rows).items() if name != "labels"}
    batch = {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    return model(**batch).last_hidden_state[0].float()


def attention_checks(folder: str, tokenizer, texts: list[str], device: str, dtype: torch.dtype) -> dict[str, dict]:
    """For every attention function: padded against sdpa in the same dtype, and packed against padded."""
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
    reference = padded_states(HagMoeModel.from_pretrained(folder, dtype=dtype).to(device).eval(), batch)
    rows: dict[str, dict] = {}
    for attention in ATTENTION:
        try:
            model = HagMoeModel.from_pretrained(folder, dtype=dtype, attn_implementation=attention, device_map=device).eval()
            padded = padded_states(model, batch)
            packed = packed_states(model, tokenizer, texts)
        except Exception as error:  # what one attention function cannot do must not cost the others
            rows[attention] = {"did not run": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            continue
        rows[attention] = {
            "padded against sdpa": float((padded - reference).abs().max()),
            "packed against padded": float((packed - padded).abs().max()),
            "largest state": float(reference.abs().max()),
        }
    return rows


@torch.inference_mode()
def experts_check(folder: str, tokenizer, texts: list[str], device: str, dtype: torch.dtype) -> float | str:
    """Largest difference of grouped_mm and the eager loop, or why there is none."""
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
    model = HagMoeModel.from_pretrained(folder, dtype=dtype).to(device).eval()
    try:
        grouped = padded_states(model, batch)
    except RuntimeError as error:
        return f"did not run: {error}".splitlines()[0][:200]
    model.set_experts_implementation("eager")
    return float((padded_states(model, batch) - grouped).abs().max())


def check(parent_name: str, device: str, command: str) -> dict:
    """Every check, as one result."""
    torch.backends.cuda.matmul.allow_tf32 = False
    texts = [text for text in read_corpus()[0] if text.strip()][::8][:TEXTS]
    parent = sentence.load(parent_name, device=device)
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
    with tempfile.TemporaryDirectory() as folder:
        mixture[0].model.save_pretrained(folder)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            result[f"grouped_mm against eager {name}"] = experts_check(folder, mixture.tokenizer, texts, device, dtype)
            result[f"attention {name}"] = attention_checks(folder, mixture.tokenizer, texts, device, dtype)
    return result


def main() -> None:
    """Run every check and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--parent", type=Path, default=None)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    command = f"python scripts/gpu_checks.py {args.output} --device {args.device}"
    result = check(str(args.parent or parent_folder()), args.device, command)
    write_text(args.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
