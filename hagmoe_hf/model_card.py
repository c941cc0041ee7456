"""Model cards, filled from what the code knows; no number in them is typed by hand."""

from huggingface_hub import ModelCard, ModelCardData

USAGE = """```python
import hagmoe_hf  # registers the architecture, once per process
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/or/hub-id/of/this/model")
vectors = model.encode(["a text", "another one"])
```"""


ENCODER_USAGE = """```python
import hagmoe_hf  # registers the architecture, once per process
from transformers import AutoModel

model = AutoModel.from_pretrained("path/or/hub-id/of/this/model")
```"""
PLACEHOLDERS = ("path/or/hub-id/of/this/model", "sentence_transformers_model_id")


def published_card(card: str, repo_id: str, is_sentence_transformer: bool) -> str:
    """A saved model's card, with the repository's name in its snippets and a way to load it without this package.

    Args:
        card: The card that was saved with the model, "" where there was none.
        repo_id: "owner/name" on the Hub.
        is_sentence_transformer: Whether it is a `SentenceTransformer`, or a bare transformers model.

    Returns:
        Markdown with a YAML head.
    """
    usage = USAGE if is_sentence_transformer else ENCODER_USAGE
    if not card.strip():
        head = ModelCardData(library_name="transformers", tags=["mixture-of-experts", "hagmoe"])
        card = f"---\n{head.to_yaml()}\n---\n\n# HAG-MoE\n\nA mixture-of-experts text encoder.\n"
    if "import hagmoe_hf" not in card:
        card = f"{card.rstrip()}\n\n## Load\n\n{usage}\n"
    without_package = usage.replace("import hagmoe_hf  # registers the architecture, once per process\n", "")
    without_package = without_package.replace('of/this/model")', 'of/this/model", trust_remote_code=True)')
    card = f"{card.rstrip()}\n\n## Load without hagmoe_hf\n\nThe code beside the weights needs `requirements.txt`.\n\n"
    card += f"{without_package}\n"
    for placeholder in PLACEHOLDERS:
        card = card.replace(placeholder, repo_id)
    return card


def upcycled_card(report: str, parent_card: str) -> str:
    """The card of a mixture that was upcycled and not trained yet.

    Args:
        report: The printed upcycling report.
        parent_card: The parent's card, "" where there is none; its licence, languages and data apply to the mixture, too.

    Returns:
        Markdown with a YAML head.
    """
    parent = ModelCard(parent_card, ignore_metadata_errors=True)
    inherited = {key: value for key, value in parent.data.to_dict().items() if key in ("license", "language", "datasets")}
    head = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "mixture-of-experts", "hagmoe"],
        **inherited,
    )
    body = f"""# HAG-MoE, upcycled

A mixture-of-experts text encoder made from a dense one by copying and splitting its weights. It has not been trained since:
its vectors are its parent's, and its router has learned nothing yet.

```
{report}
```

{USAGE}
"""
    if parent.text.strip():
        body += f"\n# The parent's model card\n\n{parent.text.strip()}\n"
    return f"---\n{head.to_yaml()}\n---\n\n{body}"
