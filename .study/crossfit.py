"""Score the training pairs of a run by proxies that have not seen them.

    python .study/crossfit.py RUN --out FOLDER

Splits RUN's training pairs by prompt into two halves and trains a proxy on each, by RUN's objective and
settings. A pair is scored by the proxy of the other half. FOLDER/crossfit.safetensors has the form of a run's
margins.safetensors, for variants.py --scores. Interrupted, the same command goes on.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import model as lm  # noqa: E402
import train  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="a finished run folder of train.py")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    args = parser.parse_args()
    run, out = Path(args.run), Path(args.out)
    path = out / "crossfit.safetensors"
    if path.is_file():
        print(f"{path} is there: nothing is trained")
        return
    out.mkdir(parents=True, exist_ok=True)
    settings = data.read_json(run / "config.json")["settings"]
    s = train.Settings(**{**settings, "output_dir": args.out})
    if s.model == data.BUILTIN:
        torch.set_num_threads(1)  # on tiny products, threads wait for each other
    tokenizer = lm.load_tokenizer(run / "policy")
    pairs = data.load_splits(settings, tokenizer).train
    own = load_file(run / "margins.safetensors")
    reference = torch.stack([own["base_chosen"], own["base_rejected"]], dim=1)  # [N, 2]
    base = s.sft_model or s.model
    if s.sft_epochs:
        base = run / "sft"

    place = {pair.source: i for i, pair in enumerate(pairs)}
    # Not by the run's own seed: by that, the SFT part was drawn, and these pairs all lie in the rest's range.
    first, second = data.split_by_prompt(pairs, (0.5,), s.seed + 1_000_000)
    scores = torch.zeros_like(reference)  # [N, 2], by the proxy of the other half
    for number, (seen, unseen) in enumerate([(first, second), (second, first)], start=1):
        theirs = reference[[place[pair.source] for pair in seen]]
        proxy = train_proxy(f"proxy-{number}", s, base, tokenizer, seen, theirs)
        model = lm.load_model(proxy, s.seed).to(lm.choose_device())
        scores[[place[pair.source] for pair in unseen]] = lm.score_pairs(
            model, unseen, micro_batch_tokens=s.micro_batch_tokens, mean=s.length_normalised
        )
    columns = {"base_chosen": own["base_chosen"], "base_rejected": own["base_rejected"]}
    columns["proxy_chosen"] = scores[:, 0].contiguous()
    columns["proxy_rejected"] = scores[:, 1].contiguous()
    data.write_whole(path, lambda unfinished: save_file(columns, unfinished))
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
    print(path)


def train_proxy(
    stage: str, s: train.Settings, base: Any, tokenizer: Any, pairs: list[data.Pair], reference: Tensor
) -> Path:
    """Plain training on these pairs, as train.py trains its proxy: the folder of the result."""

    def plain_loss(scores: Tensor, index: list[int]) -> dict[str, Tensor]:
        return train.objective(s, scores, reference[index])

    random = train.random_plan(s, len(pairs))
    return train.fit(stage, s, base, tokenizer, pairs, loss_of=plain_loss, batches_of=random)


if __name__ == "__main__":
    main()
