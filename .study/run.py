"""Run the arms of the study and write what they give into .study/results.json.

    python .study/run.py --groups tables controls --families dpo simpo --seeds 30 31 32 --jobs 2
    python .study/run.py --groups small_beta --families dpo-0.1 --seeds 30 31
    python .study/run.py --groups hh --families hh --seeds 30 31 --hh runs/hh --model MODEL    # after hh.py

A family is an objective with its beta, on one task. A seed's runs follow one another: first plain training,
which makes the SFT model and is the proxy, then the arms, which share both. --jobs seeds run at a time, one
core each. A run that is in results.json is skipped; one that stopped goes on. Rows are written as they come.
A run that failed or was refused has a row with the reason, and runs again. Stop it with Ctrl-C, which reaches
its runs too. Only one such command at a time: each one rewrites results.json.
"""

import argparse
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))

import batching  # noqa: E402
import data  # noqa: E402
import model as lm  # noqa: E402
import train  # noqa: E402

RESULTS = STUDY / "results.json"
# Settings that say where things are, or that are alike in all arms of a family
NOT_AN_ARMS = ("seed", "output_dir", "sft_model", "sft_epochs", "proxy", "micro_batch_tokens", "save_steps")


class Arm(NamedTuple):
    """A run of each seed: flags of train.py, or of variants.py after a kind. {own}, {dpo}: their folders.
    shares: an arm of the same pairs and models, whose scores and outputs it takes by shared.py."""

    name: str
    group: str
    flags: str
    kind: str = ""
    shares: str = ""


FAMILIES = {
    "dpo": "",
    "simpo": "--objective simpo --beta 10",
    "dpo-0.1": "--beta 0.1",
    "hh": "--model {model} --data {hh}/train-{seed}.jsonl --eval_data {hh}/test-{seed}.jsonl "
    "--lora_rank 8 --lr 5e-4 --epochs 1 --max_length 512",
}
RANDOM, NO_FILTER, NO_REG = "--batching random", "--filter_ratio 0", "--lambda_reg 0"
PLAIN = f"{RANDOM} {NO_FILTER} {NO_REG}"
STEP_1 = f"{RANDOM} --tau -1000 {NO_REG}"  # with random batches, no step 2, no amplification
OWN_CROSSFIT = "--scores {own}/crossfit-{seed}/crossfit.safetensors"
DPO_CROSSFIT = "--scores {dpo}/crossfit-{seed}/crossfit.safetensors"
DPO_SCORES = "--scores {dpo}/step1-{seed}/margins.safetensors"
# Runs whose folders other arms of their seed need
STARTED_FROM = [*((family, "plain") for family in FAMILIES), ("dpo", "step1"), ("hh", "rmo")]

ARMS = [
    # Tables 1, 2 and 4
    Arm("low", "tables", f"--batching low {NO_FILTER} {NO_REG}"),
    Arm("high", "tables", f"{NO_FILTER} {NO_REG}"),
    Arm("random+filter", "tables", f"{RANDOM} {NO_REG}"),
    Arm("random+reg", "tables", f"{RANDOM} {NO_FILTER}"),
    Arm("random-rmo", "tables", RANDOM),
    Arm("high+filter", "tables", NO_REG),
    Arm("high+reg", "tables", NO_FILTER),
    Arm("rmo", "tables", ""),
    # Controls
    Arm("plain-twice", "controls", f"{PLAIN} --epochs 6"),
    Arm("plain-fast", "controls", f"{PLAIN} --lr 4e-4"),
    Arm("rmo-low", "controls", "--batching low"),
    Arm("rmo-step1", "controls", "--tau -1000"),
    Arm("rmo-policy", "controls", "--batch_margins policy"),
    # Figures 4 and 5
    *[Arm(f"lambda{x}", "lambda", f"--lambda_reg {x}") for x in (0.5, 1, 2, 4, 8)],
    *[Arm(f"ratio{x}", "ratio", f"--filter_ratio {x}") for x in (0.08, 0.12, 0.16, 0.2, 0.25)],
    # RMO with another filter
    *[
        Arm(f"rmo-{kind}", "filters", "", kind)
        for kind in ("length_free", "relative", "relative_length_free", "per_token", "printed")
    ],
    Arm("rmo-oracle", "oracle", "", "oracle"),
    Arm("rmo-thinned", "oracle", "", "thinned"),
    # Step 1 alone, by other proxies and rules
    Arm("step1", "labels", STEP_1),
    Arm("step1-crossfit", "labels", STEP_1, f"paper {OWN_CROSSFIT}"),
    Arm("relative", "labels", STEP_1, "relative"),
    Arm("relative-crossfit", "labels", STEP_1, f"relative {OWN_CROSSFIT}"),
    Arm("dpo-relative", "labels", STEP_1, f"relative {DPO_SCORES}"),
    Arm("dpo-relative-crossfit", "labels", STEP_1, f"relative {DPO_CROSSFIT}"),
    Arm("dpo-agree", "labels", STEP_1, f"agree {DPO_CROSSFIT}"),
    Arm("dpo-lowest", "labels", STEP_1, f"lowest --share 0.12 {DPO_SCORES}"),
    Arm("dpo-lowest-crossfit", "labels", STEP_1, f"lowest --share 0.12 {DPO_CROSSFIT}"),
    # beta times sd small
    Arm("random+filter", "small_beta", f"{RANDOM} {NO_REG}"),
    Arm("random+reg", "small_beta", f"{RANDOM} {NO_FILTER}"),
    Arm("rmo", "small_beta", ""),
    # HH. The base's scores are plain training's; RMO computes the proxy's, for the arms behind it
    Arm("rmo", "hh", "", shares="plain"),
    Arm("high", "hh", f"{NO_FILTER} {NO_REG}", shares="rmo"),
    Arm("random+filter", "hh", f"{RANDOM} {NO_REG}", shares="rmo"),
    Arm("random+reg", "hh", f"{RANDOM} {NO_FILTER}", shares="rmo"),
]
GROUPS = list(dict.fromkeys(arm.group for arm in ARMS))


def main() -> None:
    args = parse()
    lock = threading.Lock()

    def run_seed(seed: int) -> None:
        for family in args.families:
            run_family(args, family, seed, lock)

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(run_seed, args.seeds))
        except KeyboardInterrupt:
            os._exit(130)  # the runs under way have got it too; the pool would go on with the next ones


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--groups", nargs="*", default=[], choices=GROUPS, help="arms beside plain training")
    parser.add_argument("--arms", nargs="*", help="of the groups, these alone")
    parser.add_argument("--families", nargs="+", required=True, choices=FAMILIES)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time (default: 1)")
    parser.add_argument(
        "--runs", default="runs/study", help="where the run folders go (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: .study/results.json)")
    parser.add_argument(
        "--hh", default="runs/hh", help="hh.py's folder, with its judge/ (default: %(default)s)"
    )
    parser.add_argument("--model", default="", help="model of the family hh")
    parser.add_argument("--smoke", action="store_true", help="200 pairs, one epoch: to see that it runs")
    return parser.parse_args()


def run_family(args: argparse.Namespace, family: str, seed: int, lock: Any) -> None:
    """Plain training and the arms of one family and seed, one after another."""
    own = f"{args.runs}/{family}"
    plain = f"{own}/plain-{seed}"
    builtin = family != "hh"
    places = {"own": own, "dpo": f"{args.runs}/dpo", "seed": seed, "hh": args.hh, "model": args.model}
    common = f"{FAMILIES[family]} --seed {seed}"
    if args.smoke:
        common += " --limit 200"
        common += " --epochs 1" if builtin else ""

    # The SFT model of a seed is that of its plain DPO run, whatever the family.
    sft = ""
    if builtin:
        sft = f"--sft_model {args.runs}/dpo/plain-{seed}/sft"
    if family == "dpo":
        sft = "--sft_epochs 2" if args.smoke else ""
    if builtin and family != "dpo" and not Path(f"{args.runs}/dpo/plain-{seed}/sft").is_dir():
        sys.exit(f"run.py: {family} takes its SFT model from dpo: name dpo first in --families")
    done = run_arm(args, family, Arm("plain", "plain", f"{common} {sft} {PLAIN}"), seed, places, lock)
    if not done:
        return
    shared = common
    if builtin:
        shared += f" --sft_model {args.runs}/dpo/plain-{seed}/sft"
    arms = [arm for arm in ARMS if arm.group in args.groups and (not args.arms or arm.name in args.arms)]
    needed = {OWN_CROSSFIT, DPO_CROSSFIT} if family == "dpo" else {OWN_CROSSFIT}
    if any(scores in arm.kind for arm in arms for scores in needed):
        words = ["crossfit.py", plain, "--out", f"{own}/crossfit-{seed}"]
        if start(words, Path(f"{own}/crossfit-{seed}.log")) != 0:
            print(f"{family} crossfit {seed}: failed, see {own}/crossfit-{seed}.log", flush=True)
    for arm in arms:
        proxy = "" if arm.flags.startswith(PLAIN) else f"--proxy {plain}/policy"
        run_arm(args, family, arm._replace(flags=f"{shared} {proxy} {arm.flags}"), seed, places, lock)


def run_arm(
    args: argparse.Namespace, family: str, arm: Arm, seed: int, places: dict[str, Any], lock: Any
) -> bool:
    """One run, unless its row is there; whether it is done. One that fails has a row that says so."""
    out = Path(f"{args.runs}/{family}/{arm.name}-{seed}")
    key = {"family": family, "arm": arm.name, "seed": seed}
    with lock:
        rows = data.read_json(args.results, [])
    known = next((row for row in rows if matches(row, key) and "failed" not in row), None)
    if known and ((family, arm.name) not in STARTED_FROM or known["wins"] == win_rates(out)):
        return True
    train_py, evaluate_py = "../train.py", "../evaluate.py"
    if arm.kind:
        train_py = f"variants.py {arm.kind}"
    if arm.shares:
        other = f"shared.py {args.runs}/{family}/{arm.shares}-{seed}"
        train_py, evaluate_py = f"{other} train.py", f"{other} evaluate.py"
    words = f"{train_py} --output_dir {out} {arm.flags}".format(**places).split()
    row = {**key, "group": arm.group, "kind": arm.kind.split()[0] if arm.kind else ""}
    began = time.time()
    done = start(words, Path(f"{out}.log")) == 0
    if done and family == "hh":
        done = judge_outputs(args, out, seed, evaluate_py)
    seconds = time.time() - began
    if done:
        row.update(measure(out), seconds=round(seconds))
        if family == "hh":
            row["judge_accuracy"] = judge_accuracy(args, out)
        result = {judge: round(wins["rate"], 1) for judge, wins in row["wins"].items()}
    else:
        result = last_line(Path(f"{out}.log"))
        row["failed"] = result
    print(f"{family} {arm.name} {seed}: {result} in {seconds:.0f} s", flush=True)
    if known:  # its folder was gone, and other arms start from it: unless it is the same, they are not paired
        if done and known["wins"] != row["wins"]:
            sys.exit(f"run.py: {out} made again gives {row['wins']}, not {known['wins']}: another processor?")
        return done
    with lock:
        others = [other for other in data.read_json(args.results, []) if not matches(other, key)]
        data.write_json(args.results, [*others, row])
    return done


def matches(row: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(row[name] == value for name, value in key.items())


def start(words: list[str], log: Path) -> int:
    """Run one of our programs on one core; its output goes to the log. Returns its exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as output:
        command = [sys.executable, str(STUDY / words[0]), *words[1:]]
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else f"see {log}"


def judge_outputs(args: argparse.Namespace, out: Path, seed: int, evaluate_py: str) -> bool:
    """Outputs to the seed's test prompts, judged by hh.py's judge; whether that went well."""
    log = Path(f"{out}.log")
    sampling = ["--max_new_tokens", "128", "--seed", str(seed), "--batch_size", "100"]
    if start([*evaluate_py.split(), "generate", str(out), *sampling], log) != 0:
        return False
    return start(["../evaluate.py", "judge", str(out), "--run", f"{args.hh}/judge"], log) == 0


def judge_accuracy(args: argparse.Namespace, out: Path) -> float:
    """In percent, on the labels of the run's own test pairs: the judge has held them out, among others."""
    settings = data.read_json(Path(args.hh) / "judge" / "config.json")["settings"]
    tokenizer = lm.load_tokenizer(out / "policy")
    judged = data.load_splits(settings, tokenizer).held_out
    report = data.read_json(Path(args.hh) / "judge" / "report.json")["held_out"]
    before, *_, after = report.values()
    mine = data.load_splits(data.read_json(out / "config.json")["settings"], tokenizer).held_out
    test = {data.prompt_text(pair.row["prompt"]) for pair in mine}
    places = [i for i, pair in enumerate(judged) if data.prompt_text(pair.row["prompt"]) in test]
    return 100 * sum(after[i] > before[i] for i in places) / len(places)


# ------------------------------------------------------------------------------------ what a run folder holds


def measure(out: Path) -> dict[str, Any]:
    """Everything that was measured in a run, as numbers; what is not known is left out."""
    config = data.read_json(out / "config.json")
    report = data.read_json(out / "report.json")
    defaults = asdict(train.Settings(objective=config["settings"]["objective"]))
    settings = {}
    for name, value in config["settings"].items():
        if name not in NOT_AN_ARMS and value != defaults[name]:
            settings[name] = without_folders(value)
    row = {"settings": settings, "beta": config["settings"]["beta"], "constants": config["constants"]}
    row["versions"] = config["versions"]
    row["processor"] = torch.backends.cpu.get_cpu_capability()
    row["wins"] = win_rates(out)
    if report["held_out"]:
        before, *_, after = [torch.tensor(values) for values in report["held_out"].values()]
        row["base"] = margin_numbers(before)
        row["policy"] = margin_numbers(after)
        row["policy"]["reward_accuracy"] = percent(after > before)
    scores = load_file(out / "margins.safetensors")
    if (out / "filter.json").is_file():
        row["filter"] = filter_contents(out, config["settings"], scores)
    if "proxy_chosen" in scores:
        margins = scores["proxy_chosen"] - scores["proxy_rejected"]
        row["partitions"] = partitions(margins, config["settings"]["batch_size"])
    lines = data.read_lines(out / "metrics.jsonl")
    row["steps"] = len(lines)
    row["train_seconds"] = round(sum(line["seconds"] for line in lines), 1)
    return row


def without_folders(value: Any) -> Any:
    """A setting without the folders of this machine."""
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value


def win_rates(out: Path) -> dict[str, dict[str, float]]:
    """Of the policy against the model that training started from, by judge; in percent and characters. {} of
    a run that is not finished."""
    report = data.read_json(out / "report.json", {"wins": [], "held_out": {}})
    judgements = data.read_json(out / "evaluation" / "judgements.json", {}).values()
    rows = report["wins"] + [one["wins"] for one in judgements]
    models = list(report["held_out"])  # from the one that training started from to the policy
    wins = {}
    for row in rows:
        if (row["model"], row["baseline"]) == (models[-1], models[0]):
            numbers = {
                "rate": row["rate"][0],
                "rate_error": row["rate"][1],
                "controlled": row["controlled"][0],
            }
            numbers["length"] = row["length"][0]
            numbers["baseline_length"] = row["baseline_length"][0]
            judge = row["judge"] if row["judge"] == "true reward" else "judge"
            if judge == "judge":  # a prompt that was answered with nothing has no verdict
                numbers["missing"] = row["prompts"] - row["verdicts"]
            wins[judge] = {name: value for name, value in numbers.items() if not math.isnan(value)}
    return wins


def margin_numbers(margins: Tensor) -> dict[str, float]:
    return {
        "mean": margins.mean().item(),
        "variance": margins.var(unbiased=False).item(),
        "accuracy": percent(margins > 0),
    }


def percent(values: Tensor) -> float:
    return 100 * values.double().mean().item()


def filter_contents(out: Path, settings: dict[str, Any], scores: dict[str, Tensor]) -> dict[str, Any]:
    """What each step removed: percent of the pairs, tokens that chosen is longer by, percent mislabelled."""
    results = data.read_json(out / "filter.json")
    pairs = data.load_splits(settings, lm.load_tokenizer(out / "policy")).train
    first, second = set(results["removed_step1"]), set(results["removed_step2"])
    parts = {"step1": [], "step2": [], "kept": [], "all": pairs}
    for pair in pairs:
        name = "step1" if pair.source in first else "step2" if pair.source in second else "kept"
        parts[name].append(pair)
    contents = {"ratio": 100 * results["ratio"]}
    for name, part in parts.items():
        contents[name] = {"share": 100 * len(part) / len(pairs)}
        if part:
            longer = torch.tensor([len(pair.chosen) - len(pair.rejected) for pair in part]).double()
            contents[name]["longer"] = longer.mean().item()
            contents[name]["apart"] = longer.abs().mean().item()
        if part and "truth" in part[0].row:
            contents[name]["mislabelled"] = percent(
                torch.tensor([pair.row["truth"]["margin"] < 0 for pair in part])
            )
    longer = torch.tensor([len(pair.chosen) - len(pair.rejected) for pair in pairs]).double()
    base = (scores["base_chosen"] - scores["base_rejected"]).double()
    contents["length_correlation"] = torch.corrcoef(torch.stack([base, longer]))[0, 1].item()
    return contents


def partitions(margins: Tensor, batch_size: int) -> dict[str, dict[str, float]]:
    """Table 3: mean variance of the margins in a batch, and its percentage of the largest possible."""
    draw = torch.Generator().manual_seed(0)
    margins = margins[torch.randperm(len(margins), generator=draw)[: len(margins) // batch_size * batch_size]]
    bound = batching.variance_bound(margins, batch_size).item()
    table = {}
    for name, make in train.PARTITIONS.items():
        batches = make(margins, batch_size, draw)  # [n, m]
        total = batching.total_variance(margins, batches).item()
        table[name] = {"variance": total / len(batches), "bound": 100 * total / bound}
    return table


if __name__ == "__main__":
    main()
