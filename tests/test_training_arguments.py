import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from conftest import tiny_config

from hagmoe_hf import HagMoeConfig, HagMoeModel
from hagmoe_hf.training.arguments import PRESET_FOLDER, PRESETS, TrainOptions, parse
from hagmoe_hf.training.curriculum import read_curriculum
from hagmoe_hf.training.parameters import encoder_parameters, value_by_pattern

NEEDED = ["--model", "m", "--train_data", "x.jsonl"]


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    """Whoever changes one number for one run must not have to edit the file."""
    path = tmp_path / "train.yaml"
    path.write_text(
        "model: from-file\ntrain_data: [a.csv, b.csv]\nlearning_rate: 2e-5\nmax_steps: 7\nn_group: 2\nbalance: false\n"
        "loss_options: {scale: 30}\nmatryoshka_dims: [8, 16]\n"
    )
    options, training = parse(["--config", str(path), "--max_steps", "9", "--model", "from-line"])
    assert (options.model, training.max_steps) == ("from-line", 9)
    assert (options.train_data, training.learning_rate, options.n_group) == (["a.csv", "b.csv"], 2e-5, 2)
    assert (options.loss_keywords, options.matryoshka_dims, options.balance) == ({"scale": 30}, [8, 16], False)
    assert options.loss == TrainOptions(model="m", train_data=["x"]).loss


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--loss_options", "scale"], "loss_options='scale' is not possible; allowed: a JSON object"),
        (["--loss_options", "[1]"], "loss_options='\\[1\\]' is not possible; allowed: a JSON object"),
        (["--temperature", "0.5"], "temperature=0.5 is not possible; allowed: 1"),
        (["--max_rows", "0"], "max_rows=0 is not possible; allowed: at least 1"),
        (["--calibration_rows", "-1"], "calibration_rows=-1 is not possible; allowed: 0"),
        (["--objective", "mlm", "--calibration_rows", "2"], "calibration_rows=2 is not possible; allowed: 0 with"),
        (["--where", "split"], "where='split' is not possible; allowed: COLUMN=VALUE"),
        (["--loss", "distill_kl"], "teacher=None is not possible; allowed: a folder or Hub id for loss='distill_kl'"),
        (["--teacher", "t"], "teacher='t' is not possible; allowed: None with this loss"),
        (["--preset", "small"], "preset='small' is not possible; allowed: one of .* for mlm without a model"),
        (["--objective", "mlm", "--lora_rank", "2"], "lora_rank=2 is not possible; allowed: 0 with objective='mlm'"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_loaded(more, message):
    """After ten minutes of loading it is too late."""
    with pytest.raises(ValueError, match=message):
        parse([*NEEDED, *more])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "unknown option 'learning_rte'; allowed: .*learning_rate"),
        ("- a", "is not a mapping"),
        ("a: [", "is not YAML"),
        ("train_data: []\nmodel: m", "train_data=\\[\\] is not possible; allowed: at least one"),
        ("loss: best\nmodel: m\ntrain_data: [x]", "loss='best' is not possible; allowed: one of \\['multiple_negatives"),
    ],
)
def test_a_mistake_in_the_file_is_named(text, message, tmp_path):
    """A misspelt option must not be a silent default."""
    path = tmp_path / "train.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(["--config", str(path)])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_possible_model(name):
    """It is found when somebody starts a pre-training."""
    assert PRESETS == ("base", "large", "small")
    config = HagMoeConfig(**yaml.safe_load((PRESET_FOLDER / f"{name}.yaml").read_text()))
    assert config.sparse_layers
    options = parse(["--objective", "mlm", "--preset", name, "--train_data", "x.jsonl"])[0]
    assert options.preset == name


def test_the_guides_files_are_files_that_the_command_reads(tmp_path):
    """The guide is what people copy from."""
    guide = (Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
    options_file, curriculum_file = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "train.yaml").write_text(options_file)
    (tmp_path / "curriculum.yaml").write_text(curriculum_file)
    options, training = parse(["--config", str(tmp_path / "train.yaml"), "--use_cpu"])
    assert (options.temperature, training.learning_rate) == (2, 2e-5)
    curriculum = read_curriculum(tmp_path / "curriculum.yaml")
    assert curriculum.ends(100) == [10, 50, 100]
    model = HagMoeModel(tiny_config())
    for phase in curriculum.phases:
        value_by_pattern(list(encoder_parameters(model)), phase.learning_rates)
    named = set(re.findall(r"--([a-z_]+)", guide)) - {"num_processes", "num_machines", "multi_gpu", "cpu"}
    known = {field.name for kind in (type(options), type(training)) for field in fields(kind)} | {"config", "help"}
    assert named <= known
