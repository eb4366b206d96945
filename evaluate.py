"""Who wins, by how much beyond length, and what happened to the margins.

    python evaluate.py runs/*                              one table, a row a run (means over seeds), from the held-out pairs
    python evaluate.py RUN --generate PROMPTS.json         outputs of the run's model and of its starting model
    python evaluate.py RUN --judge https://api.openai.com/v1 --judge_model gpt-4o     win rates of those outputs
    python evaluate.py MODEL ... --pairs PAIRS.jsonl       margins of any models on any pairs
    python evaluate.py RUN --table3 --figure3 batches.png  margin variance of the three ways to make batches

A judge is an OpenAI-compatible URL (key in OPENAI_API_KEY), a reward model's folder, a run (its implicit reward), or "true"
(the built-in task's reward). Outputs and judgements are files as AlpacaEval's, in RUN/evaluation/ or --out; what was
generated or paid for is stored as it comes, so that the same command goes on where it stopped.

Differs from AlpacaEval: 1) the length-controlled win rate has no instruction difficulty, no rows of gamed models and no
L1 penalty, and its standard error is a sampling error. 2) The judge's prompt is our own unless --judge_prompt is given.
3) The baseline is the model that training started from, as in the paper, not GPT-4.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, GenerationConfig
from transformers import LogitsProcessorList, TopPLogitsWarper

import data
from batching import high_variance_batches, low_variance_batches, random_batches, total_variance
from data import BUILTIN, HH_MARK, Pair
from loss import LENGTH_NORMALISED, REFERENCE_FREE
from model import load_model, load_tokenizer, score_pairs, shares_prompt, stage_folder

Item = tuple[
    str | list[dict[str, str]], str, str
]  # what a judge compares: prompt, baseline's output, model's output

# ----------------------------------------------------------------------------------------------------------- win rates


def _verdicts(preferences: list[float | None]) -> list[tuple[int, float]]:
    """(place, probability that the model wins) of each usable preference, by AlpacaEval's rules."""
    usable = [(i, 1.5 if p == 0 else float(p)) for i, p in enumerate(preferences) if p is not None]
    usable = [(i, p - 1) for i, p in usable if 1 <= p <= 2]
    if not usable:
        raise ValueError(
            f"none of {len(preferences)} preferences is a verdict (0, or 1 to 2): nothing to average"
        )
    return usable


def win_rate(preferences: list[float | None]) -> tuple[float, float]:
    """(percent, standard error) of AlpacaEval's win rate: the mean probability that the model beats the baseline.

    preferences: 1 = baseline wins .. 2 = model wins, 0 or 1.5 = draw; None, NaN and others are no verdict and left out.
    The standard error of a single verdict is NaN. Raises ValueError without any verdict.
    """
    p = torch.tensor([p for _, p in _verdicts(preferences)], dtype=torch.float64)
    error = p.std(correction=1).item() / len(p) ** 0.5 if len(p) > 1 else math.nan
    return 100 * p.mean().item(), 100 * error


def length_controlled_win_rate(
    preferences: list[float | None], model_lengths: list[int], baseline_lengths: list[int]
) -> tuple[float, float]:
    """(percent, standard error) of the win rate at equal lengths: alpaca_eval's `length_controlled_minimal`, unpenalised.

    P(model wins) = sigmoid(c + b tanh(d / std(d))), d = baseline's length - model's length in characters; fitted by maximum
    likelihood, LC = 100 sigmoid(c) (Dubois et al. 2024, arXiv 2404.04475, Eq. 2, without its instruction term). The error is
    the sandwich estimate of the sampling error; alpaca_eval's own is only the spread between instructions, 0 here. With equal
    lengths both are win_rate's. Verdicts that are all alike are fitted exactly by b = 0.
    """
    if not len(preferences) == len(model_lengths) == len(baseline_lengths):
        counts = len(preferences), len(model_lengths), len(baseline_lengths)
        raise ValueError("got {} preferences, {} model lengths and {} baseline lengths".format(*counts))
    places, p = zip(*_verdicts(preferences))
    p = torch.tensor(p, dtype=torch.float64)
    if (p == p[0]).all():
        return 100 * p[0].item(), 0.0 if len(p) > 1 else math.nan
    d = torch.tensor(baseline_lengths, dtype=torch.float64) - torch.tensor(model_lengths, dtype=torch.float64)
    tanh = (d / d.std(correction=1)).tanh()[list(places)]  # the spread is that of all rows, verdict or not
    x = torch.stack([torch.ones_like(p), tanh], 1)[:, : 2 if tanh.std() > 0 else 1]  # [n, k]
    n, k = x.shape
    ridge = torch.diag(torch.tensor([0.0, 1e-6], dtype=x.dtype))[
        :k, :k
    ]  # b stays finite where length separates wins

    def objective(beta: Tensor) -> Tensor:
        z = x @ beta
        return (F.softplus(z) - p * z).sum() + beta @ ridge @ beta / 2

    beta = x.new_zeros(k)
    for _ in range(100):  # Newton, halving a step that overshoots
        q = (x @ beta).sigmoid()
        hessian = x.T @ (x * (q * (1 - q))[:, None]) + ridge
        step = torch.linalg.solve(hessian, x.T @ (p - q) - ridge @ beta)
        while objective(beta + step) > objective(beta) and step.abs().max() > 1e-12:
            step = step / 2
        beta = beta + step
        if step.abs().max() < 1e-10:
            break
    q, win = (x @ beta).sigmoid(), beta[0].sigmoid()
    bread = torch.linalg.inv(x.T @ (x * (q * (1 - q))[:, None]) + ridge)
    meat = x.T @ (x * ((p - q) ** 2)[:, None]) * n / (n - k) if n > k else x.new_full((k, k), math.nan)
    error = (bread @ meat @ bread)[0, 0].clamp(min=0).sqrt() * win * (1 - win)
    return 100 * win.item(), 100 * error.item()


# ------------------------------------------------------------------------------------------------------------ generate


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    label: str = "",
) -> list[str]:
    """One response to each prompt of token ids (already templated), without special tokens.

    A response depends on (seed, prompt, how often the prompt came before), not on the batch it is in: greedy decoding of
    logits / temperature + Gumbel noise is exact sampling, and the noise has a generator of its own for each response.
    temperature 0: greedy. top_p: sample from the most probable tokens that together have this probability.
    """
    responses = stream(model, tokenizer, prompts, max_new_tokens, temperature, top_p, seed, batch_size, label)
    return [text for _, text in sorted(responses)]


@torch.no_grad()
def stream(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch_size: int,
    label: str = "",
    done: Container[int] = (),
) -> Iterator[tuple[int, str]]:
    """What generate does, as (place in prompts, response) while they come, long prompts first, leaving out those done."""
    if not (temperature >= 0 and 0 < top_p <= 1 and max_new_tokens >= 1 and batch_size >= 1):
        raise ValueError(
            f"cannot sample {max_new_tokens} tokens at temperature {temperature}, top_p {top_p}, batch {batch_size}"
        )
    device, counts, seeds = next(model.parameters()).device, {}, []
    for prompt in prompts:
        counts[tuple(prompt)] = counts.get(tuple(prompt), 0) + 1
        digest = hashlib.sha256(f"{seed} {list(prompt)} {counts[tuple(prompt)]}".encode()).digest()
        seeds.append(int.from_bytes(digest[:8]) >> 1)
    ends = _end_tokens(model, tokenizer)
    todo = sorted((i for i in range(len(prompts)) if i not in done), key=lambda i: -len(prompts[i]))
    # What the model's own settings add (a repetition penalty, say) would be sampling that nobody asked for.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with tqdm(total=len(prompts), initial=len(prompts) - len(todo), desc=label, disable=not label) as bar:
            for batch in (todo[k : k + batch_size] for k in range(0, len(todo), batch_size)):
                width = max(len(prompts[i]) for i in batch)
                padded = [[ends[0]] * (width - len(prompts[i])) + list(prompts[i]) for i in batch]
                ids = torch.tensor(padded, device=device)
                starts = torch.tensor([width - len(prompts[i]) for i in batch], device=device)
                output = model.generate(
                    input_ids=ids,
                    attention_mask=(torch.arange(width, device=device) >= starts[:, None]).long(),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=ends,
                    pad_token_id=ends[0],
                    logits_processor=_sampling([seeds[i] for i in batch], temperature, top_p),
                )
                for i, tokens in zip(batch, output[:, width:].tolist()):
                    end = next((k for k, token in enumerate(tokens) if token in ends), len(tokens))
                    yield i, tokenizer.decode(tokens[:end], skip_special_tokens=True)
                bar.update(len(batch))
    finally:
        model.generation_config = own


def _sampling(seeds: list[int], temperature: float, top_p: float) -> LogitsProcessorList:
    if temperature == 0:
        return LogitsProcessorList()
    generators = [
        torch.Generator().manual_seed(seed) for seed in seeds
    ]  # one a row; each token draws once more

    def noise(_: Tensor, logits: Tensor) -> Tensor:
        waits = [torch.empty(logits.shape[1]).exponential_(generator=generator) for generator in generators]
        return logits - torch.stack(waits).log().to(logits.device)  # -log(Exp(1)) is Gumbel noise

    nucleus = [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList([lambda _, logits: logits.float() / temperature, *nucleus, noise])


def _end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """What ends a response: the tokenizer's end token, the model's own, and what training supervised as the end of a turn."""
    own = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    if tokenizer.chat_template:
        answer = {
            "chosen": {"role": "assistant", "content": "a"},
            "rejected": {"role": "assistant", "content": "b"},
        }
        row = {"prompt": [{"role": "user", "content": "a"}], "source": "end of turn"} | answer
        ends.append(data.tokenize_preferences([row], tokenizer, 10**6)[0][0].chosen[-1])
    return list(dict.fromkeys(end for end in ends if end is not None))


# ---------------------------------------------------------------------------------------------------------------- runs


def is_run(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and "settings" in json.loads(path.read_text())


def open_run(folder: Path) -> tuple[dict[str, Any], Any, dict[str, Path | str]]:
    """A finished run's settings, tokenizer, and its models by label: the starting one (SFT or base), vanilla, RMO."""
    if not is_run(folder):
        raise ValueError(
            f"{folder}: no run (no config.json with settings); give a folder that train.py wrote"
        )
    if not (folder / "policy").is_dir():
        raise ValueError(f"{folder}: not finished (no policy/); start train.py again with the same command")
    s = json.loads((folder / "config.json").read_text())["settings"]
    vanilla, policy = f"vanilla {s['objective'].upper()}", folder / "policy"
    models = {"SFT": stage_folder(folder, "sft")} if s["sft_epochs"] else {"base": s["model"]}
    if s["batching"] == "random" and not s["lambda_reg"] and s["filter_ratio"] == 0 and s["tau"] is None:
        models |= {vanilla: policy}
    elif (folder / "proxy").is_dir() or s["proxy"]:
        models |= {vanilla: stage_folder(folder, "proxy"), "RMO": policy}
    else:
        models |= {"RMO": policy}
    return s, load_tokenizer(policy), models


def held_out(settings: dict[str, Any], tokenizer: Any) -> tuple[list[Pair], list[dict[str, Any]]]:
    """A run's held-out pairs, and for each the row of text it was made from."""
    splits, rows, _ = data.load_splits(settings, tokenizer)
    if settings["eval_data"]:
        rows = data.read_preferences(settings["eval_data"])
    elif settings["data"] == BUILTIN:
        rows = data.synthetic_preferences(data.BUILTIN_EVAL_PAIRS, settings["seed"], held_out=True)
    return splits["eval"], [rows[pair.row] for pair in splits["eval"]]


def response_scores(model: nn.Module, pairs: list[Pair], objective: str = "dpo", label: str = "") -> Tensor:
    """Scores of chosen and rejected as the objective defines them: sums of log-probabilities, or means, [N, 2]."""
    longest = [max(pairs, key=lambda pair: pair.size)]
    shared = shares_prompt(model, *(data.collate(longest, shared) for shared in (True, False)))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sums = score_pairs(model, data.scoring_batches(pairs, 2048, shared, rank, world), len(pairs), label)
    lengths = torch.tensor([(len(pair.chosen), len(pair.rejected)) for pair in pairs])
    return sums / lengths if objective in LENGTH_NORMALISED else sums


def margin_statistics(margins: Tensor, start: Tensor | None = None) -> dict[str, float]:
    """Of margins [N], in percent and nats; accuracy: the share above 0. start: the starting model's margins, which the
    implicit reward is relative to. Small: within a tenth of a standard deviation of 0, as tau = 14 is in the paper."""
    margins = margins.double()
    shares = {"accuracy %": margins > 0}
    if start is not None:
        shares["reward accuracy %"] = margins > start
    shares |= {"negative %": margins < 0, "small %": margins.abs() <= 0.1 * margins.std(unbiased=False)}
    values = {"mean": margins.mean(), "median": margins.median(), "variance": margins.var(unbiased=False)}
    return {key: 100 * share.double().mean().item() for key, share in shares.items()} | {
        key: value.item() for key, value in values.items()
    }


def report_run(folder: Path, device: Any) -> dict[str, dict[str, float]]:
    """Print one table on the held-out pairs of a finished run, a row a model, and return it: {label: {column: value}}.

    The built-in task adds what is true there: the reward of sampled responses, and how often it beats the starting model's.
    In a distributed run call it on every rank, as they share the scoring. Without held-out pairs: {}, after saying so.
    """
    s, tokenizer, models = open_run(folder)
    (pairs, rows), first = held_out(s, tokenizer), not dist.is_initialized() or dist.get_rank() == 0
    if not pairs:
        if first:
            print(
                f"{folder}: no held-out pairs, so no report; train with --eval_data FILE or --eval_share 0.1"
            )
        return {}
    report, kept, start, baseline = {}, {}, None, None
    prompts = {tuple(pair.prompt): text_of(row["prompt"]) for pair, row in zip(pairs, rows)}
    for label, name in models.items():
        model = load_model(name, s["seed"]).to(device).eval()
        chosen, rejected = response_scores(model, pairs, s["objective"]).unbind(1)
        report[label] = margin_statistics(chosen - rejected, start)
        kept[label] = (chosen - rejected).tolist()
        start = chosen - rejected if start is None else start
        if s["data"] == BUILTIN and not s["eval_data"]:
            responses = generate(model, tokenizer, list(prompts), 64, 1.0, seed=s["seed"], batch_size=64)
            rewards = [data.true_reward(*pair) for pair in zip(prompts.values(), responses)]
            report[label]["true reward"] = sum(rewards) / len(rewards)
            if baseline:
                verdicts = [1.5 + (a > b) / 2 - (a < b) / 2 for a, b in zip(rewards, baseline)]
                report[label]["win rate %"], report[label]["win rate error"] = win_rate(verdicts)
            baseline = baseline or rewards
    if first:
        print(
            f"{folder}: {len(pairs)} held-out pairs, margins in nats; rewards and wins are relative to {next(iter(models))}"
        )
        print(markdown([{"model": label} | row for label, row in report.items()]))
        remember(folder, report=report, margins=kept)
    return report


def batch_variances(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Table 3 and Figure 3: the run's training pairs in batches by each partition, [n, m], and their margins by the proxy
    (by the base model where there is none)."""
    path, s = folder / "margins.safetensors", open_run(folder)[0]
    if not path.is_file():
        raise ValueError(f"{path} is missing: give a finished run")
    scores, draw = load_file(path), torch.Generator().manual_seed(s["seed"])
    by = "proxy" if "proxy_chosen" in scores else "base"
    margins = scores[f"{by}_chosen"] - scores[f"{by}_rejected"]
    ways = {"Low-Var": low_variance_batches, "Rnd-Var": random_batches, "High-Var": high_variance_batches}
    return {name: way(margins, s["batch_size"], draw) for name, way in ways.items()}, margins


def table3(folders: list[Path]) -> list[dict[str, Any]]:
    """Mean variance of margins in a batch, in nats squared, and its share of the bound Var(all margins)."""
    rows = []
    for folder in folders:
        splits, margins = batch_variances(folder)
        row: dict[str, Any] = {"run": str(folder)}
        for name, batches in splits.items():
            row[name] = (total_variance(margins, batches) / len(batches)).item()
            row[f"{name} of bound %"] = 100 * row[name] / margins.double().var(unbiased=False).item()
        rows.append(row | {"High over Rnd %": 100 * (row["High-Var"] / row["Rnd-Var"] - 1)})
    return rows


def run_groups(folders: list[Path], device: Any) -> tuple[list[str], list[tuple[dict[str, Any], list[Path]]]]:
    """(settings that differ between the runs, [(their values, runs with them)]): runs in a group differ by seed at most."""
    settings = {folder: open_run(folder)[0] for folder in folders}
    free = {"seed", "output_dir", "proxy", "micro_batch_tokens", "save_steps"}
    keys = dict.fromkeys(key for s in settings.values() for key in s if key not in free)
    differing = [key for key in keys if len({json.dumps(s.get(key)) for s in settings.values()}) > 1]
    groups: dict[str, tuple[dict[str, Any], list[Path]]] = {}
    for folder, s in settings.items():
        values = {key: s.get(key) for key in differing}
        groups.setdefault(json.dumps(values), (values, []))[1].append(folder)
    return differing, list(groups.values())


def known(folder: Path, device: Any) -> dict[str, Any]:
    """What evaluation.json holds of a run; its report is made now if there is none."""
    if "report" not in remembered(folder):
        report_run(folder, device)
    return remembered(folder)


def run_table(folders: list[Path], device: Any) -> list[dict[str, Any]]:
    """A row for each group of run_groups: what differs, and the policy's results, means with standard errors over seeds."""
    rows = []
    for values, members in run_groups(folders, device)[1]:
        results = []
        for folder in members:
            found = known(folder, device)
            results.append(dict(list(found.get("report", {"": {}}).values())[-1]))
            for judge, verdict in found.get("judged", {}).items():
                results[-1] |= {
                    f"{judge}: {key}": verdict[key] for key in ("WR %", "WR error", "LC %", "LC error")
                }
        row = {"run": members[0].name, **values, "seeds": len(members)}
        for key in dict.fromkeys(key for result in results for key in result if not key.endswith(" error")):
            error = key.removesuffix(" %") + " error"
            numbers = torch.tensor([result[key] for result in results if key in result], dtype=torch.float64)
            row[key] = numbers.mean().item()
            if len(numbers) > 1:
                row[error] = numbers.std().item() / len(numbers) ** 0.5
            elif error in results[0]:
                row[error] = results[0][error]
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; "x error" stands behind "x" as plus-minus, and what a row does not have is a dash."""
    columns = [c for c in dict.fromkeys(c for row in rows for c in row) if not c.endswith(" error")]

    def number(value: Any, like: float, percent: bool) -> str:
        if value is None or isinstance(value, float) and math.isnan(value):
            return "-"
        if not isinstance(value, float):
            return str(value)
        return (
            f"{value:,.1f}"
            if percent or abs(like) >= 100
            else f"{value:.2f}"
            if abs(like) >= 0.1
            else f"{value:.3g}"
        )

    def cell(row: dict[str, Any], column: str) -> str:
        value, error = row.get(column), row.get(column.removesuffix(" %") + " error")
        text = number(value, value, column.endswith("%"))
        return (
            text
            if number(error, value, True) == "-"
            else f"{text} ± {number(error, value, column.endswith('%'))}"
        )

    lines = [columns, ["---"] * len(columns)] + [[cell(row, column) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def remembered(folder: Path) -> dict[str, Any]:
    """evaluation.json of a run, if it is about this training: metrics.jsonl holds wall times, so no other has the same."""
    run = hashlib.sha256(
        b"".join((folder / n).read_bytes() for n in ("config.json", "metrics.jsonl"))
    ).hexdigest()[:16]
    path = folder / "evaluation.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("run") == run else {"run": run}


def remember(folder: Path, **values: Any) -> None:
    write_json(folder / "evaluation.json", remembered(folder) | values)


def write_json(path: Path, value: Any) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(unfinished, path)
