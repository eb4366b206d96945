"""Print every table of the study as Markdown, from results.json.

    python .study/tables.py                      # all tables
    python .study/tables.py --against low        # gains over another arm than plain training
    python .study/tables.py --check              # the sums, on made-up results with known answers

Behind a mean, +- is its standard error over seeds. Behind a gain, it is half of the 95 % interval of the mean
difference to plain training of the same seed (Student's t); gains whose interval excludes 0 are bold.
"""

import argparse
import json
from collections.abc import Callable
from functools import cache
from math import floor, gamma, log10, pi
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results.json"
Row = dict[str, Any]
Measure = Callable[[Row], Any]  # a number, or None where it was not measured
NAMES = {"dpo": "DPO", "simpo": "SimPO", "dpo-0.1": "DPO, β = 0.1", "hh": "HH"}
TABLE_ARMS = {
    "plain": "Rnd-Var: plain (the proxy)",
    "low": "Low-Var",
    "high": "High-Var",
    "random+filter": "Rnd-Var + Filter",
    "random+reg": "Rnd-Var + Reg",
    "random-rmo": "Rnd-RMO",
    "high+filter": "High-Var + Filter",
    "high+reg": "High-Var + Reg",
    "rmo": "RMO",
}
HH_ARMS = ("plain", "high", "random+filter", "random+reg", "rmo")
SEEDS = range(30, 40)  # the plan's
MAIN = [("rmo", "plain"), ("high", "plain"), ("low", "plain"), ("random+filter", "plain")]
MAIN += [("random+reg", "plain"), ("rmo", "plain-twice")]  # the plan's main comparisons
CONTROLS = {
    "plain-twice": "plain, twice the epochs: a few more steps than proxy and RMO together",
    "plain-fast": "plain, twice the learning rate",
    "rmo-step1": "RMO without step 2",
    "rmo-low": "RMO on Low-Var batches",
    "rmo-policy": "RMO, batches by the policy's margins: Algorithm 1 to the letter",
}
FILTERS = {
    "rmo": "RMO",
    "rmo-length_free": "margins minus their fit on length",
    "rmo-relative": "margins relative to the base",
    "rmo-relative_length_free": "both",
    "rmo-per_token": "means over tokens",
    "rmo-printed": "Eq. 8 as printed",
    "rmo-oracle": "the mislabelled pairs removed",
    "rmo-thinned": "as many pairs removed at random",
}
LABELS = {
    "step1": "step 1 as in the paper, the objective's own proxy",
    "step1-crossfit": "the same, cross-fitted",
    "relative": "every pair whose margin falls, own proxy",
    "relative-crossfit": "the same, cross-fitted",
    "dpo-relative": "every pair whose margin falls by a DPO proxy at β = 1",
    "dpo-relative-crossfit": "the same, cross-fitted",
    "dpo-agree": "where the own proxy and the cross-fitted DPO proxy agree",
    "dpo-lowest": "the 12 % whose margin fell most, DPO proxy",
    "dpo-lowest-crossfit": "the same, cross-fitted",
}


class Mean(NamedTuple):
    value: float
    error: float | None  # standard error; None of one seed
    seeds: int


class Gain(NamedTuple):
    value: float
    half: float | None  # half of the 95 % interval; None of one seed
    seeds: int
    p: float | None = None  # of no gain, two-sided


# ------------------------------------------------------------------------------------------------- statistics


def p_value(t: float, freedom: int) -> float:
    """Two-sided, of Student's t: 1 minus the integral of its density from -|t| to |t|, by Simpson's rule."""
    factor = gamma((freedom + 1) / 2) / gamma(freedom / 2) / (freedom * pi) ** 0.5
    step = abs(t) / 1000
    total = 0.0
    for i in range(1001):
        weight = 1 if i in (0, 1000) else 4 if i % 2 else 2
        total += weight * (1 + (i * step) ** 2 / freedom) ** (-(freedom + 1) / 2)
    return 1 - 2 * factor * total * step / 3


@cache
def t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by bisection."""
    low, high = 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        if p_value(middle, freedom) > 0.05:
            low = middle
        else:
            high = middle
    return high


def holm(ps: list[float]) -> list[float]:
    """Corrected for being several, by Holm's method."""
    corrected = [0.0] * len(ps)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected


def mean_of(values: list[float]) -> Mean | None:
    if not values:
        return None
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Mean(fmean(values), error, len(values))


def gain_of(pairs: list[tuple[float, float]]) -> Gain | None:
    """Of (before, after), one a seed."""
    mean = mean_of([after - before for before, after in pairs])
    if mean is None:
        return None
    if not mean.error:
        return Gain(mean.value, mean.error, mean.seeds)
    half = t975(mean.seeds - 1) * mean.error
    return Gain(mean.value, half, mean.seeds, p_value(mean.value / mean.error, mean.seeds - 1))


class Study(NamedTuple):
    rows: list[Row]
    against: str = "plain"

    def values(self, family: str, arm: str, measure: Measure) -> dict[int, float]:
        """By seed."""
        found = {}
        for row in self.rows:
            if (row["family"], row["arm"]) == (family, arm) and measure(row) is not None:
                found[row["seed"]] = measure(row)
        return found

    def mean(self, family: str, arm: str, measure: Measure) -> Mean | None:
        return mean_of(list(self.values(family, arm, measure).values()))

    def gain(self, family: str, arm: str, measure: Measure) -> Gain | None:
        """Over the arm that the study is against, on the seeds that both have."""
        before = self.values(family, self.against, measure)
        after = self.values(family, arm, measure)
        if arm == self.against:
            return None
        return gain_of([(before[seed], after[seed]) for seed in sorted(before) if seed in after])

    def seeds(self, family: str) -> set[int]:
        """That any arm was tried with."""
        return {row["seed"] for row in self.rows if row["family"] == family}


# --------------------------------------------------------------------------------------------------- measures


def wins(row: Row) -> Row:
    """Of the one judge that a run has; {} if it has none."""
    return next(iter(row.get("wins", {}).values()), {})


def rate(row: Row) -> float | None:
    return wins(row).get("rate")


def controlled(row: Row) -> float | None:
    return wins(row).get("controlled")


def length(row: Row) -> float | None:
    return wins(row).get("length")


def missing(row: Row) -> int | None:
    """Prompts without a verdict: the model answered them with nothing."""
    return wins(row).get("missing")


def variance(row: Row) -> float | None:
    return row.get("policy", {}).get("variance")


def margin(row: Row) -> float | None:
    return row.get("policy", {}).get("mean")


def accuracy(row: Row) -> float | None:
    return row.get("policy", {}).get("accuracy")


def reward_accuracy(row: Row) -> float | None:
    return row.get("policy", {}).get("reward_accuracy")


def weight(row: Row) -> float | None:
    return row.get("constants", {}).get("lambda")


def ratio(row: Row) -> float | None:
    return row.get("filter", {}).get("ratio")


def length_correlation(row: Row) -> float | None:
    """Of the base model's margins with the difference in length, over all training pairs."""
    return row.get("filter", {}).get("length_correlation")


def beta_sd(row: Row) -> float | None:
    """Of the proxy's margins; rows of the first commit have the base's sd where there is no proxy."""
    return row["beta"] * row["constants"]["sd"] if "partitions" in row else None


def everything(row: Row) -> list[Any] | None:
    """All that was measured of the policy, and what the filter removed."""
    return [row["wins"], row["policy"], row["filter"]] if "filter" in row else None


def minutes(row: Row) -> float | None:
    return row["seconds"] / 60 if "seconds" in row else None


def judge_accuracy(row: Row) -> float | None:
    return row.get("judge_accuracy")


def inside(what: str, part: str, key: str) -> Measure:
    """The measure row[what][part][key]."""

    def measure(row: Row) -> float | None:
        return row.get(what, {}).get(part, {}).get(key)

    return measure


# ----------------------------------------------------------------------------------------------------- tables


def digits(value: float) -> int:
    """Decimal places; small numbers have two that count."""
    if abs(value) >= 1000:
        return 0
    if abs(value) >= 1:
        return 1
    return 2 if abs(value) >= 0.1 or value == 0 else 1 - floor(log10(abs(value)))


def mean_cell(mean: Mean | None) -> str:
    if mean is None:
        return "-"
    places = digits(mean.value)
    error = "" if mean.error is None else f" ± {mean.error:,.{places}f}"
    return f"{mean.value:,.{places}f}{error}"


def gain_cell(gain: Gain | None, seeds: int) -> str:
    """In points; bold if its interval excludes 0. The number of seeds is named where some are missing."""
    if gain is None:
        return ""
    text = f"{gain.value:+.1f}".replace("-", "−")
    if gain.half is not None:
        text += f" ± {gain.half:.1f}"
        if abs(gain.value) > gain.half:
            text = f"**{text}**"
    if gain.seeds < seeds:
        text += f" (seeds: {gain.seeds})"
    return text


def gain_cells(study: Study, family: str, arm: str) -> list[str]:
    """The gain in win rate, and at equal lengths."""
    seeds = len(study.seeds(family))
    return [gain_cell(study.gain(family, arm, measure), seeds) for measure in (rate, controlled)]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(title: str, header: list[str], rows: list[list[str]], note: str = "") -> str:
    """A table under its title; rows without any result are left out, and a table of none says so."""
    rows = [row for row in rows if any(cell not in ("", "-") for cell in row[1:])]
    body = markdown(header, rows) if rows else "No rows yet."
    return f"## {title}\n\n{body}\n" + (f"\n{note}\n" if note and rows else "")


def seeds_of(study: Study, families: list[str]) -> str:
    parts = []
    for family in families:
        seeds = sorted(study.values(family, "plain", rate))
        if seeds:
            parts.append(f"{NAMES[family]}: seeds {', '.join(map(str, seeds))}")
    return "; ".join(parts) + "."


def main_table(study: Study) -> str:
    families = ["dpo", "simpo"]
    header = ["arm"]
    for family in families:
        header += [f"{NAMES[family]}: win rate %", "at equal lengths %", "gain", "gain at equal lengths"]
    rows = []
    for arm, name in TABLE_ARMS.items():
        cells = [name]
        for family in families:
            cells.append(mean_cell(study.mean(family, arm, rate)))
            cells.append(mean_cell(study.mean(family, arm, controlled)))
            cells += gain_cells(study, family, arm)
        rows.append(cells)
    return section("Tables 1, 2 and 4", header, rows, seeds_of(study, families))


def main_comparisons(study: Study) -> str:
    """The plan's twelve, with p-values, and these corrected for being twelve."""
    comparisons = []
    for family in ("dpo", "simpo"):
        for number, (arm, against) in enumerate(MAIN, 1):
            gain = study._replace(against=against).gain(family, arm, rate)
            if gain and gain.p is not None:
                name = f"{number}. {NAMES[family]}: {TABLE_ARMS[arm]} against {against}"
                comparisons.append((name, gain))
    rows = []
    for (name, gain), corrected in zip(comparisons, holm([gain.p for _, gain in comparisons])):
        rows.append([name, gain_cell(gain, gain.seeds), f"{gain.p:.2g}", f"{corrected:.2g}"])
    header = ["comparison", "difference in win rate", "p", "p, Holm's of all these"]
    note = ""
    if len(rows) < 2 * len(MAIN):
        note = "Some of the plan's twelve are missing: Holm's method needs all."
    return section("The main comparisons", header, rows, note)


def gains_table(study: Study, title: str, arms: dict[str, str], families: list[str], note: str = "") -> str:
    """Win rates, their gains, and gains at equal lengths, three columns a family."""
    header = ["arm"]
    for family in families:
        header += [f"{NAMES[family]}: win rate %", f"gain over {study.against}", "gain at equal lengths"]
    rows = []
    for arm, name in arms.items():
        cells = [name]
        for family in families:
            cells += [mean_cell(study.mean(family, arm, rate)), *gain_cells(study, family, arm)]
        rows.append(cells)
    return section(title, header, rows, note)


def choice(study: Study) -> str:
    """By the plan: the candidate whose smallest mean gain over the families is the largest."""
    smallest = {}
    seeds = set()
    for arm in LABELS:
        gains = [study.gain(family, arm, rate) for family in ("dpo", "simpo", "dpo-0.1")]
        if all(gains):
            smallest[arm] = min(gain.value for gain in gains)
            seeds.update(gain.seeds for gain in gains)
    if len(smallest) < len(LABELS) or len(seeds) > 1:
        return "No choice: the candidates are not all there, on the same number of seeds."
    chosen = max(smallest, key=smallest.__getitem__)
    return f"By the plan's rule the choice is {chosen}, whose smallest mean gain is {smallest[chosen]:+.1f}."


def made_twice(study: Study) -> str:
    """Two arms of step 1 that are the same run for DPO, made twice: whether all that was measured agrees."""
    notes = []
    for arm in ("relative", "relative-crossfit"):
        once = study.values("dpo", arm, everything)
        again = study.values("dpo", f"dpo-{arm}", everything)
        both = once.keys() & again.keys()
        same = sum(once[seed] == again[seed] for seed in both)
        notes.append(f"DPO's {arm} and dpo-{arm} measure the same on {same} of {len(both)} seeds.")
    return " ".join(notes)


def arms_named(study: Study, family: str, beginning: str) -> list[str]:
    """Arms whose name is this and a number, by the number."""
    arms = {row["arm"] for row in study.rows if row["family"] == family and row["arm"].startswith(beginning)}
    return sorted(arms, key=lambda arm: float(arm.removeprefix(beginning)))


def lambda_curve(study: Study, family: str) -> str:
    """Figure 4: lambda on High-Var + Filter, so that 0 is that arm, and RMO by default."""
    nats = "nats a token" if family == "simpo" else "nats"
    header = ["λ", "gain in win rate", "at equal lengths", f"held-out margin ({nats})", "accuracy %"]
    header += ["above the SFT model's %"]
    rows = []
    for arm in ["high+filter", *arms_named(study, family, "lambda"), "rmo"]:
        name = {"high+filter": "0", "rmo": "default"}.get(arm, arm.removeprefix("lambda"))
        if arm == "rmo":
            name += f", {mean_cell(study.mean(family, arm, weight))}"
        cells = [name, *gain_cells(study, family, arm)]
        cells += [mean_cell(study.mean(family, arm, one)) for one in (margin, accuracy, reward_accuracy)]
        rows.append(cells)
    return section(f"Figure 4: by λ, {NAMES[family]}", header, rows)


def ratio_curve(study: Study, family: str) -> str:
    """Figure 5: the filter ratio on High-Var + Reg, so that 0 is that arm; step 1 alone; RMO by default."""
    header = ["filter ratio", "removed %", "gain in win rate", "at equal lengths"]
    rows = []
    for arm in ["high+reg", "rmo-step1", *arms_named(study, family, "ratio"), "rmo"]:
        name = {"high+reg": "0", "rmo-step1": "step 1 alone", "rmo": "default"}.get(arm)
        name = name or f"{100 * float(arm.removeprefix('ratio')):.0f} %"
        cells = [name, mean_cell(study.mean(family, arm, ratio)), *gain_cells(study, family, arm)]
        rows.append(cells)
    note = "A ratio below what step 1 alone removes is refused; where it was is said under Missing runs."
    return section(f"Figure 5: by filter ratio, {NAMES[family]}", header, rows, note)


def filter_table(study: Study) -> str:
    """What the filter removes, for the arms that show it: RMO's own and the relative one."""
    header = ["means over seeds", "step 1", "step 2", "kept", "all"]
    what = {
        "share": "share of the pairs (%)",
        "mislabelled": "truly mislabelled (%)",
        "longer": "chosen longer than rejected by (tokens)",
    }
    rows = []
    shown = [("dpo", "rmo"), ("simpo", "rmo"), ("dpo-0.1", "rmo"), ("hh", "rmo")]
    shown += [("dpo", "rmo-relative"), ("simpo", "rmo-relative")]
    for family, arm in shown:
        for key, text in what.items():
            cells = [f"{NAMES[family]}, {arm}: {text}"]
            for part in ("step1", "step2", "kept", "all"):
                cells.append(mean_cell(study.mean(family, arm, inside("filter", part, key))))
            rows.append(cells)
        correlated = mean_cell(study.mean(family, arm, length_correlation))
        rows.append([f"{NAMES[family]}, {arm}: base margin's correlation with that", "", "", "", correlated])
    return section("What the filter removes", header, rows)


def table_3(study: Study) -> str:
    header = ["all training pairs, before the filter, margins by the proxy", "Low-Var", "Rnd-Var", "High-Var"]
    rows = []
    for family in ("dpo", "simpo", "hh"):
        for key, text in (("variance", "variance in a batch"), ("bound", "% of the bound")):
            cells = [f"{NAMES[family]}: {text}"]
            for name in ("low", "random", "high"):
                cells.append(mean_cell(study.mean(family, "rmo", inside("partitions", name, key))))
            rows.append(cells)
    return section("Table 3", header, rows)


def small_beta_table(study: Study) -> str:
    header = ["DPO, β = 0.1", "win rate %", "gain", "gain at equal lengths"]
    header += ["variance of held-out margins (nats²)", "characters of a response", "β · sd"]
    rows = []
    for arm, name in {**TABLE_ARMS, **FILTERS}.items():
        cells = [name, mean_cell(study.mean("dpo-0.1", arm, rate)), *gain_cells(study, "dpo-0.1", arm)]
        cells += [mean_cell(study.mean("dpo-0.1", arm, one)) for one in (variance, length, beta_sd)]
        rows.append(cells)
    return section("Small β · sd", header, rows, seeds_of(study, ["dpo-0.1"]))


def beta_table(study: Study) -> str:
    header = ["", "β · sd of the proxy's margins"]
    rows = [[NAMES[f], mean_cell(study.mean(f, "rmo", beta_sd))] for f in ("dpo", "simpo", "dpo-0.1", "hh")]
    return section("How firmly β holds the policy", header, rows)


def hh_tables(study: Study) -> str:
    header = ["HH", "win rate %", "at equal lengths %", "gain", "gain at equal lengths", "characters"]
    header += ["no verdict, most of a seed"]
    rows = []
    for arm, name in TABLE_ARMS.items():
        lacking = study.values("hh", arm, missing).values()
        cells = [name, mean_cell(study.mean("hh", arm, rate)), mean_cell(study.mean("hh", arm, controlled))]
        cells += gain_cells(study, "hh", arm)
        cells += [mean_cell(study.mean("hh", arm, length)), str(max(lacking)) if lacking else "-"]
        rows.append(cells)
    first = section("HH", header, rows, hh_note(study))

    arms = [arm for arm in TABLE_ARMS if study.values("hh", arm, rate)]
    by_seed = []
    for seed, right in sorted(study.values("hh", "plain", judge_accuracy).items()):
        rates = [study.values("hh", arm, rate).get(seed) for arm in arms]
        cells = ["-" if value is None else f"{value:.1f}" for value in rates]
        by_seed.append([str(seed), f"{right:.1f}", *cells])
    header = ["seed", "judge right on %", *[TABLE_ARMS[arm] for arm in arms]]
    return first + "\n" + section("HH, win rates by seed", header, by_seed)


def hh_note(study: Study) -> str:
    """How good the judge is, and what the plan forbids to conclude."""
    right = study.mean("hh", "plain", judge_accuracy)
    notes = [f"The judge is right on {mean_cell(right)} % of the labels of a seed's test pairs."]
    if right and right.value < 55:
        notes.append("That is below 55 %: nothing is concluded.")
    few = []
    for arm in HH_ARMS:
        seeds = study.values("hh", arm, rate)
        if not all(seed in seeds for seed in SEEDS):
            few.append(f"{TABLE_ARMS[arm]} has {len(seeds)}")
        lacking = study.values("hh", arm, missing)
        if max(lacking.values(), default=0) > 5:
            notes.append(f"{TABLE_ARMS[arm]} lacks more than 5 verdicts on a seed: nothing is concluded.")
    if few:
        notes.append(f"Of the plan's ten seeds, {', '.join(few)}: nothing is concluded from these.")
    return " ".join(notes)


def missing_table(study: Study) -> str:
    """Seeds that an arm lacks and others of its family have: diverged, refused, or not yet run."""
    missing: dict[tuple[str, str], list[str]] = {}  # (arm, why) -> seeds
    for family, name in NAMES.items():
        mine = [row for row in study.rows if row["family"] == family]
        planned = HH_ARMS if family == "hh" and mine else ()
        for arm in dict.fromkeys([*planned, *[row["arm"] for row in mine]]):
            for seed in sorted(study.seeds(family) - study.values(family, arm, rate).keys()):
                reasons = [row["failed"] for row in mine if (row["arm"], row["seed"]) == (arm, seed)]
                why = reasons[0] if reasons else "not run"
                missing.setdefault((f"{name}, {arm}", why), []).append(str(seed))
    rows = [[arm, ", ".join(seeds), why] for (arm, why), seeds in missing.items()]
    return section("Missing runs", ["arm", "seeds", "why"], rows)


def time_table(study: Study) -> str:
    header = ["minutes a run, with its report", *NAMES.values()]
    rows = []
    for arm in dict.fromkeys(row["arm"] for row in study.rows):
        rows.append([arm, *[mean_cell(study.mean(family, arm, minutes)) for family in NAMES]])
    return section("Run times", header, rows)


def all_tables(study: Study) -> str:
    families = ["dpo", "simpo", "dpo-0.1"]
    labels = f"{choice(study)} {made_twice(study)}"
    tables = [
        main_table(study),
        main_comparisons(study),
        gains_table(study, "Controls", CONTROLS, ["dpo", "simpo"]),
        lambda_curve(study, "dpo"),
        lambda_curve(study, "simpo"),
        ratio_curve(study, "dpo"),
        ratio_curve(study, "simpo"),
        filter_table(study),
        table_3(study),
        gains_table(study, "RMO with another filter", FILTERS, families),
        gains_table(study, "Step 1 alone, by other proxies and rules", LABELS, families, labels),
        beta_table(study),
        small_beta_table(study),
        hh_tables(study),
        missing_table(study),
        time_table(study),
    ]
    return "\n".join(tables)


# ------------------------------------------------------------------------------------------------------ check


def made_up() -> list[Row]:
    """Three seeds: RMO gains 3, 2 and 4 points over plain, Low-Var 1, -1 and 0; High-Var has one seed, -1."""
    rates = {"plain": [60, 62, 64], "rmo": [63, 64, 68], "low": [61, 61, 64], "high": [59]}
    rows = []
    for arm, values in rates.items():
        for seed, value in enumerate(values, start=30):
            wins = {"true reward": {"rate": value, "controlled": value - 1, "length": 70}}
            row = {"family": "dpo", "arm": arm, "seed": seed, "wins": wins, "beta": 1.0, "seconds": 30}
            row["constants"] = {"sd": 7.5, "lambda": 1.2}
            row["policy"] = {"mean": 2.0, "variance": 93.0, "accuracy": 70.0, "reward_accuracy": 80.0}
            if arm == "rmo":
                part = {"share": 6.0 + seed - 31, "longer": -1.5, "mislabelled": 70.0}
                row["filter"] = {"ratio": 14.0, "step1": part, "step2": {"share": 0.0}}
                row["partitions"] = {"low": {"variance": 0.1, "bound": 0.1}}
            rows.append(row)
    refused = {"family": "dpo", "arm": "high", "seed": 31, "failed": "ValueError: refused"}
    return [*rows, refused]


def check() -> None:
    assert [round(t975(n), 2) for n in (1, 9, 10, 30)] == [12.71, 2.26, 2.23, 2.04]
    assert [round(p_value(t, n), 3) for t, n in ((2.262, 9), (-12.706, 1), (0, 4))] == [0.05, 0.05, 1.0]
    assert holm([0.03, 0.01, 0.02, 0.9]) == [0.06, 0.04, 0.06, 0.9]
    study = Study(made_up())
    # 3 points; standard deviation 1, so 4.303 / sqrt(3) = 2.48
    assert gain_cell(study.gain("dpo", "rmo", rate), 3) == "**+3.0 ± 2.5**"
    assert gain_cell(study.gain("dpo", "low", rate), 3) == "+0.0 ± 2.5"
    assert gain_cell(study.gain("dpo", "high", rate), 3) == "−1.0 (seeds: 1)"
    assert mean_cell(study.mean("dpo", "plain", rate)) == "62.0 ± 1.2"  # 2 / sqrt(3)
    # over Low-Var: 2, 3 and 4
    against_low = study._replace(against="low")
    assert gain_cell(against_low.gain("dpo", "rmo", rate), 3) == "**+3.0 ± 2.5**"
    assert "| Rnd-Var: plain (the proxy) | 62.0 ± 1.2 | 61.0 ± 1.2 |  |  | - | - |  |  |" in main_table(study)
    assert "| RMO | 65.0 ± 1.5 | 64.0 ± 1.5 | **+3.0 ± 2.5** | **+3.0 ± 2.5** |" in main_table(study)
    assert "| DPO, rmo: share of the pairs (%) | 6.0 ± 0.6 | 0.00 ± 0.00 | - | - |" in filter_table(study)
    assert "| DPO: % of the bound | 0.10 ± 0.00 | - | - |" in table_3(study)
    assert "| DPO | 7.5 ± 0.0 |" in beta_table(study)
    assert "| default, 1.2 ± 0.0 | **+3.0 ± 2.5** |" in lambda_curve(study, "dpo")
    # 3 / 0.577 = 5.196 at 2 degrees of freedom: 1 - t / sqrt(2 + t^2) = 0.035
    assert "| 1. DPO: RMO against plain | **+3.0 ± 2.5** | 0.035 | 0.07 |" in main_comparisons(study)
    assert "No rows yet." in hh_tables(study)
    assert "ten seeds, Rnd-Var: plain (the proxy) has 0, High-Var has 0" in hh_note(study)
    answers = {"rate": 50.0, "controlled": 49.0, "length": 300.0}
    hh = [
        {"family": "hh", "arm": "plain", "seed": seed, "wins": {"judge": {**answers, "missing": seed}}}
        for seed in (1, 2)
    ]
    assert "(the proxy) | 50.0 ± 0.0 | 49.0 ± 0.0 |  |  | 300.0 ± 0.0 | 2 |" in hh_tables(Study(hh))
    hh = [dict(row, seed=seed, judge_accuracy=54.0) for row in hh for seed in SEEDS]
    assert "below 55 %: nothing is concluded. Of the plan's ten seeds, High-Var has 0" in hh_note(Study(hh))
    assert "| HH, rmo | 30, 31, " in missing_table(Study(hh))
    hh[-1]["wins"]["judge"]["missing"] = 6
    assert "(the proxy) lacks more than 5 verdicts on a seed" in hh_note(Study(hh))
    assert "| DPO, high | 31 | ValueError: refused |" in missing_table(study)
    assert "| DPO, high | 32 | not run |" in missing_table(study)
    # Gains are 1, 2, ... 9 in two families; in the third they are -1, but 0 of the fifth.
    candidates = []
    for family in ("dpo", "simpo", "dpo-0.1"):
        for number, arm in enumerate(["plain", *LABELS]):
            value = number if family != "simpo" or arm == "plain" else -(number != 5)
            candidates.append({"family": family, "arm": arm, "seed": 25, "wins": {"judge": {"rate": value}}})
    assert "the choice is dpo-relative, whose smallest mean gain is +0.0" in choice(Study(candidates))
    assert all_tables(Study([])).count("No rows yet.") == 17
    print("tables.py: the sums are right")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: .study/results.json)")
    parser.add_argument("--against", default="plain", help="the arm that gains are over (default: plain)")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check:
        return check()
    rows = json.loads(args.results.read_text(encoding="utf-8")) if args.results.is_file() else []
    print(all_tables(Study(rows, args.against)))


if __name__ == "__main__":
    main()
