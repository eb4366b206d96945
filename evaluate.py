"""Who wins, by how much beyond length, and what happened to the margins.

    python evaluate.py report RUN...                   who won, held-out margins, what the filter removed
    python evaluate.py generate RUN                    outputs of its policy, and of the model it started from
    python evaluate.py judge RUN --url URL             how often a judge prefers the policy's
    python evaluate.py margins MODEL... --pairs FILE   margins of any models on any pairs
    python evaluate.py figures RUN... --out FOLDER     the paper's figures that these runs can give

Outputs and judgements are AlpacaEval's files, in RUN/evaluation/. Differs from AlpacaEval:
1) The rate at equal lengths is alpaca_eval's length_controlled_minimal without the L1 penalty: it knows no
   difficulty of instructions and no gamed models. Its standard error is one of sampling.
2) The judge's prompt is our own wording; --judge_prompt FILE gives another, such as AlpacaEval's.
3) The baseline is the model that training started from: the SFT model, or the base where there is no SFT.
To borrow: the section "win rates" needs torch only.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from itertools import combinations
from operator import attrgetter
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import batching
import data
import model as lm
from loss import LENGTH_NORMALISED, REFERENCE_FREE

# -------------------------------------------------------------------------------------------------- win rates


class Estimate(NamedTuple):
    """A number and its standard error, which is NaN where it is not known."""

    value: float
    error: float = math.nan

    def __str__(self) -> str:
        """As tables show it: with its error, to about three digits; a dash for what is not known."""
        digits = 1 + sum(abs(self.value) < limit for limit in (10, 1, 0.1))
        error = "" if math.isnan(self.error) else f" ± {self.error:,.{digits}f}"
        return "-" if math.isnan(self.value) else f"{self.value:,.{digits}f}{error}"


def mean_of(values: Any) -> Estimate:
    """The mean of numbers with its standard error; NaN of none."""
    values = torch.as_tensor(values, dtype=torch.float64)
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), error)


def win_rate(preferences: list[float | None]) -> Estimate:
    """AlpacaEval's win rate, in percent: the mean probability that the model wins.

    preferences: 1 = baseline wins .. 2 = model wins, 0 or 1.5 = draw; None, NaN and others are no verdict and
    left out. The standard error of a single verdict is NaN. Raises ValueError without any verdict.
    """
    return mean_of(100 * _wins(preferences)[1])


def _wins(preferences: list[float | None]) -> tuple[list[int], Tensor]:
    """Places of the verdicts, by AlpacaEval's rules, and the probability that the model wins at each."""
    places = [i for i, p in enumerate(preferences) if p is not None and (p == 0 or 1 <= p <= 2)]
    if not places:
        raise ValueError(f"none of {len(preferences)} preferences is a verdict (0, or from 1 to 2)")
    return places, torch.tensor([(preferences[i] or 1.5) - 1 for i in places], dtype=torch.float64)


def length_controlled_win_rate(
    preferences: list[float | None], model_lengths: list[int], baseline_lengths: list[int]
) -> Estimate:
    """The win rate at equal lengths, in percent; lengths are in characters.

    P(model wins) = sigmoid(c + b tanh(d / std(d))), d = baseline's length - model's length, fitted by maximum
    likelihood; the rate is 100 sigmoid(c) (Dubois et al. 2024, arXiv 2404.04475, Eq. 2 without its term for
    the instruction), the error the sandwich estimate. With equal lengths both are win_rate's; verdicts that
    are all alike are fitted exactly, by b = 0.
    """
    if not len(preferences) == len(model_lengths) == len(baseline_lengths):
        raise ValueError("preferences, model_lengths and baseline_lengths must be of one length")
    places, wins = _wins(preferences)
    if (wins == wins[0]).all():
        return Estimate(100 * wins[0].item(), 0.0 if len(wins) > 1 else math.nan)
    d = torch.tensor(baseline_lengths, dtype=wins.dtype) - torch.tensor(model_lengths, dtype=wins.dtype)
    columns = [torch.ones_like(wins)]
    if len(d[places].unique()) > 1:
        columns.append((d / d.std()).tanh()[places])  # the spread is that of all rows, with a verdict or not
    x = torch.stack(columns, dim=1)  # [n, k]
    n, k = x.shape
    ridge = torch.tensor([0, 1e-6], dtype=wins.dtype)[:k].diag()  # b stays finite where length alone decides
    fit = x.new_zeros(k)  # c and b
    for _ in range(200):  # Newton's method, by short steps
        q = (x @ fit).sigmoid()
        inverse = torch.linalg.inv(x.T @ (x * (q * (1 - q))[:, None]) + ridge)
        fit += (inverse @ (x.T @ (wins - q) - ridge @ fit)).clamp(-0.5, 0.5)
    win = fit[0].sigmoid().item()
    if n == k:
        return Estimate(100 * win)
    scores = x * (wins - q)[:, None]  # [n, k]
    variance = (inverse @ scores.T @ scores @ inverse)[0, 0].item() * n / (n - k)  # of c
    return Estimate(100 * win, 100 * win * (1 - win) * variance**0.5)


# --------------------------------------------------------------------------------------------------- generate


class Sampling(NamedTuple):
    """max_new_tokens: of a response, at most. temperature 0: greedy. batch_size: changes no response."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    seed: int = 0
    batch_size: int = 16


def generate(model: nn.Module, tokenizer: Any, prompts: list[list[int]], how: Sampling) -> list[str]:
    """A response to each prompt of token ids (data.tokenize_prompts).

    It depends on the seed, the prompt and how often that came before, not on the batch it is in: each has its
    own generator of noise, on the model's device. The model's own sampling options are replaced.
    """
    if how.temperature < 0 or min(how.max_new_tokens, how.batch_size) < 1:
        raise ValueError("sampling needs a temperature of 0 or more, and one token and prompt at least")
    device = next(model.parameters()).device
    end = lm.end_tokens(model, tokenizer)
    limits = {"max_new_tokens": how.max_new_tokens, "eos_token_id": end, "pad_token_id": end[0]}
    model.generation_config = transformers.GenerationConfig(**limits)
    counts = Counter()
    seeds = []
    for prompt in map(tuple, prompts):
        counts[prompt] += 1
        digest = hashlib.sha256(f"{how.seed} {prompt} {counts[prompt]}".encode())
        seeds.append(int(digest.hexdigest()[:15], 16))
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    responses = [""] * len(prompts)
    for start in tqdm(range(0, len(order), how.batch_size), "responses", unit="batch"):
        batch = order[start : start + how.batch_size]
        rows = [torch.tensor(prompts[i]) for i in batch]
        ids = pad_sequence(rows, True, end[0], "left").to(device)  # [B, T]
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left").to(device)
        noise = gumbel_noise([seeds[i] for i in batch], how.temperature, device)
        found = model.generate(input_ids=ids, attention_mask=mask, logits_processor=[noise])
        for i, row in zip(batch, found[:, ids.shape[1] :].tolist()):
            length = next((k for k, token in enumerate(row) if token in end), len(row))
            responses[i] = tokenizer.decode(row[:length], skip_special_tokens=True)
    return responses


def gumbel_noise(seeds: list[int], temperature: float, device: Any) -> Any:
    """Adds noise to logits [B, V], so that the largest is an exact sample of their softmax, row by row."""
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def add(_: Tensor, logits: Tensor) -> Tensor:
        waits = [torch.empty_like(row).exponential_(generator=g) for row, g in zip(logits, generators)]
        return logits - temperature * torch.stack(waits).log()  # -log of an exponential is Gumbel noise

    return add


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """AlpacaEval's rows by instruction, with prompts: their own, text or messages, else a user's message.
    Raises ValueError naming the row that is none."""
    given = data.read_json(path)
    if not isinstance(given, list):
        raise ValueError(f"{path}: no such file, or no list of rows; evaluate.py generate writes outputs")
    rows = {}
    for number, row in enumerate(given, 1):
        if not isinstance(row, dict) or not isinstance(row.get("instruction"), str):
            raise ValueError(f"{path}: item {number} has no instruction, a text")
        prompt = row.get("prompt") or [{"role": "user", "content": row["instruction"]}]
        if isinstance(prompt, str) and prompt.startswith('[{"role": '):
            with suppress(ValueError):  # write_outputs writes messages as text: alpaca_eval takes no lists
                prompt = json.loads(prompt)
        try:
            prompt = data.text_or_messages(prompt, "prompt")
            data.make_row(prompt, "a", "b", str(path))  # refuses what is no Unicode
        except ValueError as error:
            raise ValueError(f"{path}: item {number}: {error}") from None
        rows[row["instruction"]] = {**row, "prompt": prompt}
    repeated = len(given) - len(rows)
    if repeated:
        print(f"{path}: {repeated} of {len(given)} rows repeat an instruction, of which the last one stands")
    return rows


def write_outputs(args: argparse.Namespace) -> None:
    """AlpacaEval's files of outputs, of a run and of the model it started from, with their prompts."""
    run = open_run(args.run)
    folder = Path(args.out or run.folder / "evaluation")
    tokenizer = lm.load_tokenizer(run.folder / "policy")
    if args.instructions:
        rows = read_rows(Path(args.instructions))
    else:
        prompts = [pair.row["prompt"] for pair in splits_of(run, tokenizer).held_out]
        rows = {data.prompt_text(prompt): {"prompt": prompt} for prompt in prompts}
    if not rows:
        raise ValueError(f"{args.instructions or run.folder}: no prompts; give --instructions FILE")
    prompts = [row["prompt"] for row in rows.values()]
    files = ("reference_outputs.json", run.start), ("model_outputs.json", run.policy)
    for number, (name, label) in enumerate(files):
        # Each model has noise of its own: with the same, near models would give equal outputs, all draws.
        how = Sampling(args.max_new_tokens, args.temperature, 2 * args.seed + number, args.batch_size)
        model = load(run, label)
        positions = lm.positions(model)
        room = positions - how.max_new_tokens
        if room < 1:
            raise ValueError(f"--max_new_tokens {how.max_new_tokens}: the model has {positions} in all")
        ids, counts = data.tokenize_prompts(prompts, tokenizer, room, chat_of(run, tokenizer))
        outputs = []
        for (text, row), output in zip(rows.items(), generate(model, tokenizer, ids, how)):
            prompt = row["prompt"]
            if isinstance(prompt, str):
                output = output.rstrip()  # in plain text, a space before it belongs to it
            else:
                output = output.strip()
                prompt = json.dumps(prompt)
            row = {**row, "instruction": text, "prompt": prompt, "output": output}
            outputs.append({**row, "generator": f"{label} of {run.folder.name}", "training": run.training})
        data.write_json(folder / name, outputs)
        print(f"{folder / name}: prompts: {data.describe(counts)}")


# ------------------------------------------------------------------------------------------------------ judge


class Comparison(NamedTuple):
    """What a judge compares. prompt: text or messages, as training had it."""

    prompt: Any
    baseline_output: str
    model_output: str


JUDGE_PROMPT = """<|im_start|>system
Say which of two answers serves the person who asked better: weigh correctness, helpfulness and clarity, not
length or order. Reply with nothing but the better answer's name, m or M.<|im_end|>
<|im_start|>user
# Request
{instruction}
# Answer m
{output_1}
# Answer M
{output_2}
# The better answer's name (m or M)<|im_end|>"""


def judge_messages(template: str, instruction: str, first: str, second: str) -> list[dict[str, str]]:
    """The judge's chat. As in alpaca_eval, each {key} is replaced once, in this order, even in text filled in
    before; unlike there, turns are split first, so that a control token in a text cannot begin one."""
    messages = []
    for turn in template.split("<|im_start|>")[1:]:
        role, _, content = turn.partition("<|im_end|>")[0].strip().partition("\n")
        messages.append({"role": role.strip(), "content": content.strip()})
    for key, value in (("{instruction}", instruction), ("{output_1}", first), ("{output_2}", second)):
        holders = [message for message in messages if key in message["content"]]
        if not holders:
            raise ValueError(f"the judge's prompt lacks {key} inside a turn, <|im_start|>user ... <|im_end|>")
        holders[0]["content"] = holders[0]["content"].replace(key, value, 1)
    return messages


def read_verdict(choice: dict[str, Any]) -> float | None:
    """1 = first answer .. 2 = second, by log-probabilities of "m" and "M"; without any, the hard label."""
    p = token_probabilities(choice)
    if not p:
        message = choice.get("message")
        content = message.get("content") if isinstance(message, dict) else None
        return {"m": 1.0, "M": 2.0}.get(str(content).strip())
    first = p.get("m", 0.0)
    second = p.get("M", 0.0)
    return 2 - first / (first + second) if first + second else None


def token_probabilities(choice: dict[str, Any]) -> dict[str, float]:
    """Of the likeliest first tokens; {} if the endpoint gave no log-probabilities."""
    try:
        tops = choice["logprobs"]["content"][0]["top_logprobs"]
        return {top["token"]: math.exp(top["logprob"]) for top in tops}
    except (LookupError, TypeError):
        return {}


def ask_endpoint(items: list[Comparison], args: Any, stored: Path) -> list[float | None]:
    """Preferences of AlpacaEval's weighted judge behind an OpenAI-compatible URL. Each answer is stored as it
    comes, under a hash of its question; only what is not there, or cannot be read, is asked."""
    url = args.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    template = Path(args.judge_prompt).read_text(encoding="utf-8") if args.judge_prompt else JUDGE_PROMPT
    options = {"max_tokens": 1, "temperature": 1, "top_p": 1.0, "logprobs": True, "top_logprobs": 5}
    questions = {}
    keys = []  # of each item's question
    switched = []
    for prompt, *outputs in items:
        text = data.prompt_text(prompt)
        # AlpacaEval's draw at its seed 0: whether the judge sees the model's output first
        switched.append(random.Random(f"is_switched_outputs{text}0").choices([False, True])[0])
        if switched[-1]:
            outputs.reverse()
        body = {"model": args.judge_model, "messages": judge_messages(template, text, *outputs), **options}
        keys.append(hashlib.sha256(json.dumps([url, body]).encode()).hexdigest())
        questions[keys[-1]] = body
    answers = dict(data.read_lines(stored))
    missing = [key for key in questions if read_verdict(answers.get(key, {})) is None]
    lock = threading.Lock()

    def ask(key: str) -> None:
        answers[key] = post(url, questions[key])
        with lock:
            data.append_line(stored, [key, answers[key]])

    with ThreadPoolExecutor(args.concurrency) as pool:
        try:
            list(tqdm(pool.map(ask, missing), args.judge_model, len(missing), unit="question"))
        except (ValueError, KeyboardInterrupt) as error:
            pool.shutdown(cancel_futures=True)  # what is under way is paid for: it ends, and is stored
            rest = f"{stored} keeps the answers, the same command goes on"
            raise ValueError(f"{str(error) or 'stopped'}; {rest}") from None
    verdicts = [read_verdict(answers[key]) for key in keys]
    unread = [answers[key] for key, verdict in zip(keys, verdicts) if verdict is None]
    hard = sum(not token_probabilities(answers[key]) for key in keys)
    print(f"{args.judge_model}: {len(missing)} of {len(items)} asked now, {hard} without log-probabilities")
    if len(unread) > len(items) / 10:
        print(f"WARNING: {len(unread)} of {len(items)} are no verdict, such as {str(unread[0])[:300]}")
    return [3 - v if switch and v else v for v, switch in zip(verdicts, switched)]


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The endpoint's choice, in three tries at most. The key goes into the header and nowhere else."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if key:  # unredirected: not for whoever a redirect names
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    for wait in (2, 10, 0):
        try:
            with urlopen(request, timeout=120) as response:
                answer = response.read().decode(errors="replace").replace(key or "\0", "***")
            return dict(json.loads(answer)["choices"][0])
        except HTTPError as error:
            text = ""
            with suppress(OSError, HTTPException):  # it may break off
                text = error.read(2000).decode(errors="replace").replace(key or "\0", "***")
            problem = f"HTTP {error.code} {' '.join(text.split())[:300]}"
            if error.code == 400:  # too long, or filtered: no verdict on this one, there may be on others
                return {"refused": problem}
            if error.code in (401, 403, 404) or "insufficient_quota" in problem:
                break
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            problem = f"no answer, {type(error).__name__} {getattr(error, 'reason', '')}".strip()
        time.sleep(wait)
    raise ValueError(f"{url}: {problem}; check OPENAI_API_KEY, --url, --judge_model, --concurrency")


def true_preferences(items: list[Comparison]) -> list[float]:
    """By the built-in task's reward."""
    preferences = []
    for item in items:
        prompt = data.prompt_text(item.prompt)
        gain = data.true_reward(prompt, item.model_output) - data.true_reward(prompt, item.baseline_output)
        preferences.append(1.5 + (gain > 0) / 2 - (gain < 0) / 2)
    return preferences


@torch.no_grad()
def model_preferences(items: list[Comparison], args: Any) -> list[float | None]:
    """By a reward model or by a run's implicit reward, which see what training would: an empty output, or two
    that are alike once cut, make no pair, and no verdict."""
    run = open_run(args.judge_run) if args.judge_run else open_model(args.reward_model)
    rows = []
    for number, item in enumerate(items):
        rows.append(data.make_row(item.prompt, item.model_output, item.baseline_output, str(number)))
    if all("drop" in row for row in rows):
        return [None] * len(items)
    pairs, counts = tokenized(rows, run)
    print(f"{args.judge_run or args.reward_model}: {data.describe(counts)}")
    if args.judge_run:
        margins = margins_of(run, pairs)
        gains = margins[run.policy]
        if run.settings["objective"] not in REFERENCE_FREE:
            gains = gains - margins[run.start]
    else:
        options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
        model = transformers.AutoModelForSequenceClassification.from_pretrained(args.reward_model, **options)
        if model.config.num_labels != 1 or "SequenceClassification" not in str(model.config.architectures):
            raise ValueError(f"{args.reward_model}: no sequence classifier with one label")
        model.to(lm.choose_device()).eval()
        gains = torch.zeros(len(pairs))
        for k, pair in enumerate(tqdm(pairs, args.reward_model, unit="pair")):
            chosen = torch.tensor([pair.prompt + pair.chosen], device=model.device)
            rejected = torch.tensor([pair.prompt + pair.rejected], device=model.device)
            gains[k] = (model(chosen).logits - model(rejected).logits)[0, 0].item()
    preferences = {int(pair.source): 1.5 + gain / 2 for pair, gain in zip(pairs, gains.sign().tolist())}
    return [preferences.get(i) for i in range(len(items))]


def judge_outputs(args: argparse.Namespace) -> None:
    """Write a judge's preferences as AlpacaEval's annotations.json, and the win rate as judgements.json."""
    run = open_run(args.run)
    if args.true_reward and run.settings["data"] != [data.BUILTIN]:
        raise ValueError("--true_reward is the reward of the built-in task, and this run has other data")
    if args.judge_prompt and args.url is None:
        raise ValueError("--judge_prompt is for the judge behind --url: leave it out")
    folder = Path(args.out or run.folder / "evaluation")
    baseline = read_rows(folder / "reference_outputs.json")
    model = read_rows(folder / "model_outputs.json")
    pairs = [(row, model[text]) for text, row in baseline.items() if text in model]
    if not pairs:
        raise ValueError(f"{folder}: its two files of outputs share no instruction: evaluate.py generate")
    if len(pairs) < max(len(baseline), len(model)):
        print(f"{len(pairs)} instructions are in both files: {len(baseline)} and {len(model)} are there")
    for row in [*baseline.values(), *model.values()]:
        if not isinstance(row.get("output"), str):
            raise ValueError(f"{folder}: no output, a text, to {row['instruction']!r:.60}")
        if row.get("training", run.training) != run.training:
            raise ValueError(f"{folder}: outputs of an earlier training of this run: evaluate.py generate")
    items = [Comparison(theirs["prompt"], theirs["output"], ours["output"]) for theirs, ours in pairs]
    unequal = [i for i, item in enumerate(items) if item.baseline_output != item.model_output]
    asked = [items[i] for i in unequal]
    if args.url is not None:
        name = f"{args.judge_model}, {Path(args.judge_prompt or 'our own prompt').stem}"
        verdicts = ask_endpoint(asked, args, folder / "answers.jsonl")
    elif args.true_reward:
        name = "true reward, of outputs"
        verdicts = true_preferences(asked)
    else:
        name = args.judge_run or args.reward_model
        verdicts = model_preferences(asked, args)
    verdict_of = dict(zip(unequal, verdicts))
    preferences = [verdict_of.get(i, 1.5) for i in range(len(items))]  # equal outputs are a draw
    annotations = []
    for (theirs, ours), preference in zip(pairs, preferences):
        row = {key: theirs[key] for key in ("dataset", "instruction") if key in theirs}
        row.update(output_1=theirs["output"], generator_1=theirs.get("generator"))
        row.update(output_2=ours["output"], generator_2=ours.get("generator"))
        annotations.append({**row, "annotator": name, "preference": preference})
    data.write_json(folder / "annotations.json", annotations)
    if asked and not any(verdicts):
        preferences = [None] * len(items)  # draws of equal outputs alone tell nothing
    judgements = data.read_json(folder / "judgements.json", {})
    wins = wins_of(run.policy, run.start, name, items, preferences)
    judgements[name] = {"training": run.training, "wins": wins._asdict()}
    data.write_json(folder / "judgements.json", judgements)
    print(table(WINS, [wins]))


# ------------------------------------------------------------------------------------------------------- runs

METHODS = {"dpo": "DPO", "ipo": "IPO", "simpo": "SimPO", "orpo": "ORPO", "slic": "SLiC"}
BATCHES = {"low": "Low-Var", "random": "Rnd-Var", "high": "High-Var"}  # the paper's names, by --batching
SAMPLES = 16  # responses of each model to each prompt of the built-in task


class Run(NamedTuple):
    """A finished run, or a model as if it were one. models: folders or hub ids by label, from the one that
    training started from to the policy. training: a hash of its wall times, which no earlier training in the
    same folder has. fingerprint: of its data."""

    folder: Path
    settings: dict[str, Any]
    models: dict[str, str]
    training: str = ""
    fingerprint: str | None = None

    @property
    def start(self) -> str:  # the label of the model that training started from
        return next(iter(self.models))

    @property
    def policy(self) -> str:
        return next(reversed(self.models))


def open_run(name: str | Path) -> Run:
    folder = Path(name)
    config = data.read_json(folder / "config.json", {})
    s = config.get("settings")
    if s is None or not (folder / "policy").is_dir():
        raise ValueError(f"{folder}: no finished run (settings in config.json, policy/); train.py makes them")
    if s["sft_model"]:  # its SFT is that of the run that trained it, if there is one
        trained = data.read_json(Path(s["sft_model"]).parent / "config.json", {}).get("settings", {})
        s.update({key: trained[key] for key in ("sft_epochs", "sft_lr") if key in trained})
    models = {"base": s["model"]}
    if s["sft_model"] or s["sft_epochs"]:
        models = {"SFT": s["sft_model"] or str(folder / "sft")}
    plain = f"plain {METHODS[s['objective']]}"
    if s["proxy"] or (folder / "proxy").is_dir():
        models[plain] = s["proxy"] or str(folder / "proxy")
    models[method_of(s) or plain] = str(folder / "policy")
    training = hashlib.sha256((folder / "metrics.jsonl").read_bytes()).hexdigest()[:16]
    return Run(folder, s, models, training, config.get("data"))


def method_of(s: dict[str, Any]) -> str:
    """RMO, or those of its three parts that these settings switch on, by the paper's names; "" of none."""
    parts = []
    if s["batching"] != "random":
        parts.append(BATCHES[s["batching"]])
    if s["tau"] is not None or s["filter_ratio"] != 0:
        parts.append("Filter")
    if s["lambda_reg"] != 0:
        parts.append("Reg")
    return "RMO" if parts == ["High-Var", "Filter", "Reg"] else " + ".join(parts)


def open_model(name: str) -> Run:
    if (Path(name) / "policy").is_dir():
        return open_run(name)
    settings = dict(objective="dpo", chat="auto", max_length=1024, max_prompt_length=None, seed=0)
    return Run(Path(name), settings, {name: name})


def load(run: Run, label: str) -> nn.Module:
    if run.settings.get("model") == data.BUILTIN:
        torch.set_num_threads(1)  # threads wait for each other on tiny products
    return lm.load_model(run.models[label], run.settings["seed"]).to(lm.choose_device()).eval()


def splits_of(run: Run, tokenizer: Any) -> data.Splits:
    """The pairs of a run. Raises ValueError if they are not those it was trained on, and held out from."""
    splits = data.load_splits(run.settings, tokenizer)
    if run.fingerprint not in (None, data.fingerprint(splits.everything)):
        raise ValueError(f"{run.folder}: its data has changed since it was trained: put the files back")
    return splits


def chat_of(run: Run, tokenizer: Any) -> str:
    """How the run renders prompts: without a template, messages too are plain text."""
    return run.settings["chat"] if tokenizer.chat_template else "never"


def tokenized(rows: list[dict[str, Any]], run: Run) -> tuple[list[data.Pair], dict[str, int]]:
    """Rows as the run's training has them, and how many went which way."""
    s = run.settings
    tokenizer = lm.load_tokenizer(run.models[run.policy])
    lengths = s["max_length"], s["max_prompt_length"]
    return data.tokenize_preferences(rows, tokenizer, *lengths, chat_of(run, tokenizer))


def margins_of(run: Run, pairs: list[data.Pair]) -> dict[str, Tensor]:
    """Margins (Eq. 1) of pairs by each model of a run, [N] float64, of sums over tokens or of means as its
    objective has them. In a distributed run every rank must call it, as they share the scoring."""
    if not pairs:
        return {}
    mean = run.settings["objective"] in LENGTH_NORMALISED
    margins = {}
    for label in run.models:
        model = load(run, label)
        lm.check_pairs(model, pairs)
        tokens = 16_384 if model.device.type == "cuda" else 2048
        scores = lm.score_pairs(model, pairs, tokens, mean, f"{run.folder.name} {label}").double()
        margins[label] = scores[:, 0] - scores[:, 1]
    return margins


class Partition(NamedTuple):
    """A row of Table 3."""

    by: str  # whose margins: the proxy's, or the base's in a run without proxy
    name: str
    variance: Estimate  # mean of the batches'
    share: Estimate  # in percent of the bound
    means: Tensor  # of the batches, [n]


def partitions(run: Run) -> list[Partition]:
    """Table 3, of all training pairs before the filter. One remainder sits out of all partitions."""
    m = run.settings["batch_size"]
    draw = torch.Generator().manual_seed(0)
    scores = load_file(run.folder / "margins.safetensors")
    by = "proxy" if "proxy_chosen" in scores else "base"
    margins = (scores[f"{by}_chosen"] - scores[f"{by}_rejected"]).double()
    margins = margins[torch.randperm(len(margins), generator=draw)[: len(margins) // m * m]]
    makers = batching.low_variance_batches, batching.random_batches, batching.high_variance_batches
    rows = []
    for name, make in zip(BATCHES.values(), makers):
        batches = make(margins, m, draw)  # [n, m]
        total = batching.total_variance(margins, batches)  # Eq. 10
        share = 100 * total / batching.variance_bound(margins, m)  # NaN where all margins are equal
        variance = Estimate(total.item() / len(batches))
        rows.append(Partition(by, name, variance, Estimate(share.item()), margins[batches].mean(1)))
    return rows


# ----------------------------------------------------------------------------------------------------- report


class Wins(NamedTuple):
    """How often a model's outputs beat a baseline's, in percent; mean lengths of outputs, in characters."""

    model: str
    baseline: str
    judge: str
    rate: Estimate
    controlled: Estimate  # at equal lengths
    length: Estimate
    baseline_length: Estimate
    verdicts: int
    prompts: int


class Margins(NamedTuple):
    """Margins of a model on held-out pairs: nats, nats squared, percent of the pairs."""

    model: str
    mean: Estimate
    variance: Estimate
    accuracy: Estimate
    reward_accuracy: Estimate


WINS = ["model", "against", "judge", "wins %", "equal lengths %", "length", "baseline's", "verdicts", "of"]
MARGINS = ["model", "margin (nats)", "variance (nats²)", "accuracy %", "reward accuracy %"]
TABLE_3 = ["run", "margins by", "batches", "margin variance (nats²)", "% of the bound"]
COLUMNS = """wins: the share of comparisons that the judge gives the model, draws count half; equal lengths:
by AlpacaEval's correction, not to be read below 100 verdicts; length: of outputs, in characters; margin: log-
probability of chosen minus that of rejected, on held-out pairs; accuracy: margin above 0; reward accuracy:
above that of the model that training started from (simpo, orpo: above 0); ±: standard error over prompts or
pairs, or over runs that differ by seed; margins by: whose, of all training pairs, before the filter; bound:
the largest variance that batches can have."""


def wins_of(model: str, baseline: str, judge: str, items: list[Comparison], preferences: list) -> Wins:
    """Errors are over prompts: several comparisons of one count as their mean, and the rate at equal lengths
    then has none."""
    prompts: dict[str, list[float]] = {}
    for item, preference in zip(items, preferences):
        verdicts = prompts.setdefault(data.prompt_text(item.prompt), [])
        if preference is not None:
            verdicts.append(preference)
    means = [sum(verdicts) / len(verdicts) for verdicts in prompts.values() if verdicts]
    baseline_lengths = [len(item.baseline_output) for item in items]
    model_lengths = [len(item.model_output) for item in items]
    rate = controlled = Estimate(math.nan)
    if means:
        rate = win_rate(means)
        controlled = length_controlled_win_rate(preferences, model_lengths, baseline_lengths)
        if len(items) > len(prompts):
            controlled = Estimate(controlled.value)
    lengths = mean_of(model_lengths), mean_of(baseline_lengths)
    return Wins(model, baseline, judge, rate, controlled, *lengths, len(means), len(prompts))


def true_wins(run: Run, pairs: list[data.Pair]) -> list[Wins]:
    """On the built-in task, by its true reward: SAMPLES responses of each model to each prompt, each compared
    with each of another model's."""
    prompts = {data.prompt_text(pair.row["prompt"]): pair.prompt for pair in pairs}
    tokenizer = lm.load_tokenizer(run.folder / "policy")
    responses = {}  # [P][SAMPLES] texts by label
    for number, label in enumerate(run.models):
        how = Sampling(64, 1.0, 10 * run.settings["seed"] + number, 512)
        texts = generate(load(run, label), tokenizer, [*prompts.values()] * SAMPLES, how)
        responses[label] = [texts[k :: len(prompts)] for k in range(len(prompts))]
    wins = []
    for baseline, model in combinations(run.models, 2):
        items = []
        for prompt, theirs, mine in zip(prompts, responses[baseline], responses[model]):
            items += [Comparison(prompt, a, b) for a in theirs for b in mine]
        wins.append(wins_of(model, baseline, "true reward", items, true_preferences(items)))
    return wins


def margin_rows(margins: dict[str, Tensor], objective: str) -> list[Margins]:
    start = next(iter(margins.values()), None)
    rows = []
    for label, values in margins.items():
        reference = 0 if objective in REFERENCE_FREE else start
        gained = Estimate(math.nan) if values is start else mean_of(100.0 * (values > reference))
        variance = Estimate(values.var(unbiased=False).item())
        rows.append(Margins(label, mean_of(values), variance, mean_of(100.0 * (values > 0)), gained))
    return rows


def filter_sentences(run: Run, pairs: list[data.Pair]) -> list[str]:
    """What the filter kept and removed of a run's training pairs."""
    removed = data.read_json(run.folder / "filter.json", {})
    if not removed:
        return ["There was no filter."]
    steps = {place: step for step in (1, 2) for place in removed[f"removed_step{step}"]}
    sentences = []
    for step, name in enumerate(("The filter kept", "Its step 1 removed", "Its step 2 removed")):
        part = [pair for pair in pairs if steps.get(pair.source, 0) == step]
        longer = mean_of([len(pair.chosen) - len(pair.rejected) for pair in part]).value
        wrong = mean_of([pair.row["truth"]["margin"] < 0 for pair in part if "truth" in pair.row]).value
        sentence = f"{name} {len(part):,} of {len(pairs):,} pairs ({100 * len(part) / len(pairs):.1f} %)"
        if part:
            than = "longer" if longer > 0 else "shorter"
            sentence += f", chosen {abs(longer):.1f} tokens {than} than rejected"
        if not math.isnan(wrong):
            sentence += f", {100 * wrong:.0f} % mislabelled"
        sentences.append(sentence + ".")
    return sentences


def make_report(run: Run) -> dict[str, Any]:
    """report.json, made if it is not there or of another training, and judges' win rates: {"wins", "margins",
    "filter": sentences, "held_out": margins by model}. Every rank must call it."""
    path = run.folder / "report.json"
    first = lm.rank_and_world()[0] == 0
    report = data.read_json(path, {})
    if report.get("training") != run.training:
        splits = splits_of(run, lm.load_tokenizer(run.folder / "policy"))
        report = {"training": run.training, "wins": [], "filter": filter_sentences(run, splits.train)}
        margins = margins_of(run, splits.held_out)
        report["held_out"] = {label: values.tolist() for label, values in margins.items()}
        if first and run.settings["data"] == [data.BUILTIN] and not run.settings["eval_data"]:
            report["wins"] = [row._asdict() for row in true_wins(run, splits.held_out)]
        if first:
            data.write_json(path, report)
    judgements = data.read_json(run.folder / "evaluation" / "judgements.json", {}).values()
    rows = report["wins"] + [one["wins"] for one in judgements if one["training"] == run.training]
    report["wins"] = []
    for row in rows:  # JSON has made lists of the estimates
        values = [Estimate(*value) if isinstance(value, list) else value for value in row.values()]
        report["wins"].append(Wins(*values))
    held_out = {}
    for label, values in report["held_out"].items():
        held_out[label] = torch.tensor(values, dtype=torch.float64)
    return {**report, "margins": margin_rows(held_out, run.settings["objective"])}


def table(header: list[str], rows: list[Any]) -> str:
    """A Markdown table of results."""
    lines = [header, *([str(value) for value in row] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def report_run(folder: Path) -> None:
    """Print what became of a finished run, and write report.json. Every rank must call it; rank 0 prints."""
    run = open_run(folder)
    report = make_report(run)
    if lm.rank_and_world()[0] > 0:
        return
    for row in report["wins"]:
        if not math.isnan(row.rate.error):
            apart = row.rate.value - 50
            if apart:
                apart = apart / row.rate.error if row.rate.error else math.copysign(math.inf, apart)
            winner = row.model if apart > 2 else row.baseline if apart < -2 else "no clear winner"
            rates = f"{row.rate} %, at equal lengths {row.controlled} %"
            print(f"{row.model} against {row.baseline}: {winner} ({rates}; {apart:+.1f} errors from a draw)")
    show(report["wins"], report["margins"], report["filter"], [run])
    step = f"generate {folder}" if report["margins"] else f"generate {folder} --instructions FILE"
    if (run.folder / "evaluation" / "model_outputs.json").is_file():
        step = f"judge {folder} --url URL"
    if report["wins"]:
        step = f"figures {folder} --out {folder}/figures"
    print(f"Next: python evaluate.py {step}")


def show(wins: list[Wins], margins: list[Margins], sentences: list[str], runs: list[Run]) -> None:
    if wins:
        print(table(WINS, wins))
    if margins:
        print(table(MARGINS, margins))
    print(*sentences, sep="\n")
    print(table(TABLE_3, [[run.folder.name, *row[:4]] for run in runs for row in partitions(run)]))
    print(COLUMNS)


class Group(NamedTuple):
    """Runs that differ by seed at most, and the results of their policies over these."""

    name: str
    settings: dict[str, Any]
    runs: list[Run]
    wins: dict[str, Wins]  # by judge, against the model that training started from
    margins: list[Margins]  # one, if there are held-out pairs
    held_out: list[float]
    place: float = 0.0  # on the x axis of a figure


def alike(items: list[Any], free: set[str]) -> list[list[Any]]:
    """Runs, or groups of runs, that differ by seed and in these settings at most, together."""
    free = {"seed", "output_dir", "proxy", "sft_model", "micro_batch_tokens", "save_steps", *free}
    together = {}
    for item in items:
        fixed = {key: value for key, value in item.settings.items() if key not in free}
        together.setdefault(json.dumps(fixed, sort_keys=True), []).append(item)
    return list(together.values())


def over_seeds(rows: list[Any], name: str, runs: int) -> Any:
    """The means of results of some of so many runs, with their standard errors; a single one is itself."""
    if runs > 1:
        name += f" ({len(rows)} seeds)" if len(rows) == runs else f" ({len(rows)} of {runs} seeds)"
    means = {"model": name}
    for field, values in zip(rows[0]._fields, zip(*rows)):
        if isinstance(values[0], Estimate) and len(rows) > 1:
            means[field] = mean_of([one.value for one in values])
        elif isinstance(values[0], int):  # verdicts and prompts
            means[field] = sum(values)
    return rows[0]._replace(**means)


def read_groups(folders: list[str]) -> list[Group]:
    """The finished runs among these folders, over seeds; the others are named and left out."""
    runs = []
    for folder in folders:
        try:
            runs.append(open_run(folder))
        except (ValueError, OSError) as error:
            print(f"left out: {error}")
    if not runs:
        raise ValueError("none of these folders is a finished run of train.py")
    groups = []
    for together in alike(runs, set()):
        name = commonprefix([run.folder.name for run in together]).strip("-_.") or together[0].folder.name
        if len({run.settings["seed"] for run in together}) < len(together):
            raise ValueError(f"{name}: two of these runs have the same settings and seed: name one of them")
        wins = {}
        margins = []
        held_out = []
        for run in together:
            report = make_report(run)
            for row in report["wins"]:
                if (row.model, row.baseline) == (run.policy, run.start):
                    wins.setdefault(row.judge, []).append(row)
            margins += report["margins"][-1:]
            held_out += report["held_out"].get(run.policy, [])
        count = len(together)
        averages = {judge: over_seeds(rows, name, count) for judge, rows in wins.items()}
        margins = [over_seeds(margins, name, count)] if margins else []
        if count > 1:
            name += f" ({count} seeds)"
        groups.append(Group(name, together[0].settings, together, averages, margins, held_out))
    return groups


def report_runs(args: argparse.Namespace) -> None:
    if len(args.runs) == 1:
        return report_run(args.runs[0])
    groups = read_groups(args.runs)
    wins = [row for group in groups for row in group.wins.values()]
    margins = [row for group in groups for row in group.margins]
    runs = [run for group in groups for run in group.runs]
    sentences = [f"{run.folder.name}: {' '.join(make_report(run)['filter'])}" for run in runs]
    show(wins, margins, sentences, runs)


def compare_margins(args: argparse.Namespace) -> None:
    rows = []
    for name in args.models:
        run = open_model(name)
        pairs, counts = tokenized(data.read_preferences(args.pairs), run)
        print(f"{name}: {data.describe(counts)}")
        for row in margin_rows(margins_of(run, pairs), run.settings["objective"]):
            rows.append(row._replace(model=name if row.model == name else f"{name} {row.model}"))
    print(table(MARGINS, rows))


# ---------------------------------------------------------------------------------------------------- figures


def draw_rates(axis: Any, groups: list[Group], free: set[str], x_label: str) -> None:
    """Win rates over a setting by the judge that most groups have. Only runs alike in all else are joined."""
    judges = Counter(judge for group in groups for judge in group.wins)
    judge = max(judges, key=judges.__getitem__, default="")
    judged = [group for group in groups if judge in group.wins]
    arms = [arm for arm in alike(judged, free) if len(arm) > 1]
    if not arms:
        raise ValueError(f"it needs win rates of runs that differ in {' or '.join(sorted(free))} alone")
    for arm in arms:
        arm.sort(key=attrgetter("place"))
        xs = [group.place for group in arm]
        rows = [group.wins[judge] for group in arm]
        others = f", {arm[0].name} ..." if len(arms) > 1 else ""
        values, errors = zip(*[row.rate for row in rows])
        axis.errorbar(xs, values, errors, marker="o", capsize=3, label=f"win rate{others}")
        values, errors = zip(*[row.controlled for row in rows])
        axis.errorbar(xs, values, errors, marker="^", capsize=3, label=f"at equal lengths{others}")
    axis.axhline(50, color="grey", linewidth=0.8, zorder=0)
    axis.set(xlabel=x_label, ylabel=f"wins against {rows[0].baseline} (% of comparisons), judge: {judge}")


def draw_density(axis: Any, values: list[float], label: str) -> None:
    """A Gaussian kernel density relative to its peak, so that unlike widths fit one scale."""
    from matplotlib.mlab import GaussianKDE

    kernels = GaussianKDE(values, "silverman")
    tail = 4 * kernels.covariance.item() ** 0.5
    grid = torch.linspace(min(values) - tail, max(values) + tail, 500)
    heights = kernels.evaluate(grid)
    axis.plot(grid, heights / heights.max(), label=label)
    axis.set(ylabel="density (peak = 1)", ylim=(0, None))


NO_HELD_OUT = "it needs held-out pairs: train with --eval_share or --eval_data"


def figure1(figure: Any, groups: list[Group]) -> None:
    """The objective's loss over training, without amplification, as a moving mean."""
    axis = figure.subplots()
    for group in groups:
        logs = [data.read_lines(run.folder / "metrics.jsonl") for run in group.runs]
        curves = [[line["loss"] - line.get("amplification", 0.0) for line in log] for log in logs]
        loss = torch.tensor(list(zip(*curves))).mean(1)  # [steps of the shortest run]
        window = max(1, len(loss) // 20)
        epochs = torch.arange(window, len(loss) + 1) / sum(line["epoch"] == 1 for line in logs[0])
        axis.plot(epochs, loss.unfold(0, window, 1).mean(1), label=group.name)
    axis.set(xlabel="epoch", ylabel="loss of the objective alone (nats a pair)")
    axis.set_xticks(range(math.ceil(axis.get_xlim()[1])))
    axis.grid(axis="x")


def figure2(figure: Any, groups: list[Group]) -> None:
    """Win rates by how batches are made."""
    axis = figure.subplots()
    placed = [group._replace(place=list(BATCHES).index(group.settings["batching"])) for group in groups]
    draw_rates(axis, placed, {"batching"}, "how batches are made")
    axis.set_xticks([0, 1, 2], BATCHES.values())


def figure3(figure: Any, groups: list[Group]) -> None:
    """Mean margins of batches, of the first run."""
    axis = figure.subplots()
    run = groups[0].runs[0]
    parts = partitions(run)
    for part in parts:
        draw_density(axis, part.means.tolist(), part.name)
    axis.set(xlabel=f"mean margin of a batch of {run.folder.name}, by its {parts[0].by} (nats)")


def figure4(figure: Any, groups: list[Group]) -> None:
    """Margins of held-out pairs, accuracy and win rates over lambda."""
    left, middle, right = figure.subplots(1, 3)
    amplified = [group.settings for group in groups if group.settings["lambda_reg"] != 0]
    placed = []
    for group in groups:
        constants = [data.read_json(run.folder / "config.json")["constants"] for run in group.runs]
        weight = mean_of([values.get("lambda", 0.0) for values in constants]).value
        settings = dict(group.settings)
        if weight == 0 and amplified:  # it has no alpha or median, so it is alike to runs of any
            settings.update({name: amplified[0][name] for name in ("alpha", "median")})
        placed.append(group._replace(place=weight, settings=settings))
    draw_rates(right, placed, {"lambda_reg"}, "λ")
    arms = alike([group for group in placed if group.margins], {"lambda_reg"})
    if not arms:
        raise ValueError(NO_HELD_OUT)
    arm = sorted(max(arms, key=len), key=attrgetter("place"))
    xs = [group.place for group in arm]
    values, errors = zip(*[group.margins[0].accuracy for group in arm])
    middle.errorbar(xs, values, errors, marker="o", capsize=3, label="accuracy")
    middle.set(xlabel="λ", ylabel="accuracy (% of held-out pairs)")
    for group in arm:
        draw_density(left, group.held_out, f"λ = {group.place:.3g}")
    left.set(xlabel="margin of held-out pairs (nats)")


def figure5(figure: Any, groups: list[Group]) -> None:
    """Win rates over the share of pairs that the filter removed."""
    placed = []
    for group in groups:
        filters = [data.read_json(run.folder / "filter.json", {"ratio": 0.0}) for run in group.runs]
        placed.append(group._replace(place=mean_of([100 * found["ratio"] for found in filters]).value))
    free = {"filter_ratio", "tau", "gamma"}
    draw_rates(figure.subplots(), placed, free, "pairs that the filter removed (% of training pairs)")


def margins_by_model(figure: Any, groups: list[Group]) -> None:
    """Margins of held-out pairs by each model of the first run."""
    run = groups[0].runs[0]
    held_out = make_report(run)["held_out"]
    if not held_out:
        raise ValueError(NO_HELD_OUT)
    axis = figure.subplots()
    for label, margins in held_out.items():
        draw_density(axis, margins, label)
    axis.set(xlabel=f"margin of held-out pairs by the models of {run.folder.name} (nats)")


FIGURES = {"figure1": figure1, "figure2": figure2, "figure3": figure3, "figure4": figure4}
FIGURES.update({"figure5": figure5, "margins": margins_by_model})


def draw_figures(args: argparse.Namespace) -> None:
    try:
        from matplotlib import cycler, rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    groups = read_groups(args.runs)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00"]  # Okabe and Ito's
    styles = ["-", "--", "-.", ":", (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3))]
    look = cycler(color=7 * colours, linestyle=6 * styles)  # 42 curves before two look alike
    for name, draw in FIGURES.items():
        with rc_context({"axes.prop_cycle": look, "figure.dpi": 160}):
            figure = Figure((14, 5) if name == "figure4" else (8, 5), layout="constrained")
            try:
                draw(figure, groups)
            except ValueError as error:
                print(f"{name} is not drawn: {error}")
                continue
            for axis in figure.axes:
                axis.legend()
            figure.savefig(folder / f"{name}.png")
        print(folder / f"{name}.png")


# ---------------------------------------------------------------------------------------------------- command


def parse(words: list[str] | None = None) -> argparse.Namespace:
    look = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **look)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Any, name: str, says: str, example: str) -> argparse.ArgumentParser:
        example = f"example:\n  python evaluate.py {name} {example}"
        one = commands.add_parser(name, help=says, description=says, epilog=example, **look)
        one.set_defaults(command=run)
        return one

    one = command(report_runs, "report", "Who won, held-out margins, what the filter removed.", "runs/*")
    one.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py wrote")

    one = command(write_outputs, "generate", "Outputs of a run and of its starting model.", "runs/rmo")
    add = one.add_argument
    add("run", metavar="RUN", help="a folder that train.py wrote")
    add("--instructions", metavar="FILE", help="rows, each a user's message (default: held-out prompts)")
    add("--max_new_tokens", type=int, default=256, help="tokens of an output, at most (default: 256)")
    add("--temperature", type=float, default=0.7, help="of sampling, 0 = greedy (default: 0.7)")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")
    add("--batch_size", type=int, default=16, help="prompts at a time, changes no output (default: 16)")
    add("--out", metavar="FOLDER", help="where to write (default: RUN/evaluation)")

    example = "runs/rmo --url https://api.openai.com/v1 --judge_model gpt-4o"
    one = command(judge_outputs, "judge", "How often a judge prefers the run's outputs.", example)
    add = one.add_argument
    add("run", metavar="RUN", help="a folder that train.py wrote")
    by = one.add_mutually_exclusive_group(required=True).add_argument
    by("--url", help="an OpenAI-compatible endpoint; the key is the environment's OPENAI_API_KEY")
    by("--reward_model", metavar="FOLDER", help="a sequence classifier with one label")
    by("--run", dest="judge_run", metavar="RUN", help="the implicit reward of another run")
    by("--true_reward", action="store_true", help="the reward of the built-in task")
    add("--judge_model", default="gpt-4o", help="the model behind --url (default: gpt-4o)")
    add("--judge_prompt", metavar="FILE", help="its prompt, as AlpacaEval writes them (default: our own)")
    add("--concurrency", type=int, default=5, help="requests at a time (default: 5)")
    add("--out", metavar="FOLDER", help="outputs and judgements (default: RUN/evaluation, read by report)")

    example = "runs/rmo gpt2 --pairs test.jsonl"
    one = command(compare_margins, "margins", "Margins of models on pairs.", example)
    one.add_argument("models", nargs="+", metavar="MODEL", help="runs, model folders or hub ids")
    one.add_argument("--pairs", required=True, metavar="FILE", help="preferences, in any form of train.py's")

    example = "runs/* --out figures"
    one = command(draw_figures, "figures", "The paper's figures, as far as runs allow.", example)
    one.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py wrote")
    one.add_argument("--out", required=True, metavar="FOLDER", help="where to write")
    return parser.parse_args(words)


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    args = parse()
    try:
        args.command(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"evaluate.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: stopped; the same command goes on")


if __name__ == "__main__":
    main()
