"""Run train.py with another filter than the paper's.

    python .study/variants.py KIND [--scores FILE] [--share S] TRAIN_FLAGS...

KIND, where a pair's relative margin is the margin of the proxy minus that of the base:

    paper                   Eq. 6 to 9 as train.py has them, on the scores of --scores
    length_free             on margins minus their linear fit on the difference in length
    relative                step 1 removes every pair whose relative margin is negative, step 2 the small ones
    relative_length_free    both
    per_token               on means over tokens, for objectives that are defined on sums
    printed                 Eq. 8 with its printed sign: keeps the small margins
    lowest                  step 1 removes the share S with the lowest relative margins, whatever their sign
    agree                   step 1 removes pairs whose relative margin is negative by FILE and by the run
    oracle                  removes exactly the mislabelled pairs (built-in task)
    thinned                 removes as many pairs, at random

FILE holds scores in the form of a run's margins.safetensors, of the same seed: those of another run or of
crossfit.py. Batches are made by the same margins as the filter. Amplification keeps the run's own. Step 2 has
tau = 0.1 sd and gamma = 0.01 sd of these margins; --tau -1000 switches it off, and oracle, thinned and lowest
have none. One process only.
"""

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import batching  # noqa: E402
import data  # noqa: E402
import filter  # noqa: E402
import model as lm  # noqa: E402
import train  # noqa: E402

KINDS = [
    "paper",
    "length_free",
    "relative",
    "relative_length_free",
    "per_token",
    "printed",
    "lowest",
    "agree",
]
KINDS += ["oracle", "thinned"]
WITHOUT_STEP_2 = ("oracle", "thinned", "lowest")


class Judged(NamedTuple):
    """What a kind of filter makes of the pairs: which of them step 1 removes, and step 2's margins, [N]."""

    removed: Tensor
    margins: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--scores", metavar="FILE", help="(default: the run's own margins.safetensors)")
    parser.add_argument("--share", type=float, help="of the pairs, for lowest")
    parser.add_argument("--output_dir", required=True, metavar="RUN", help="the run folder, as for train.py")
    args, flags = parser.parse_known_args()
    if (args.kind == "lowest") != (args.share is not None):
        parser.error("lowest needs --share, and no other kind has one")
    if args.kind == "printed":
        filter.retention_probability = printed_retention
    else:
        replace_filter(args)
    sys.argv = ["train.py", "--output_dir", args.output_dir, *flags]
    train.main()


ours = filter.retention_probability


def printed_retention(proxy: Tensor, tau: float, gamma: float = 1.0) -> Tensor:
    return 1 - ours(proxy, tau, gamma)


def replace_filter(args: argparse.Namespace) -> None:
    """Put this filter in place of the paper's in train.py, by name."""
    kept = None

    @cache
    def judged() -> Judged:
        return judge(args)

    def margin_decrease(base: Tensor, proxy: Tensor) -> Tensor:
        return judged().removed

    def dual_denoising_filter(
        base: Tensor,
        proxy: Tensor,
        tau: float,
        gamma: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        nonlocal kept
        removed, margins = judged()
        retained = torch.ones(len(removed), dtype=torch.bool)
        if tau >= 0 and args.kind not in WITHOUT_STEP_2:
            sd = margins.std(unbiased=False).item()
            draw = torch.rand(len(removed), dtype=torch.float64, generator=generator)
            retained = draw < filter.retention_probability(margins, 0.1 * sd, 0.01 * sd)
        kept = (~removed & retained).nonzero().squeeze(1)
        return kept

    def high_variance_batches(
        margins: Tensor, batch_size: int, generator: torch.Generator | None = None
    ) -> Tensor:
        return batching.high_variance_batches(judged().margins[kept], batch_size, generator)

    train.margin_decrease = margin_decrease
    train.dual_denoising_filter = dual_denoising_filter
    train.PARTITIONS["high"] = high_variance_batches


def judge(args: argparse.Namespace) -> Judged:
    """What this kind of filter makes of the run's training pairs; the run folder has their scores already."""
    folder = Path(args.output_dir)
    settings = data.read_json(folder / "config.json")["settings"]
    tokenizer = lm.builtin_tokenizer(data.builtin_texts())
    if settings["model"] != data.BUILTIN:
        tokenizer = lm.load_tokenizer(settings["model"], settings["chat_template"])
    pairs = data.load_splits(settings, tokenizer).train
    chosen = torch.tensor([len(pair.chosen) for pair in pairs])  # [N], tokens
    rejected = torch.tensor([len(pair.rejected) for pair in pairs])

    own = load_file(folder / "margins.safetensors")
    scores = load_file(args.scores) if args.scores else own
    if len(scores["base_chosen"]) != len(pairs):
        raise ValueError(
            f"{args.scores}: of {len(scores['base_chosen'])} pairs, but the run has {len(pairs)}"
        )
    if args.kind == "per_token":
        if settings["objective"] in train.loss.LENGTH_NORMALISED:
            raise ValueError("per_token: the scores of this objective are means over tokens already")
        scores = {
            name: values / (chosen if "chosen" in name else rejected) for name, values in scores.items()
        }
    base, proxy = margins_of(scores)
    if "length_free" in args.kind:
        longer = (chosen - rejected).to(base)
        base = without_fit(base, longer)
        proxy = without_fit(proxy, longer)
    relative = proxy - base

    if args.kind in ("oracle", "thinned"):
        mislabelled = torch.tensor([pair.row["truth"]["margin"] < 0 for pair in pairs])
        if args.kind == "oracle":
            return Judged(mislabelled, proxy)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(settings["seed"]))
        return Judged(mislabelled[order], proxy)
    if args.kind == "lowest":
        count = round(args.share * len(pairs))
        lowest = relative.argsort()[:count]
        return Judged(torch.zeros(len(pairs), dtype=torch.bool).index_fill(0, lowest, True), relative)
    if args.kind == "agree":
        own_base, own_proxy = margins_of(own)
        return Judged((relative < 0) & (own_proxy < own_base), relative)
    if args.kind.startswith("relative"):
        return Judged(relative < 0, relative)
    return Judged(filter.margin_decrease(base, proxy), proxy)


def margins_of(scores: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Margins (Eq. 1) of base and proxy, [N] each."""
    base = scores["base_chosen"] - scores["base_rejected"]
    proxy = scores["proxy_chosen"] - scores["proxy_rejected"]
    return base, proxy


def without_fit(margins: Tensor, longer: Tensor) -> Tensor:
    """Margins minus their linear fit on `longer`; their mean stays."""
    longer = longer - longer.mean()
    return margins - (margins @ longer) / (longer @ longer) * longer


if __name__ == "__main__":
    main()
