"""Prepare the HH experiment: pairs for the judge, and each seed's own pairs and test prompts.

    python .study/hh.py HH_FILE... --out runs/hh --model MODEL --seeds 30 31 32

From Anthropic HH: each seed draws --test prompts and --train pairs of the single-turn conversations, none of
them in both. The judge is trained on --judge conversations of several turns, whose first message is nobody's
single-turn prompt: no seed uses its pairs. Its accuracy is measured on all single-turn pairs. Everything
depends on the files and the seeds alone. Then the judge is trained: runs/hh/judge. Next: run.py --groups hh.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))

import data  # noqa: E402

LONGEST = 1300  # characters of a conversation with one response: what 512 tokens hold


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", nargs="+", metavar="HH_FILE", help="files in any form that train.py reads")
    parser.add_argument("--out", default="runs/hh", help="(default: %(default)s)")
    parser.add_argument("--model", required=True, help="the judge starts from it, as the runs do")
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--judge", type=int, default=1000, help="pairs (default: %(default)s)")
    parser.add_argument("--train", type=int, default=320, help="pairs of a seed (default: %(default)s)")
    parser.add_argument("--test", type=int, default=100, help="pairs of a seed (default: %(default)s)")
    args = parser.parse_args()
    out = Path(args.out)
    single, several = read(args.files)
    if args.train + args.test > len(single) or args.judge > len(several):
        counts = f"{len(single)} single-turn pairs and {len(several)} for the judge"
        sys.exit(f"hh.py: the files hold {counts}: lower --train, --test or --judge")
    write(out / "single.jsonl", single)
    write(out / "judge.jsonl", random.Random(0).sample(several, args.judge))
    for seed in args.seeds:
        drawn = random.Random(seed).sample(single, args.test + args.train)
        write(out / f"test-{seed}.jsonl", drawn[: args.test])
        write(out / f"train-{seed}.jsonl", drawn[args.test :])
    print(f"{out}: {len(single)} single-turn pairs, {len(several)} for the judge to draw from")
    flags = f"--model {args.model} --data {out}/judge.jsonl --eval_data {out}/single.jsonl"
    flags += f" --output_dir {out}/judge --batching random --filter_ratio 0 --lambda_reg 0"
    flags += " --lora_rank 8 --lr 5e-4 --epochs 1 --max_length 512"
    sys.exit(subprocess.run([sys.executable, str(STUDY.parent / "train.py"), *flags.split()]).returncode)


def read(files: list[str]) -> tuple[list[Any], list[Any]]:
    """Single-turn pairs, one a prompt, and those of several turns that share no first message with them."""
    single, several = {}, {}
    for row in data.read_preferences(files):
        if "drop" in row or row["chosen"] == row["rejected"]:
            continue
        messages = data.as_messages(row["prompt"])
        size = sum(len(message["content"]) for message in messages)
        if size + max(len(row["chosen"]), len(row["rejected"])) > LONGEST:
            continue
        pair = {"prompt": messages, "chosen": row["chosen"].strip(), "rejected": row["rejected"].strip()}
        first = messages[0]["content"]
        if [message["role"] for message in messages] == ["user"]:
            single.setdefault(first, pair)
        else:
            several.setdefault(first, pair)
    return [*single.values()], [pair for first, pair in several.items() if first not in single]


def write(path: Path, pairs: list[Any]) -> None:
    """One JSON a line. A file that is there must hold the same: runs may have used it."""
    lines = "".join(f"{json.dumps(pair)}\n" for pair in pairs)
    if path.is_file() and path.read_text(encoding="utf-8") != lines:
        sys.exit(f"hh.py: {path} holds other pairs: choose another --out")
    data.write_whole(path, lambda unfinished: unfinished.write_text(lines, encoding="utf-8"))


if __name__ == "__main__":
    main()
