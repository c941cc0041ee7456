"""Model cards, filled from what the code knows; no number in them is typed by hand."""

from huggingface_hub import ModelCard, ModelCardData

USAGE = """```python
import hagmoe_hf  # registers the architecture, once per process
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/or/hub-id/of/this/model")
vectors = model.encode(["a text", "another one"])
```"""


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
