from types import SimpleNamespace

import pytest
import torch
from conftest import spread, tiny_config
from transformers import AutoTokenizer, TrainerControl, TrainerState

from hagmoe_hf import HagMoeModel, sentence, upcycle
from hagmoe_hf.training.curriculum import Curriculum, CurriculumCallback, Phase, cut_features, read_curriculum
from hagmoe_hf.training.parameters import encoder_parameters

YAML = """
phases:
  - name: routers
    until: 0.25
    learning_rates: {"*": 0, "*.router.*": 2}
    aux_loss_coef: 0.01
    topk_group: 2
  - name: experts
    until: 6
    learning_rates: {"*": 0, "*.router.*": 1, "*.experts.*": 5e-1}
  - name: everything
"""


@pytest.fixture
def curriculum(tmp_path):
    path = tmp_path / "curriculum.yaml"
    path.write_text(YAML)
    return read_curriculum(path)


def begin(callback, model, max_steps=8, deepspeed=None):
    """Start training as the trainer would; returns what it hands to every call."""
    arguments, state = SimpleNamespace(deepspeed=deepspeed), TrainerState(max_steps=max_steps)
    callback.on_train_begin(arguments, state, TrainerControl(), model=model)
    return arguments, state, TrainerControl()


def step(callback, trainer_view, optimizer=None):
    callback.on_step_begin(*trainer_view)
    if optimizer:
        callback.on_pre_optimizer_step(*trainer_view)
        optimizer.step()
        callback.on_optimizer_step(*trainer_view)
    trainer_view[1].global_step += 1


def test_a_phase_follows_from_the_step_alone(curriculum):
    """A resumed run knows only its step; a wrong phase would train the wrong weights."""
    assert [curriculum.phase_at(s, 8).name for s in range(8)] == ["routers"] * 2 + ["experts"] * 4 + ["everything"] * 2
    assert curriculum.ends(8) == [2, 6, 8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phases: [", "is not YAML"),
        ("phase: []", "one key 'phases'"),
        ("phases: []", "one key 'phases'"),
        ("phases: [{until: 0.5}]", "phase 1 has no name"),
        ("phases: [{name: a, lr: 1}]", "phase 'a': unknown field 'lr'; allowed: .*learning_rates"),
        ("phases: [{name: a, until: 0}]", "until=0 is not possible; allowed: a step"),
        ("phases: [{name: a, until: 1.5}]", "until=1.5 is not possible; allowed: a step"),
        ("phases: [{name: a, aux_loss_coef: -1}]", "aux_loss_coef=-1 is not possible; allowed: a finite number, 0 or more"),
        ("phases: [{name: a, z_loss_coef: .nan}]", "z_loss_coef=nan is not possible"),
        ("phases: [{name: a, topk_group: 1.5}]", "topk_group=1.5 is not possible; allowed: an integer, at least 1"),
        ("phases: [{name: a, max_length: 2}]", "max_length=2 is not possible; allowed: an integer, at least 3"),
        ("phases: [{name: a, mix: {x: 0}}]", "mix=.* is not possible; allowed: a mapping of domain -> weight"),
        ("phases: [{name: a, learning_rates: [1]}]", "learning_rates=.* is not possible; allowed: a mapping of parameter"),
        ("phases: [{name: a, until: 3}, {name: a}]", "Several phases are named 'a'"),
    ],
)
def test_a_mistake_in_the_file_names_file_phase_field_and_what_is_allowed(text, message, tmp_path):
    """A curriculum with a silent mistake wastes the whole run."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_curriculum(path)
    assert "mine.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([Phase("a", 0.5), Phase("b", 3), Phase("c")], "Phase 'b': until=3 is step 3 of 8; allowed: after step 4"),
        ([Phase("a", 0.5)], "Phase 'a': until=0.5 is step 4; allowed for the last phase: the end of the run, 1.0 or 8"),
        ([Phase("a", learning_rates={"*.expert.*": 1.0})], "pattern '\\*.expert.\\*' matches no parameter"),
        (
            [Phase("a", 4), Phase("b", topk_group=5)],
            "Phase 'b': topk_group=5 is not possible; allowed: between 1 and",
        ),
        ([Phase("a", max_length=8)], "max_length in a phase needs a SentenceTransformer"),
        ([Phase("a", 4), Phase("a")], "Several phases are named 'a'; allowed: a name of its own for each"),
    ],
)
def test_a_phase_that_cannot_be_is_refused_before_the_first_step(phases, message):
    """Found at its first step it would cost everything trained until then."""
    model = HagMoeModel(tiny_config())
    with pytest.raises(ValueError, match=message):
        begin(CurriculumCallback(Curriculum(tuple(phases))), model)
    assert model.config.topk_group == 1


def test_deepspeed_is_refused_where_it_would_undo_the_learning_rates():
    """Its own copies of the weights would silently win."""
    callback = CurriculumCallback(Curriculum((Phase("a", learning_rates={"*": 0.5}),)))
    with pytest.raises(ValueError, match="learning_rates in a phase with DeepSpeed"):
        begin(callback, HagMoeModel(tiny_config()), deepspeed={"zero_optimization": {"stage": 2}})
    begin(CurriculumCallback(Curriculum((Phase("a", topk_group=2),))), HagMoeModel(tiny_config()), deepspeed={"a": 1})


def test_a_coefficient_without_the_router_callback_is_refused():
    """It would be read, believed and never used."""
    with pytest.raises(ValueError, match="Phase 'a' sets z_loss_coef without a router_callback"):
        CurriculumCallback(Curriculum((Phase("a", z_loss_coef=0.1),)))


def test_learning_rate_factors_scale_what_the_optimizer_did(curriculum):
    """Compared with plain gradient descent, whose step is known: rate * factor * gradient."""
    model = spread(HagMoeModel(tiny_config()))
    callback = CurriculumCallback(curriculum, SimpleNamespace(aux_loss_coef=0.0, z_loss_coef=0.0, bias_update_rate=0.02))
    view = begin(callback, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    expected = {"routers": {"router": 2, "experts": 0}, "experts": {"router": 1, "experts": 0.5}, "everything": {}}
    for _ in range(8):
        before = {name: parameter.detach().clone() for name, parameter in encoder_parameters(model).items()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        step(callback, view, optimizer)
        factors = expected[callback.phase.name]
        for name, parameter in encoder_parameters(model).items():
            kind = "router" if ".router." in name else "experts" if ".experts." in name else None
            factor = factors.get(kind, 0) if factors else 1
            if factor == 0:
                assert torch.equal(parameter, before[name]), name
            else:
                assert torch.allclose(parameter, before[name] - 0.5 * factor, atol=1e-6), name


def test_what_a_phase_leaves_out_returns_to_what_the_run_began_with(curriculum):
    """A warm-up's coefficient that stays on would balance experts for the rest of the run."""
    router = SimpleNamespace(aux_loss_coef=0.3, z_loss_coef=0.1, bias_update_rate=0.02)
    model = HagMoeModel(tiny_config())
    callback = CurriculumCallback(curriculum, router)
    view = begin(callback, model)
    seen = []
    for _ in range(8):
        step(callback, view)
        seen.append((router.aux_loss_coef, router.z_loss_coef, model.config.topk_group))
    assert seen == [(0.01, 0.1, 2)] * 2 + [(0.3, 0.1, 1)] * 6
    phases = [(entry["phase"], entry["step"]) for entry in view[1].log_history]
    assert phases == [("routers", 0), ("experts", 2), ("everything", 6)]


def test_a_resumed_run_is_in_its_phase_and_does_not_log_it_twice(curriculum):
    """Its log must equal an uninterrupted one's."""
    model = HagMoeModel(tiny_config())
    router = SimpleNamespace(aux_loss_coef=0.0, z_loss_coef=0.0, bias_update_rate=0.02)
    callback = CurriculumCallback(curriculum, router)
    view = begin(callback, model)
    view[1].global_step, view[1].log_history = 1, [{"phase": "routers", "step": 0}]
    step(callback, view)
    assert callback.phase.name == "routers"
    assert router.aux_loss_coef == 0.01
    assert view[1].log_history == [{"phase": "routers", "step": 0}]


def test_a_cut_batch_is_what_the_tokenizer_would_have_made(tiny_parent, corpus):
    """Without its closing token a text is one that the model has never seen the like of."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_parent)
    texts = [*corpus[:20], "a", ""]
    for length in (3, 8, 40, 64):
        whole = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        wanted = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        cut = cut_features({**whole, "modality": "text"}, length)
        assert cut.pop("modality") == "text"
        assert cut.keys() == wanted.keys()
        for key, value in cut.items():
            assert torch.equal(value, wanted[key]), (length, key)


def test_lengths_are_cut_in_training_only(tiny_parent):
    """Evaluation must see what a user will send."""
    model = upcycle(sentence.load(str(tiny_parent), device="cpu"))
    callback = CurriculumCallback(Curriculum((Phase("short", max_length=5),)))
    view = begin(callback, model)
    step(callback, view)
    view = begin(callback, model)  # again, as after an interruption
    step(callback, view)
    features = model.tokenize(["one two three four five six seven eight"])
    assert features["input_ids"].shape[1] > 5
    assert model.train()(dict(features))["token_embeddings"].shape[1] == 5
    assert model.eval()(dict(features))["token_embeddings"].shape[1] == features["input_ids"].shape[1]
    callback.on_train_end(*view)
    assert model.train()(dict(features))["token_embeddings"].shape[1] == features["input_ids"].shape[1]


def test_lengths_are_not_cut_from_the_left(tiny_parent):
    """The first tokens of a row would be its padding, and its last ones would be lost."""
    model = upcycle(sentence.load(str(tiny_parent), device="cpu"))
    model.tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="max_length in a phase with padding on the left; allowed: a tokenizer that pads"):
        begin(CurriculumCallback(Curriculum((Phase("short", max_length=5),))), model)
