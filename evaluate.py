"""Who wins, by how much beyond length, and what happened to the margins.

    python evaluate.py runs/*                         a table on held-out pairs, a row a run, means over seeds
    python evaluate.py RUN --generate PROMPTS.json    outputs of its model and of the one it started from
    python evaluate.py RUN --judge https://api.openai.com/v1 --judge_model gpt-4o     win rates of the outputs
    python evaluate.py RUN MODEL --pairs PAIRS.jsonl  margins of any models on any pairs
    python evaluate.py RUN --table3 --figure3 B.png   what each way to make batches does to their margins

A judge is an OpenAI-compatible URL (key: the environment's OPENAI_API_KEY), a reward model's folder, a run's
folder (its implicit reward), or "true" (the built-in task's reward). Outputs and judgements are files as
AlpacaEval's, in RUN/evaluation/ or --out. What was generated or paid for is stored as it comes: the same
command goes on where it stopped.

Differs from AlpacaEval: 1) the length-controlled win rate knows no instruction difficulty, no gamed models
and no L1 penalty, and its standard error is one of sampling. 2) The judge's prompt is our own wording
unless --judge_prompt is given. 3) The baseline is the model that training started from, as in the paper.
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
from collections.abc import Callable, Mapping
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
from transformers import AutoModelForSequenceClassification as RewardModel
from transformers import GenerationConfig, LogitsProcessorList, TopPLogitsWarper
from transformers.utils import logging

import batching
import data
import model as lm
from data import BUILTIN, HH_MARK, Pair
from loss import LENGTH_NORMALISED, REFERENCE_FREE

Prompt = str | list[dict[str, str]]
Item = tuple[Prompt, str, str]  # what a judge compares: prompt, baseline's output, model's output
Judge = Callable[[list[Item]], list[float | None]]  # its preferences, from 1 (baseline) to 2 (model)
Row = dict[str, Any]

# -------------------------------------------------------------------------------------------------- win rates


def _wins(preferences: list[float | None]) -> tuple[list[int], Tensor]:
    """Places of the verdicts, by AlpacaEval's rules, and the probability that the model wins at each."""
    usable = [(i, 1.5 if p == 0 else float(p)) for i, p in enumerate(preferences) if p is not None]
    usable = [(i, p - 1) for i, p in usable if 1 <= p <= 2]
    if not usable:
        raise ValueError(f"none of {len(preferences)} preferences is a verdict (0, or from 1 to 2)")
    return [i for i, _ in usable], torch.tensor([p for _, p in usable], dtype=torch.float64)


def win_rate(preferences: list[float | None]) -> tuple[float, float]:
    """(percent, standard error) of AlpacaEval's win rate: the mean probability that the model wins.

    preferences: 1 = baseline wins .. 2 = model wins, 0 or 1.5 = draw; None, NaN and others are no verdict
    and left out. The standard error of a single verdict is NaN. Raises ValueError without any verdict.
    """
    _, p = _wins(preferences)
    error = p.std().item() / len(p) ** 0.5 if len(p) > 1 else math.nan
    return 100 * p.mean().item(), 100 * error


def length_controlled_win_rate(
    preferences: list[float | None], model_lengths: list[int], baseline_lengths: list[int]
) -> tuple[float, float]:
    """(percent, standard error) of the win rate at equal lengths: alpaca_eval's length_controlled_minimal.

    P(model wins) = sigmoid(c + b tanh(d / std(d))), d = baseline's length - model's length in characters,
    fitted by maximum likelihood; LC = 100 sigmoid(c) (Dubois et al. 2024, arXiv 2404.04475, Eq. 2 without
    its term for the instruction). The error is the sandwich estimate of the sampling error; alpaca_eval's
    is the spread between instructions, here 0. With equal lengths both are win_rate's. Verdicts that are
    all alike are fitted exactly, by b = 0.
    """
    counts = len(preferences), len(model_lengths), len(baseline_lengths)
    if len(set(counts)) > 1:
        raise ValueError("{} preferences, {} model lengths, {} baseline lengths".format(*counts))
    places, p = _wins(preferences)
    if (p == p[0]).all():
        return 100 * p[0].item(), 0.0 if len(p) > 1 else math.nan
    d = torch.tensor(baseline_lengths, dtype=p.dtype) - torch.tensor(model_lengths, dtype=p.dtype)
    tanh = (d / d.std()).tanh()[places]  # the spread is that of all rows, with a verdict or not
    x = torch.stack([torch.ones_like(p), tanh], 1)[:, : 2 if tanh.std() > 0 else 1]  # [n, k]
    n, k = x.shape
    ridge = torch.tensor([0, 1e-6], dtype=p.dtype)[:k].diag()  # b stays finite where length alone decides

    def hessian(q: Tensor) -> Tensor:
        return x.T @ (x * (q * (1 - q))[:, None]) + ridge

    def objective(beta: Tensor) -> Tensor:
        return (F.softplus(x @ beta) - p * (x @ beta)).sum() + beta @ ridge @ beta / 2

    beta = x.new_zeros(k)
    for _ in range(100):  # Newton, halving a step that goes too far
        q = (x @ beta).sigmoid()
        step = torch.linalg.solve(hessian(q), x.T @ (p - q) - ridge @ beta)
        while objective(beta + step) > objective(beta) and step.abs().max() > 1e-12:
            step = step / 2
        beta = beta + step
    q, win = (x @ beta).sigmoid(), beta[0].sigmoid().item()
    bread, meat = torch.linalg.inv(hessian(q)), x.T @ (x * ((p - q) ** 2)[:, None])
    variance = (bread @ meat @ bread)[0, 0].item() * n / (n - k) if n > k else math.nan
    return 100 * win, 100 * win * (1 - win) * variance**0.5


# --------------------------------------------------------------------------------------------------- generate


@torch.no_grad()
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
    done: Mapping[int, str] = {},
    store: Callable[[int, str], None] = lambda place, text: None,
) -> list[str]:
    """One response to each prompt of token ids (already templated), without special tokens.

    A response depends on (seed, prompt, how often the prompt came before) and not on the batch it is in:
    the greedy choice over logits / temperature + Gumbel noise is an exact sample, and each response has
    its own generator of noise. temperature 0: greedy. top_p: only the most probable tokens that together
    have this probability. done: responses there are, by place; store(place, response) is called for each
    new one.
    """
    if not (temperature >= 0 and 0 < top_p <= 1 and min(max_new_tokens, batch_size) >= 1):
        raise ValueError("sampling needs temperature >= 0, 0 < top_p <= 1, and one token and prompt at least")
    device, counts, seeds, responses = next(model.parameters()).device, {}, [], dict(done)
    for prompt in map(tuple, prompts):
        counts[prompt] = counts.get(prompt, 0) + 1
        digest = hashlib.sha256(f"{seed} {prompt} {counts[prompt]}".encode())
        seeds.append(int(digest.hexdigest()[:15], 16))
    row = as_row([{"role": "user", "content": "a"}], "a", "b", tokenizer)
    turn = data.tokenize_preferences([row], tokenizer, 10**6)[0][0]  # it ends as training supervised it
    own = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, turn.chosen[-1], *(own if isinstance(own, list) else [own])]
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    todo = sorted((i for i in range(len(prompts)) if i not in done), key=lambda i: -len(prompts[i]))
    # The model's own settings (a repetition penalty, say) would make it sampling that nobody asked for.
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        for k in tqdm(range(0, len(todo), batch_size), label, unit="batch", disable=not label):
            batch = todo[k : k + batch_size]
            width = len(prompts[batch[0]])
            pads = torch.tensor([[width - len(prompts[i])] for i in batch])
            ids = [[ends[0]] * (width - len(prompts[i])) + list(prompts[i]) for i in batch]
            output = model.generate(
                input_ids=torch.tensor(ids).to(device),
                attention_mask=(torch.arange(width) >= pads).long().to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0],
                logits_processor=_sampling([seeds[i] for i in batch], temperature, top_p),
            )
            for i, tokens in zip(batch, output[:, width:].tolist()):
                end = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
                responses[i] = tokenizer.decode(tokens[:end], skip_special_tokens=True)
                store(i, responses[i])
    finally:
        model.generation_config = settings
    return [responses[i] for i in range(len(prompts))]


def _sampling(seeds: list[int], temperature: float, top_p: float) -> LogitsProcessorList:
    if temperature == 0:
        return LogitsProcessorList()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def add_noise(_: Tensor, logits: Tensor) -> Tensor:
        waits = [torch.empty(logits.shape[1]).exponential_(generator=generator) for generator in generators]
        return logits - torch.stack(waits).log().to(logits.device)  # -log of an exponential is Gumbel noise

    nucleus = [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList([lambda _, logits: logits.float() / temperature, *nucleus, add_noise])


def as_row(prompt: Prompt, chosen: str, rejected: str, tokenizer: Any) -> Row:
    """A row for data.tokenize_preferences; messages become HH's transcript without a chat template."""
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": repr(text_of(prompt)[:40])}
    if isinstance(prompt, str):
        return row
    if tokenizer.chat_template:
        return row | {side: {"role": "assistant", "content": row[side]} for side in ("chosen", "rejected")}
    return row | {"prompt": _transcript(prompt), "chosen": f" {chosen}", "rejected": f" {rejected}"}


def _transcript(turns: list[dict[str, str]]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names.get(t['role'], t['role'])}: {t['content']}" for t in turns) + HH_MARK


def text_of(prompt: Prompt) -> str:
    """A prompt as AlpacaEval's files have it: the user's one message, or the transcript of several turns."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else _transcript(prompt)


def prompt_of(instruction: str) -> Prompt:
    return instruction if HH_MARK in instruction else [{"role": "user", "content": instruction}]


def read_pairs(source: str) -> list[Row]:
    if source == BUILTIN:
        return data.synthetic_preferences(data.BUILTIN_EVAL_PAIRS, 0, held_out=True)
    return data.read_preferences(source)


def read_prompts(source: str) -> list[Row]:
    """{instruction, prompt, perhaps dataset}, each instruction once: AlpacaEval's, or of preference pairs."""
    rows = read_json(Path(source)) if source.endswith(".json") and Path(source).is_file() else []
    if rows and isinstance(rows, list) and all(isinstance(r, dict) and "instruction" in r for r in rows):
        rows = [r | {"prompt": prompt_of(r["instruction"])} for r in rows]
    else:
        rows = [{"instruction": text_of(r["prompt"]), "prompt": r["prompt"]} for r in read_pairs(source)]
    return list({row["instruction"]: row for row in rows}.values())


def write_outputs(path: Path, name: str, model: Any, tokenizer: Any, prompts: list[Row], how: Row) -> None:
    """AlpacaEval's model_outputs.json; each response is stored beside it, in .jsonl, as it comes."""
    room = (getattr(model.config, "max_position_embeddings", None) or 10**6) - how["max_new_tokens"]
    rows = [as_row(prompt["prompt"], "a", "b", tokenizer) for prompt in prompts]
    ids = [pair.prompt for pair in data.tokenize_preferences(rows, tokenizer, room + 64, room)[0]]
    if len(ids) < len(prompts):
        raise ValueError(f"{len(prompts) - len(ids)} of {len(prompts)} prompts are empty: remove them")
    about = {"model": lm.fingerprint(model), "prompts": hashlib.sha256(repr(ids).encode()).hexdigest()}
    about |= {key: value for key, value in how.items() if key != "batch_size"}
    stored = path.with_suffix(".jsonl")
    if not read_lines(stored):
        append_line(stored, about)
    first, *lines = read_lines(stored)
    if first != about:
        raise ValueError(f"{stored} is of another model, other prompts or settings: delete it, or give --out")
    done = {line["place"]: line["output"] for line in lines}

    def store(place: int, text: str) -> None:
        append_line(stored, {"place": place, "output": text})

    texts = generate(model, tokenizer, ids, **how, label=str(path), done=done, store=store)
    kept = [{key: row[key] for key in ("dataset", "instruction") if key in row} for row in prompts]
    write_json(path, [row | {"output": text.strip(), "generator": name} for row, text in zip(kept, texts)])
    print(f"{path}: {len(texts)} outputs of {name}")


# ------------------------------------------------------------------------------------------------------ judge

JUDGE_PROMPT = """<|im_start|>system
You compare two answers to one request and say which of them serves the person who asked better.
<|im_end|>
<|im_start|>user
# Request
{instruction}

# Answer m
{output_1}

# Answer M
{output_2}

# Verdict
Weigh correctness, helpfulness and clarity, not length or order. Reply with nothing but the
better answer's name, m or M:
<|im_end|>"""


def judge_messages(template: str, instruction: str, first: str, second: str) -> list[dict[str, str]]:
    """The judge's chat. As in alpaca_eval, each {key} is replaced once, in this order, even in text filled in
    before; unlike there, turns are split first, so that a control token in a text cannot begin one."""
    turns = [turn.partition("<|im_end|>")[0].strip() for turn in template.split("<|im_start|>")[1:]]
    messages = [dict(zip(("role", "content"), re.split(r"\s*\n", turn, maxsplit=1))) for turn in turns]
    for key, value in (("{instruction}", instruction), ("{output_1}", first), ("{output_2}", second)):
        message = next((m for m in messages if key in m.get("content", "")), None)
        if message is None:
            raise ValueError(f"the judge's prompt lacks {key} inside a turn, <|im_start|>user ... <|im_end|>")
        message["content"] = message["content"].replace(key, value, 1)
    return [m | {"content": m["content"].strip()} for m in messages]


def parse_verdict(choice: Row) -> float | None:
    """1 = first answer .. 2 = second, by log-probabilities of "m" and "M"; without any, the hard label."""
    try:
        tops = choice["logprobs"]["content"][0]["top_logprobs"]
    except (LookupError, TypeError):
        return {"m": 1.0, "M": 2.0}.get(((choice.get("message") or {}).get("content") or "").strip())
    p = {top["token"]: math.exp(top["logprob"]) for top in tops}
    first, second = p.get("m", 0.0), p.get("M", 0.0)
    return 2 - first / (first + second) if first + second else None


def ask_endpoint(
    items: list[Item], url: str, model: str, template: str, store: Path, concurrency: int = 5
) -> list[float | None]:
    """AlpacaEval's weighted judge behind an OpenAI-compatible URL. Each answer goes to `store` as it
    comes, under a hash of its question; only what is not there is asked."""
    url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    how = {"max_tokens": 1, "temperature": 1, "top_p": 1.0, "logprobs": True, "top_logprobs": 5}
    bodies, keys, switched, stop, lock = {}, [], [], threading.Event(), threading.Lock()
    for prompt, *outputs in items:
        draw = random.Random(f"is_switched_outputs{text_of(prompt)}0")  # alpaca_eval's, at its seed 0
        switched.append(draw.choices([False, True])[0])  # whether the judge sees the model's output first
        messages = judge_messages(template, text_of(prompt), *(outputs[::-1] if switched[-1] else outputs))
        body = {"model": model, "messages": messages} | how
        keys.append(hashlib.sha256(json.dumps([url, body]).encode()).hexdigest())
        bodies[keys[-1]] = body
    answers = {line["key"]: line["answer"] for line in read_lines(store)}
    missing = [key for key in bodies if key not in answers]

    def ask(key: str) -> None:
        answer = post(url, bodies[key], stop)
        with lock:
            append_line(store, {"key": key, "answer": answer})
            answers[key] = answer
            bar.update()

    with tqdm(total=len(missing), desc=model, unit="request") as bar, ThreadPoolExecutor(concurrency) as pool:
        try:
            for future in [pool.submit(ask, key) for key in missing]:
                future.result()
        except (ValueError, OSError, HTTPException, KeyboardInterrupt) as error:
            stop.set()
            pool.shutdown(cancel_futures=True)  # what is under way is paid for: it ends, and is stored
            kept = f"{len(read_lines(store))} answers are kept in {store}, the same command goes on"
            raise ValueError(f"{error or 'stopped'}; {kept}") from None
    tokens = sum((answers[key].get("usage") or {}).get("total_tokens") or 0 for key in missing)
    print(f"{model}: {len(missing)} requests, {tokens:,} tokens; {len(bodies) - len(missing)} stored answers")
    choices = [answers[key]["choices"][0] for key in keys]
    if hard := sum(bool(choice) and not choice.get("logprobs") for choice in choices):
        print(f"{model}: {hard} answers without log-probabilities, hard labels: not AlpacaEval's judge")
    found = map(parse_verdict, choices)
    return [3 - verdict if verdict and switch else verdict for verdict, switch in zip(found, switched)]


def post(url: str, body: Row, stop: threading.Event) -> Row:
    """The endpoint's answer; if it is overloaded or the connection breaks, waits and tries again."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    key, said = os.environ.get("OPENAI_API_KEY", "").strip(), "stopped"
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError("OPENAI_API_KEY holds characters that no key has: set it again")
    if key:  # unredirected: not for whoever a redirect names
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    for attempt in range(7):
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                answer = json.load(response)
            answer["choices"][0].keys()
            return answer
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code} {' '.join(error.read(2000).decode(errors='replace').split())[:300]}"
            said = said.replace(key or "\0", "***")
            if error.code == 400 and re.search("context_length|content_filter|content_policy", said):
                return {"choices": [{}], "refused": said}  # no verdict on this row; there may be on others
            if error.code not in (408, 409, 429) and error.code < 500 or "insufficient_quota" in said:
                raise ValueError(f"{url}: {said}; check OPENAI_API_KEY, the URL and --judge_model") from None
        except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            said = f"{type(error).__name__} {error}".replace(key or "\0", "***")
        tqdm.write(f"{said[:120]}; trying again in {2**attempt} s", file=sys.stderr)
        if stop.wait(2**attempt):
            break
    raise ValueError(f"{url}: no answer ({said}); check the URL and the connection")


@torch.no_grad()
def score_with_reward_model(items: list[Item], folder: str, device: Any) -> list[tuple[float, float]]:
    """By a sequence classifier with one label, of the templated chat or of prompt and response as texts."""
    tokenizer = lm.load_tokenizer(folder)
    try:
        model = RewardModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # whatever a damaged folder raises
        raise ValueError(f"{folder}: no reward model ({' '.join(str(error).split())[:200]})") from None
    if model.config.num_labels != 1 or "SequenceClassification" not in str(model.config.architectures):
        kind = f"{model.config.architectures} with {model.config.num_labels} labels"
        raise ValueError(f"{folder}: {kind} is no reward model (a sequence classifier with one label)")
    model.to(device).eval()

    def reward(prompt: Prompt, response: str) -> float:
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        texts, how = [text_of(prompt), response], {}
        if tokenizer.chat_template:
            turns = [*turns, {"role": "assistant", "content": response}]
            texts, how = [tokenizer.apply_chat_template(turns, tokenize=False)], {"add_special_tokens": False}
        inputs = tokenizer(*texts, **how, truncation=True, return_tensors="pt").to(device)
        return model(**inputs).logits[0, 0].item()

    return [(reward(prompt, a), reward(prompt, b)) for prompt, a, b in tqdm(items, folder)]


def score_with_run(items: list[Item], folder: Path, device: Any) -> list[list[float]]:
    """By a run's implicit reward, beta (log pi - log pi_ref); of a reference-free objective, beta log pi."""
    s, tokenizer, models = open_run(folder)
    rows = [as_row(prompt, *outputs, tokenizer) for prompt, *outputs in items]
    pairs, _ = data.tokenize_preferences(rows, tokenizer, s["max_length"], s["max_prompt_length"])
    rewards, (start, *_, policy) = torch.zeros(len(items), 2), models.values()  # 0, 0: equal once truncated
    for sign, name in ((1, policy), (-1, start))[: 1 if s["objective"] in REFERENCE_FREE else 2]:
        model = lm.load_model(name, s["seed"]).to(device).eval()
        scores = response_scores(model, pairs, s["objective"], str(name))
        rewards[[pair.row for pair in pairs]] += sign * s["beta"] * scores
    return rewards.tolist()


def open_judge(args: argparse.Namespace, device: Any, store: Path) -> tuple[str, Judge]:
    """The name and the judge that --judge asks for. Equal outputs are a draw that it is not asked about."""

    def judge(items: list[Item]) -> list[float | None]:
        asked = [item for item in items if item[1] != item[2]]
        found = iter(decide(asked) if asked else [])
        return [1.5 if item[1] == item[2] else next(found) for item in items]

    def decide(items: list[Item]) -> list[float | None]:
        if is_url:
            return ask_endpoint(items, args.judge, args.judge_model, template, store, args.concurrency)
        if args.judge == "true":
            scores = [[data.true_reward(text_of(prompt), text) for text in texts] for prompt, *texts in items]
        elif is_run(args.judge):
            scores = score_with_run(items, Path(args.judge), device)
        else:
            scores = score_with_reward_model(items, args.judge, device)
        return [1.5 + (b > a) / 2 - (b < a) / 2 for a, b in scores]

    is_url, path = bool(re.match("https?://", args.judge)), args.judge_prompt
    if path == "alpaca_eval":
        package = importlib.util.find_spec("alpaca_eval")
        if not package:
            raise ValueError("--judge_prompt alpaca_eval: pip install alpaca_eval, or give the prompt's file")
        configs = Path(package.origin).parent / "evaluators_configs"
        path = configs / "alpaca_eval_clf_gpt4_turbo" / "alpaca_eval_clf.txt"
    template = Path(path).read_text(encoding="utf-8") if path else JUDGE_PROMPT
    name = f"{args.judge_model}, {Path(path).name if path else 'our own prompt'}" if is_url else args.judge
    return name, judge


def judge_outputs(folder: Path, name: str, judge: Judge) -> Row:
    """Win rates of the folder's model_outputs.json against its reference_outputs.json, in whose order
    annotations.json is written."""
    sides = []
    for path in (folder / "reference_outputs.json", folder / "model_outputs.json"):
        if not path.is_file():
            raise ValueError(f"{path} is missing: make it with --generate PROMPTS")
        rows = read_json(path)
        if not all(isinstance(row, dict) and {"instruction", "output"} <= row.keys() for row in rows):
            raise ValueError(f"{path}: not a list of {{instruction, output, generator}}, as AlpacaEval's")
        sides.append({row["instruction"]: row for row in rows})
        if len(sides[-1]) < len(rows):
            raise ValueError(f"{path}: {len(rows) - len(sides[-1])} instructions stand twice; keep one")
    both = [(row, sides[1][instruction]) for instruction, row in sides[0].items() if instruction in sides[1]]
    if not both:
        raise ValueError(f"{folder}: no instruction in common; generate both from the same prompts")
    preferences = judge([(prompt_of(a["instruction"]), a["output"], b["output"]) for a, b in both])
    annotations = []
    for (a, b), preference in zip(both, preferences):
        row = {key: a[key] for key in ("dataset", "instruction") if key in a}
        for k, side in ((1, a), (2, b)):
            row |= {f"output_{k}": side["output"], f"generator_{k}": side.get("generator", f"model {k}")}
        annotations.append(row | {"annotator": name, "preference": preference and round(preference, 10)})
    write_json(folder / "annotations.json", annotations)
    theirs, mine = ([len(row["output"]) for row in side] for side in zip(*both))
    found = {"outputs": str(folder), "judge": name, "pairs": len(both), "no verdict": preferences.count(None)}
    found |= dict(zip(("WR %", "WR error"), win_rate(preferences)))
    found |= dict(zip(("LC %", "LC error"), length_controlled_win_rate(preferences, mine, theirs)))
    found |= {"characters": sum(mine) / len(mine), "baseline's": sum(theirs) / len(theirs)}
    return found | {"without a partner": len(sides[0] | sides[1]) - len(both)}


def judge_accuracy(judge: Judge, rows: list[Row]) -> float:
    """Percent of labelled rows on which the judge prefers chosen; a draw counts half."""
    sides = [[row["rejected"], row["chosen"]] for row in rows]
    texts = [[side if isinstance(side, str) else side["content"] for side in pair] for pair in sides]
    found = [p for p in judge([(row["prompt"], *pair) for row, pair in zip(rows, texts)]) if p is not None]
    return 100 * sum((p > 1.5) + (p == 1.5) / 2 for p in found) / max(1, len(found))


# ------------------------------------------------------------------------------------------------------- runs


def is_run(name: str | Path) -> bool:
    path = Path(name) / "config.json"
    return path.is_file() and "settings" in read_json(path)


def open_run(folder: Path) -> tuple[Row, Any, dict[str, Path | str]]:
    """A finished run's settings, tokenizer, and models by label: the starting one, vanilla, RMO."""
    if not is_run(folder):
        raise ValueError(f"{folder}: no run (no config.json with settings in it); train.py makes them")
    if not (folder / "policy").is_dir():
        raise ValueError(f"{folder}: not finished (no policy/); start train.py again with the same command")
    s = read_json(folder / "config.json")["settings"]
    vanilla, policy = f"vanilla {s['objective'].upper()}", folder / "policy"
    models = {"SFT": lm.stage_folder(folder, "sft")} if s["sft_epochs"] else {"base": s["model"]}
    if s["batching"] == "random" and not s["lambda_reg"] and s["filter_ratio"] == 0 and s["tau"] is None:
        return s, lm.load_tokenizer(policy), models | {vanilla: policy}
    if (folder / "proxy").is_dir() or s["proxy"]:
        models[vanilla] = lm.stage_folder(folder, "proxy")
    return s, lm.load_tokenizer(policy), models | {"RMO": policy}


def held_out(s: Row, tokenizer: Any) -> tuple[list[Pair], list[Row]]:
    """The held-out pairs of a run with these settings, and the row of text that each was made from."""
    splits, rows, _ = data.load_splits(s, tokenizer)
    if s["eval_data"]:
        rows = data.read_preferences(s["eval_data"])
    elif s["data"] == BUILTIN:
        rows = data.synthetic_preferences(data.BUILTIN_EVAL_PAIRS, s["seed"], held_out=True)
    return splits["eval"], [rows[pair.row] for pair in splits["eval"]]


def response_scores(model: nn.Module, pairs: list[Pair], objective: str, label: str = "") -> Tensor:
    """Scores of chosen and rejected as the objective has them, sums over tokens or means: [N, 2]."""
    longest = [max(pairs, key=lambda pair: pair.size)]
    shared = lm.shares_prompt(model, *(data.collate(longest, shared) for shared in (True, False)))
    ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sums = lm.score_pairs(model, data.scoring_batches(pairs, 2048, shared, *ranks), len(pairs), label)
    lengths = torch.tensor([(len(pair.chosen), len(pair.rejected)) for pair in pairs])
    return sums / lengths if objective in LENGTH_NORMALISED else sums


def margin_statistics(margins: Tensor, start: Tensor | None = None) -> dict[str, float]:
    """Of margins [N], in percent and nats; accuracy: the share above 0. start: the starting model's
    margins, which the implicit reward is relative to. Small: within a tenth of a standard deviation of 0,
    as tau = 14 is in the paper."""
    margins = margins.double()
    shares = {"accuracy": margins > 0} | ({} if start is None else {"reward accuracy": margins > start})
    shares |= {"negative": margins < 0, "small": margins.abs() <= 0.1 * margins.std(unbiased=False)}
    values = {f"{key} %": 100 * share.double().mean() for key, share in shares.items()}
    values |= {"mean": margins.mean(), "median": margins.median(), "variance": margins.var(unbiased=False)}
    return {key: value.item() for key, value in values.items()}


def report_run(folder: Path, device: Any) -> dict[str, dict[str, float]]:
    """Print a table on the held-out pairs of a finished run, and return it: {label: {column: value}}.

    The built-in task adds what is true there: the reward of sampled responses, and how often it beats the
    starting model's. In a distributed run call it on every rank, as they share the scoring. Without
    held-out pairs: {}, after saying so.
    """
    s, tokenizer, models = open_run(folder)
    (pairs, rows), first = held_out(s, tokenizer), not dist.is_initialized() or dist.get_rank() == 0
    if not pairs:
        if first:
            print(f"{folder}: no held-out pairs, no report; train with --eval_data FILE or --eval_share 0.1")
        return {}
    report, margins, baseline = {}, {}, None
    prompts = {tuple(pair.prompt): text_of(row["prompt"]) for pair, row in zip(pairs, rows)}
    for label, name in models.items():
        model = lm.load_model(name, s["seed"]).to(device).eval()
        chosen, rejected = response_scores(model, pairs, s["objective"]).unbind(1)
        report[label] = margin_statistics(chosen - rejected, next(iter(margins.values()), None))
        margins[label] = chosen - rejected
        if s["data"] == BUILTIN and not s["eval_data"]:
            texts = generate(model, tokenizer, list(prompts), 64, 1.0, 1.0, s["seed"], batch_size=64)
            rewards = [data.true_reward(*pair) for pair in zip(prompts.values(), texts)]
            report[label]["true reward"] = sum(rewards) / len(rewards)
            if baseline:
                found = win_rate([1.5 + (a > b) / 2 - (a < b) / 2 for a, b in zip(rewards, baseline)])
                report[label] |= dict(zip(("win rate %", "win rate error"), found))
            baseline = baseline or rewards
    if first:
        print(f"{folder}: {len(pairs)} held-out pairs, margins in nats, wins against {next(iter(models))}")
        print(markdown([{"model": label} | row for label, row in report.items()]))
        remember(folder, report=report, margins={label: values.tolist() for label, values in margins.items()})
    return report


def batch_margins(folder: Path) -> dict[str, Tensor]:
    """Margins of a run's training pairs by its proxy (or base model): "all", and in batches [n, m] of each
    kind, without a remainder that is the same for all kinds."""
    s, path = open_run(folder)[0], folder / "margins.safetensors"
    if not path.is_file():
        raise ValueError(f"{path} is missing: give a finished run")
    scores, draw, m = load_file(path), torch.Generator().manual_seed(s["seed"]), s["batch_size"]
    by = "proxy" if "proxy_chosen" in scores else "base"
    margins = scores[f"{by}_chosen"] - scores[f"{by}_rejected"]
    kinds = {"Low-Var": batching.low_variance_batches, "Rnd-Var": batching.random_batches}
    kinds["High-Var"] = batching.high_variance_batches
    seated = margins[torch.randperm(len(margins), generator=draw)[: len(margins) // m * m]]
    batches = {name: seated[make(seated, m, draw)] for name, make in kinds.items()}
    return {"all": margins} | batches


def table3(folder: Path) -> Row:
    """Mean variance of the margins in a batch, in nats squared, and its share of the largest possible."""
    kinds, row = batch_margins(folder), {"run": folder.name}
    for name in ("Low-Var", "Rnd-Var", "High-Var"):
        margins, (n, m) = kinds[name].flatten(), kinds[name].shape
        total = batching.total_variance(margins, torch.arange(n * m).view(n, m)).item()
        row[name] = total / n
        row[f"{name} of bound %"] = 100 * total / batching.variance_bound(margins, m).item()
    return row


def run_groups(folders: list[Path], device: Any) -> list[Row]:
    """Runs that differ by seed at most, together: {name, settings, differing: those that other runs have
    otherwise, folders, results: the policy's, means with standard errors over seeds}."""
    settings, groups = {folder: open_run(folder)[0] for folder in folders}, {}
    free = {"seed", "output_dir", "proxy", "micro_batch_tokens", "save_steps"}
    keys = dict.fromkeys(key for s in settings.values() for key in s if key not in free)
    keys = [key for key in keys if len({json.dumps(s.get(key)) for s in settings.values()}) > 1]
    for folder, s in settings.items():
        if "report" not in remembered(folder):
            report_run(folder, device)
        known = remembered(folder)
        result = dict([*known.get("report", {"": {}}).values()][-1])
        for judge, row in known.get("judged", {}).items():
            result |= {f"{k} ({judge}) {v}": row[f"{k} {v}"] for k in ("WR", "LC") for v in ("%", "error")}
        differing = {key: s.get(key) for key in keys}
        name = ", ".join(f"{key} {value}" for key, value in differing.items()) or folder.name
        group = {"name": name, "settings": s, "differing": differing, "folders": [], "found": []}
        group = groups.setdefault(json.dumps(differing), group)
        group["folders"].append(folder)
        group["found"].append(result)
    for group in groups.values():
        group["results"], found = {}, group.pop("found")
        for key in dict.fromkeys(key for result in found for key in result if not key.endswith(" error")):
            error = key.removesuffix(" %") + " error"
            values = torch.tensor([result[key] for result in found if key in result], dtype=torch.float64)
            group["results"][key] = values.mean().item()
            if len(values) > 1:
                group["results"][error] = values.std().item() / len(values) ** 0.5
            elif error in found[0]:
                group["results"][error] = found[0][error]
    return list(groups.values())


def markdown(rows: list[Row]) -> str:
    """Rows as a Markdown table; "x error" stands behind "x" or "x %"; what a row lacks is a dash."""

    def text(value: Any) -> str:
        if isinstance(value, float) and not math.isnan(value):
            return f"{value:.2g}" if abs(value) < 0.1 else f"{value:,.{1 if abs(value) >= 10 else 2}f}"
        return "-" if value is None or isinstance(value, float) else str(value)

    rows_by_length = sorted(rows, key=len, reverse=True)  # the first may lack columns in the middle
    columns = [c for c in dict.fromkeys(c for row in rows_by_length for c in row) if not c.endswith(" error")]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        errors = [text(row.get(column.removesuffix(" %") + " error")) for column in columns]
        lines.append([text(row.get(c)) + (f" ± {e}" if e != "-" else "") for c, e in zip(columns, errors)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def remembered(folder: Path) -> Row:
    """evaluation.json of a run, if it is of this training, which the wall times in metrics.jsonl tell."""
    texts = [(folder / name).read_bytes() for name in ("config.json", "metrics.jsonl")]
    run, path = hashlib.sha256(b"".join(texts)).hexdigest()[:16], folder / "evaluation.json"
    found = read_json(path) if path.is_file() else {}
    return found if found.get("run") == run else {"run": run}


def remember(folder: Path, **values: Any) -> None:
    write_json(folder / "evaluation.json", remembered(folder) | values)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def write_json(path: Path, value: Any) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(unfinished, path)


def read_lines(path: Path) -> list[Any]:
    """The values of a .jsonl file, less a last line that a crash cut short."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    try:
        return [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); repair or delete it") from None


def append_line(path: Path, value: Any) -> None:
    """Add a whole line to a .jsonl file, in the place of one that a crash cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        size = file.tell()
        file.seek(max(0, size - 1))
        if size and file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(value).encode() + b"\n")


# ---------------------------------------------------------------------------------------------------- figures

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00")  # Okabe and Ito's, and as many
STROKES = ("-", "--", "-.", ":", (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)))  # strokes for black and white print


def style(k: int) -> Row:
    return {"color": COLOURS[k % 6], "linestyle": STROKES[k % 6], "linewidth": 1.8}


def canvas(width: float, height: float, rows: int, columns: int, title: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    figure = Figure((width, height), layout="constrained", dpi=160)
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def densities(axis: Any, values: dict[str, Tensor], low: float, high: float, first: int = 0) -> None:
    """Gaussian kernel densities with Silverman's bandwidth."""
    grid = torch.linspace(low, high, 600, dtype=torch.float64)
    for k, (label, v) in enumerate(values.items(), first):
        v = v.double().flatten()
        width = max(1.06 * v.std().item() * len(v) ** -0.2, (high - low) / 1000)
        heights = (-(((grid[:, None] - v) / width) ** 2) / 2).exp().mean(1) / (width * math.tau**0.5)
        axis.plot(grid, heights, label=label, **style(k))
    axis.set(ylabel="density (1 / nat)", xlim=(low, high))
    axis.legend(frameon=False)


def span(values: Any) -> tuple[float, float]:
    """From where to where all but the outermost hundredth of each lies."""
    ends = torch.stack([v.double().flatten().quantile(torch.tensor([0.005, 0.995]).double()) for v in values])
    low, high = ends[:, 0].min().item(), ends[:, 1].max().item()
    return low - 0.1 * (high - low), high + 0.1 * (high - low)


def results_over(axis: Any, xs: list[float], groups: list[Row], pattern: str, x_label: str) -> None:
    """Each result in percent that all groups have and whose name fits, over xs, with standard errors."""
    keys = [key for key in groups[0]["results"] if re.search(pattern + ".*%$", key)]
    keys = [key for key in keys if all(key in group["results"] for group in groups)]
    for k, key in enumerate(keys):
        name = key.removesuffix(" %")
        points = [(x, g["results"][key], g["results"].get(f"{name} error", 0)) for x, g in zip(xs, groups)]
        axis.errorbar(*zip(*sorted(points)), label=name, marker="os^Dv*"[k % 6], capsize=3, **style(k))
    axis.set(xlabel=x_label, ylabel="percent")
    if keys:
        axis.legend(frameon=False, fontsize=8)


def figure1(groups: list[Row]) -> Any:
    figure, (axis,) = canvas(7, 4, 1, 1, "Training loss of the policy")
    for k, group in enumerate(groups):
        curves = [[line["loss"] for line in read_lines(f / "metrics.jsonl")] for f in group["folders"]]
        loss = torch.tensor([curve[: min(map(len, curves))] for curve in curves]).mean(0)  # over seeds
        window = max(1, len(loss) // 20)
        axis.plot(range(1, len(loss) + 1), loss, color=COLOURS[k % 6], linewidth=0.5, alpha=0.35)
        running = loss.unfold(0, window, 1).mean(1)
        axis.plot(range(window, len(loss) + 1), running, label=group["name"], **style(k))
    axis.set(xlabel=f"optimizer step (bold: mean of the last {window})", ylabel="loss (nats per pair)")
    axis.legend(frameon=False)
    return figure


def figure3(folder: Path) -> Any:
    kinds = batch_margins(folder)
    mean = kinds.pop("all").mean().item()
    means = {name: margins.mean(1) for name, margins in kinds.items()}
    title = f"Mean margin of a batch of {kinds['Rnd-Var'].shape[1]} pairs, {folder.name}"
    figure, axes = canvas(7, 6, 3, 1, title)
    for k, (axis, name) in enumerate(zip(axes, means)):
        densities(axis, {name: means[name]}, *span(means.values()), first=k)
        axis.axvline(mean, color="grey", linewidth=0.8, zorder=0)
    axes[-1].set(xlabel="mean margin of the batch (nats); grey: mean over all pairs")
    return figure


def figure4(groups: list[Row]) -> Any:
    groups = sorted(groups, key=lambda group: group["settings"]["lambda_reg"])
    xs = [group["settings"]["lambda_reg"] for group in groups]
    found = [[remembered(folder).get("margins", {}) for folder in group["folders"]] for group in groups]
    if not all(run for runs in found for run in runs):
        raise ValueError("figure 4 shows margins of held-out pairs; train with --eval_data or --eval_share")
    margins = {}
    for x, runs in zip(xs, found):
        margins[f"λ = {x:g}"] = torch.cat([torch.tensor([*run.values()][-1]) for run in runs])
    figure, axes = canvas(12, 4, 1, 3, "Regularization intensity λ: held-out margins, accuracy, win rate")
    densities(axes[0], margins, *span(margins.values()))
    axes[0].axvline(0, color="grey", linewidth=0.8)
    axes[0].set(xlabel="margin (nats)")
    results_over(axes[1], xs, groups, "accuracy", "λ")
    results_over(axes[2], xs, groups, "^(win rate|WR|LC)", "λ")
    return figure


def filtered(folder: Path) -> Row:
    path = folder / "filter.json"
    return read_json(path) if path.is_file() else {"ratio": 0.0, "removed_step1": [], "removed_step2": []}


def figure5(groups: list[Row]) -> Any:
    ratios = [[100 * filtered(folder)["ratio"] for folder in group["folders"]] for group in groups]
    figure, (axis,) = canvas(6, 4, 1, 1, "Win rate by filter ratio")
    xs = [sum(ratio) / len(ratio) for ratio in ratios]
    results_over(axis, xs, groups, "^(win rate|WR|LC)", "pairs that the filter removed (percent)")
    return figure


def figure_margins(folder: Path) -> Any:
    margins, held = batch_margins(folder)["all"], remembered(folder).get("margins", {})
    kept = torch.ones(len(margins), dtype=torch.bool)
    kept[filtered(folder)["removed_step1"] + filtered(folder)["removed_step2"]] = False
    title = f"Margins before and after filter and training, {folder.name}"
    figure, axes = canvas(11, 4, 1, 2 if held else 1, title)
    bins = torch.linspace(*span([margins]), 61)
    for k, (label, values) in enumerate({"all": margins, "kept": margins[kept]}.items()):
        axes[0].hist(values, bins, histtype="step", label=f"{label} {len(values):,} pairs", **style(k))
    axes[0].set(title="training pairs, before and after the filter", ylabel="pairs")
    axes[0].set(xlabel="margin by the proxy (nats)")
    axes[0].legend(frameon=False)
    if held:
        values = {label: torch.tensor(values) for label, values in held.items()}
        densities(axes[1], values, *span(values.values()))
        axes[1].set(title="held-out pairs, before and after training", xlabel="margin (nats)")
    return figure


# ---------------------------------------------------------------------------------------------------- command


def parse(words: list[str] | None = None) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    add = parser.add_argument
    add("models", nargs="+", help="run folders that train.py wrote, or models (folder or hub id)")
    add("--generate", metavar="PROMPTS", help="AlpacaEval's instructions .json, pairs, or 'built-in'")
    add("--baseline", metavar="MODEL", help="what to compare with (default: the run's starting model)")
    add("--max_new_tokens", type=int, default=256, help="tokens of a response at most (default: %(default)s)")
    add("--temperature", type=float, default=0.7, help="of sampling, 0 = greedy (default: %(default)s)")
    add("--top_p", type=float, default=1.0, help="nucleus sampling (default: 1 = off)")
    add("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    add("--batch_size", type=int, default=16, help="prompts at a time, changes no output (default: 16)")
    add("--judge", metavar="URL|FOLDER|true", help="judge model_outputs.json against reference_outputs.json")
    add("--judge_model", default="gpt-4o", help="model behind the URL (default: %(default)s)")
    add("--judge_prompt", metavar="FILE", help="'alpaca_eval': the installed package's (default: our own)")
    add("--concurrency", type=int, default=5, help="requests at a time (default: %(default)s)")
    add("--labelled", metavar="PAIRS", help="test the judge on these (default: held-out pairs; URL: none)")
    add("--out", metavar="DIR", help="folder of outputs and judgements (default: RUN/evaluation)")
    add("--pairs", metavar="PAIRS", help="print the models' margins on these")
    add("--table3", action="store_true", help="print the margin variance of each kind of batches")
    add("--figure1", metavar="FILE", help="training loss of the runs (figures: .png, .svg or .pdf)")
    add("--figure3", metavar="FILE", help="mean margins of batches, of the first run")
    add("--figure4", metavar="FILE", help="margins, accuracy and win rates by lambda_reg")
    add("--figure5", metavar="FILE", help="win rates by filter ratio")
    add("--figure_margins", metavar="FILE", help="margins by filter and training, of the first run")
    add("--json", metavar="FILE", help="write the printed tables here too")
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {key: Path(value) for key, value in vars(args).items() if key.startswith("figure") and value}
    if bad := [path for path in figures.values() if path.suffix not in (".png", ".svg", ".pdf")]:
        raise ValueError(f"{bad[0]}: the name of a figure must end in .png, .svg or .pdf")
    if args.out and len(args.models) > 1:
        raise ValueError("--out is for one model: leave it out, or name one")
    tables, folders = {}, [Path(name) for name in args.models]
    for name in args.models if args.generate else []:
        write_both_outputs(name, args, device)
    if args.judge:
        tables["judged"] = [judge_model(name, args, device) for name in args.models]
    if args.pairs:
        tables["margins"] = [row for name in args.models for row in margin_rows(name, args.pairs, device)]
    if args.table3:
        tables["table3"] = [table3(folder) for folder in folders]
    groups = []
    if figures.keys() - {"figure3"} or not (figures or tables or args.generate):
        groups = run_groups(folders, device)
    if groups and not tables:
        names = [{"run": ", ".join(f.name for f in g["folders"]), "seeds": len(g["folders"])} for g in groups]
        tables["runs"] = [name | g["differing"] | g["results"] for name, g in zip(names, groups)]
    for rows in tables.values():
        print(markdown(rows))
    if args.judge:
        print("LC: alpaca_eval's length_controlled_minimal without L1 penalty; ±: standard error")
    if args.json:
        write_json(Path(args.json), tables)
    for name, path in figures.items():
        about = folders[0] if name in ("figure3", "figure_margins") else groups
        path.parent.mkdir(parents=True, exist_ok=True)
        globals()[name](about).savefig(path)
        print(f"{name}: {path}")


def outputs_folder(name: str, args: argparse.Namespace) -> Path:
    if args.out or is_run(name):
        return Path(args.out or Path(name) / "evaluation")
    if (Path(name) / "model_outputs.json").is_file():
        return Path(name)
    raise ValueError(f"{name} is no run: say with --out where the outputs are, or are to go")


def write_both_outputs(name: str, args: argparse.Namespace, device: Any) -> None:
    """model_outputs.json, and reference_outputs.json unless one is there that was not generated here."""
    keys = ("max_new_tokens", "temperature", "top_p", "seed", "batch_size")
    how, out = {key: getattr(args, key) for key in keys}, outputs_folder(name, args)
    prompts = read_prompts(args.generate)
    s, tokenizer, models = open_run(Path(name)) if is_run(name) else ({"seed": 0}, None, {"": name})
    baseline = args.baseline or (next(iter(models.values())) if tokenizer else None)
    jobs, given = {out / "model_outputs.json": [*models.values()][-1]}, out / "reference_outputs.json"
    if not given.is_file() or given.with_suffix(".jsonl").is_file():
        if not baseline:
            raise ValueError(f"{name} is no run: say with --baseline MODEL what to compare it with")
        jobs[given] = baseline
    for path, source in jobs.items():
        own = lm.load_tokenizer(source) if not tokenizer or source == args.baseline else tokenizer
        model = lm.load_model(source, s["seed"]).to(device).eval()
        generator = str(source).strip("/").replace("/", "__")  # alpaca_eval makes a file name of it
        write_outputs(path, generator, model, own, prompts, how)


def judge_model(name: str, args: argparse.Namespace, device: Any) -> Row:
    """The judge's verdicts on a model's outputs, and how often it agrees with labels, where there are any."""
    out = outputs_folder(name, args)
    title, judge = open_judge(args, device, out / "answers.jsonl")
    row, rows = judge_outputs(out, title, judge), read_pairs(args.labelled) if args.labelled else []
    if is_run(name) and not args.labelled and not args.judge.startswith("http"):
        rows = held_out(*open_run(Path(name))[:2])[1]
    if rows := [labelled for labelled in rows if "drop" not in labelled]:
        row |= {"judge right on labels %": judge_accuracy(judge, rows), "labels": len(rows)}
    if is_run(name):
        remember(Path(name), judged=remembered(Path(name)).get("judged", {}) | {title: row})
    return row


def margin_rows(name: str, source: str, device: Any) -> list[Row]:
    """Statistics of the margins on some pairs of a run's models, or of one model."""
    s: Row = {"objective": "dpo", "max_length": 1024, "max_prompt_length": None, "seed": 0}
    tokenizer, models = None, {"": name}
    if is_run(name):
        s, tokenizer, models = open_run(Path(name))
    tokenizer = tokenizer or lm.load_tokenizer(name)
    lengths = s["max_length"], s["max_prompt_length"]
    pairs, _ = data.tokenize_preferences(read_pairs(source), tokenizer, *lengths)
    found, start = [], None
    for label, path in models.items():
        model = lm.load_model(path, s["seed"]).to(device).eval()
        chosen, rejected = response_scores(model, pairs, s["objective"], f"{name} {label}").unbind(1)
        row = margin_statistics(chosen - rejected, start)
        found.append({"model": f"{name} {label}".strip(), "pairs": len(pairs)} | row)
        start = chosen - rejected if start is None else start
    return found


def main() -> None:
    logging.disable_progress_bar()
    try:
        run(parse())
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: stopped; the same command goes on")


if __name__ == "__main__":
    main()
