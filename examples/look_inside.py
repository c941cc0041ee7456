"""What do the experts know? Record where texts go, compare with chance, and draw it.

Prints: for random gates and for gates that start from texts, how many bits the choice of expert says about a text's domain,
beside what shuffled labels would give; then the findings in words. Draws: domains.png.
Time: 43 s on one core.
"""

import random
from pathlib import Path

from sentence_transformers import SentenceTransformer

from hagmoe_hf import upcycle
from hagmoe_hf.analysis import stats
from hagmoe_hf.analysis.plots import label_expert_heatmap
from hagmoe_hf.analysis.summary import findings, summarize
from hagmoe_hf.analysis.texts import Texts, label_ids
from hagmoe_hf.analysis.trace import label_load, record
from hagmoe_hf.demo import parent_folder, read_corpus

rows = list(zip(*read_corpus(), strict=True))
random.Random(0).shuffle(rows)
known = [text for text, _ in rows[::2]]  # the gates start from one half and are looked at on the other
texts, domains = zip(*rows[1::2], strict=True)

parent = SentenceTransformer(str(parent_folder()))
for name, calibration_texts in (("random gates", None), ("gates that start from texts", known)):
    mixture = upcycle(parent, calibration_texts=calibration_texts)
    trace = record(mixture, Texts(texts, domains=domains))
    print(f"{name}: {len(texts)} texts, {len(trace.token_id):,} tokens")
    for layer, index in zip(trace.layers, trace.expert_index.swapaxes(0, 1), strict=True):
        counts = stats.counts_per_text(index, trace.text_start, trace.num_experts)
        information = stats.label_information(counts, label_ids(trace.texts.domains)[1])
        print(
            f"  layer {layer}: {stats.effective_experts(counts.sum(axis=0)):.1f} of {trace.num_experts} experts work; "
            f"{information.bits:.2f} bits about the domain, {information.baseline:.2f} with shuffled labels"
        )
for finding in findings(summarize(trace)):
    print(f"- {finding}")
label_expert_heatmap(label_load(trace, "domain"), Path("domains.png"))
