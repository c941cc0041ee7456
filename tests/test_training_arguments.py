import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from conftest import tiny_config

from hagmoe_hf import HagMoeConfig, HagMoeModel
from hagmoe_hf.training.arguments import PRESET_FOLDER, PRESETS, RECIPE_FOLDER, RECIPES, TrainOptions, parse
from hagmoe_hf.training.curriculum import read_curriculum
from hagmoe_hf.training.parameters import encoder_parameters, value_by_pattern
from hagmoe_hf.training.yaml_files import read_yaml

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
        (["--ngram_memory_size", "-1"], "ngram_memory_size=-1 is not possible; allowed: 0"),
        (["--objective", "mlm", "--ngram_memory_size", "2"], "ngram_memory_size=2 is not possible; allowed: 0 with"),
        (["--objective", "mlm", "--preserve"], "objective='mlm' is not possible; allowed: 'embedding' for"),
        (["--domain_losses", "[1]"], "domain_losses='\\[1\\]' is not possible; allowed: a JSON object"),
        (
            ["--domain_losses", '{"a": "mse"}'],
            r"domain_losses\['a'\]='mse' is not possible; allowed: one of \['multiple_negatives",
        ),
        (["--domain_losses", '{"a": ["cosent"]}'], r"domain_losses\['a'\]=\['cosent'\] is not possible; allowed: one of"),
        (
            ["--domain_losses", '{"a": "cosent"}', "--domain_column", "d"],
            r"domain_losses\['a'\]='cosent' .*with loss='multiple_negatives_ranking', .*same columns, \['multiple_neg",
        ),
        (
            ["--domain_losses", '{"a": "distill_mse"}'],
            "domain_column=None is not possible; allowed: a column, with domain_los",
        ),
        (
            ["--domain_losses", '{"a": "distill_mse"}', "--domain_column", "d"],
            "teacher=None is not possible; allowed: a folder or Hub id for loss='distill_mse'",
        ),
        (
            ["--domain_losses", '{"a": "distill_mse"}', "--domain_column", "d", "--matryoshka_dims", "8", "--teacher", "t"],
            r"matryoshka_dims=\[8\] is not possible; allowed: none with domain_losses",
        ),
        (["--preserve", "--preserve_experts"], "preserve_experts=True is not possible; allowed: False with preserve=True"),
        (
            ["--dictionaries", "w.jsonl"],
            r"dictionaries=\['w.jsonl'\] is not possible; allowed: none without fit_translations",
        ),
        (["--preserved_rate", "0.5"], "preserved_rate=0.5 is not possible; allowed: 0 without preserve_experts=True"),
        (
            ["--preserve_experts", "--preserved_rate", "2"],
            "preserved_rate=2.0 is not possible; allowed: a number from 0 to 1",
        ),
        (["--preserve_experts", "--lora_rank", "2"], "lora_rank=2 is not possible; allowed: 0 for"),
        (["--preserve", "--lora_rank", "2"], "lora_rank=2 is not possible; allowed: 0 for"),
        (["--preserve", "--curriculum", "c.yaml"], "curriculum='c.yaml' is not possible; allowed: None for"),
        (
            ["--loss", "translation", "--teacher", "t", "--columns", "a", "b", "c"],
            r"columns=.* allowed: two with",
        ),
        (["--objective", "mlm", "--calibration_rows", "2"], "calibration_rows=2 is not possible; allowed: 0 with"),
        (["--where", "split"], "where='split' is not possible; allowed: COLUMN=VALUE"),
        (
            ["--where", "lang=en", "lang=de"],
            "where=\\['lang=en', 'lang=de'\\] is not possible; allowed: one value of each column",
        ),
        (["--loss", "distill_kl"], "teacher=None is not possible; allowed: a folder or Hub id for loss='distill_kl'"),
        (["--interpolation", "0"], "interpolation=0.0 is not possible; allowed: a number over 0, up to 1"),
        (["--interpolation", "0.5", "--lora_rank", "2"], "interpolation=0.5 is not possible; allowed: 1 with adapters"),
        (["--interpolation", "0.5", "--objective", "mlm"], "interpolation=0.5 is not possible; allowed: 1 with objective"),
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


def test_a_shortened_option_is_refused_not_ignored(tmp_path, capsys):
    """`--conf FILE` was once taken for an option, and the file never read."""
    (tmp_path / "train.yaml").write_text("model: m\ntrain_data: [x]")
    with pytest.raises((SystemExit, ValueError)):
        parse(["--conf", str(tmp_path / "train.yaml"), "--model", "m", "--train_data", "x", "--output_dir", "o"])
    assert parse(["--config", str(tmp_path / "train.yaml"), "--output_dir", "o"])[0].model == "m"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_rows: 10.5", "max_rows=10.5 is not possible; allowed: int | None"),
        ("max_rows: true", "max_rows=True is not possible; allowed: int | None"),
        ("sparse_layers: [1, two]", "sparse_layers=[1, 'two'] is not possible; allowed: list[int] | None"),
        ("matryoshka_dims: 8, 16", "matryoshka_dims='8, 16' is not possible; allowed: list[int]"),
        ("matryoshka_dims: ['16']", "matryoshka_dims=['16'] is not possible; allowed: list[int]"),
        ("where: {domain: a}", "where={'domain': 'a'} is not possible; allowed: list[str]"),
        ("train_data:", "train_data=None is not possible; allowed: list[str]"),
        ("model: 5", "model=5 is not possible; allowed: str | None"),
        ("balance: 2", "balance=2 is not possible; allowed: bool"),
        ("loss_options: [1]", "loss_options=[1] is not possible; allowed: dict | str | None"),
        ("learning_rate: [1]", "learning_rate=[1] is not possible; allowed: float"),
        ("seed: 1.5", "seed=1.5 is not possible; allowed: int"),
        ("label_names: {a: b}", "label_names={'a': 'b'} is not possible; allowed: list[str] | None"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_file(text, message, tmp_path):
    """Otherwise it fails after the model was loaded, as a sentence about iterables or slices."""
    path = tmp_path / "train.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}.")):
        parse(["--config", str(path), *NEEDED])


def test_one_value_is_a_list_of_one(tmp_path):
    """`train_data: pairs.jsonl` is what people write first; it must not be read letter by letter."""
    path = tmp_path / "train.yaml"
    path.write_text(
        "model: m\ntrain_data: pairs.jsonl\nwhere: domain=a\nsparse_layers: 1\nmatryoshka_dims: 16\nlabel_names: score\n"
    )
    options, training = parse(["--config", str(path)])
    assert (options.train_data, options.where, options.conditions) == (["pairs.jsonl"], ["domain=a"], {"domain": "a"})
    assert (options.sparse_layers, options.matryoshka_dims, training.label_names) == ([1], [16], ["score"])


def test_the_trainers_own_kinds_of_values_pass(tmp_path):
    """The file may hold any of the trainer's options; a check that is too strict would lock some out."""
    path = tmp_path / "train.yaml"
    path.write_text(
        "model: m\ntrain_data: [x]\nlearning_rate: 1\nnum_train_epochs: 2.5\nwarmup_steps: 0.1\nreport_to: none\n"
        "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 1}\nbatch_sampler: no_duplicates\n"
        "eval_steps: null\nprompts: {anchor: 'query: '}\ntf32: null\nloss_options: '{\"scale\": 20}'\nmax_rows: '7'\n"
    )
    options, training = parse(["--config", str(path), "--use_cpu"])
    assert (options.loss_keywords, options.max_rows, training.prompts) == ({"scale": 20}, 7, {"anchor": "query: "})
    assert (training.learning_rate, training.num_train_epochs, training.warmup_steps) == (1, 2.5, 0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_possible_model(name):
    """It is found when somebody starts a pre-training."""
    assert PRESETS == ("base", "large", "small")
    config = HagMoeConfig(**yaml.safe_load((PRESET_FOLDER / f"{name}.yaml").read_text()))
    assert config.sparse_layers
    options = parse(["--objective", "mlm", "--preset", name, "--train_data", "x.jsonl"])[0]
    assert options.preset == name


TRANSLATED = ["--domain_column", "d", "--domain_losses", '{"a": "translation"}', "--use_cpu", *NEEDED]


def test_options_that_are_not_given_are_the_recipes_where_one_fits(tmp_path):
    """What was measured together is what somebody gets who says no more than which rows are translations."""
    assert RECIPES == ("languages",)
    recipe = read_yaml(RECIPE_FOLDER / "languages.yaml")
    options, training = parse(TRANSLATED)
    assert options.recipe == "languages"
    assert {name: getattr(options, name, getattr(training, name, None)) for name in recipe} == recipe
    path = tmp_path / "train.yaml"
    path.write_text("learning_rate: 5e-5\npreserved_rate: 0.5\n")
    options, training = parse([*TRANSLATED, "--config", str(path), "--preserved_rate", "0.75"])
    assert (training.learning_rate, options.preserved_rate, options.fit_translations) == (5e-5, 0.75, True)
    assert training.learning_rate_mapping == {"experts": 1e-4}
    path.write_text("domain_losses: {a: translation}\ndomain_column: d\n")
    assert parse(["--config", str(path), *NEEDED])[0].recipe == "languages"
    path.write_text("sparse_layers: []\nngram_memory_size: 0\nfit_translations: false\n")
    options, training = parse([*TRANSLATED, "--config", str(path)])  # nothing that is named there is missing then
    assert (options.freeze, training.learning_rate_mapping) == (["embeddings.*"], {})


def test_no_recipe_where_none_fits_or_none_is_wanted(tmp_path):
    """Runs of today must come out tomorrow as they did, where nothing says translation."""
    plain = TrainOptions(model="m", train_data=["x.jsonl"])
    assert parse(NEEDED)[0] == plain
    assert parse([*NEEDED, "--loss", "translation"])[0].recipe is None
    options, training = parse([*TRANSLATED, "--recipe", "none", "--loss", "ranking_distill_kl"])
    assert (options.fit_translations, options.ngram_memory_size, training.learning_rate_mapping) == (False, 0, {})
    path = tmp_path / "train.yaml"
    path.write_text("recipe: none\nloss: ranking_distill_kl\n")
    assert not parse([*TRANSLATED, "--config", str(path)])[0].fit_translations
    path.write_text("recipe: null\n")
    assert parse([*TRANSLATED, "--config", str(path)])[0].recipe == "languages"
    path.write_text("recipe: cake\n")
    with pytest.raises(ValueError, match=r"recipe='cake' is not possible; allowed: one of \[None, 'none', 'languages'\]"):
        parse([*NEEDED, "--config", str(path)])


def test_rows_can_be_chosen_by_what_they_are_not():
    """A model's own language, or a test's rows, have to stay out, and are named more easily than all the others."""
    options = parse([*NEEDED, "--where", "lang!=en", "split=train", "text=a!=b", "lang!=de"])[0]
    assert options.conditions == {"split": "train", "text": "a!=b"}
    assert options.exclusions == {"lang": ["en", "de"]}


@pytest.mark.parametrize("option", ["--domain_losses", "--domain-losses"])
def test_the_recipe_follows_either_spelling_and_its_rates_the_rate(option):
    """transformers reads both; a run at a lower rate would otherwise have experts that learn many times as fast."""
    command = [*NEEDED, "--use_cpu", "--domain_column", "d", option, '{"a": "translation"}']
    assert parse(command)[0].recipe == "languages"
    training = parse([*command, option.replace("domain", "learning").replace("losses", "rate"), "5e-5"])[1]
    assert training.learning_rate_mapping == {"experts": 1e-4}
    with pytest.raises(SystemExit):
        parse([*command, "--learning_rate", "fast"])
    with pytest.raises(
        ValueError, match=r"preserve_experts=True .* \(Recipe 'languages' gives .*; recipe='none' turns it off"
    ):
        parse([*command, "--preserve"])


def test_the_guides_files_are_files_that_the_command_reads(tmp_path):
    """The guide is what people copy from."""
    guide = (Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
    files = {text.split()[1].rstrip(",:"): text for text in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    read = {name: parse(["--config", str(tmp_path / name), "--use_cpu"]) for name in files if name != "curriculum.yaml"}
    options, training = read["train.yaml"]
    assert (options.temperature, training.learning_rate) == (2, 2e-5)
    assert read["languages.yaml"][0].preserve
    assert read["prompts.yaml"][1].prompts == {"anchor": "query: ", "positive": "passage: "}
    for name in ("mixed.yaml", "further.yaml"):  # upcycled by the recipe, and what goes on with it
        options, training = read[name]
        assert (options.loss_of("bitext"), options.loss_of("others")) == ("translation", "ranking_distill_kl")
        assert training.learning_rate_mapping == {"experts": 2e-4}
        assert training.num_train_epochs == 1
    assert not read["further.yaml"][0].fit_translations
    curriculum = read_curriculum(tmp_path / "curriculum.yaml")
    assert curriculum.ends(100) == [10, 50, 100]
    model = HagMoeModel(tiny_config())
    for phase in curriculum.phases:
        value_by_pattern(list(encoder_parameters(model)), phase.learning_rates)
    named = set(re.findall(r"--([a-z_]+)", guide)) - {"num_processes", "num_machines", "multi_gpu", "cpu", "most"}
    known = {field.name for kind in (type(options), type(training)) for field in fields(kind)} | {"config", "help"}
    assert named <= known
