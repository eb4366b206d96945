"""Run train.py, or evaluate.py generate, and take from another run what is the same in both.

    python .study/shared.py OTHER train.py TRAIN_FLAGS...
    python .study/shared.py OTHER evaluate.py generate RUN FLAGS...

train.py takes the scores of its training pairs by base and proxy, and the margins of its held-out pairs by
all models that OTHER has too. evaluate.py takes the outputs of the model that training started from: give it
the flags that OTHER's had. It stops if data or models are not the same. The results are the same bits with it
and without, but for a large model this saves hours. One process only.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402

compute_margins = evaluate.margins_of
generate = evaluate.generate
open_run = train.open_run


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[2] not in ("train.py", "evaluate.py"):
        sys.exit(__doc__)
    _, other, program, *flags = sys.argv
    other = evaluate.open_run(other)
    sys.argv = [program, *flags]
    if program == "train.py":
        share_scores(other)
        share_margins(other)
        train.main()
    else:
        _, run, *_ = flags
        share_outputs(other, evaluate.open_run(run))
        evaluate.main()


def share_scores(other: evaluate.Run) -> None:
    """Let a run begin with the other's scores of training pairs."""

    def open_with_scores(s: train.Settings, fingerprint: str) -> None:
        open_run(s, fingerprint)
        theirs = data.read_json(other.folder / "config.json")
        ours = data.read_json(s.folder / "config.json")
        models = zip(ours["models"], theirs["models"])  # of the base, then of the proxy
        same = ours["data"] == theirs["data"] and s.objective == other.settings["objective"]
        if not same or any(our != their for our, their in models):
            raise ValueError(f"{other.folder}: of other pairs, models or another objective")
        mine = s.folder / "margins.safetensors"
        if not mine.exists():
            data.write_whole(mine, lambda part: shutil.copyfile(other.folder / mine.name, part))

    train.open_run = open_with_scores


def share_margins(other: evaluate.Run) -> None:
    """Let a report begin with the other's margins of held-out pairs."""
    theirs = data.read_json(other.folder / "report.json")["held_out"]

    def margins_of(run: evaluate.Run, pairs: list[data.Pair]) -> dict[str, Tensor]:
        check_same(run, other)
        margins = {}
        unknown = {}
        for name, model in run.models.items():  # the policy comes last
            if model == other.models.get(name):
                margins[name] = torch.tensor(theirs[name], dtype=torch.float64)
            else:
                unknown[name] = model
        return {**margins, **compute_margins(run._replace(models=unknown), pairs)}

    evaluate.margins_of = margins_of


def share_outputs(other: evaluate.Run, run: evaluate.Run) -> None:
    """Let the first of a run's two files of outputs be the other's."""
    check_same(run, other)
    theirs = data.read_json(other.folder / "evaluation" / "reference_outputs.json")

    def take(model: nn.Module, tokenizer: Any, prompts: list[list[int]], how: Any) -> list[str]:
        evaluate.generate = generate  # for the policy
        if len(prompts) != len(theirs):
            raise ValueError(f"{other.folder}: outputs to {len(theirs)} prompts, and here are {len(prompts)}")
        return [row["output"] for row in theirs]

    evaluate.generate = take


def check_same(run: evaluate.Run, other: evaluate.Run) -> None:
    if run.fingerprint != other.fingerprint or run.models[run.start] != other.models[other.start]:
        raise ValueError(f"{other.folder}: of other pairs, or of another model, than {run.folder}")


if __name__ == "__main__":
    main()
