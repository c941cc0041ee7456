"""Short runs of the train command, and what they left."""

import json
from pathlib import Path

from safetensors.torch import load_file


def words(output, model, data, **options) -> list[str]:
    """The command line of a short run."""
    usual = {
        "use_cpu": True,
        "no_balance": None,
        "disable_tqdm": True,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
    }
    given = {"output_dir": output, "model": model, "train_data": data, **usual, **options}
    return [
        word
        for name, value in given.items()
        for word in (f"--{name}", *(() if value is None else map(str, value if isinstance(value, list) else [value])))
    ]


def history(output: Path, step: int) -> list[dict]:
    state = json.loads((output / f"checkpoint-{step}/trainer_state.json").read_text())
    return [
        {k: e[k] for k in ("step", "loss", "learning_rate", "grad_norm", "phase") if k in e} for e in state["log_history"]
    ]


def largest_difference(one: Path, other: Path) -> float:
    a, b = (load_file(folder / "model/model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
