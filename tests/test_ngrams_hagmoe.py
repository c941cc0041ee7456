"""N-grams that are frequent, found again, and the memory that holds a row for each."""

from collections import Counter

import pytest
import torch
from conftest import SHAPES, TINY, spread, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hagmoe_hf import HagMoeConfig, HagMoeForMaskedLM, HagMoeModel, upcycle
from hagmoe_hf.ngrams_hagmoe import NEVER, frequent_ngrams, ngram_rows, spell_ngrams

TEXTS = st.lists(st.lists(st.integers(-1, 3), min_size=1, max_size=9), min_size=1, max_size=6)


def flat(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """All tokens one after the other, and the lengths of the texts."""
    return torch.tensor([token for text in texts for token in text]), torch.tensor(list(map(len, texts)))


def count(texts: list[list[int]], order: int) -> Counter:
    """What a reader would count: runs of 1 to `order` tokens of one text without a negative one."""
    return Counter(
        tuple(text[first : first + n])
        for text in texts
        for n in range(1, order + 1)
        for first in range(len(text) - n + 1)
        if min(text[first : first + n]) >= 0
    )


def whole_texts(texts: list[list[int]]) -> set[tuple[int, ...]]:
    """Texts without their negative tokens, where the others follow each other."""
    runs = ("".join("x" if token >= 0 else " " for token in text).split() for text in texts)
    return {tuple(token for token in text if token >= 0) for text, own in zip(texts, runs, strict=True) if len(own) == 1}


def frequent(counts: Counter, texts: list[list[int]], least_count: int) -> dict[tuple[int, ...], int]:
    """Of counted n-grams those that may have a row."""
    wholes = whole_texts(texts)
    return {ngram: number for ngram, number in counts.items() if number >= least_count or ngram in wholes}


@given(texts=TEXTS, most=st.integers(1, 30), least_count=st.integers(1, 3))
def test_the_most_frequent_ngrams_are_known(texts, most, least_count):
    """A memory that holds other rows than it says learns for texts that nobody has."""
    counts = count(texts, 3)
    eligible = frequent(counts, texts, least_count)
    names, found_counts = frequent_ngrams(*flat(texts), [-1], most, 3, least_count)
    known = dict(zip(spell_ngrams(names), found_counts.tolist(), strict=True))
    counted = {ngram: number for ngram, number in known.items() if number}
    assert counted == {ngram: eligible[ngram] for ngram in counted}
    assert len(known) == len(names)
    assert len(counted) == min(most, len(eligible))
    best_wholes = sorted((counts[ngram] for ngram in whole_texts(texts) & counts.keys()), reverse=True)[: most // 2]
    others = sorted(eligible.values(), reverse=True)
    for number in best_wholes:
        others.remove(number)
    assert sorted(counted.values()) == sorted([*best_wholes, *others[: most - len(best_wholes)]])
    for ngram in known.keys() - counted.keys():
        assert any(longer[: len(ngram)] == ngram for longer in counted)
    assert names.tolist() == sorted(names.tolist())


def test_a_dictionary_gets_a_row_for_each_word():
    """Each of its words stands there once, and would never be frequent."""
    sentences, words = [[7, 8, 9, 7, 8, 9, 7, 8, 9]] * 3, [[-1, 20 + word, 21 + word, -1] for word in range(0, 10, 2)]
    names, counts = frequent_ngrams(*flat([*sentences, *words]), [-1], 10, 3, 3)
    known = dict(zip(spell_ngrams(names), counts.tolist(), strict=True))
    assert [known[tuple(word[1:3])] for word in words] == [1] * 5
    assert known[(20,)] == 0, "a beginning has a name, for the word's sake, and learns nothing"
    assert sum(number > 1 for number in known.values()) == 5, "half of the places are for what is frequent"


@given(texts=TEXTS, most=st.integers(1, 30))
def test_every_known_ngram_is_found_where_it_ends_and_no_other(texts, most):
    """Also by the search that exported graphs use, which has no operation of its own for it."""
    ids, lengths = flat(texts)
    names, _ = frequent_ngrams(ids, lengths, [-1], most, 3, 1)
    follows = torch.tensor([place > 0 for text in texts for place in range(len(text))])
    if not len(names):
        return
    row = {ngram: place + 1 for place, ngram in enumerate(spell_ngrams(names))}
    expected = [
        [
            row.get(tuple(text[max(0, end - n) : end]), 0) if end >= n else 0
            for text in texts
            for end in range(1, len(text) + 1)
        ]
        for n in (1, 2, 3)
    ]
    for is_traced in (False, True):
        found = ngram_rows(ids.unsqueeze(0), follows.unsqueeze(0), names, 3, is_traced)
        assert torch.stack(found).squeeze(1).tolist() == expected


def with_memory(shape: str = "bert", seed: int = 0, **changes) -> HagMoeModel:
    """A tiny mixture whose memory knows runs of the ids 5, 6, ..., 20."""
    ids = torch.arange(5, 21).repeat(3)
    names, _ = frequent_ngrams(ids, torch.tensor([16, 16, 16]), [], 60, 4, 1)
    changes = {**SHAPES[shape], "ngram_memory_size": len(names), "ngram_memory_scale": 1.0, **changes}
    model = HagMoeModel(tiny_config(**changes)).eval()
    spread(model, scale=0.2, seed=seed)
    model.ngram_memory.names.copy_(names)
    model.ngram_memory.counts.copy_(torch.arange(len(names)) % 4 + 1)
    return model


TEXT = [9, 10, 11, 12, 13, 40, 5, 6]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_text_has_one_vector_however_it_is_batched(shape):
    """Padding on either side, packing and neighbours must neither break n-grams nor make new ones."""
    model = with_memory(shape)
    pad = model.config.pad_token_id
    alone = model(torch.tensor([TEXT])).last_hidden_state[0]
    other = [14, 15, 16, 17, 18, 19, 20, 8, 9, 10, 11, 12]  # what the text begins with follows its own end
    for left in (True, False):
        padding = [pad] * (len(other) - len(TEXT))
        row = padding + TEXT if left else TEXT + padding
        real = [0] * len(padding) + [1] * len(TEXT) if left else [1] * len(TEXT) + [0] * len(padding)
        mask = torch.tensor([real, [1] * len(other)])
        for kwargs in ({}, {"output_hidden_states": True}):  # without padding, and with
            states = model(torch.tensor([row, other]), mask, **kwargs).last_hidden_state[0][mask[0].bool()]
            torch.testing.assert_close(states, alone, atol=1e-5, rtol=0)
    packed = torch.tensor([other + TEXT])
    boundaries = torch.tensor([0, len(other), len(other) + len(TEXT)])
    states = model(packed, cu_seq_lens_q=boundaries, max_length_q=12).last_hidden_state[0][len(other) :]
    torch.testing.assert_close(states, alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_row_changes_texts_that_hold_its_ngram_and_no_others():
    """What is learned for some texts must leave others as they were."""
    model = with_memory()
    row = spell_ngrams(model.ngram_memory.names).index((10, 11, 12)) + 1
    texts = [torch.tensor([TEXT]), torch.tensor([[9, 10, 40, 11, 12]])]
    before = [model(text).last_hidden_state for text in texts]
    model.ngram_memory.rows[row] += 1.0
    after = [model(text).last_hidden_state for text in texts]
    assert (before[0] - after[0]).abs().max() > 1e-3
    assert torch.equal(before[1], after[1])


def test_rows_learn_by_their_scale_and_only_where_they_are_met():
    """Twice the scale is twice the step; the gradient, which clipping looks at, stays as it is."""
    gradients = []
    for scale in (1.0, 50.0):
        model = with_memory(ngram_memory_scale=scale)
        model.ngram_memory.rows.data.zero_()
        model(torch.tensor([TEXT])).last_hidden_state.square().sum().backward()
        gradients.append(model.ngram_memory.rows.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    met = {row for rows in found(model, TEXT) for row in rows} - {0}
    assert set(gradients[0].abs().sum(-1).nonzero().flatten().tolist()) == met
    with torch.no_grad():
        model.ngram_memory.rows.add_(torch.randn(model.ngram_memory.rows.shape) * 0.01)
        inferred = model(torch.tensor([TEXT])).last_hidden_state
    torch.testing.assert_close(model(torch.tensor([TEXT])).last_hidden_state, inferred, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_memory_can_be_turned_off_for_good(tmp_path):
    """Whoever finds that it costs more than it brings need not train again."""
    model = with_memory()
    model.config.ngram_memory_scale = 0.0
    model.save_pretrained(tmp_path)
    again, text = HagMoeModel.from_pretrained(tmp_path).eval(), torch.tensor([TEXT])
    model.ngram_memory = None
    assert torch.equal(again(text).last_hidden_state, model(text).last_hidden_state)


def test_what_is_only_the_beginning_of_others_adds_nothing_and_learns_nothing():
    """Its texts are to stay as they are."""
    model = with_memory(ngram_memory_scale=2.0)
    memory = model.ngram_memory
    memory.rows.data[1:] = 1.0
    memory.counts[1] = 0
    learned, silent = spell_ngrams(memory.names)[0], spell_ngrams(memory.names)[1]
    assert len(learned) == len(silent) == 1
    moved = memory(torch.tensor([[*learned, *silent]]), torch.zeros(1, 2, dtype=torch.bool))
    torch.testing.assert_close(moved[0], torch.tensor([2.0, 0.0]).unsqueeze(-1).expand(-1, moved.shape[-1]))
    moved.sum().backward()
    assert memory.rows.grad[1].ne(0).all()
    assert memory.rows.grad[[0, 2]].eq(0).all()


@given(texts=TEXTS, preserved=TEXTS, most=st.integers(1, 30), least_count=st.integers(1, 3))
def test_no_ngram_of_preserved_texts_is_counted(texts, preserved, most, least_count):
    """A row for one would move the texts that are to stay."""
    counts, elsewhere = count(texts, 3), count(preserved, 3)
    eligible = frequent(counts, texts, least_count).keys() - elsewhere.keys()
    names, found_counts = frequent_ngrams(*flat(texts), [-1], most, 3, least_count, flat(preserved))
    spelled = spell_ngrams(names)
    kept = {ngram: number for ngram, number in zip(spelled, found_counts.tolist(), strict=True) if number}
    assert kept == {ngram: counts[ngram] for ngram in kept}
    assert kept.keys() <= eligible
    assert len(kept) == min(most, len(eligible))
    assert set(spelled) == {ngram[:n] for ngram in kept for n in range(1, len(ngram) + 1)}


def found(model: HagMoeModel, text: list[int]) -> list[list[int]]:
    follows = torch.tensor([[False] + [True] * (len(text) - 1)])
    return [rows[0].tolist() for rows in ngram_rows(torch.tensor([text]), follows, model.ngram_memory.names, 4)]


def test_saving_keeps_what_the_memory_knows(tmp_path):
    """A reloaded model that knows other n-grams would silently give other vectors."""
    model = with_memory()
    model.save_pretrained(tmp_path)
    again = HagMoeModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again.ngram_memory.names, model.ngram_memory.names)
    assert torch.equal(again.ngram_memory.counts, model.ngram_memory.counts)
    text = torch.tensor([TEXT])
    torch.testing.assert_close(again(text).last_hidden_state, model(text).last_hidden_state)
    half = HagMoeModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.ngram_memory.names, model.ngram_memory.names)


def test_a_fresh_memory_knows_nothing_and_adds_nothing():
    """A model from a config must not begin with noise in a table that learns a hundred times as fast."""
    model = HagMoeForMaskedLM(tiny_config(ngram_memory_size=5))
    assert (model.model.ngram_memory.names == NEVER).all()
    assert not model.model.ngram_memory.rows.any()
    assert all(rows == [0] * len(TEXT) for rows in found(model.model, TEXT))


def test_the_config_counts_the_memory():
    """Active parameters decide what a token costs; a row that is looked up is none."""
    plain, config = tiny_config(), tiny_config(ngram_memory_size=100)
    counts = config.parameter_counts()
    assert counts.total == HagMoeModel(config).num_parameters()
    assert counts.memory == counts.total - plain.parameter_counts().total == 101 * TINY["hidden_size"]
    assert counts.active == plain.parameter_counts().active


@pytest.mark.parametrize(
    ("field", "value"), [("ngram_memory_size", -1), ("ngram_memory_order", 0), ("ngram_memory_scale", -1.0)]
)
def test_a_memory_that_cannot_be_is_refused(field, value):
    with pytest.raises(Exception, match=f"{field}={value}"):
        HagMoeConfig(**{field: value})


def test_embeddings_instead_of_ids_are_refused():
    """They do not say which n-grams they are, and a vector without the memory would be another one."""
    with pytest.raises(ValueError, match=r"inputs_embeds .* ngram_memory_size=58"):
        with_memory()(inputs_embeds=torch.zeros(1, 3, TINY["hidden_size"]))


@pytest.mark.parametrize("sparse_layers", [None, []])
def test_upcycling_with_ngrams_is_exact(sparse_layers, tiny_parent, corpus):
    """Rows start at 0, so the promise of equal vectors holds with a memory, too."""
    parent = SentenceTransformer(str(tiny_parent), device="cpu")
    pairs = list(zip(corpus[::2], corpus[1::2], strict=False))
    mixture = upcycle(parent, ngram_texts=pairs, ngram_memory_size=200, sparse_layers=sparse_layers)
    difference = mixture.encode(corpus[:40]) - parent.encode(corpus[:40])
    assert abs(difference).max() < 1e-5
    memory = mixture[0].model.ngram_memory
    assert mixture.upcycling_report.ngrams == len(memory.names) == 200
    assert "200 n-grams" in str(mixture.upcycling_report)
    special = set(parent.tokenizer.all_special_ids)
    assert not special & {token for ngram in spell_ngrams(memory.names) for token in ngram}
    read = parent.tokenizer(corpus[: 2 * len(pairs)], truncation=True, max_length=parent.max_seq_length)["input_ids"]
    counts = count([[-1 if token in special else token for token in ids] for ids in read], 4)
    kept = sorted((counts[ngram] for ngram in spell_ngrams(memory.names)), reverse=True)
    assert kept == sorted(counts.values(), reverse=True)[:200]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ngram_texts": "one text"}, "ngram_texts holds 'one text'"),
        ({"ngram_texts": [3]}, "ngram_texts holds 3"),
        ({"ngram_texts": ["a b c d e f"]}, "no token occurs 3 times"),
        ({"ngram_texts": []}, "no token occurs 3 times"),
        ({"ngram_memory_size": 0}, "ngram_memory_size=0"),
    ],
)
def test_texts_that_give_no_memory_are_refused(arguments, message, tiny_parent):
    with pytest.raises(ValueError, match=message):
        upcycle(str(tiny_parent), **arguments)


def test_texts_without_a_tokenizer_are_refused(tiny_parent):
    parent = SentenceTransformer(str(tiny_parent), device="cpu")[0].model
    with pytest.raises(ValueError, match="ngram_texts with a BertModel, which comes without its tokenizer"):
        upcycle(parent, ngram_texts=["a text"] * 3)


def test_a_mean_of_names_is_refused():
    """As averaging whole state dicts makes it; every n-gram would be another one then, without a word."""
    model = HagMoeModel(tiny_config(ngram_memory_size=40))
    averaged = {name: (tensor + tensor) / 2 for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"ngram_memory\.names is torch\.float32; allowed: torch\.int64"):
        model.load_state_dict(averaged)
