import pytest

from hagmoe_hf.training.arguments import PRESET_FOLDER, PRESETS, TrainOptions, parse

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
    import yaml

    from hagmoe_hf import HagMoeConfig

    assert PRESETS == ("base", "large", "small")
    config = HagMoeConfig(**yaml.safe_load((PRESET_FOLDER / f"{name}.yaml").read_text()))
    assert config.sparse_layers
    options = parse(["--objective", "mlm", "--preset", name, "--train_data", "x.jsonl"])[0]
    assert options.preset == name
