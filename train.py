"""Train a language model with Reward Margin Optimization: Algorithm 2 of the paper, from top to bottom.

    python train.py                                       # built-in model and preferences, one CPU minute
    torchrun train.py --model MODEL --data PAIRS.jsonl    # one GPU
    torchrun --nproc_per_node 8 train.py --model MODEL --data PAIRS.jsonl    # eight, the same update
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...

`rmo` is the algorithm, `pair_loss` its loss, `fit` the training loop; the rest is what they stand on. Plain
DPO is `--batching random --filter_ratio 0 --lambda_reg 0`. Interrupted at any point, the same command goes
on.

Differs from the paper: 1) The reference of Eq. 4 is the base model, and the base margins (line 4) need its
log-probabilities anyway: they are scored once and kept, no second model is loaded. 2) The median of Eq. 14
("compute global median", line 14) is that of the proxy's margins, a constant of the run, as the text says. 3)
tau, gamma, alpha and lambda default to about the paper's values in standard deviations of the proxy's
margins; the filter ratio is what comes of it. 4) Batches are made anew each epoch (line 9), by default from
the proxy's margins, which costs nothing; `--batch_margins policy` scores the current policy as Algorithm 1
has it. 5) N = n m in the paper; here a random remainder sits out each epoch.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import transformers
import yaml  # comes with transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

import data
import evaluate
import loss as objectives
import model as lm
from batching import (
    high_variance_batches,
    low_variance_batches,
    random_batches,
    total_variance,
    variance_bound,
)
from data import BUILTIN, Pair
from filter import dual_denoising_filter, margin_decrease, tau_for_ratio

Objective = Literal["dpo", "ipo", "simpo", "orpo", "slic", "kto", "beta_dpo"]
Partition, Scorer = Literal["high", "random", "low"], Literal["proxy", "policy"]
Plan = Callable[[int, nn.Module], Tensor]  # (epoch, model) -> [n, m]
PARTITIONS = {"high": high_variance_batches, "random": random_batches, "low": low_variance_batches}


def flag(default: Any, help: str) -> Any:
    """A field whose --help ends with its default, unless the text names a better one."""
    return HfArg(default=default, help=help + ("" if default is None else " (default: %(default)s)"))


@dataclass
class Settings:
    """Reward Margin Optimization. The flags may also stand in a .json or .yaml file: train.py
    settings.yaml. Margins, and what is compared with them, are in nats, or nats a token for ipo, simpo and
    orpo; sd is the population standard deviation of the proxy's margins."""

    model: str = flag(BUILTIN, "folder or hub id of a causal LM; 'built-in' makes a tiny one")
    data: str = flag(BUILTIN, "pairs: .json, .jsonl, .gz of these, 'owner/name[:file]' on the hub")
    eval_data: str | None = flag(None, "held-out pairs, in the same formats")
    eval_share: float = flag(0.0, "or this share (0 to 0.9) of the prompts of --data, drawn by seed")
    limit: int | None = flag(None, "read only the first K pairs of --data, for a quick look")
    output_dir: str = flag("runs/rmo", "the run folder; the same command goes on where it stopped")
    chat_template: str | None = flag(None, "file with a Jinja chat template, for a tokenizer that has none")
    proxy: str | None = flag(None, "run on the same data and model, to share its SFT, margins and proxy")

    objective: Objective = flag("dpo", "the loss that RMO is added to")
    beta: float | None = flag(None, "temperature (default: 2 for simpo, else 0.1; built-in 1 for sums)")
    label_smoothing: float = flag(0.0, "dpo only: share of labels taken to be wrong, 0 to 0.5")
    simpo_gamma: float | None = flag(None, "simpo only: target reward margin (default: 1)")

    filter_ratio: float | None = flag(None, "share of pairs to remove, by a tau that does it; 0 = none")
    tau: float | None = flag(None, "or Eq. 8's threshold on |proxy margin| (default: 0.1 sd)")
    gamma: float | None = flag(None, "Eq. 8: width of the soft threshold (default: 0.01 sd)")
    batching: Partition = flag("high", "margin variance in a batch; high is Algorithm 1")
    batch_margins: Scorer = flag("proxy", "whose margins; policy scores all pairs each epoch")
    lambda_reg: float | None = flag(
        None, "Eq. 14: weight, 0 = no amplification (default: 0.16 alpha beta; ipo 0.32 alpha / beta)"
    )
    alpha: float | None = flag(None, "Eq. 14: scale (default: 1 sd)")
    median: float | None = flag(None, "Eq. 14: median (default: that of the proxy margins)")

    sft_epochs: int | None = flag(None, "epochs of SFT on a fifth of the data (default: 15 built-in, else 0)")
    sft_lr: float | None = flag(None, "peak learning rate of SFT (default: 3e-3 built-in, else 2e-5)")
    epochs: int = flag(3, "epochs of proxy and of policy training")
    batch_size: int = flag(16, "pairs in a global batch, over all ranks")
    lr: float | None = flag(None, "peak learning rate (default: 2e-4 built-in, 5e-5 with LoRA, else 1e-6)")
    warmup: float = flag(0.1, "share of the steps in which lr rises; then it falls to 0; both linearly")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    max_length: int = flag(1024, "tokens of a prompt and one response; what is more is cut off")
    max_prompt_length: int | None = flag(None, "tokens of a prompt (default: what is left, at least half)")
    lora_rank: int = flag(0, "LoRA of this rank on all linear layers but the head, 0 = train all weights")
    gradient_checkpointing: bool = flag(False, "keep no activations: less memory, a third more time")
    micro_batch_tokens: int | None = flag(None, "tokens a pass (default: CUDA 16384, CPU 384, built-in 2048)")
    save_steps: int = flag(100, "optimizer steps between checkpoints: the most that a crash can cost")
    seed: int = flag(0, "of data splits, filter draw, batches and initial weights")

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on other flags, and refuse what cannot be. Raises ValueError."""
        builtin = self.model == BUILTIN
        defaults = {
            "beta": 2.0 if self.objective == "simpo" else 1.0 if builtin and not self.per_token else 0.1,
            "sft_epochs": 15 if builtin else 0,
            "sft_lr": 3e-3 if builtin else 2e-5,
            "lr": 2e-4 if builtin else 5e-5 if self.lora_rank else 1e-6,
            "micro_batch_tokens": 16384 if torch.cuda.is_available() else 2048 if builtin else 384,
        }
        held_out = self.eval_share and (self.eval_data or self.data == BUILTIN)
        constants = (self.alpha is not None or self.median is not None) and self.lambda_reg == 0
        target = self.simpo_gamma is not None and self.objective != "simpo"
        batches = self.batching, self.batch_margins
        conflicts = {
            "--tau and --filter_ratio both set the filter": None not in (self.tau, self.filter_ratio),
            "--gamma is for a filter, --filter_ratio 0 is none": self.gamma and self.filter_ratio == 0,
            "--alpha and --median are for Eq. 14, --lambda_reg 0 switches it off": constants,
            "--eval_share and --eval_data, or the built-in data, both give held-out pairs": held_out,
            "--label_smoothing is for --objective dpo": self.label_smoothing and self.objective != "dpo",
            "--simpo_gamma is for --objective simpo": target,
            "--batching random uses no --batch_margins": batches == ("random", "policy"),
        }
        for why, wrong in conflicts.items():
            if wrong:
                raise ValueError(f"{why}: give one of them")
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        bounds = """eval_share 0 .9, limit 1 inf, beta 1e-9 inf, label_smoothing 0 .499, simpo_gamma -inf inf,
            filter_ratio 0 .999, tau -inf inf, gamma 1e-9 inf, lambda_reg 0 inf, alpha 1e-9 inf,
            median -inf inf, sft_epochs 0 inf, sft_lr 0 inf, epochs 1 inf, batch_size 1 inf, lr 0 inf,
            warmup 0 1, max_grad_norm 1e-9 inf, max_length 2 inf, max_prompt_length 1 inf, lora_rank 0 inf,
            micro_batch_tokens 1 inf, save_steps 1 inf, seed 0 inf"""
        for name, low, high in map(str.split, bounds.split(",")):
            value = getattr(self, name)
            if value is not None and not (float(low) <= value <= float(high) and math.isfinite(value)):
                raise ValueError(f"--{name} {value} is out of range: {low} to {high}")

    @property
    def per_token(self) -> bool:
        return self.objective in objectives.LENGTH_NORMALISED

    @property
    def filtering(self) -> bool:
        return self.tau is not None or self.filter_ratio != 0

    @property
    def needs_proxy(self) -> bool:
        given = self.median is not None and self.alpha is not None
        amplify = self.lambda_reg != 0 and not given
        return self.filtering or amplify or (self.batching != "random" and self.batch_margins == "proxy")


def rmo(s: Settings, device: torch.device) -> None:
    """Algorithm 2. Every stage leaves its result in the run folder, and is skipped where that is there."""
    out, clock, since = Path(s.output_dir), Counter(), time.perf_counter()

    def lap(part: str) -> None:
        """Count the time since the last call as that of this part."""
        nonlocal since
        now = time.perf_counter()
        clock[part] += now - since
        since = now

    run = prepare(s, device)
    lap("preparation")
    pairs, sft_pairs = run.pairs, run.sft_pairs
    lengths = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])  # [N, 2]

    def score(side: str, model: nn.Module) -> dict[str, Tensor]:
        """s(y+) and s(y-) of every pair, sums or means over tokens as the objective has it."""
        batches = data.scoring_batches(pairs, s.micro_batch_tokens, run.shared, *lm.rank_and_world())
        sums = lm.score_pairs(model, batches, [pair.source for pair in pairs], f"{side} scores")
        lap("scoring")
        chosen, rejected = (sums / lengths if s.per_token else sums).unbind(1)
        return {f"{side}_chosen": chosen, f"{side}_rejected": rejected}

    def trained(stage: str, start: str | Path, *what: Any, log: Path | None = None) -> Path:
        """The folder of this stage's model, trained from the model `start` unless it is there, and whole."""
        wrong = lm.damage(out / stage)
        if wrong and (out / stage).exists():
            say(f"{out / stage} is damaged ({wrong}): not used, made again")
        barrier()  # every rank has looked before one writes
        if wrong:
            model = lm.load_model(start, s.seed).to(device)
            if s.lora_rank and stage != "sft":
                lm.add_lora(model, s.lora_rank, s.seed)
            fit(stage, model, s, run.shared, log, *what)
            lm.merge_lora(model)
            on_rank_0(lambda: lm.save_model(model, run.tokenizer, out / stage))
            lap(f"{stage} training")
        return out / stage

    def random_plan(purpose: str, count: int) -> Plan:
        return lambda epoch, _: random_batches(
            torch.zeros(count), s.batch_size, generator(s.seed, purpose, epoch)
        )

    # SFT, if asked for, on the chosen responses of a disjoint part of the data: it makes the base model
    base = s.model
    if s.sft_epochs:
        n = torch.tensor([len(pair.chosen) for pair in sft_pairs], device=device)
        what = sft_pairs, len(n), s.sft_epochs, s.sft_lr, random_plan("sft", len(n))
        nll = lambda scores, index, *_: (-scores[:, 0] / n[index], {})  # noqa: E731
        base = evaluate.stage_folder(run.donor, "sft") if run.donor else trained("sft", base, *what, nll)

    # Line 4: base and proxy margins. The base scores are the reference log-probabilities of Eq. 4 too.
    scores = load_scores(out, run.identity) or (load_scores(run.donor, run.identity) if run.donor else {})
    if not scores:
        scores = score("base", lm.load_model(base, s.seed).to(device))
        scores |= dict(zip(("chosen_tokens", "rejected_tokens"), lengths.T))
    on_rank_0(lambda: save_tensors(out / "margins.safetensors", scores, run.identity))
    reference = torch.stack([scores["base_chosen"], scores["base_rejected"]], 1).to(device)  # [N, 2]
    loss_of = partial(pair_loss, s, reference, lengths.to(device) if s.per_token else None)
    damaged = (out / "proxy").exists() and lm.damage(out / "proxy")
    if s.needs_proxy and (damaged or "proxy_chosen" not in scores):
        what = pairs, len(pairs), s.epochs, s.lr, random_plan("batches", len(pairs)), loss_of
        proxy = run.donor / "policy" if run.donor else trained("proxy", base, *what)
        scores |= score("proxy", lm.load_model(proxy, s.seed).to(device))
        on_rank_0(lambda: save_tensors(out / "margins.safetensors", scores, run.identity))
    base_margins = scores["base_chosen"] - scores["base_rejected"]  # [N], Eq. 1
    proxy_margins = scores["proxy_chosen"] - scores["proxy_rejected"] if s.needs_proxy else base_margins

    # The paper's constants, tau 14, alpha 125 and lambda 2 at beta 0.1, are for margins with a standard
    # deviation of about 142 (the root of Table 3's Rnd-Var). Counted in it they fit other models and lengths.
    sd = proxy_margins.std(unbiased=False).item()
    if s.needs_proxy and sd == 0:
        raise ValueError("all proxy margins are equal: there is nothing to filter, batch or amplify by")
    constants = {"sd": sd, "lambda": 0.0}  # as used, for the record

    # Lines 5 and 6: Dual Denoising Filtering
    kept = torch.arange(len(pairs))
    if s.filtering:
        tau, gamma = 0.1 * sd if s.tau is None else s.tau, 0.01 * sd if s.gamma is None else s.gamma
        if s.filter_ratio:
            try:
                tau = tau_for_ratio(base_margins, proxy_margins, s.filter_ratio, gamma)
            except ValueError as error:
                again = f"Nothing need be trained again: --proxy {run.donor or out} --output_dir ANOTHER"
                raise ValueError(f"{error}. {again}") from None
        kept = dual_denoising_filter(base_margins, proxy_margins, tau, gamma, generator(s.seed, "filter"))
        constants |= {"tau": tau, "gamma": gamma}
        on_rank_0(lambda: report_filter(out, gamma, base_margins, proxy_margins, kept, tau))
    if len(kept) < s.batch_size:
        raise ValueError(f"the filter left {len(kept)} of {len(pairs)} pairs, not one batch: filter less")

    # Lines 9 and 10: Batch Margin Diversification, anew for each epoch
    def plan(epoch: int, model: nn.Module) -> Tensor:
        lap("policy training")
        margins = proxy_margins[kept]
        if s.batch_margins == "policy":
            scored = score("policy", model)
            margins = (scored["policy_chosen"] - scored["policy_rejected"])[kept]
        batches = PARTITIONS[s.batching](margins, s.batch_size, generator(s.seed, "batches", epoch))
        report_batches(epoch, margins, batches)
        lap("filter and batches")
        return kept[batches]

    # Lines 11 to 17: training with Pairwise Margin Amplification
    if s.lambda_reg != 0:
        median = proxy_margins.double().quantile(0.5).item() if s.median is None else s.median
        alpha = sd if s.alpha is None else s.alpha
        slope = 1 / s.beta if s.objective == "ipo" else s.beta / 2  # of DPO's loss, or IPO's, at the start
        weight = 0.32 * alpha * slope if s.lambda_reg is None else s.lambda_reg
        say(f"amplification: lambda {weight:.4g}, median {median:.4g}, alpha {alpha:.4g}")
        constants |= {"lambda": weight, "median": median, "alpha": alpha}
        amplify = partial(objectives.margin_amplification, median=median, alpha=alpha, weight=weight)
        loss_of = partial(loss_of, amplify=amplify)
    on_rank_0(lambda: evaluate.write_json(out / "constants.json", constants))
    lap("filter and batches")
    log = out / "metrics.jsonl"
    trained("policy", base, pairs, len(kept), s.epochs, s.lr, plan, loss_of, log=log)
    on_rank_0(lambda: shutil.rmtree(out / "checkpoint", ignore_errors=True))
    say(f"done: {out / 'policy'}")
    on_rank_0(lambda: report_speed(log, clock, run, kept, bool(s.lora_rank), device))
    evaluate.report_run(out, device)


def pair_loss(
    s: Settings,
    reference: Tensor,
    lengths: Tensor | None,
    scores: Tensor,
    index: Tensor,
    whole: tuple[Tensor, Tensor] | None,
    running: float,
    amplify: Callable[[Tensor], Tensor] = torch.zeros_like,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 15 for some pairs of a batch: losses [B], and what is logged of them, [B] each.

    scores: [B, 2] sums from the policy; index: [B] their rows in reference, the [N, 2] scores of the base
    model; lengths: [N, 2] if scores are to be means over tokens; whole: (scores, index) of the global batch,
    for objectives.BATCH_LEVEL; running: the running mean of the reward margin; amplify: Eq. 14.
    """
    if lengths is not None:
        scores = scores / lengths[index]
    ratios = scores - reference[index]  # log pi / pi_ref, [B, 2]
    (chosen, rejected), references = scores.unbind(1), reference[index].unbind(1)
    batch = (whole[0] - reference[whole[1]]).unbind(1) if whole else None
    options = {"label_smoothing": s.label_smoothing, "simpo_gamma": s.simpo_gamma}
    losses = objectives.preference_loss(
        s.objective, chosen, rejected, *references, s.beta, **options, batch=batch, threshold=running
    )
    margin = chosen - rejected  # Eq. 1
    reg_loss = amplify(margin)
    rewards = s.beta * (scores if s.objective in objectives.REFERENCE_FREE else ratios)
    stats = {
        "reg_loss": reg_loss,
        "margin_mean": margin,
        "margin_variance": margin.double() ** 2,  # less the square of the mean, once the batch is whole
        "accuracy": rewards[:, 0] > rewards[:, 1],
        "reward_chosen": rewards[:, 0],
        "reward_rejected": rewards[:, 1],
        "logps_chosen": chosen,
        "logps_rejected": rejected,
    }
    return losses + reg_loss, stats  # Eq. 15


def fit(
    stage: str,
    model: nn.Module,
    s: Settings,
    shared: bool,
    log: Path | None,
    pairs: list[Pair],
    count: int,
    epochs: int,
    lr: float,
    plan: Plan,
    loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
) -> None:
    """The training loop of every stage; it trains `model` in place, on `count` of the pairs.

    plan(epoch, model) -> the epoch's global batches, [n, m] indices into pairs, the same on every rank.
    loss_of(scores [B, 2], index [B], whole, running) -> losses [B] and statistics. The update is that of the
    mean over the global batch, however ranks and micro-batches split it. State (step, the epoch's batches,
    weights, AdamW's moments) is saved every save_steps and on SIGTERM or Ctrl-C; where the run folder has one
    of this stage, the loop goes on from it.
    """
    (rank, world), device, out = lm.rank_and_world(), next(model.parameters()).device, Path(s.output_dir)
    model.train()  # dropout is 0 all the same; gradient checkpointing wants it
    if s.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if world == 1 and device.type == "cpu" and s.model != BUILTIN:
        lm.accumulate_in_place(model)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, weight_decay=0.0, fused=True)
    state, path = training_state(weights, optimizer), out / "checkpoint" / "state.safetensors"
    step, running, batches, lines = 0, 0.0, None, read_log(log) if log else []
    saved, about = load_tensors(path)
    if about.get("stage") == stage:  # else there is none, or one of a stage that is finished
        if log and len(lines) < about["step"]:
            say(f"{log} is damaged behind step {len(lines)}: {stage} starts again from step 0")
        else:
            step, running, batches = about["step"], about["running"], saved["batches"]
            for name, tensor in state.items():
                tensor.data.copy_(saved[name])
            say(f"{stage}: going on from step {step}")
    del saved  # as large as the weights and their moments
    barrier()  # every rank has read the log before one cuts it
    if log:  # steps that the checkpoint does not know will be done again
        text = "".join(json.dumps(line) + "\n" for line in lines[:step])
        on_rank_0(lambda: lm.write_atomically(log, lambda path: path.write_text(text)))
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    batch_level = stage != "sft" and s.objective in objectives.BATCH_LEVEL
    steps_per_epoch = count // s.batch_size
    total = epochs * steps_per_epoch
    warmup = max(1, round(s.warmup * total))

    def save() -> None:
        about = {"stage": stage, "step": step, "running": running}

        def write() -> None:
            if log:  # the lines of these steps reach the disk first
                with log.open("a") as file:
                    os.fsync(file.fileno())
            save_tensors(path, state | {"batches": batches}, about)

        on_rank_0(write)

    bar = tqdm(total=total, initial=step, desc=stage, unit="step", disable=rank > 0)
    with stop_signals() as stop_wanted, bar:
        while step < total:
            started = time.perf_counter()
            epoch, number = divmod(step, steps_per_epoch)
            if number == 0:
                batches = plan(epoch, model)
                started = time.perf_counter()  # a step's seconds are those of the step
            rows = batches[number].tolist()
            whole = None
            if batch_level:  # costs one more forward pass, over the whole batch
                everyone = [pairs[i] for i in rows]
                parts = data.scoring_batches(everyone, s.micro_batch_tokens, shared, rank, world)
                scores = lm.score_pairs(model, parts, [pair.source for pair in everyone]).to(device)
                whole = scores, torch.tensor(rows, device=device)

            # Every rank takes its share; DDP needs them all, so one without pairs takes a pair of weight 0.
            mine = rows[rank::world] or rows[:1]
            weight = 1 / len(rows) if rank < len(rows) else 0.0
            groups = data.micro_batches([pairs[i] for i in mine], s.micro_batch_tokens, shared)
            totals: Counter[str] = Counter()
            for group in groups:
                index = [mine[i] for i in group]
                micro_batch = data.collate([pairs[i] for i in index], shared) | {"index": torch.tensor(index)}
                micro_batch = lm.to_device(micro_batch, device)
                last = group is groups[-1]
                with nullcontext() if world == 1 or last else parallel.no_sync():
                    scores = lm.sequence_logps(parallel, micro_batch)  # [B, 2]
                    losses, stats = loss_of(scores, micro_batch["index"], whole, running)
                    (losses.sum() * weight * world).backward()  # DDP divides by world
                for key, value in ({"loss": losses} | stats).items():
                    totals[key] = totals[key] + value.detach().double().sum() * weight
            norm = nn.utils.clip_grad_norm_(weights.values(), s.max_grad_norm)

            stop = torch.tensor(float(len(stop_wanted)), device=device)
            sums = torch.stack([value.double() for value in (*totals.values(), stop)])
            if world > 1:
                dist.all_reduce(sums)
            # all that is logged in one transfer
            *sums, stop, norm = torch.cat([sums, norm.double()[None]]).tolist()
            values = dict(zip(totals, sums))
            if not (math.isfinite(values["loss"]) and math.isfinite(norm)):
                save()
                raise ValueError(
                    f"{stage} step {step + 1}: loss {values['loss']}, gradient norm {norm}. Nothing was "
                    f"updated; the state before this step is in {out / 'checkpoint'}. Lower lr, or look at "
                    f"this batch: {', '.join(pairs[i].source for i in rows)}"
                )
            # up to lr over the warm-up, then down to 0, linearly
            rate = lr * min((step + 1) / warmup, (total - step) / (total - warmup + 1))
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            if stats:
                values["margin_variance"] -= values["margin_mean"] ** 2
                running = 0.9 * running + 0.1 * (values["reward_chosen"] - values["reward_rejected"])
            line = {"step": step, "epoch": epoch + 1} | values | {"grad_norm": norm, "lr": rate}
            line |= {"tokens": sum(pairs[i].size for i in rows), "pairs": len(rows)}
            line["seconds"] = time.perf_counter() - started
            if log and rank == 0:
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            shown = [key for key in ("loss", "margin_mean", "accuracy") if key in values]
            bar.set_postfix({key: f"{values[key]:.3g}" for key in shown}, refresh=False)
            bar.update()
            if stop or (step % s.save_steps == 0 and step < total):
                save()
            if stop:
                raise SystemExit(f"stopped after {stage} step {step} of {total}: the same command goes on")


# ------------------------------------------------------------------------------------------------- run folder


class Run(NamedTuple):
    """What `prepare` finds: everything a run stands on, checked."""

    tokenizer: Any
    pairs: list[Pair]
    sft_pairs: list[Pair]
    identity: dict[str, str]
    donor: Path | None
    shared: bool
    product_weights: tuple[int, int]


def prepare(s: Settings, device: torch.device) -> Run:
    """Read, check and describe everything, and only then make the run folder. Raises ValueError."""
    if device.type == "cpu" and s.model != BUILTIN:  # compiling a kernel a shape pays for large products only
        lm.fast_products()
    if s.model == BUILTIN:
        tokenizer = lm.builtin_tokenizer(data.builtin_texts())
    else:
        tokenizer = lm.load_tokenizer(s.model, s.chat_template)
    splits, _, counts = data.load_splits(asdict(s), tokenizer)
    pairs, sft_pairs = splits["train"], [pair._replace(rejected=[]) for pair in splits["sft"]]
    if s.batch_size > min(len(pairs), len(sft_pairs) if s.sft_epochs else len(pairs)):
        raise ValueError(
            f"{len(pairs)} pairs to train on and {len(sft_pairs)} for SFT fill no batch of {s.batch_size}: "
            "give more data or a smaller --batch_size"
        )
    model = lm.load_model(s.model, s.seed).to(device)
    identity = {"data": data.fingerprint(pairs), "sft_data": data.fingerprint(splits["sft"])}
    identity |= {"model": lm.fingerprint(model), "objective": s.objective}
    donor = open_donor(s, identity)
    longest, positions = max(pairs + splits["sft"], key=lambda pair: pair.length), lm.positions(model)
    if longest.length > positions:
        raise ValueError(
            f"{longest.source}: {longest.length} tokens, the model has {positions} positions: "
            f"--max_length {positions}"
        )
    shared = lm.shares_prompt(model, *data.both_ways([longest]))
    open_run(s, identity)

    given = {key: value for key, value in asdict(s).items() if value is not None}
    say("settings: " + " ".join(f"{key}={value}" for key, value in given.items()))
    kind = "float32, bf16 autocast" if device.type == "cuda" else "float32"
    count = model.num_parameters()
    state = (4 if s.lora_rank else 16) * count / 2**30  # weights; and gradients and AdamW's two moments
    say(f"model: {type(model).__name__}, {count:,} parameters, {kind}, {state:.2g} GiB besides activations")
    parts = ", ".join(f"{len(part):,} to {use}" for use, part in splits.items())
    say(f"pairs: {data.listed(counts)}; {parts}")
    say(f"batches of {s.batch_size} pairs over {lm.rank_and_world()[1]} rank(s) on {device.type}")
    if not shared:
        say("two rows a pair, slower: this model's mask or positions do not let responses share a prompt")
    for pair in pairs[:3]:
        prompt, chosen, rejected = (tokenizer.decode(ids) for ids in pair[:3])
        say(f"--- {pair.source}, supervised between >>> and <<<\n{prompt}")
        say(f"  chosen   >>>{chosen}<<<\n  rejected >>>{rejected}<<<")
    return Run(tokenizer, pairs, sft_pairs, identity, donor, shared, lm.product_weights(model))


def open_donor(s: Settings, identity: dict[str, str]) -> Path | None:
    """The folder of --proxy. Raises ValueError unless it has the same base model and data, and a proxy that
    was trained as this run would train it, but for the seed."""
    if not s.proxy:
        return None
    donor = Path(s.proxy)
    if not (donor / "config.json").is_file():
        raise ValueError(f"--proxy {donor}: no run of train.py (no config.json)")
    keys = ["sft_epochs"]
    if s.sft_epochs or s.needs_proxy:
        keys += "batch_size warmup max_grad_norm".split()
    keys += ["sft_lr"] * bool(s.sft_epochs)
    if s.needs_proxy:
        keys += "beta label_smoothing simpo_gamma epochs lr lora_rank".split()
    theirs = evaluate.read_config(donor)
    if other := differences(theirs, identity | {key: getattr(s, key) for key in keys}):
        raise ValueError(f"--proxy {donor}: of another {other}")
    scores = load_scores(donor, identity)
    is_proxy = evaluate.is_plain(theirs["settings"]) and (donor / "policy").is_dir()
    if not scores or (s.needs_proxy and "proxy_chosen" not in scores and not is_proxy):
        raise ValueError(f"--proxy {donor}: no proxy margins, and no finished plain run, itself a proxy")
    return donor


def differences(config: dict[str, Any], ours: dict[str, Any]) -> str:
    """What the config.json of a run has otherwise; nothing: ""."""
    theirs = config["settings"] | config  # a fingerprint says more than the flag of its name
    return "; ".join(
        f"{key} {theirs.get(key)!r} there, {value!r} here"
        for key, value in ours.items()
        if theirs.get(key) != value
    )


def open_run(s: Settings, identity: dict[str, str]) -> None:
    """Make the run folder with its config.json, or check that it holds a run of the same settings."""
    out, settings = Path(s.output_dir), asdict(s)
    modules = {"torch": torch, "transformers": transformers}
    versions = {"python": platform.python_version()} | {key: m.__version__ for key, m in modules.items()}
    config = {"settings": settings, "versions": versions} | identity
    if (out / "config.json").is_file():
        free = "save_steps", "output_dir", "micro_batch_tokens"  # the result is the same, but for rounding
        ours = {key: value for key, value in (settings | identity).items() if key not in free}
        if other := differences(evaluate.read_config(out), ours):
            raise ValueError(
                f"{out} holds a run of another configuration ({other}): "
                "choose another --output_dir, or delete it"
            )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is no run folder: choose another --output_dir")
    barrier()  # every rank has looked before one writes
    on_rank_0(lambda: evaluate.write_json(out / "config.json", config))


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(about | {"checksum": checksum(tensors, about)}, sort_keys=True)
    lm.write_atomically(path, lambda unfinished: save_file(tensors, unfinished, metadata={"about": text}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What save_tensors wrote; nothing if there is no file, or, after saying so, if it is damaged."""
    if not path.is_file():
        return {}, {}
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            about = json.loads(file.metadata()["about"])
        if about.pop("checksum") != checksum(tensors, about):
            raise ValueError("its checksum is wrong")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        say(f"{path} is damaged ({error}): not used, made again")
        return {}, {}
    return tensors, about


def checksum(tensors: dict[str, Tensor], about: dict[str, Any]) -> int:
    crc = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.numpy(), zlib.crc32(f"{name} {tuple(tensor.shape)}".encode(), crc))
    return crc


def load_scores(run: Path, identity: dict[str, str]) -> dict[str, Tensor]:
    """The columns of margins.safetensors. Raises ValueError if they are of other data, model or objective."""
    scores, about = load_tensors(run / "margins.safetensors")
    if scores and about != identity:
        raise ValueError(f"{run / 'margins.safetensors'}: of other data, model or objective; delete it")
    return scores


def training_state(weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors that training changes, by name: the weights, and AdamW's moments, made here as it makes
    them."""
    state = {f"weight {name}": weight for name, weight in weights.items()}
    for name, weight in weights.items():
        moments = {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = moments | {"step": torch.zeros((), device=weight.device)}
        state |= {f"{key} {name}": moment for key, moment in optimizer.state[weight].items()}
    return state


def read_log(log: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, up to the first that is not the next step's."""
    lines = enumerate(evaluate.read_lines(log), 1)
    whole = takewhile(lambda at: isinstance(at[1], dict) and at[1].get("step") == at[0], lines)
    return [line for _, line in whole]


# ---------------------------------------------------------------------------------------------------- reports


def report_filter(out: Path, gamma: float, base: Tensor, proxy: Tensor, kept: Tensor, tau: float) -> None:
    """Write filter.json and say what was removed."""
    step1 = margin_decrease(base, proxy)
    step2 = (~step1).index_fill(0, kept, False)
    one, two = (step.nonzero().flatten().tolist() for step in (step1, step2))
    ratio = (len(one) + len(two)) / len(base)
    found = {"tau": tau, "gamma": gamma, "ratio": ratio, "kept": len(kept)}
    evaluate.write_json(out / "filter.json", found | {"removed_step1": one, "removed_step2": two})
    counts = f"step1 removed {len(one)}, step2 removed {len(two)} of {len(base)} pairs ({ratio:.2%})"
    say(f"filter: {counts}, tau {tau:.4g}, gamma {gamma:.4g}")


def report_batches(epoch: int, margins: Tensor, batches: Tensor) -> None:
    """Say how much of the largest possible margin variance the batches have, and random ones (Table 3)."""
    (n, m), count = batches.shape, batches.numel()
    bound = variance_bound(margins[batches.flatten()], m).clamp(min=1e-30)  # all margins may be equal
    share, random = (total_variance(margins, batches) / bound).item(), (1 - 1 / m) * count / max(1, count - 1)
    say(
        f"epoch {epoch + 1}: {n} batches with {share:.3%} of the largest possible margin variance "
        f"(random ones: {random:.1%} expected); {len(margins) - count} pairs sit out"
    )


def report_speed(
    log: Path, clock: Counter, run: Run, kept: Tensor, frozen: bool, device: torch.device
) -> None:
    """Say where the time of this start went, and how fast the policy was trained, over all starts."""
    total = sum(clock.values())
    parts = (f"{stage} {seconds:.0f} ({seconds / total:.0%})" for stage, seconds in clock.items())
    say(f"seconds: {', '.join(parts)}")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:  # in KiB, but in bytes on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if not (lines := read_log(log)):
        return
    tokens, pairs, seconds = (sum(line[key] for line in lines) for key in ("tokens", "pairs", "seconds"))
    trained = [run.pairs[i] for i in kept.tolist()]
    responses = sum(len(p.chosen) + len(p.rejected) for p in trained) / sum(p.size for p in trained)
    body, head = run.product_weights
    flops = (4 if frozen else 6) * tokens * (body + head * responses) / seconds / lm.rank_and_world()[1]
    possible = lm.product_speed(device)
    say(
        f"policy training: {pairs / seconds:.3g} pairs/s, {tokens / seconds:,.0f} tokens/s (a prompt counted "
        f"once), peak memory {peak / 2**30:.2f} GiB on rank 0, model FLOP utilisation {flops / possible:.0%} "
        f"of the {possible / 1e9:,.0f} GFLOP/s of a plain matrix product"
    )


# ---------------------------------------------------------------------------------------------------- process


def generator(*key: Any) -> torch.Generator:
    """A private generator: its numbers depend on the key, (seed, purpose, epoch), and on nothing before."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7]))


def say(text: str) -> None:
    if lm.rank_and_world()[0] == 0:
        tqdm.write(text)
        sys.stdout.flush()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def on_rank_0(act: Callable[[], Any]) -> None:
    """Do something once; all ranks go on when it is done."""
    if lm.rank_and_world()[0] == 0:
        act()
    barrier()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM or Ctrl-C comes; a second one acts as usual."""
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        seen.append(number)
        signal.signal(number, usual[number])

    usual = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if seen:  # after the last step had looked
        signal.raise_signal(seen[0])


def main() -> None:
    parser = HfArgumentParser(Settings, allow_abbrev=False, formatter_class=argparse.HelpFormatter)
    parser.description = Settings.__doc__
    parser.usage = "train.py [--flag value ...] or train.py settings.yaml"
    transformers.utils.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # for what stays in float32
    try:
        words = sys.argv[1:]
        if len(words) == 1 and words[0].endswith((".json", ".yaml", ".yml")):
            read = yaml.safe_load(Path(words[0]).read_text())  # JSON is YAML
            if not isinstance(read, dict):
                raise ValueError(f"{words[0]}: must hold flags and their values, as in lr: 1.0e-6")
            words = [f"--{key}={value}" for key, value in read.items() if value is not None]
        flags, unknown = parser.parse_known_args(words)
        if unknown:
            raise ValueError(f"unknown flag {' '.join(unknown)}; --help lists all")
        settings = Settings(**vars(flags))
        if "LOCAL_RANK" in os.environ:
            dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        rmo(settings, device)
    except (ValueError, OSError, SafetensorError, yaml.YAMLError) as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; the same command goes on from what is finished")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
