"""How long an arm is trained, on how much, at which learning rates; the same for every arm of a table."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Budget:
    """What every arm of a table gets.

    Attributes:
        name: Of the folder of results.
        steps: Optimizer steps.
        batch_size: Pairs per step.
        max_length: Longest text in tokens.
        learning_rates: The grid, tried with the first seed on held-out pairs.
        seeds: Of data order, new weights and dropout; further ones run at the arm's best rate.
        dev_rows: Held-out pairs per domain.
        evaluations: Points of the curve after the start, evenly spaced.
        warmup: Share of the steps in which the rate rises; then it falls to 0, both linearly.
        temperature: T of the domains' weights n^(1/T).
        calibration_pairs: Of the domain that is drawn most often, where gates start from texts; of others as they are drawn.
        bfloat16: Whether training computes under bfloat16 autocast; evaluation is float32 in any case.
        follows: Name of the budget whose kept runs this one goes on from, with other batches and a new optimizer; "" where
            a run starts from the parent.
        left_out: Domains of which nothing is trained on; their held-out pairs tell what training costs elsewhere.
        left_out_languages: Likewise.
        translated: Domains of translations from English: of both texts of such a pair the target is the parent's vector of
            the English one.
        distillation: Weight of the parent's similarities in every arm's loss, but for translations; an arm may have its own.
    """

    name: str
    steps: int
    batch_size: int
    max_length: int
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    dev_rows: int
    evaluations: int
    warmup: float = 0.1
    temperature: float = 2.0
    calibration_pairs: int = 150
    bfloat16: bool = False
    follows: str = ""
    left_out: tuple[str, ...] = ()
    left_out_languages: tuple[str, ...] = ()
    translated: tuple[str, ...] = ()
    distillation: float = 0.0

    def is_translated(self, domain: str) -> bool:
        """Whether a domain's pairs are translations from English here; those of dictionaries are in every budget."""
        return domain in self.translated or domain == WORD_DOMAIN

    @property
    def pairs_before(self) -> int:
        """Pairs that a run has seen before its first step."""
        if not self.follows:
            return 0
        before = BUDGETS[self.follows]
        return before.pairs_before + before.steps * before.batch_size


WORD_DOMAIN = "words"  # of dictionaries, for arms that train on them
SOFTWARE = ("software-bitext", "ui-bitext")
# English anchors, positives in other languages; the last is what `prepare` finds in articles of one title
TRANSLATED = (*SOFTWARE, "encyclopedia-bitext")
# Domains that the parent knows well and badly, of many kinds of text
LEFT_OUT = ("code", "cooking", "encyclopedia", "security", "sysadmin-docs")

MOSTLY_TRANSLATIONS = Budget(
    "translations",
    400,
    64,
    32,
    (1e-4,),
    (0, 1, 2),
    200,
    4,
    temperature=1.0,
    bfloat16=True,
    left_out_languages=("en",),
    translated=SOFTWARE,
    distillation=1.0,
)

BUDGETS = {
    budget.name: budget
    for budget in (
        # For a CPU: says in which direction to look, not who wins
        Budget("screening", 150, 48, 32, (1e-4,), (0, 1, 2), 40, 3),
        # For a CPU with bfloat16 matrix units: three seeds, two rates
        Budget("small", 300, 64, 32, (1e-4, 3e-4), (0, 1, 2), 100, 3, bfloat16=True),
        # The same in float32, for a CPU without bfloat16 units, at the rate that won there: does a memory pay?
        Budget("memory", 300, 64, 32, (1e-4,), (0, 1, 2), 200, 3),
        # The first again, five times as long: does capacity pay later?
        Budget("medium", 1500, 64, 32, (1e-4,), (0, 1, 2), 200, 5, bfloat16=True),
        # And as long again, from where those runs ended: what is the trend?
        Budget("medium-2", 1500, 64, 32, (1e-4,), (0, 1, 2), 200, 5, bfloat16=True, follows="medium"),
        # Half as long, from there: arms that are upcycled from the dense parent's run, against that run going on
        Budget("branch", 750, 64, 32, (1e-4,), (0, 1, 2), 200, 3, bfloat16=True, follows="medium"),
        # For a CPU: what does training cost in domains of which it saw nothing?
        Budget("left-out", 300, 64, 32, (1e-4,), (0, 1, 2), 200, 3, bfloat16=True, left_out=LEFT_OUT),
        # For a CPU: an English parent learns other languages; what does it cost in English?
        Budget("languages", 300, 64, 32, (1e-4,), (0, 1, 2), 200, 3, left_out_languages=("en",), translated=SOFTWARE),
        # Domains drawn by size, so that most pairs are translations, and the parent's similarities kept in the others
        MOSTLY_TRANSLATIONS,
        # The same for a CPU without bfloat16 units
        replace(MOSTLY_TRANSLATIONS, name="translations-float32", bfloat16=False),
        # The same, shorter, with what articles of one title say in two languages among the translations
        replace(MOSTLY_TRANSLATIONS, name="titles", steps=300, evaluations=3, bfloat16=False, translated=TRANSLATED),
        # Four times over 30,098 pairs (`--rows 8000`): does the gain last? A point of the curve every half of a pass
        replace(MOSTLY_TRANSLATIONS, name="epochs", steps=1880, evaluations=8),
        # Four times over 7,545 pairs (`--rows 2000`), for a CPU without bfloat16 units: the same, two rates
        replace(MOSTLY_TRANSLATIONS, name="passes", steps=470, evaluations=8, learning_rates=(1e-4, 2e-4), bfloat16=False),
        # With the pairs in English, and domains by the root of their size: data as most users have it
        replace(MOSTLY_TRANSLATIONS, name="mixed", temperature=2.0, left_out_languages=()),
        # For a GPU: about one pass over the pairs
        Budget("full", 1200, 512, 64, (5e-5, 1e-4, 2e-4), (0, 1, 2), 200, 12, bfloat16=True),
        # For a GPU: does the order of the arms change with more pairs?
        Budget("long", 4800, 512, 64, (5e-5, 1e-4, 2e-4), (0, 1, 2), 200, 16, bfloat16=True),
    )
}
