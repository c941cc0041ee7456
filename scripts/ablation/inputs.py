"""Everything a run reads, made once: pairs as token ids by domain, texts for calibration, the kit, the parent.

A step's batch is gathered on the device from flat arrays, so the loop neither tokenizes nor waits.
"""

import gzip
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer
from word_pairs import without_known

from ablation.budgets import TRANSLATED, WORD_DOMAIN, Budget
from hagmoe_hf.evaluation.decontamination import is_contaminated, kit_texts
from hagmoe_hf.evaluation.kit import find_sets
from hagmoe_hf.files import new_file, new_folder, write_text
from hagmoe_hf.ngram_memory import LEAST_COUNT
from hagmoe_hf.ngrams_hagmoe import frequent_ngrams
from hagmoe_hf.upcycling import CALIBRATION_LENGTH

COLUMNS = ("anchor", "positive")
WORDS, CALIBRATION_WORDS = f"{WORD_DOMAIN}.npz", "words.json"  # beside the manifest, which is the same with and without
DEV_ROWS, CALIBRATION_ROWS = 200, 600  # per domain, at most
LONGEST_TITLE = 60  # characters; longer ones are sentences with a comma
BUCKET = 8  # batches whose rows are sorted by length before they are cut, so that little of a batch is padding


@dataclass(frozen=True)
class Texts:
    """Tokenized texts, one after the other.

    Attributes:
        ids: (tokens,) on the device.
        offsets: (texts + 1,) where each begins, on the device.
        lengths: (texts,) on the host.
    """

    ids: Tensor
    offsets: Tensor
    lengths: np.ndarray


@dataclass(frozen=True)
class Pairs:
    """Pairs of all domains, one domain after the other.

    Attributes:
        columns: Anchors and positives.
        domains: Names.
        first_rows: (domains + 1,) where each domain begins.
        languages: (pairs,) code of each pair's language; that of the positive in a domain of translations from English.
        pad_id: Of the tokenizer.
    """

    columns: tuple[Texts, Texts]
    domains: tuple[str, ...]
    first_rows: np.ndarray
    languages: np.ndarray
    pad_id: int

    def rows_of(self, domain: int, budget: Budget) -> np.ndarray:
        """Numbers of a domain's pairs that may be trained on."""
        rows = np.arange(*self.first_rows[domain : domain + 2])
        if self.domains[domain] in budget.left_out:
            return rows[:0]
        is_translated = budget.is_translated(self.domains[domain])  # its pairs are in two languages
        return rows if is_translated else rows[~np.isin(self.languages[rows], budget.left_out_languages)]

    def features(self, rows: np.ndarray) -> list[dict[str, Tensor]]:
        """Model inputs of both columns for (B,) rows, each padded to its longest text."""
        device = self.columns[0].ids.device
        rows_B = torch.from_numpy(rows).to(device, non_blocking=True)
        return [_gather(texts, rows_B, int(texts.lengths[rows].max()), self.pad_id) for texts in self.columns]


def _gather(texts: Texts, rows_B: Tensor, longest: int, pad_id: int) -> dict[str, Tensor]:
    position_L = torch.arange(-(-longest // 8) * 8, device=rows_B.device)  # multiples of 8 suit the matrix units
    start_B, end_B = texts.offsets[rows_B], texts.offsets[rows_B + 1]
    index_BL = start_B[:, None] + position_L
    mask_BL = index_BL < end_B[:, None]
    ids_BL = texts.ids[index_BL.clamp(max=texts.ids.shape[0] - 1)].masked_fill(~mask_BL, pad_id)
    return {"input_ids": ids_BL.long(), "attention_mask": mask_BL.long()}


def prepare(
    pairs: Path,
    kit: Path,
    parent: Path,
    out: Path,
    max_length: int,
    most_rows: int | None,
    seed: int,
    titles: bool = False,
) -> None:
    """Make the folder `out`.

    Args:
        pairs: Parquet with the columns domain, lang, anchor, positive, split.
        kit: Evaluation sets; no pair that repeats one of their texts is trained on.
        parent: Folder of a dense SentenceTransformer.
        out: A new folder.
        max_length: Longest text in tokens.
        most_rows: Pairs kept of each domain; None for all.
        seed: Of that sample.
        titles: Whether to add what articles of one title say in two languages, as a domain of translations.

    Raises:
        ValueError: A domain is left without pairs to train on, or to hold out.
    """
    frame = pd.read_parquet(pairs).sample(frac=1, random_state=seed)
    if titles:
        frame = pd.concat([frame, same_titles(frame)], ignore_index=True)
    sets = find_sets(kit)
    known = kit_texts(sets)
    tokenizer = AutoTokenizer.from_pretrained(parent)
    manifest: dict = {
        "pairs": pairs.name,
        "max_length": max_length,
        "seed": seed,
        "pad_id": tokenizer.pad_token_id,
        "domains": {},
    }
    with new_folder(out) as folder:
        for domain, rows in tqdm(sorted(frame.groupby("domain")), desc="Domains"):
            train, dev = (rows[rows.split == split] for split in ("train", "dev"))
            train, dev = train[:most_rows], dev[:DEV_ROWS]
            clean = [not is_contaminated(a, p, known) for a, p in zip(train.anchor, train.positive, strict=True)]
            dropped, train = len(train) - sum(clean), train[clean]
            if train.empty or dev.empty:
                raise ValueError(f"domain {domain!r} has {len(train)} and {len(dev)} pairs; allowed: some of either split.")
            for split, part in (("train", train), ("dev", dev)):
                _pack(part, tokenizer, max_length, folder / split / f"{domain}.npz")
            texts = [text for column in COLUMNS for text in train[column][: CALIBRATION_ROWS // 2]]
            (folder / "calibration").mkdir(exist_ok=True)
            (folder / "calibration" / f"{domain}.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
            manifest["domains"][domain] = {"train": len(train), "dev": len(dev), "in_the_kit": dropped}
        for kit_set in sets:
            for name, path in kit_set.files.items():
                target = folder / "kit" / kit_set.key / f"{name}.jsonl.gz"
                target.parent.mkdir(parents=True, exist_ok=True)
                data = path.read_bytes()
                target.write_bytes(data if path.suffix == ".gz" else gzip.compress(data, mtime=0))
        if (kit / "manifest.json").is_file():
            shutil.copy(kit / "manifest.json", folder / "kit")
        shutil.copytree(parent, folder / "parent", ignore=shutil.ignore_patterns(".git*"))
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def same_titles(pairs: pd.DataFrame) -> pd.DataFrame:
    """What encyclopedias in English and in other languages say about the same titles, as translations of each other.

    An article's pair has "TITLE, description" as its anchor and its beginning as the positive. Titles are the same in two
    languages where they are names; they are cut off, since they would give away what belongs together. A pair is held out
    where the text in the other language is.

    Args:
        pairs: With the columns domain, lang, anchor, positive, split; those of the domain "encyclopedia" are read.

    Returns:
        Likewise, of the domain "encyclopedia-bitext": English anchors, positives in the language `lang`.
    """
    articles = pairs[pairs.domain == "encyclopedia"]
    parts = articles.anchor.str.partition(", ")
    articles = articles.assign(title=parts[0], description=parts[2])
    articles = articles[(articles.description != "") & (articles.title.str.len() <= LONGEST_TITLE)]
    articles = articles.drop_duplicates(["lang", "title"])
    is_english = articles.lang == "en"
    met = articles[~is_english].merge(articles[is_english], on="title", suffixes=("", "_en"))
    met = met[(met.split == "dev") | (met.split_en == "train")]
    halves = [
        met.assign(anchor=met[f"{column}_en"], positive=met[column])[["lang", "anchor", "positive", "split"]]
        for column in ("description", "positive")
    ]
    return pd.concat(halves).assign(domain="encyclopedia-bitext").sample(frac=1, random_state=0)


def add_words(words: Path, folder: Path) -> None:
    """Put pairs of words into a folder that `prepare` made: a memory may start from them; one arm is trained on them.

    Args:
        words: Parquet that `scripts/word_pairs.py` made. Pairs that a set of the kit compares are left out.
        folder: That `prepare` made.
    """
    rows = without_known(pd.read_parquet(words), find_sets(folder / "kit"))
    max_length = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["max_length"]
    rows = rows[rows.split == "train"].sample(frac=1, random_state=0)
    texts = rows[list(COLUMNS)][: CALIBRATION_ROWS // 2].to_numpy().T.tolist()
    write_text(folder / CALIBRATION_WORDS, json.dumps(texts, ensure_ascii=False))
    with new_file(folder / WORDS) as partial:
        _pack(rows, AutoTokenizer.from_pretrained(folder / "parent"), max_length, partial)


def _pack(rows: pd.DataFrame, tokenizer, max_length: int, path: Path) -> None:
    arrays = {}
    small = np.uint16 if len(tokenizer) < 2**16 else np.uint32
    for column in COLUMNS:
        ids = tokenizer(list(rows[column]), truncation=True, max_length=max_length)["input_ids"]
        arrays[f"{column}_ids"] = np.concatenate(ids).astype(small)
        arrays[f"{column}_lengths"] = np.array([len(text) for text in ids], dtype=np.uint16)
    arrays["languages"] = rows.lang.to_numpy(dtype="U8")
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:  # a path without the suffix would get one
        np.savez_compressed(file, **arrays)


def load_pairs(
    folder: Path, split: str, max_length: int, device: str, most_rows: int | None = None, words: bool = False
) -> Pairs:
    """The pairs of a split, on the device, cut to `max_length` tokens (the closing token stays the last).

    With `words`, those of dictionaries are the last domain.
    """
    paths = sorted((folder / split).glob("*.npz")) + ([_words_of(folder)] if words else [])
    columns = []
    languages = [np.load(path)["languages"][:most_rows] for path in paths]
    for column in COLUMNS:
        ids, lengths = [], []
        for path in paths:
            with np.load(path) as file:
                cut = _cut(file[f"{column}_ids"], file[f"{column}_lengths"], max_length, most_rows)
                ids.append(cut[0])
                lengths.append(cut[1])
        length = np.concatenate(lengths)
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(length)])).to(device)
        columns.append(Texts(torch.from_numpy(np.concatenate(ids)).to(device), offsets, length))
    first_rows = np.cumsum([0, *map(len, lengths)])
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    domains = tuple(path.stem for path in paths)
    return Pairs((columns[0], columns[1]), domains, first_rows, np.concatenate(languages), manifest["pad_id"])


def _cut(ids: np.ndarray, lengths: np.ndarray, max_length: int, most_rows: int | None) -> tuple[np.ndarray, np.ndarray]:
    lengths = lengths[:most_rows].astype(np.int64)
    ends = np.cumsum(lengths)
    ids = ids[: ends[-1]].astype(np.int32)
    position = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    is_last = position == np.repeat(lengths, lengths) - 1
    kept = (position < max_length - 1) | is_last
    return ids[kept], np.minimum(lengths, max_length)


def calibration_pairs(folder: Path, budget: Budget) -> list[tuple[str, str]]:
    """Pairs as training draws and sees them: so many of each domain as its weight says, texts cut to length."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "parent")
    sizes = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["domains"]
    weights = {
        domain: sizes[domain]["train"] ** (1 / budget.temperature) for domain in sizes if domain not in budget.left_out
    }
    pairs: list[tuple[str, str]] = []
    for domain, weight in sorted(weights.items()):
        path = folder / "calibration" / f"{domain}.json"
        texts = json.loads(path.read_text(encoding="utf-8"))
        tokens = tokenizer(texts, truncation=True, max_length=budget.max_length, return_offsets_mapping=True)
        cut = [text[: max(end for _, end in spans)] for text, spans in zip(texts, tokens["offset_mapping"], strict=True)]
        half = len(cut) // 2
        wanted = math.ceil(budget.calibration_pairs * weight / max(weights.values()))
        pairs += list(zip(cut[:half], cut[half:], strict=False))[:wanted]
    return pairs


@lru_cache
def training_ngrams(
    folder: Path, most: int, order: int, preserved: str = "", words: bool = False, translated: bool = False
) -> tuple[Tensor, Tensor]:
    """Names and counts of the most frequent n-grams of all training pairs, as `upcycle` counts them.

    Args:
        folder: That `prepare` made.
        most: Most n-grams.
        order: Tokens of the longest.
        preserved: Language whose texts are to stay as they are; "" for none.
        words: Whether those of dictionaries count as well.
        translated: Whether translations alone count, instead of all pairs.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder / "parent")
    pairs = load_pairs(folder, "train", CALIBRATION_LENGTH, "cpu")
    counts_N = _is_translated(pairs) if translated else np.full(pairs.first_rows[-1], True)
    own, others = [], []
    for texts, languages in zip(pairs.columns, languages_of_columns(pairs), strict=True):
        is_preserved_N = languages == preserved
        own.append(_texts_where(texts, counts_N & ~is_preserved_N))
        others.append(_texts_where(texts, counts_N & is_preserved_N))
    if words:
        english, translations = word_translations(folder)
        own += [translations] if preserved else [english, translations]
        others += [english] if preserved else []
    ids_T, length_N = (torch.cat(parts) for parts in zip(*own, strict=True))
    kept_ids_T, kept_length_N = (torch.cat(parts) for parts in zip(*others, strict=True))
    special = tokenizer.all_special_ids
    return frequent_ngrams(ids_T, length_N, special, most, order, LEAST_COUNT, (kept_ids_T, kept_length_N))


def training_translations(folder: Path, words: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Ids and lengths of the English texts of all training pairs that are translations, and those of the others.

    Args:
        folder: That `prepare` made.
        words: Whether those of dictionaries are among them.
    """
    pairs = load_pairs(folder, "train", CALIBRATION_LENGTH, "cpu")
    found = [_texts_where(texts, _is_translated(pairs)) for texts in pairs.columns]
    if words:
        both = zip(found, word_translations(folder), strict=True)
        return [(torch.cat([own[0], more[0]]), torch.cat([own[1], more[1]])) for own, more in both]
    return found


def _texts_where(texts: Texts, is_kept_N: np.ndarray) -> tuple[Tensor, Tensor]:
    """Ids and lengths of the texts of a mask."""
    length_N, kept_N = torch.from_numpy(texts.lengths), torch.from_numpy(is_kept_N)
    return texts.ids[torch.repeat_interleave(kept_N, length_N)].long(), length_N[kept_N]


def _is_translated(pairs: Pairs) -> np.ndarray:
    """(pairs,) whether each is a translation from English."""
    return np.repeat([name in TRANSLATED for name in pairs.domains], np.diff(pairs.first_rows))


def _words_of(folder: Path) -> Path:
    path = folder / WORDS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; allowed: inputs that --add-words gave some.")
    return path


def word_translations(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Ids and lengths of the English words of dictionaries, and those of the words of other languages.

    Raises:
        FileNotFoundError: The folder has none.
    """
    with np.load(_words_of(folder)) as file:
        return [
            (
                torch.from_numpy(file[f"{column}_ids"].astype(np.int64)),
                torch.from_numpy(file[f"{column}_lengths"].astype(np.int64)),
            )
            for column in COLUMNS
        ]


def languages_of_columns(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """(pairs,) the languages of anchors, which are English where the positives translate them, and those of positives."""
    return np.where(_is_translated(pairs), "en", pairs.languages), pairs.languages


def texts_by_language(
    folder: Path, language: str, words: bool = False, translated: bool = False
) -> tuple[list[str], list[str]]:
    """Texts for calibration: those in a language, and those in others.

    Args:
        folder: That `prepare` made.
        language: Its code.
        words: Whether those of dictionaries are among them.
        translated: Whether all others are translations.
    """
    own: list[str] = []
    others: list[str] = []
    if words:
        english, translations = json.loads((folder / CALIBRATION_WORDS).read_text(encoding="utf-8"))
        (own if language == "en" else others).extend(english)
        others += translations
    for path in sorted((folder / "calibration").glob("*.json")):
        if translated and path.stem not in TRANSLATED:
            continue
        texts = json.loads(path.read_text(encoding="utf-8"))
        positives = np.load(folder / "train" / f"{path.stem}.npz")["languages"][: len(texts) // 2]
        anchors = np.full_like(positives, "en") if path.stem in TRANSLATED else positives
        for text, its_language in zip(texts, [*anchors, *positives], strict=True):
            (own if its_language == language else others).append(text)
    return own, others


def plan(pairs: Pairs, budget: Budget, seed: int, mixed: bool) -> list[np.ndarray]:
    """The rows of every step, the same for every arm on the same pairs: a function of these, budget, seed, and `mixed`.

    Domains come by weight n^(1/T), what is left out never. Each goes through its rows in a random order, and starts again
    when it is used up.
    """
    random = np.random.default_rng([seed, int(mixed)])
    rows_of = [pairs.rows_of(domain, budget) for domain in range(len(pairs.domains))]
    sizes = np.array(list(map(len, rows_of)))
    weights = sizes ** (1 / budget.temperature)
    draws = budget.steps * (budget.batch_size if mixed else 1)
    turns = random.choice(len(sizes), size=draws, p=weights / weights.sum())
    if not mixed:
        streams = [_batches(pairs, rows_of[domain], [seed, domain], budget.batch_size) for domain in range(len(sizes))]
        return [next(streams[domain]) for domain in turns]
    rows = np.empty(draws, dtype=np.int64)
    for domain in range(len(sizes)):
        mine = np.flatnonzero(turns == domain)
        rows[mine] = _order(rows_of[domain], [seed, domain], len(mine))
    return list(rows.reshape(budget.steps, budget.batch_size))


def _order(rows: np.ndarray, seeds: list[int], wanted: int) -> np.ndarray:
    """The first `wanted` of a domain's rows, pass after pass, each in an order of its own."""
    passes = range(-(-wanted // max(1, len(rows))))
    orders = [rows[np.random.default_rng([*seeds, turn]).permutation(len(rows))] for turn in passes]
    return np.concatenate([*orders, np.empty(0, dtype=np.int64)])[:wanted]


def _batches(pairs: Pairs, rows: np.ndarray, seeds: list[int], batch_size: int):
    """Batches of a domain's rows without end: within a few batches' rows, those of about the same length go together."""
    lengths = pairs.columns[0].lengths + pairs.columns[1].lengths
    turn = 0
    while True:
        random = np.random.default_rng([*seeds, turn])
        order = rows[random.permutation(len(rows))]
        for window in _windows(order, batch_size):
            by_length = window[np.argsort(lengths[window], kind="stable")]
            cuts = [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
            yield from (cuts[number] for number in random.permutation(len(cuts)))
        turn += 1


def _windows(order: np.ndarray, batch_size: int) -> Sequence[np.ndarray]:
    """Parts of whole batches; a domain smaller than a batch is one part, and what is left over waits for the next pass."""
    whole = max(batch_size, len(order) // batch_size * batch_size)
    return [order[at : at + BUCKET * batch_size] for at in range(0, min(whole, len(order)), BUCKET * batch_size)]
