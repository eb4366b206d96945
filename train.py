"""Train a language model with Reward Margin Optimization: Algorithm 2 of the paper, from top to bottom.

    python train.py                                       # built-in model and preferences, a few CPU minutes
    torchrun train.py --model MODEL --data PAIRS.jsonl    # one GPU
    torchrun --nproc_per_node 8 train.py --model MODEL --data PAIRS.jsonl    # eight, the same update

Plain DPO is `--batching random --filter_ratio 0 --lambda_reg 0`. Interrupted, the same command goes on.

Differs from the paper:
1) The reference of Eq. 4 is the base model, whose scores line 4 computes anyway; no second model is loaded.
2) The median of line 14 is that of the proxy's margins of all pairs, before the filter: one number a run.
3) tau, gamma and alpha default to about the paper's values, in standard deviations of the proxy's margins;
   lambda makes amplification 8 % as steep as the objective: about the paper's 2 for DPO at beta = 0.1.
4) Batches are made anew each epoch (line 9), by default from the proxy's margins, which costs nothing;
   --batch_margins policy scores the current policy, as Algorithm 1 has it.
5) N = n m in the paper; here a random remainder sits out each epoch.
6) The fifth of the data that the paper keeps for SFT is split off only where there is SFT.
7) With simpo, ipo and orpo a margin is a difference of means over tokens, wherever there is one.
"""

import argparse
import hashlib
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers
import yaml  # comes with transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

import data
import evaluate
import loss
import model as lm
from batching import high_variance_batches, low_variance_batches, random_batches
from data import BUILTIN, Pair
from filter import dual_denoising_filter, margin_decrease, tau_for_ratio

# (scores [B, 2], index of their pairs [B]) -> "loss" and what else is logged, [B] each
LossOf = Callable[[Tensor, list[int]], dict[str, Tensor]]
BatchesOf = Callable[[int, nn.Module], Tensor]  # (epoch, model) -> [n, m], indices of the pairs
Constants = dict[str, float]  # tau, gamma, alpha, ..., by name
PARTITIONS = {"high": high_variance_batches, "random": random_batches, "low": low_variance_batches}


def rmo(s: "Settings") -> Path:
    """Algorithm 2: returns the folder of the trained policy."""
    tokenizer, pairs, sft_pairs = prepare(s)

    # Experiment setup: SFT on the chosen responses of a disjoint fifth of the data makes the base model.
    base = s.sft_model or s.model
    if s.sft_epochs:
        random = random_plan(s, len(sft_pairs))
        base = fit("sft", s, base, tokenizer, sft_pairs, loss_of=sft_loss, batches_of=random)

    # Line 4: base and proxy margins. The base scores are the reference of Eq. 4 too.
    reference = scores_of("base", base, pairs, s)  # [N, 2]
    base_margins = reference[:, 0] - reference[:, 1]  # [N], Eq. 1
    proxy_margins = base_margins  # a stand-in: where no proxy is needed, only its length is used

    def proxy_loss(scores: Tensor, index: list[int]) -> dict[str, Tensor]:
        return objective(s, scores, reference[index])

    if s.needs_proxy:
        random = random_plan(s, len(pairs))
        proxy = s.proxy or fit("proxy", s, base, tokenizer, pairs, loss_of=proxy_loss, batches_of=random)
        proxy_scores = scores_of("proxy", proxy, pairs, s)  # [N, 2]
        proxy_margins = proxy_scores[:, 0] - proxy_scores[:, 1]  # [N], Eq. 1

    # The paper's constants are for margins with a standard deviation of about 142 (the root of Table 3's
    # Rnd-Var). Counted in standard deviations they fit other models and lengths.
    sd = proxy_margins.std(unbiased=False).item()
    if s.needs_proxy and sd == 0:
        raise ValueError("all proxy margins are equal: there is nothing to filter, batch or amplify by")
    tau = 0.1 * sd if s.tau is None else s.tau
    gamma = 0.01 * sd if s.gamma is None else s.gamma
    alpha = sd if s.alpha is None else s.alpha
    lambda_reg = default_lambda(s, reference, alpha) if s.lambda_reg is None else s.lambda_reg
    median = proxy_margins.double().quantile(0.5).item() if s.median is None else s.median  # line 14
    constants = {"lambda": lambda_reg}
    if s.needs_proxy:
        constants["sd"] = sd
    if lambda_reg != 0:
        constants.update({"alpha": alpha, "median": median})

    # Lines 5 and 6: Dual Denoising Filtering. From here on, pairs and tensors are those of D_final.
    if s.filtering:
        if s.filter_ratio:
            tau = tau_for_ratio(base_margins, proxy_margins, s.filter_ratio, gamma)
        constants.update({"tau": tau, "gamma": gamma})
        kept = dual_denoising_filter(base_margins, proxy_margins, tau, gamma, generator(s.seed, "filter"))
        kept = from_rank_0(kept)  # [K]
        report_filter(s, pairs, kept, margin_decrease(base_margins, proxy_margins), constants)
        pairs = [pairs[i] for i in kept.tolist()]
        reference = reference[kept]
        proxy_margins = proxy_margins[kept]

    # Lines 8 to 10: Batch Margin Diversification, anew for each epoch
    def rmo_batches(epoch: int, model: nn.Module) -> Tensor:
        margins = proxy_margins
        if s.batch_margins == "policy":
            scores = lm.score_pairs(model, pairs, s.micro_batch_tokens, s.length_normalised, "policy scores")
            margins = scores[:, 0] - scores[:, 1]
        return PARTITIONS[s.batching](margins, s.batch_size, generator(s.seed, "batches", epoch))  # [n, m]

    # Lines 12 to 17: training with Pairwise Margin Amplification
    def rmo_loss(scores: Tensor, index: list[int]) -> dict[str, Tensor]:
        logged = objective(s, scores, reference[index])  # line 13
        if lambda_reg != 0:
            margin = scores[:, 0] - scores[:, 1]  # Eq. 1, the policy's alone
            amplification = loss.margin_amplification(margin, median, alpha, lambda_reg)  # line 15, Eq. 14
            logged["loss"] = logged["loss"] + amplification  # line 16, Eq. 15
            logged["amplification"] = amplification
        return logged

    report_constants(s, constants, len(pairs))
    policy = fit("policy", s, base, tokenizer, pairs, loss_of=rmo_loss, batches_of=rmo_batches)
    on_rank_0(s.checkpoint.unlink, missing_ok=True)
    return policy


def objective(s: "Settings", scores: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """The plain loss of some pairs, as "loss", and what else is logged of them, [B] each.

    scores, reference: [B, 2], of chosen and rejected, by the policy and by the base model.
    """
    chosen, rejected = scores.unbind(1)
    reference = reference.to(scores.device, non_blocking=True)
    ref = reference.unbind(1)  # of chosen, of rejected
    if s.objective == "dpo":  # Eq. 4
        losses = loss.dpo_loss(chosen, rejected, *ref, beta=s.beta, label_smoothing=s.label_smoothing)
    elif s.objective == "ipo":
        losses = loss.ipo_loss(chosen, rejected, *ref, beta=s.beta)
    elif s.objective == "slic":
        losses = loss.slic_loss(chosen, rejected, *ref, beta=s.beta)
    elif s.objective == "simpo":
        losses = loss.simpo_loss(chosen, rejected, beta=s.beta, gamma=s.simpo_gamma)
    elif s.objective == "orpo":
        losses = loss.orpo_loss(chosen, rejected, beta=s.beta)
    margins = chosen - rejected  # Eq. 1
    reference_free = s.objective in loss.REFERENCE_FREE
    rewards = s.beta * (scores if reference_free else scores - reference)  # [B, 2]
    return {
        "loss": losses,
        "margin_mean": margins,  # fit takes the means of all these
        "margin_square": margins.double() ** 2,  # fit makes margin_variance of it
        "reward_accuracy": rewards[:, 0] > rewards[:, 1],
        "reward_chosen": rewards[:, 0],
        "reward_rejected": rewards[:, 1],
        "logps_chosen": chosen,
        "logps_rejected": rejected,
    }


def sft_loss(scores: Tensor, index: list[int]) -> dict[str, Tensor]:
    """The negative log-likelihood of each chosen response, [B]; fit divides by the tokens of the batch."""
    return {"loss": -scores[:, 0]}


def fit(
    stage: str,
    s: "Settings",
    start: str | Path,
    tokenizer: Any,
    pairs: list[Pair],
    *,
    loss_of: LossOf,
    batches_of: BatchesOf,
) -> Path:
    """The training loop of every stage: trains the model `start`, and returns the folder of the result.

    The update is that of the mean loss over the pairs of the global batch (SFT: over their response tokens),
    however ranks and micro-batches split it. A folder that is there is finished, and returned as it is.
    """
    folder = s.folder / stage
    if folder.exists():
        return folder
    rank, world = lm.rank_and_world()
    sft = stage == "sft"
    lr, epochs = (s.sft_lr, s.sft_epochs) if sft else (s.lr, s.epochs)
    model = lm.load_model(start, s.seed).to(lm.choose_device())
    if s.lora_rank:
        lm.add_lora(model, s.lora_rank, s.seed)
    if s.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train(s.gradient_checkpointing)  # which wants it; else off: some mixtures' routers then add noise
    one_row = lm.takes_one_row(model, pairs)
    frozen = lm.freeze_unreached(model, pairs)
    if frozen:
        say(f"{stage}: {frozen:,} weights that text does not reach stay as they are")
    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    first, batches = load_checkpoint(s, stage, model, optimizer)
    if stage == "policy":  # lines of later steps are written again
        on_rank_0(data.keep_lines, s.folder / "metrics.jsonl", first)
    steps_per_epoch = len(pairs) // s.batch_size
    total = epochs * steps_per_epoch
    warmup = max(1, round(s.warmup * total))

    bar = tqdm(range(first, total), stage, total, initial=first, unit="step", disable=rank > 0)
    for step in bar:  # lines 8 and 12, epochs and batches, in one loop that can be entered anywhere
        started = time.perf_counter()
        epoch, number = divmod(step, steps_per_epoch)
        if number == 0:
            batches = from_rank_0(batches_of(epoch, model))  # [n, m]
        drawn = batches[number].tolist()  # the pairs of the global batch

        # Learning rate: up to lr over the warm-up, then down towards 0, linearly
        up = (step + 1) / warmup
        down = (total - step) / (total - warmup + 1)  # both are 1 at the last step of the warm-up
        rate = lr * min(up, down)
        optimizer.param_groups[0]["lr"] = rate

        # Each rank takes every world-th pair. DDP needs all ranks in each backward pass, so a rank without a
        # pair of its own takes the first, with a share of 0.
        mine = drawn[rank::world] or drawn[:1]
        count = sum(len(pairs[i].chosen) for i in drawn) if sft else len(drawn)
        share = 1 / count if rank < len(drawn) else 0.0  # of one pair (SFT: one token) in the mean

        # Micro-batches of similar lengths
        sums: dict[str, Tensor] = {}
        groups = data.micro_batches([pairs[i] for i in mine], s.micro_batch_tokens, one_row)
        for group in groups:
            index = [mine[i] for i in group]
            batch = data.collate([pairs[i] for i in index], one_row)
            parallel.require_backward_grad_sync = group is groups[-1]  # DDP adds up gradients once a step
            scores = lm.sequence_logps(parallel, batch, mean=s.length_normalised and not sft)  # [B, 2]
            logged = loss_of(scores, index)
            (logged["loss"].sum() * share * world).backward()  # DDP divides by world
            for name, values in logged.items():
                sums[name] = sums.get(name, 0) + values.detach().double().sum() * share

        # Clipping
        norm = nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm)

        # Reduction of all that is logged, in one transfer
        sums["grad_norm"] = norm.double() / world
        reduced = torch.stack(list(sums.values()))
        if world > 1:
            dist.all_reduce(reduced)
        means = dict(zip(sums, reduced.tolist()))
        if not math.isfinite(means["loss"] + means["grad_norm"]):
            seen = f"loss {means['loss']}, gradient norm {means['grad_norm']}; nothing was updated"
            sources = ", ".join(pairs[i].source for i in drawn)
            raise ValueError(f"{stage} step {step + 1}: {seen}. Look at these pairs, or at --lr: {sources}")

        # Update
        optimizer.step()
        optimizer.zero_grad(set_to_none=world == 1)  # DDP's gradients stay in its buckets, once in memory

        # Log
        if stage == "policy" and rank == 0:
            means["margin_variance"] = means.pop("margin_square") - means["margin_mean"] ** 2
            sizes = {"pairs": len(drawn), "tokens": sum(pairs[i].size for i in drawn)}
            line = {"step": step + 1, "epoch": epoch + 1, **means, "lr": rate, **sizes}
            line["seconds"] = time.perf_counter() - started
            data.append_line(s.folder / "metrics.jsonl", line)
        bar.set_postfix(loss=f"{means['loss']:.3g}", refresh=False)

        # Checkpoint
        if (step + 1) % s.save_steps == 0 and step + 1 < total:
            save_checkpoint(s, stage, step + 1, batches, model, optimizer)

    lm.merge_lora(model)
    on_rank_0(lm.save_model, model, tokenizer, folder)
    return folder


def random_plan(s: "Settings", count: int) -> BatchesOf:
    """Random batches of so many pairs, anew for each epoch: those of plain training."""

    def batches_of(epoch: int, model: nn.Module) -> Tensor:
        return random_batches(torch.zeros(count), s.batch_size, generator(s.seed, "batches", epoch))

    return batches_of


def default_lambda(s: "Settings", reference: Tensor, alpha: float) -> float:
    """The lambda at which Eq. 14 is, at the median, 8 % as steep as the objective is on average at the start.

    For DPO that is 0.16 alpha beta: the paper's 2 at its alpha of 125 and the authors' beta of 0.1.
    """
    scores = reference.clone().requires_grad_()  # [N, 2]
    losses = objective(s, scores, reference)["loss"]
    (slopes,) = torch.autograd.grad(losses.sum(), scores)
    # A margin grows by 1 where chosen rises by 1/2 and rejected falls by 1/2.
    fall = (slopes[:, 1] - slopes[:, 0]) / 2  # -dloss/dmargin, [N]
    return 0.08 * fall.mean().item() * (4 * alpha)  # sigmoid(x / alpha) has the slope 1 / (4 alpha) at 0


def generator(*key: Any) -> torch.Generator:
    """A private generator: its numbers depend on the key, (seed, purpose, epoch), and on nothing before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


# ------------------------------------------------------------------------------------------------ settings


def flag(default: Any, help: str) -> Any:
    """A field whose --help ends with its default, unless that is None: then the text states it."""
    text = help if default is None else f"{help} (default: %(default)s)"
    return HfArg(default=default, help=text)


@dataclass
class Settings:
    """Reward Margin Optimization. The flags may also stand in a .json or .yaml file: train.py settings.yaml.
    Margins, and what is compared with them, are in nats, or nats a token for ipo, simpo and orpo; sd is the
    standard deviation of the proxy's margins."""

    # Data
    data: list[str] | None = flag(None, "pairs: files or 'owner/name:path' on the hub (default: built-in)")
    limit: int | None = flag(None, "a random so many of the usable pairs of --data, drawn by seed")
    single_turn: bool = flag(False, "only pairs whose prompt is one user message")
    eval_data: list[str] | None = flag(None, "held-out pairs, in the same forms")
    eval_share: float = flag(0.0, "or this share, 0 to 0.9, of the prompts of --data, drawn by seed")
    chat: Literal["auto", "always", "never"] = flag(
        "auto", "template for messages (auto), for strings too, or never"
    )
    chat_template: str | None = flag(None, "file with a Jinja chat template, for a tokenizer that has none")
    max_length: int = flag(1024, "tokens of a prompt and one response; what is more is cut off")
    max_prompt_length: int | None = flag(None, "tokens of a prompt (default: what is left, at least half)")
    # Experiment setup: the model, and SFT
    model: str = flag(BUILTIN, "folder or hub id of a causal LM; 'built-in' makes a tiny one")
    lora_rank: int = flag(0, "LoRA of this rank on all nn.Linear but the head, 0 = train all weights")
    sft_model: str | None = flag(None, "model to use instead of training SFT; data is split all the same")
    sft_epochs: int | None = flag(None, "epochs of SFT on a fifth of the data (default: 15 built-in, else 0)")
    sft_lr: float | None = flag(None, "peak lr of SFT (default: 3e-3 built-in, 5e-5 LoRA, else 2e-5)")
    # Eq. 4: the objective that RMO is added to
    objective: Literal["dpo", "ipo", "simpo", "orpo", "slic"] = flag("dpo", "the loss that RMO is added to")
    beta: float | None = flag(None, "temperature (default: 2 for simpo, else 0.1; built-in 1 for sums)")
    label_smoothing: float = flag(0.0, "dpo only: share of labels taken to be wrong, 0 to 0.5")
    simpo_gamma: float | None = flag(None, "simpo only: target reward margin (default: 1)")
    # Line 4: the proxy
    proxy: str | None = flag(None, "model to use instead of training a proxy: a plain run's policy")
    # Lines 5 and 6: Dual Denoising Filtering
    filter_ratio: float | None = flag(None, "share of pairs that both steps remove; sets tau; 0 = none")
    tau: float | None = flag(None, "or Eq. 8's threshold on |proxy margin| (default: 0.1 sd)")
    gamma: float | None = flag(None, "Eq. 8: width of the soft threshold (default: 0.01 sd)")
    # Lines 8 to 10: Batch Margin Diversification
    batching: Literal["high", "random", "low"] = flag("high", "margin variance in a batch; high: Algorithm 1")
    batch_margins: Literal["proxy", "policy"] = flag("proxy", "whose margins; policy: scored anew each epoch")
    # Lines 14 and 15: Pairwise Margin Amplification
    lambda_reg: float | None = flag(
        None, "Eq. 14's lambda, 0 = none (default: as steep as 0.16 alpha beta is for dpo)"
    )
    alpha: float | None = flag(None, "Eq. 14's width (default: 1 sd)")
    median: float | None = flag(None, "Eq. 14's median (default: that of the proxy's margins)")
    # Line 16: training of proxy and policy
    epochs: int = flag(3, "epochs of proxy and of policy training")
    batch_size: int = flag(16, "pairs in a global batch, over all ranks")
    lr: float | None = flag(None, "peak learning rate (default: 2e-4 built-in, 5e-5 LoRA, else 1e-6)")
    warmup: float = flag(0.1, "share of the steps in which lr rises; then it falls to 0; both linearly")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    micro_batch_tokens: int | None = flag(
        None, "in a micro-batch, with padding (default: CUDA 16384, CPU 384, built-in 2048)"
    )
    gradient_checkpointing: bool = flag(False, "keep no activations: less memory, a third more time")
    # The run
    seed: int = flag(0, "of data splits, filter draw, batches and initial weights")
    output_dir: str = flag("runs/rmo", "the run folder; the same command goes on where it stopped")
    save_steps: int = flag(100, "optimizer steps between checkpoints, each of 12 bytes a trained parameter")

    def __post_init__(self) -> None:
        """Refuse what cannot be, then fill in the defaults that depend on other flags. Raises ValueError."""
        if self.tau is not None and self.filter_ratio is not None:
            raise ValueError("--tau and --filter_ratio both set the filter: give one of them")
        if self.gamma is not None and self.filter_ratio == 0:
            raise ValueError("--gamma is for a filter, and --filter_ratio 0 is none: leave one out")
        if self.lambda_reg == 0 and (self.alpha is not None or self.median is not None):
            raise ValueError("--alpha and --median are for Eq. 14, which --lambda_reg 0 switches off")
        if self.eval_share and (self.eval_data or self.data is None):
            raise ValueError("--eval_share: --eval_data, or the built-in task, gives held-out pairs already")
        if self.label_smoothing and self.objective != "dpo":
            raise ValueError("--label_smoothing is for --objective dpo")
        if self.simpo_gamma is not None and self.objective != "simpo":
            raise ValueError("--simpo_gamma is for --objective simpo")
        if self.chat_template and self.model == BUILTIN:
            raise ValueError("--chat_template: the built-in model has one of its own: leave it out")
        if self.batching == "random" and self.batch_margins == "policy":
            raise ValueError("--batching random uses no margins: leave out --batch_margins")
        if self.sft_model and self.sft_epochs:
            raise ValueError("--sft_model is used instead of training SFT: leave out --sft_epochs")
        if self.sft_lr is not None and self.sft_epochs is None and (self.sft_model or self.model != BUILTIN):
            raise ValueError("--sft_lr is for SFT, and there is none: give --sft_epochs, or leave it out")
        most = sys.float_info.max  # infinity and NaN are out of every range
        ranges = {
            (1e-12, most): ["beta", "gamma", "alpha", "max_grad_norm"],
            (1, most): ["limit", "epochs", "batch_size", "micro_batch_tokens", "save_steps"],
            (0, most): ["lambda_reg", "sft_epochs", "sft_lr", "lr", "lora_rank", "seed"],
            (-most, most): ["tau", "median", "simpo_gamma"],
            (0, 0.9): ["eval_share"],
            (0, 0.499): ["label_smoothing"],
            (0, 0.999): ["filter_ratio"],
            (0, 1): ["warmup"],
        }
        for (low, high), names in ranges.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    raise ValueError(f"--{name} {value} is out of range: {low:g} to {high:g}")

        self.length_normalised = self.objective in loss.LENGTH_NORMALISED
        defaults = {"data": [BUILTIN], "beta": 0.1, "sft_epochs": 0, "sft_lr": 2e-5, "lr": 1e-6}
        defaults["micro_batch_tokens"] = 384
        if self.lora_rank:
            defaults.update(sft_lr=5e-5, lr=5e-5)
        if self.model == BUILTIN:
            defaults.update(sft_lr=3e-3, lr=2e-4, micro_batch_tokens=2048)
            if not self.length_normalised:
                defaults["beta"] = 1.0
            if not self.sft_model:
                defaults["sft_epochs"] = 15
        if self.objective == "simpo":
            defaults.update(beta=2.0, simpo_gamma=1.0)
        if torch.cuda.is_available():
            defaults["micro_batch_tokens"] = 16384
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

        for_constants = self.lambda_reg != 0 and (self.median is None or self.alpha is None)
        for_batches = self.batching != "random" and self.batch_margins == "proxy"
        self.filtering = self.tau is not None or self.filter_ratio != 0
        self.needs_proxy = self.filtering or for_constants or for_batches
        if self.proxy and not self.needs_proxy:
            raise ValueError("--proxy: nothing here uses a proxy's margins: leave it out")
        self.folder = Path(self.output_dir)
        self.checkpoint = self.folder / "checkpoint.safetensors"


# ---------------------------------------------------------------------------------------------- run folder


def prepare(s: Settings) -> tuple[Any, list[Pair], list[Pair]]:
    """Read, check and describe everything, and only then make the run folder: tokenizer, pairs, SFT pairs."""
    if s.model == BUILTIN:
        torch.set_num_threads(1)  # on tiny products, threads wait for each other
        tokenizer = lm.builtin_tokenizer(data.builtin_texts())
    else:
        lm.fast_products()
        tokenizer = lm.load_tokenizer(s.model, s.chat_template)
    for name in (s.sft_model, s.proxy):
        if name and lm.load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"{name} has another vocabulary than {s.model}: give a model trained from it")
    say("settings: " + " ".join(f"{key}={value}" for key, value in asdict(s).items() if value is not None))

    splits = data.load_splits(asdict(s), tokenizer)
    pairs = splits.train
    sft_pairs = [pair._replace(rejected=[]) for pair in splits.sft]
    counts = f"{len(pairs):,} pairs to train on, {len(sft_pairs):,} for SFT, {len(splits.held_out):,} to test"
    say(f"pairs: {data.describe(splits.counts)}; {counts}")
    for pair in pairs[:3]:
        say(data.show(pair, tokenizer))
    if s.batch_size > len(pairs) or (s.sft_epochs and s.batch_size > len(sft_pairs)):
        raise ValueError(f"{counts}: no batch of {s.batch_size}; give more data, or a smaller --batch_size")
    if s.eval_share and not splits.held_out:
        raise ValueError(f"{counts}: raise --eval_share, {s.eval_share} of so few prompts is none")

    chosen = sum(len(pair.chosen) for pair in pairs) / len(pairs)
    rejected = sum(len(pair.rejected) for pair in pairs) / len(pairs)
    say(f"lengths: chosen responses have {chosen:.1f} tokens on average, rejected ones {rejected:.1f}")

    model = lm.load_model(s.sft_model or s.model, s.seed).to(lm.choose_device())
    lm.check_pairs(model, splits.everything)
    description = f"model: {type(model).__name__}, {model.num_parameters():,} parameters"
    if s.lora_rank:
        share = lm.add_lora(model, s.lora_rank, s.seed)
        description += f", {share:.0%} of them in layers with LoRA"
    # float32: the weights; and of those that are trained their gradients and AdamW's two moments
    trained = model.num_parameters(only_trainable=True)
    say(f"{description}; {(4 * model.num_parameters() + 12 * trained) / 2**30:.2g} GiB besides activations")
    if not lm.takes_one_row(model, pairs):
        say("two rows a pair, slower: this model's mask or positions do not let responses share a prompt")
    open_run(s, data.fingerprint(splits.everything))
    return tokenizer, pairs, sft_pairs


def is_finished(s: Settings) -> bool:
    """Whether the run folder is complete. Raises ValueError if it is of other settings, or no run folder."""
    path = s.folder / "config.json"
    if not path.is_file():
        if s.folder.exists() and any(file.suffix != ".unfinished" for file in s.folder.iterdir()):
            raise ValueError(f"{s.folder} exists and is no run folder: choose another --output_dir")
        return False
    config = data.read_json(path)
    if not isinstance(config, dict) or "settings" not in config:
        raise ValueError(f"{path} holds no settings of a run: restore it, or delete the folder")
    free = ("output_dir", "save_steps", "micro_batch_tokens")  # the result is the same, but for rounding
    for key, value in asdict(s).items():
        theirs = config["settings"].get(key)
        if theirs != value and key not in free:
            other = f"{s.folder} holds a run with --{key} {theirs}, not {value}"
            raise ValueError(f"{other}: choose another --output_dir")
    return (s.folder / "policy").is_dir() and not s.checkpoint.exists()


def open_run(s: Settings, fingerprint: str) -> None:
    """Make the run folder with its config.json, or check that its data and the models it was given are these.
    Raises ValueError."""
    path = s.folder / "config.json"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    ours = {"settings": asdict(s), "constants": {}, "versions": versions, "data": fingerprint}
    ours["models"] = [lm.weights_fingerprint(name) for name in (s.sft_model or s.model, s.proxy) if name]
    config = data.read_json(path, ours)
    for what in ("data", "models"):
        if config.get(what) != ours[what]:
            raise ValueError(f"{s.folder} holds a run on other {what}: choose another --output_dir")
    for name in (s.sft_model, s.proxy):
        theirs = data.read_json(Path(name).parent / "config.json", {}) if name else {}
        if theirs.get("data", fingerprint) != fingerprint:
            say(f"WARNING: {name} was trained on other pairs or splits, perhaps on what is held out here")
    on_rank_0(data.write_json, path, config)
    if not path.is_file():
        raise ValueError(f"{path}: written by rank 0, not seen here: all nodes must share the run folder")


def scores_of(stage: str, name: str | Path, pairs: list[Pair], s: Settings) -> Tensor:
    """Scores of chosen and rejected by the model of this name, [N, 2]; kept in margins.safetensors."""
    path = s.folder / "margins.safetensors"
    columns = load_file(path) if path.is_file() else {}
    keys = (f"{stage}_chosen", f"{stage}_rejected")
    if keys[0] not in columns:
        model = lm.load_model(name, s.seed).to(lm.choose_device())
        scores = lm.score_pairs(model, pairs, s.micro_batch_tokens, s.length_normalised, f"{stage} scores")
        columns.update(zip(keys, scores.T.contiguous()))
        on_rank_0(data.write_whole, path, lambda unfinished: save_file(columns, unfinished))
    return torch.stack([columns[key] for key in keys], dim=1)


def save_checkpoint(
    s: Settings, stage: str, step: int, batches: Tensor, model: nn.Module, optimizer: AdamW
) -> None:
    """Write the state of training after so many steps: the epoch's batches, weights and AdamW's state."""
    state = {"batches": batches}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            state[f"weight {name}"] = weight.detach()
            for moment, value in optimizer.state[weight].items():  # step, exp_avg, exp_avg_sq
                state[f"{moment} {name}"] = value
    about = {"stage": stage, "step": str(step)}

    def write() -> None:
        with (s.folder / "metrics.jsonl").open("a") as log:
            os.fsync(log.fileno())  # the lines of these steps reach the disk first
        data.write_whole(s.checkpoint, lambda unfinished: save_file(state, unfinished, about))

    on_rank_0(write)


def load_checkpoint(s: Settings, stage: str, model: nn.Module, optimizer: AdamW) -> tuple[int, Tensor | None]:
    """Put back what save_checkpoint wrote of this stage, if it did: the steps done, the epoch's batches."""
    if not s.checkpoint.is_file():
        return 0, None
    with safe_open(s.checkpoint, "pt") as file:  # reads tensor by tensor
        about = file.metadata()
        if about["stage"] != stage:
            return 0, None
        for key in file.keys():
            if key != "batches":
                kind, name = key.split(" ")
                weight = model.get_parameter(name)
                if kind == "weight":
                    weight.data.copy_(file.get_tensor(key))
                else:
                    optimizer.state[weight][kind] = file.get_tensor(key).to(weight.device, copy=True)
        say(f"{stage}: going on from step {about['step']}")
        return int(about["step"]), file.get_tensor("batches")


def report_filter(s: Settings, pairs: list[Pair], kept: Tensor, step1: Tensor, constants: Constants) -> None:
    """Write filter.json, and say how many pairs each step removed. Raises ValueError if too few are left."""
    step2 = torch.ones(len(pairs), dtype=torch.bool).index_fill(0, kept, False) & ~step1
    first = [pairs[i].source for i in step1.nonzero().flatten().tolist()]
    second = [pairs[i].source for i in step2.nonzero().flatten().tolist()]
    ratio = 1 - len(kept) / len(pairs)
    results = {**constants, "ratio": ratio, "kept": len(kept)}
    results.update({"removed_step1": first, "removed_step2": second})
    on_rank_0(data.write_json, s.folder / "filter.json", results)
    say(f"filter: step 1 removed {len(first)}, step 2 {len(second)} of {len(pairs)} pairs ({ratio:.2%})")
    if len(kept) < s.batch_size:
        raise ValueError(f"the filter left {len(kept)} pairs, no batch of {s.batch_size}: filter less")


def report_constants(s: Settings, constants: Constants, count: int) -> None:
    """Add the constants to config.json, and say them, and how many pairs there are to make batches of."""
    path = s.folder / "config.json"
    on_rank_0(data.write_json, path, {**data.read_json(path), "constants": constants})
    say("constants: " + ", ".join(f"{name} {value:.4g}" for name, value in constants.items()))
    say(f"batches of {s.batch_size} from {count} pairs; {count % s.batch_size} of them sit out each epoch")


def report_speed(s: Settings) -> None:
    """Say how fast the policy was trained, over all starts, and how much memory this process took."""
    lines = data.read_lines(s.folder / "metrics.jsonl")
    seconds = sum(line["seconds"] for line in lines)
    pairs = sum(line["pairs"] for line in lines) / seconds
    tokens = sum(line["tokens"] for line in lines) / seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    memory = f"this process: peak memory {peak / 2**30:.2f} GiB"
    say(f"policy training: {pairs:.3g} pairs/s, {tokens:,.0f} tokens/s (a prompt counted once); {memory}")


# ------------------------------------------------------------------------------------------------- process


def say(text: str) -> None:
    if lm.rank_and_world()[0] == 0:
        tqdm.write(text)


def on_rank_0(act: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Call this once, when all ranks are here; they go on when it is done."""
    if dist.is_initialized():
        dist.barrier()
    if lm.rank_and_world()[0] == 0:
        act(*args, **options)
    if dist.is_initialized():
        dist.barrier()


def from_rank_0(tensor: Tensor) -> Tensor:
    """Rank 0's tensor, on every rank: float64 sums on different processors may differ in the last bit."""
    box = [tensor]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def stop_at_ctrl_c() -> None:
    """Ctrl-C ends the process at once, in the middle of a step too: files appear whole or not at all."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGINT, lambda number, frame: None)  # Python's own waits for the running operation
    signal.set_wakeup_fd(writer)  # is written to at once, whichever thread gets the signal

    def wait() -> None:
        os.read(reader, 1)
        say("\ntrain.py: stopped; the same command goes on from what is finished")
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    parser = HfArgumentParser(Settings, allow_abbrev=False, formatter_class=argparse.HelpFormatter)
    parser.description = Settings.__doc__
    parser.usage = "train.py [--flag value ...] or train.py settings.yaml"
    stop_at_ctrl_c()
    device = lm.choose_device()
    try:
        words = sys.argv[1:]
        if words and not words[0].startswith("-") and words[0].endswith((".json", ".yaml", ".yml")):
            if len(words) > 1:
                raise ValueError(f"{words[0]} stands alone: write the other flags into it")
            words = words_of(Path(words[0]))
        (s,) = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
        if "LOCAL_RANK" in os.environ:
            timeout = timedelta(hours=2)  # a large model takes long to write
            backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
            dist.init_process_group(backend, timeout=timeout, device_id=gpu)
        if is_finished(s):
            say(f"{s.output_dir} is finished: nothing is trained")
        else:
            rmo(s)
            report_speed(s)
        evaluate.report_run(s.folder)
        if dist.is_initialized():  # not after an error: it would wait for the other ranks
            dist.destroy_process_group()
    except (ValueError, OSError, SafetensorError, yaml.YAMLError) as error:
        sys.exit(f"train.py: error: {error}")
    except torch.OutOfMemoryError as error:
        remedy = "lower --micro_batch_tokens, or give --gradient_checkpointing or --lora_rank"
        sys.exit(f"train.py: error: {error} -- {remedy}")


def words_of(path: Path) -> list[str]:
    """The command line for the flags in a file. Raises ValueError if it holds none."""
    flags = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    if not isinstance(flags, dict):
        raise ValueError(f"{path}: must hold a line 'flag: value' for each flag")
    words = []
    for name, value in flags.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


if __name__ == "__main__":
    main()
