"""Who wins, by how much beyond length, and what happened to the margins.

    python evaluate.py runs/*                         a table on held-out pairs, a row a run, means over seeds
    python evaluate.py RUN --generate PROMPTS.json    outputs of its model and of the one it started from
    python evaluate.py RUN --judge https://api.openai.com/v1 --judge_model gpt-4o     win rates of the outputs
    python evaluate.py RUN MODEL --pairs PAIRS.jsonl  margins of any models on any pairs
    python evaluate.py RUN --table3 --figure3 B.png   what each way to make batches does to their margins
    python evaluate.py RUN --filter                   what the filter removed

A judge is an OpenAI-compatible URL (key: the environment's OPENAI_API_KEY), a reward model's folder, a run's
folder (its implicit reward), or "true" (the built-in task's reward). Files are AlpacaEval's, in
RUN/evaluation/ or --out. What was generated or paid for is stored as it comes: the same command goes on.

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
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
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
Row = dict[str, Any]
FREE = {"seed", "output_dir", "proxy", "micro_batch_tokens", "save_steps"}  # may differ in a group of runs
HELD_OUT = ("eval_data", "eval_share", "max_length", "max_prompt_length")
ALIKE = ("model", "data", "limit", *HELD_OUT, "sft_epochs", "objective", "beta", "seed")  # to be subtracted
SAMPLES = 16  # responses to each held-out prompt of the built-in task

# -------------------------------------------------------------------------------------------------- win rates


def _wins(preferences: list[float | None]) -> tuple[list[int], Tensor]:
    """Places of the verdicts, by AlpacaEval's rules, and the probability that the model wins at each."""
    places = [i for i, p in enumerate(preferences) if p is not None and (p == 0 or 1 <= p <= 2)]
    if not places:
        raise ValueError(f"none of {len(preferences)} preferences is a verdict (0, or from 1 to 2)")
    return places, torch.tensor([(preferences[i] or 1.5) - 1 for i in places], dtype=torch.float64)


def prefer(baseline: Any, model: Any) -> Any:
    """Preferences by rewards, numbers or tensors: 1 = baseline's is larger, 1.5 = equal, 2 = model's."""
    return 1.5 + (model > baseline) / 2 - (model < baseline) / 2


def win_rate(preferences: list[float | None]) -> tuple[float, float]:
    """(percent, standard error) of AlpacaEval's win rate: the mean probability that the model wins.

    preferences: 1 = baseline wins .. 2 = model wins, 0 or 1.5 = draw; None, NaN and others are no verdict and
    left out. The standard error of a single verdict is NaN. Raises ValueError without any verdict."""
    _, p = _wins(preferences)
    error = p.std().item() / len(p) ** 0.5 if len(p) > 1 else math.nan
    return 100 * p.mean().item(), 100 * error


def length_controlled_win_rate(
    preferences: list[float | None], model_lengths: list[int], baseline_lengths: list[int]
) -> tuple[float, float]:
    """(percent, standard error) of the win rate at equal lengths: alpaca_eval's length_controlled_minimal.

    P(model wins) = sigmoid(c + b tanh(d / std(d))), d = baseline's length - model's length in characters,
    fitted by maximum likelihood; LC = 100 sigmoid(c) (Dubois et al. 2024, arXiv 2404.04475, Eq. 2 without
    its term for the instruction). The error is the sandwich estimate of the sampling error. With equal
    lengths both are win_rate's; verdicts that are all alike are fitted exactly, by b = 0."""
    counts = len(preferences), len(model_lengths), len(baseline_lengths)
    if len(set(counts)) > 1:
        raise ValueError("{} preferences, {} model lengths, {} baseline lengths".format(*counts))
    places, p = _wins(preferences)
    if (p == p[0]).all():
        return 100 * p[0].item(), 0.0 if len(p) > 1 else math.nan
    d = torch.tensor(baseline_lengths, dtype=p.dtype) - torch.tensor(model_lengths, dtype=p.dtype)
    tanh = (d / d.std()).tanh()[places]  # the spread is that of all rows, with a verdict or not
    n, k = len(p), 2 if tanh.std() > 0 else 1
    x = torch.stack([torch.ones_like(p), tanh], 1)[:, :k]
    ridge = torch.tensor([0, 1e-6], dtype=p.dtype)[:k].diag()  # b stays finite where length alone decides
    beta = x.new_zeros(k)
    for _ in range(100):  # Newton, each time with the best of ever shorter steps
        q = (x @ beta).sigmoid()
        bread = torch.linalg.inv(x.T @ (x * (q * (1 - q))[:, None]) + ridge)
        step = bread @ (x.T @ (p - q) - ridge @ beta)
        tries = beta[:, None] + step[:, None] / 2 ** torch.arange(40)  # [k, 40]
        loss = F.softplus(x @ tries).sum(0) - p @ x @ tries + (ridge @ tries**2).sum(0) / 2
        beta = tries[:, loss.argmin()]
    win, scores = beta[0].sigmoid().item(), x * (p - q)[:, None]
    variance = (bread @ scores.T @ scores @ bread)[0, 0].item() * n / (n - k) if n > k else math.nan
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
    done: dict[int, str] | None = None,
    store: Callable[[int, str], None] | None = None,
) -> list[str]:
    """One response to each prompt of token ids (already templated), without special tokens.

    A response depends on (seed, prompt, how often the prompt came before) and not on the batch it is in:
    the greedy choice over logits / temperature + Gumbel noise is an exact sample, and each response has
    its own generator of noise. temperature 0: greedy. top_p: only the most probable tokens that together have
    this probability. done: responses there are, by place; store(place, response) is called for a new one."""
    if not (temperature >= 0 and 0 < top_p <= 1 and min(max_new_tokens, batch_size) >= 1):
        raise ValueError("sampling needs temperature >= 0, 0 < top_p <= 1, and one token and prompt at least")
    device, counts, seeds, responses = next(model.parameters()).device, Counter(), [], dict(done or {})
    for prompt in map(tuple, prompts):
        counts[prompt] += 1
        digest = hashlib.sha256(f"{seed} {prompt} {counts[prompt]}".encode())
        seeds.append(int(digest.hexdigest()[:15], 16))
    row = as_row([{"role": "user", "content": "a"}], "a", "b", tokenizer)
    turn = data.tokenize_preferences([row], tokenizer, 10**6)[0][0]  # it ends as training supervised it
    own, end = model.generation_config, tokenizer.eos_token_id
    known = own.eos_token_id if isinstance(own.eos_token_id, list) else {own.eos_token_id} - {None}
    how = {"eos_token_id": [end, turn.chosen[-1], *known], "pad_token_id": end}
    todo = sorted((i for i in range(len(prompts)) if i not in responses), key=lambda i: -len(prompts[i]))
    # the model's own settings (a repetition penalty, say) would make it sampling that nobody asked for
    model.generation_config = GenerationConfig(max_new_tokens=max_new_tokens, **how)
    try:
        for k in tqdm(range(0, len(todo), batch_size), label, unit="batch", disable=not label):
            batch = todo[k : k + batch_size]
            rows = [torch.tensor(prompts[i]) for i in batch]
            ids = pad_sequence(rows, True, end, "left").to(device)
            mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left").to(device)
            draw = _sampling([seeds[i] for i in batch], temperature, top_p)
            found = model.generate(input_ids=ids, attention_mask=mask, logits_processor=draw)
            texts = tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
            for i, responses[i] in zip(batch, texts):
                if store:
                    store(i, responses[i])
    finally:
        model.generation_config = own
    return [responses[i] for i in range(len(prompts))]


def _sampling(seeds: list[int], temperature: float, top_p: float) -> LogitsProcessorList:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def add_noise(_: Tensor, logits: Tensor) -> Tensor:
        waits = [torch.empty(logits.shape[1]).exponential_(generator=generator) for generator in generators]
        return logits - torch.stack(waits).log().to(logits.device)  # -log of an exponential is Gumbel noise

    nucleus = [TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps = [lambda _, logits: logits.float() / temperature, *nucleus, add_noise]
    return LogitsProcessorList(steps if temperature else [])


def as_row(prompt: Prompt, chosen: str, rejected: str, tokenizer: Any) -> Row:
    """A row for data.tokenize_preferences; messages become HH's transcript without a chat template. In a
    transcript a space stands before each turn, which outputs, being stripped, have lost."""
    answers, source = [chosen, rejected], repr(text_of(prompt)[:40])
    if isinstance(prompt, list) and tokenizer.chat_template:
        answers = [{"role": "assistant", "content": answer} for answer in answers]
    elif isinstance(prompt, list) or prompt.endswith(HH_MARK):
        prompt = prompt if isinstance(prompt, str) else text_of(prompt, transcript=True)
        answers = [answer if answer[:1].isspace() else f" {answer}" for answer in answers]
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "source": source}


def text_of(prompt: Prompt, transcript: bool = False) -> str:
    """A prompt as AlpacaEval's files have it: the user's one message, or the transcript of several turns."""
    if isinstance(prompt, str) or (len(prompt) == 1 and not transcript):
        return prompt if isinstance(prompt, str) else prompt[0]["content"]
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names.get(t['role'], t['role'])}: {t['content']}" for t in prompt) + HH_MARK


def prompt_of(instruction: str) -> Prompt:
    return instruction if HH_MARK in instruction else [{"role": "user", "content": instruction}]


def read_pairs(source: str, seed: int = 0) -> list[Row]:
    if source == BUILTIN:
        return data.synthetic_preferences(data.BUILTIN_EVAL_PAIRS, seed, held_out=True)
    return data.read_preferences(source)


def read_prompts(source: str) -> list[Row]:
    """{instruction, prompt, perhaps dataset}, each instruction once: AlpacaEval's, or of preference pairs."""
    rows = lm.read_json(Path(source), []) if source.endswith(".json") else []
    if rows and isinstance(rows, list) and all(isinstance(r, dict) and "instruction" in r for r in rows):
        rows = [r | {"prompt": prompt_of(r["instruction"])} for r in rows]
    else:
        rows = [{"instruction": text_of(r["prompt"]), "prompt": r["prompt"]} for r in read_pairs(source)]
    return list({row["instruction"]: row for row in rows}.values())


def write_outputs(path: Path, name: str, model: Any, tokenizer: Any, prompts: list[Row], how: Row) -> None:
    """AlpacaEval's model_outputs.json; each response is stored beside it, in .jsonl, as it comes."""
    room = lm.positions(model) - how["max_new_tokens"]
    # responses that begin with a space do not merge with the end of a prompt that is plain text
    rows = [as_row(prompt["prompt"], " a", " b", tokenizer) for prompt in prompts]
    ids = [pair.prompt for pair in data.tokenize_preferences(rows, tokenizer, room + 64, room)[0]]
    if len(ids) < len(prompts):
        raise ValueError(f"{len(prompts) - len(ids)} of {len(prompts)} prompts are empty: remove them")
    about = {"model": lm.fingerprint(model), "prompts": hashlib.sha256(repr(ids).encode()).hexdigest()}
    about |= {key: value for key, value in how.items() if key != "batch_size"}
    stored = path.with_suffix(".jsonl")
    done = dict(read_lines(stored))
    if not done:
        append_line(stored, "about", about)
    if done.pop("about", about) != about:
        raise ValueError(f"{stored} is of another model, other prompts or settings: delete it, or give --out")
    store = partial(append_line, stored)
    texts = generate(model, tokenizer, ids, **how, label=str(path), done=done, store=store)
    kept = [{key: row[key] for key in ("dataset", "instruction") if key in row} for row in prompts]
    write_json(path, [row | {"output": text.strip(), "generator": name} for row, text in zip(kept, texts)])
    print(f"{path}: {len(texts)} outputs of {name}")


# ------------------------------------------------------------------------------------------------------ judge

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
    items: list[Item], url: str, model: str, template: str, store: Path, concurrency: int
) -> list:
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
    answers = dict(read_lines(store))
    missing = [key for key in bodies if key not in answers]

    def ask(key: str) -> None:
        answers[key] = post(url, bodies[key], stop)
        with lock:
            append_line(store, key, answers[key])
            bar.update()

    with tqdm(total=len(missing), desc=model, unit="request") as bar, ThreadPoolExecutor(concurrency) as pool:
        try:
            list(pool.map(ask, missing))
        except (ValueError, OSError, HTTPException, KeyboardInterrupt) as error:
            stop.set()
            pool.shutdown(cancel_futures=True)  # what is under way is paid for: it ends, and is stored
            kept = f"{len(read_lines(store))} answers are kept in {store}, the same command goes on"
            raise ValueError(f"{str(error) or 'stopped'}; {kept}") from None
    tokens = sum((answers[key].get("usage") or {}).get("total_tokens") or 0 for key in missing)
    print(f"{model}: {len(missing)} requests, {tokens:,} tokens; {len(bodies) - len(missing)} stored answers")
    choices = [answers[key]["choices"][0] for key in keys]
    if hard := sum(bool(choice) and not choice.get("logprobs") for choice in choices):
        print(f"{model}: {hard} answers without log-probabilities, hard labels: not AlpacaEval's judge")
    found = zip(map(parse_verdict, choices), switched)
    return [3 - verdict if verdict and switch else verdict for verdict, switch in found]


def post(url: str, body: Row, stop: threading.Event) -> Row:
    """The endpoint's answer; if it is overloaded or the connection breaks, waits and tries again."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    key, said = os.environ.get("OPENAI_API_KEY", "").strip(), "stopped"
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError("OPENAI_API_KEY holds characters that no key has: set it again")
    if key:  # unredirected: not for whoever a redirect names
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    for attempt in range(7):
        try:
            with urlopen(request, timeout=120) as response:
                answer = json.load(response)
            answer["choices"][0].keys()
            return answer
        except HTTPError as error:
            said = f"HTTP {error.code} {' '.join(error.read(2000).decode(errors='replace').split())[:300]}"
            said = said.replace(key or "\0", "***")
            if error.code == 400 and re.search("context_length|content_filter|content_policy", said):
                return {"choices": [{}], "refused": said}  # no verdict on this row; there may be on others
            if error.code not in (408, 409, 429) and error.code < 500 or "insufficient_quota" in said:
                raise ValueError(f"{url}: {said}; check OPENAI_API_KEY, the URL and --judge_model") from None
        except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            said = f"{type(error).__name__} {error}".replace(key or "\0", "***")
        if attempt == 6:
            break
        tqdm.write(f"{said[:120]}; trying again in {2**attempt} s", file=sys.stderr)
        if stop.wait(2**attempt):
            break
    raise ValueError(f"{url}: no answer ({said}); check the URL and the connection")


def ask_truth(items: list[Item]) -> list[float]:
    """By the built-in task's reward."""
    return [prefer(*(data.true_reward(text_of(prompt), text) for text in texts)) for prompt, *texts in items]


@torch.no_grad()
def ask_reward_model(items: list[Item], folder: str, device: Any) -> list[float]:
    """By a sequence classifier with one label, of the templated chat or of prompt and response as texts."""
    tokenizer = lm.load_tokenizer(folder)
    try:
        model = RewardModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        if model.config.num_labels != 1 or "SequenceClassification" not in str(model.config.architectures):
            raise ValueError(f"{model.config.architectures} is no sequence classifier with one label")
        model.to(device).eval()
    except Exception as error:  # or whatever a damaged folder raises
        raise ValueError(f"{folder}: no reward model ({' '.join(str(error).split())[:200]})") from None

    def reward(prompt: Prompt, response: str) -> float:
        texts, how = [text_of(prompt), response], {}
        if tokenizer.chat_template:
            turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            turns = [*turns, {"role": "assistant", "content": response}]
            texts, how = [tokenizer.apply_chat_template(turns, tokenize=False)], {"add_special_tokens": False}
        inputs = tokenizer(*texts, **how, truncation=True, return_tensors="pt").to(device)
        return model(**inputs).logits[0, 0].item()

    return [prefer(reward(prompt, a), reward(prompt, b)) for prompt, a, b in tqdm(items, folder)]


def ask_run(items: list[Item], folder: str, device: Any) -> list[float]:
    """By a run's implicit reward, beta (log pi - log pi_ref); of a reference-free objective, beta log pi."""
    s, tokenizer, models = open_run(folder)
    rows = [as_row(prompt, theirs, baselines, tokenizer) for prompt, baselines, theirs in items]
    pairs, _ = data.tokenize_preferences(rows, tokenizer, s["max_length"], s["max_prompt_length"])
    ends = {label: models[label] for label in ([*models][0], [*models][-1])}
    before, after = (margins for _, _, margins, _ in scored(ends, pairs, s, device))
    gain = prefer(0 * before if s["objective"] in REFERENCE_FREE else before, after)
    found = dict(zip((pair.row for pair in pairs), gain.tolist()))
    return [found.get(row, 1.5) for row in range(len(items))]  # those equal once truncated are no pairs


def open_judge(args: argparse.Namespace, device: Any, store: Path) -> tuple[str, Any]:
    """The name of the judge that --judge asks for, and the judge: items -> preferences. Equal outputs are a
    draw that it is not asked about."""
    name, path = args.judge, args.judge_prompt
    if re.match("https?://", name):
        if path == "alpaca_eval":
            if not (package := importlib.util.find_spec("alpaca_eval")):
                raise ValueError("--judge_prompt: pip install alpaca_eval, or give the prompt's file")
            configs = Path(package.origin).parent / "evaluators_configs"
            path = configs / "alpaca_eval_clf_gpt4_turbo" / "alpaca_eval_clf.txt"
        template = Path(path).read_text(encoding="utf-8") if path else JUDGE_PROMPT
        how = {"template": template, "store": store, "concurrency": args.concurrency}
        decide = partial(ask_endpoint, url=name, model=args.judge_model, **how)
        name = f"{args.judge_model}, {Path(path).name if path else 'our own prompt'}"
    elif name == "true":
        decide = ask_truth
    else:
        decide = partial(ask_run if is_run(name) else ask_reward_model, folder=name, device=device)

    def judge(items: list[Item]) -> list[float | None]:
        asked = [item for item in items if item[1] != item[2]]
        found = iter(decide(asked) if asked else [])
        return [1.5 if item[1] == item[2] else next(found) for item in items]

    return name, judge


def judge_model(name: str, args: argparse.Namespace, device: Any, agreed: dict[str, float]) -> Row:
    """Write a judge's preferences as AlpacaEval's annotations.json and return their win rates; and how often
    the judge agrees with labels, where there are any (a draw agrees by half). agreed: by labels, what is
    known of that."""
    out = outputs_folder(name, args)
    (title, judge), sides = open_judge(args, device, out / "answers.jsonl"), []
    for path in (out / "reference_outputs.json", out / "model_outputs.json"):
        if not path.is_file():
            raise ValueError(f"{path} is missing: make it with --generate PROMPTS")
        rows = lm.read_json(path)
        fit = all(isinstance(row, dict) and {"instruction", "output"} <= row.keys() for row in rows)
        if not fit or len({row["instruction"] for row in rows}) < len(rows):
            raise ValueError(f"{path}: no list of {{instruction, output, generator}}, each instruction once")
        sides.append({row["instruction"]: row for row in rows})
    both = [(row, sides[1][instruction]) for instruction, row in sides[0].items() if instruction in sides[1]]
    if not both:
        raise ValueError(f"{out}: no instruction in common; generate both from the same prompts")
    preferences = judge([(prompt_of(a["instruction"]), a["output"], b["output"]) for a, b in both])
    annotations = []
    for (a, b), preference in zip(both, preferences):
        row = {key: a[key] for key in ("dataset", "instruction") if key in a}
        for k, side in ((1, a), (2, b)):
            row |= {f"output_{k}": side["output"], f"generator_{k}": side.get("generator", f"model {k}")}
        annotations.append(row | {"annotator": title, "preference": preference and round(preference, 10)})
    write_json(out / "annotations.json", annotations)
    theirs, mine = ([len(row["output"]) for row in side] for side in zip(*both))
    found = {"outputs": str(out), "judge": title, "pairs": len(both), "no verdict": preferences.count(None)}
    found |= dict(zip(("WR %", "WR error"), win_rate(preferences)))
    found |= dict(zip(("LC %", "LC error"), length_controlled_win_rate(preferences, mine, theirs)))
    alone = len(sides[0] | sides[1]) - len(both)
    found |= {"characters": fmean(mine), "baseline's": fmean(theirs), "without a partner": alone}
    rows = read_pairs(args.labelled) if args.labelled else []
    if is_run(name) and not args.labelled and not args.judge.startswith("http"):
        rows = held_out(*open_run(name)[:2])[1]
    if rows := [row for row in rows if "drop" not in row]:
        sides = ((row["prompt"], row["rejected"], row["chosen"]) for row in rows)
        items = [(p, *(s if isinstance(s, str) else s["content"] for s in side)) for p, *side in sides]
        if (labels := repr(items)) not in agreed:
            agreed[labels] = win_rate([p and prefer(1.5, p) for p in judge(items)])[0]
        found |= {"judge right on labels %": agreed[labels], "labels": len(rows)}
    if is_run(name):
        remembered(Path(name), judged=remembered(Path(name)).get("judged", {}) | {title: found})
    return found


# ------------------------------------------------------------------------------------------------------- runs


def is_plain(settings: dict[str, Any]) -> bool:
    """Whether a run with these settings is the plain objective on random batches, a proxy."""
    unfiltered = settings["tau"] is None and settings["filter_ratio"] == 0
    return unfiltered and settings["batching"] == "random" and settings["lambda_reg"] == 0


def stage_folder(run: Path, stage: str) -> Path:
    """The model of a stage ("sft", "proxy", "policy") of a run: its own, or that of the run it was given as
    --proxy."""
    while not (run / stage).is_dir():
        settings = read_config(run)["settings"]
        if not settings["proxy"]:
            if stage == "proxy" and is_plain(settings):  # itself the proxy of runs that were given it
                return run / "policy"
            raise ValueError(f"{run} has no {stage}/")
        run = Path(settings["proxy"])
    return run / stage


def read_config(run: Path) -> dict[str, Any]:
    """config.json of a run. Raises ValueError if it is damaged."""
    config = lm.read_json(run / "config.json")
    settings = config.get("settings") if isinstance(config, dict) else None
    if not isinstance(settings, dict) or "objective" not in settings:
        raise ValueError(f"{run / 'config.json'}: no settings of a run: restore it, or delete {run}")
    return config


def is_run(name: str | Path) -> bool:
    return "settings" in lm.read_json(Path(name) / "config.json", {})


def open_run(name: str | Path, or_model: bool = False) -> tuple[Row, Any, dict[str, Path | str]]:
    """A finished run's settings, tokenizer, and models by label: the starting one, vanilla, RMO. or_model:
    the same of a model, which has no settings of its own."""
    folder = Path(name)
    if or_model and not is_run(folder):
        s = {"objective": "dpo", "max_length": 1024, "max_prompt_length": None, "seed": 0}
        return s, lm.load_tokenizer(name), {"": name}
    if not is_run(folder):
        raise ValueError(f"{folder}: no run (no config.json with settings in it); train.py makes them")
    if not (folder / "policy").is_dir():
        raise ValueError(f"{folder}: not finished (no policy/); start train.py again with the same command")
    s = read_config(folder)["settings"]
    vanilla, policy = f"vanilla {s['objective'].upper()}", folder / "policy"
    models = {"SFT": stage_folder(folder, "sft")} if s["sft_epochs"] else {"base": s["model"]}
    plain = is_plain(s)
    if not plain:
        with suppress(ValueError):  # some need no proxy
            models[vanilla] = stage_folder(folder, "proxy")
    return s, lm.load_tokenizer(policy), models | {vanilla if plain else "RMO": policy}


def held_out(s: Row, tokenizer: Any) -> tuple[list[Pair], list[Row]]:
    """The held-out pairs of a run with these settings, and the row of text that each was made from."""
    splits, rows, _ = data.load_splits(s, tokenizer)
    if s["eval_data"] or s["data"] == BUILTIN:
        rows = read_pairs(s["eval_data"] or BUILTIN, s["seed"])
    return splits["eval"], [rows[pair.row] for pair in splits["eval"]]


def scored(models: Row, pairs: list[Pair], s: Row, device: Any) -> Iterator[tuple[str, Any, Tensor, Row]]:
    """(label, model, margins [N], their statistics in percent and nats) of each model, by sums over tokens or
    means, as the objective has them.

    Accuracy: the share above 0; reward accuracy: above the first model's, which the implicit reward is
    relative to. Small: within a tenth of a standard deviation of 0, as tau = 14 is in the paper."""
    start, probe = None, data.both_ways(pairs)
    lengths = torch.tensor([(len(pair.chosen), len(pair.rejected)) for pair in pairs])
    for label, name in models.items():
        model = lm.load_model(name, s["seed"]).to(device).eval()
        shared = lm.shares_prompt(model, *probe)
        batches = data.scoring_batches(pairs, 2048, shared, *lm.rank_and_world())
        scores = lm.score_pairs(model, batches, [pair.source for pair in pairs], f"{name} {label}").double()
        chosen, rejected = (scores / lengths if s["objective"] in LENGTH_NORMALISED else scores).unbind(1)
        margins = chosen - rejected
        shares = {"accuracy": margins > 0, "small": margins.abs() <= 0.1 * margins.std(unbiased=False)}
        shares |= {} if start is None else {"reward accuracy": margins > start}
        start = margins if start is None else start
        row = {f"{key} %": 100 * share.double().mean() for key, share in shares.items()}
        row |= {
            "mean": margins.mean(),
            "median": margins.quantile(0.5),
            "variance": margins.var(unbiased=False),
        }
        yield label, model, margins, {key: value.item() for key, value in row.items()}


def report_run(folder: Path, device: Any) -> dict[str, dict[str, float]]:
    """Print a table on the held-out pairs of a finished run, and return it: {label: {column: value}}.

    The built-in task adds what is true there: the reward of SAMPLES responses a prompt, how often they beat
    the starting model's, each compared with each, with the error over prompts, and that rate at equal
    lengths. In a distributed run call it on every rank, as they share the scoring. Without held-out pairs:
    {}, after saying so."""
    s, tokenizer, models = open_run(folder)
    (pairs, rows), first = held_out(s, tokenizer), lm.rank_and_world()[0] == 0
    if not pairs:
        if first:
            print(f"{folder}: no held-out pairs, no report; train with --eval_data FILE or --eval_share 0.1")
        return {}
    report, margins, baseline = {}, {}, None
    prompts = {tuple(pair.prompt): text_of(row["prompt"]) for pair, row in zip(pairs, rows)}
    for label, model, values, report[label] in scored(models, pairs, s, device):
        margins[label] = values.tolist()
        if s["data"] == BUILTIN and not s["eval_data"]:
            draw = s["seed"] if baseline is None else s["seed"] + 1  # independent of the starting model's
            texts = generate(model, tokenizer, [*prompts] * SAMPLES, 64, 1.0, 1.0, draw, batch_size=256)
            found = [(data.true_reward(p, t), len(t)) for p, t in zip([*prompts.values()] * SAMPLES, texts)]
            rewards, sizes = torch.tensor(found, dtype=torch.float64).view(SAMPLES, -1, 2).unbind(2)  # [S, P]
            report[label] |= {"true reward": rewards.mean().item(), "characters": sizes.mean().item()}
            if baseline is None:
                baseline = rewards, sizes
                continue
            wins = prefer(baseline[0][:, None], rewards)  # each sample with each, [S, S, P]
            values = win_rate(wins.mean((0, 1)).tolist())
            report[label] |= dict(zip(("win rate %", "win rate error"), values))
            lengths = (side.expand_as(wins).flatten().tolist() for side in (sizes, baseline[1][:, None]))
            report[label]["LC win rate %"], _ = length_controlled_win_rate(wins.flatten().tolist(), *lengths)
    if first:
        print(f"{folder}: {len(pairs)} held-out pairs, margins in nats, wins against {next(iter(models))}")
        print(markdown([{"model": label} | row for label, row in report.items()]))
        remembered(folder, report=report, margins=margins)
        if (folder / "filter.json").is_file():
            print("What the filter removed; longer: chosen than rejected, in tokens")
            print(markdown([filter_row(folder)]))
    return report


def batch_margins(folder: Path) -> dict[str, Tensor]:
    """Margins of a run's training pairs by its proxy (or base model): "all", and in batches [n, m] of each
    kind, without a remainder that is the same for all kinds."""
    s, scores = open_run(folder)[0], load_file(folder / "margins.safetensors")
    draw, m = torch.Generator().manual_seed(s["seed"]), s["batch_size"]
    by = "proxy" if "proxy_chosen" in scores else "base"
    margins = scores[f"{by}_chosen"] - scores[f"{by}_rejected"]
    seated = margins[torch.randperm(len(margins), generator=draw)[: len(margins) // m * m]]
    kinds = {"Low-Var": batching.low_variance_batches, "Rnd-Var": batching.random_batches}
    kinds["High-Var"] = batching.high_variance_batches
    return {"all": margins} | {name: seated[make(seated, m, draw)] for name, make in kinds.items()}


def table3(folder: Path) -> Row:
    """Mean variance of the margins in a batch, in nats squared, and its share of the largest possible."""
    row = {}
    for name, margins in list(batch_margins(folder).items())[1:]:  # [n, m]
        row[name] = margins.double().var(1, unbiased=False).mean().item()
        bound = batching.variance_bound(margins.flatten(), margins.shape[1]).item() / len(margins)
        row[f"{name} of bound %"] = 100 * row[name] / bound
    return row


def filter_row(folder: Path) -> Row:
    """What the filter of a run removed and kept: shares of all pairs; by how many tokens chosen is longer
    than rejected, on average, and how that goes with the base margin; on the built-in task, how many pairs
    are mislabelled, their rejected response having the higher true reward."""
    (s, tokenizer, _), scores = open_run(folder), load_file(folder / "margins.safetensors")
    base, removed = scores["base_chosen"] - scores["base_rejected"], lm.read_json(folder / "filter.json", {})
    by = torch.zeros(len(base), dtype=torch.long)
    for step in (1, 2):
        by[removed.get(f"removed_step{step}", [])] = step
    columns = {"longer by": (scores["chosen_tokens"] - scores["rejected_tokens"]).double()}  # [N] each
    both = torch.stack([columns["longer by"], base.double()])
    row = {"correlation of length and base margin": torch.corrcoef(both)[0, 1].nan_to_num()}
    if s["data"] == BUILTIN:
        splits, rows, _ = data.load_splits(s, tokenizer)
        if data.fingerprint(splits["train"]) == read_config(folder).get("data"):  # of this version's making
            wrong = [rows[pair.row]["truth"]["margin"] < 0 for pair in splits["train"]]
            columns["mislabelled %"] = 100 * torch.tensor(wrong).double()
    for name, mask in (("all", by >= 0), ("step 1", by == 1), ("step 2", by == 2), ("kept", by == 0)):
        row |= {} if name == "all" else {f"{name} %": 100 * mask.double().mean()}
        row |= {f"{name}: {key}": values[mask].mean() for key, values in columns.items() if mask.any()}
    return {key: value.item() for key, value in row.items()}


def grouped(folders: list[Path]) -> list[Row]:
    """Runs that differ by seed at most, together: {name, settings, differing: those that other runs have
    otherwise, folders}."""
    settings, groups = {folder: open_run(folder)[0] for folder in folders}, {}
    keys = dict.fromkeys(key for s in settings.values() for key in s if key not in FREE)
    keys = [key for key in keys if len({json.dumps(s.get(key)) for s in settings.values()}) > 1]
    for folder, s in settings.items():
        differing = {key: "default" if s.get(key) is None else s[key] for key in keys}
        name = ", ".join(f"{key} {value}" for key, value in differing.items()) or folder.name
        new = {"name": name, "settings": s, "differing": differing, "folders": []}
        group = groups.setdefault(str(differing), new)
        if twins := [other for other in group["folders"] if settings[other].get("seed") == s.get("seed")]:
            raise ValueError(f"{twins[0]} and {folder} have the same settings and seed: name one of them")
        group["folders"].append(folder)
    return list(groups.values())


def over_seeds(rows: list[Row]) -> Row:
    """Means of what all rows have, with standard errors "x error" for "x" or "x %"; of one row, its own."""
    means = {}
    for key in [key for key in rows[0] if all(key in row for row in rows) and not key.endswith(" error")]:
        error, values = key.removesuffix(" %") + " error", [row[key] for row in rows]
        spread = stdev(values) / len(values) ** 0.5 if len(values) > 1 else rows[0].get(error)
        means |= {key: fmean(values)} | ({} if spread is None else {error: spread})
    return means


def add_results(groups: list[Row], device: Any) -> None:
    """To each group {results: of its policies on held-out pairs, over seeds}, and its gains in win rate,
    paired by seed, over the first plain run given that is ALIKE, with half the width of their 95 %
    interval."""
    found, plain, alike = {}, {}, {}  # by folder: results; by what must be alike: plain run; by folder: that
    for folder in [folder for group in groups for folder in group["folders"]]:
        if "report" not in remembered(folder):
            report_run(folder, device)
        known, s = remembered(folder), read_config(folder)["settings"]
        found[folder] = dict([{}, *known.get("report", {}).values()][-1])
        for judge, row in known.get("judged", {}).items():
            found[folder] |= {f"{k[:2]} ({judge}){k[2:]}": row[k] for k in row if k[:3] in ("WR ", "LC ")}
        alike[folder] = tuple(s.get(key) for key in ALIKE)
        if is_plain(s):
            plain.setdefault(alike[folder], folder)
    for group in groups:
        results = group["results"] = over_seeds([found[folder] for folder in group["folders"]])
        pairs = [(found[folder], plain.get(alike[folder], folder)) for folder in group["folders"]]
        pairs = [(row, found[base]) for row, base in pairs if row is not found[base]]
        for key in [key for key in results if re.match(r"(LC )?(win rate|WR|LC).*%$", key)]:
            gains = [row[key] - base[key] for row, base in pairs if key in base]
            if len(gains) == len(group["folders"]) > 1:
                name = f"{key.removesuffix(' %')} - vanilla (95 %)"
                half = t975(len(gains) - 1) * stdev(gains) / len(gains) ** 0.5
                results |= {name: fmean(gains), f"{name} error": half}


def t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; from 10 on by its series (Abramowitz and Stegun, 26.7.5)."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    series = 1.95996 + 2.37227 / freedom + 2.8225 / freedom**2 + 2.5559 / freedom**3
    return table[freedom - 1] if freedom < 10 else series


def markdown(rows: list[Row]) -> str:
    """Rows as a Markdown table; "x error" stands behind "x" or "x %"; what a row lacks is a dash."""

    def text(value: Any) -> str:
        if isinstance(value, float) and value == value:
            return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
        return "-" if value is None or value != value else str(value)

    columns = dict.fromkeys(c for row in sorted(rows, key=len, reverse=True) for c in row)
    columns = [c for c in columns if not c.endswith(" error")]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        errors = [text(row.get(column.removesuffix(" %") + " error")) for column in columns]
        lines.append([text(row.get(c)) + (f" ± {e}" if e != "-" else "") for c, e in zip(columns, errors)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def remembered(folder: Path, **new: Any) -> Row:
    """evaluation.json of a run, if it is of this training, which the wall times in metrics.jsonl tell; with
    what is new, which is written there."""
    run = hashlib.sha256((folder / "metrics.jsonl").read_bytes()).hexdigest()[:16]
    path = folder / "evaluation.json"
    found = lm.read_json(path, {})
    found = (found if found.get("run") == run else {"run": run}) | new
    if new:
        write_json(path, found)
    return found


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    lm.write_atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def read_lines(path: Path) -> list[Any]:
    """The values of a .jsonl file, less lines that a crash cut short."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def append_line(path: Path, *values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        # the newline comes first: it ends a line that a crash cut short
        file.write("\n" + json.dumps(values))


# ---------------------------------------------------------------------------------------------------- figures

FIGURES = {  # title, rows and columns
    "figure1": ("training loss of the policy", 1, 1),
    "figure3": ("mean margins of batches, first run", 3, 1),
    "figure4": ("held-out margins, accuracy and win rates by regularization intensity λ", 1, 3),
    "figure5": ("win rates by filter ratio", 1, 1),
    "figure_margins": ("margins before and after filter and training, first run", 1, 2),
}


def draw(name: str, path: Path, groups: list[Row]) -> None:
    """Write one of FIGURES. A line is told by its colour (Okabe and Ito's) and by its stroke."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00"]
    strokes = ["-", "--", "-.", ":", (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1))]
    look = {"axes.prop_cycle": matplotlib.cycler(color=colours, linestyle=strokes), "legend.frameon": False}
    look |= {"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 160, "legend.fontsize": 8}
    (title, rows, columns), folder = FIGURES[name], groups[0]["folders"][0]
    with matplotlib.rc_context(look):
        figure = Figure((2 + 4 * columns, 2 + 2 * rows), layout="constrained")
        figure.suptitle(title.capitalize().replace("first run", folder.name))
        axes = figure.subplots(rows, columns, squeeze=False, sharex="col").flatten()
        globals()[name](axes, groups, folder)
        for axis in axes:
            axis.legend() if axis.has_data() else axis.set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    print(f"{name}: {path}")


def densities(axis: Any, values: dict[str, Any], x_label: str, **look: Any) -> None:
    """Gaussian kernel densities with Silverman's bandwidth, where all but the outermost hundredths lie."""
    values = {label: torch.as_tensor(v, dtype=torch.float64) for label, v in values.items()}
    ends = [v.quantile(q).item() for v in values.values() for q in (0.005, 0.995)]
    low, high = min(ends), max(ends)
    grid = torch.linspace(1.2 * low - 0.2 * high, 1.2 * high - 0.2 * low, 600, dtype=torch.float64)
    for label, v in values.items():
        width = max(1.06 * v.std(unbiased=False).item() * len(v) ** -0.2, (high - low) / 1000, 1e-9)
        kernels = torch.distributions.Normal(v, width).log_prob(grid[:, None]).exp()
        axis.plot(grid, kernels.mean(1), label=label, **look)
    axis.set(xlabel=x_label, ylabel="density (1 / nat)", ylim=(0, None))


def results_over(axis: Any, xs: list[float], groups: list[Row], pattern: str, x_label: str) -> None:
    """Each result in percent that all groups have and whose name fits, over xs, with standard errors."""
    results = [group["results"] for _, group in sorted(zip(xs, groups), key=lambda point: point[0])]
    for key in results[0]:
        if re.search(pattern + ".*%$", key) and all(key in row for row in results):
            name, ys = key.removesuffix(" %"), [row[key] for row in results]
            errors = [row.get(f"{name} error", 0) for row in results]
            axis.errorbar(sorted(xs), ys, errors, label=name, marker="o", capsize=3)
    axis.set(xlabel=x_label, ylabel="percent")


def figure1(axes: Any, groups: list[Row], folder: Path) -> None:
    for k, group in enumerate(groups):
        curves = [[line["loss"] for line in read_lines(f / "metrics.jsonl")] for f in group["folders"]]
        loss = torch.tensor([curve[: min(map(len, curves))] for curve in curves]).mean(0)  # over seeds
        window = max(1, len(loss) // 20)
        axes[0].plot(range(1, len(loss) + 1), loss, color=f"C{k}", linestyle="-", linewidth=0.5, alpha=0.35)
        axes[0].plot(range(window, len(loss) + 1), loss.unfold(0, window, 1).mean(1), label=group["name"])
    axes[0].set(xlabel="optimizer step (bold: mean of a twentieth of them)", ylabel="loss (nats per pair)")


def figure3(axes: Any, groups: list[Row], folder: Path) -> None:
    every, *kinds = batch_margins(folder).items()
    for k, (axis, (name, margins)) in enumerate(zip(axes, kinds)):
        densities(axis, {name: margins.mean(1)}, "mean margin of the batch (nats)", color=f"C{k}")
        axis.axvline(every[1].mean(), color="grey", linewidth=0.8, zorder=0, label="mean over all pairs")
        axis.label_outer()


def figure4(axes: Any, groups: list[Row], folder: Path) -> None:
    xs = [lm.read_json(g["folders"][0] / "constants.json", {"lambda": 0.0})["lambda"] for g in groups]
    margins: dict[str, list[float]] = {}
    for x, group in sorted(zip(xs, groups), key=lambda point: point[0]):
        found = [[[], *remembered(f).get("margins", {}).values()][-1] for f in group["folders"]]
        margins[f"λ = {x:g}"] = margins.get(f"λ = {x:g}", []) + sum(found, [])
    if not all(margins.values()):
        raise ValueError("figure 4 shows margins of held-out pairs; train with --eval_data or --eval_share")
    densities(axes[0], margins, "margin (nats)")
    results_over(axes[1], xs, groups, "accuracy", "λ")
    results_over(axes[2], xs, groups, "^(win rate|WR|LC)", "λ")


def figure5(axes: Any, groups: list[Row], folder: Path) -> None:
    filters = [[lm.read_json(f / "filter.json", {"ratio": 0}) for f in group["folders"]] for group in groups]
    xs = [100 * fmean(found["ratio"] for found in runs) for runs in filters]
    results_over(axes[0], xs, groups, "^(win rate|WR|LC)", "pairs that the filter removed (percent)")


def figure_margins(axes: Any, groups: list[Row], folder: Path) -> None:
    margins, held = batch_margins(folder)["all"], remembered(folder).get("margins", {})
    kept = torch.ones(len(margins), dtype=torch.bool)
    removed = lm.read_json(folder / "filter.json", {"removed_step1": [], "removed_step2": []})
    kept[removed["removed_step1"] + removed["removed_step2"]] = False
    bins = torch.linspace(margins.min(), margins.max(), 61)
    for name, values, stroke in (("all", margins, "-"), ("kept", margins[kept], "--")):
        label = f"{name} {len(values):,} training pairs"
        axes[0].hist(values, bins, histtype="step", linestyle=stroke, label=label)
    axes[0].set(xlabel="margin by the proxy (nats)", ylabel="pairs")
    if held:
        densities(axes[1], held, "margin of held-out pairs (nats)")


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
    add("--filter", action="store_true", help="print what the filter removed: noise? short or long ones?")
    add("--json", metavar="FILE", help="write the printed tables here too")
    for name, (title, *_) in FIGURES.items():
        add(f"--{name}", metavar="FILE", help=f"{title} (.png, .svg or .pdf)")
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {name: Path(path) for name in FIGURES if (path := getattr(args, name))}
    if bad := [path for path in figures.values() if path.suffix not in (".png", ".svg", ".pdf")]:
        raise ValueError(f"{bad[0]}: the name of a figure must end in .png, .svg or .pdf")
    if args.out and len(args.models) > 1:
        raise ValueError("--out is for one model: leave it out, or name one")
    tables, folders = {}, [Path(name) for name in args.models]
    for name in args.models if args.generate else []:
        write_both_outputs(name, args, device)
    if args.judge:
        agreed: dict[str, float] = {}
        tables["judged"] = [judge_model(name, args, device, agreed) for name in args.models]
    if args.pairs:
        tables["margins"] = []
        for name in args.models:
            s, tokenizer, models = open_run(name, or_model=True)
            lengths = s["max_length"], s["max_prompt_length"]
            pairs, _ = data.tokenize_preferences(read_pairs(args.pairs), tokenizer, *lengths)
            for label, _, _, row in scored(models, pairs, s, device):
                tables["margins"].append({"model": f"{name} {label}".strip(), "pairs": len(pairs)} | row)
    wanted = {"table3": table3} if args.table3 else {}
    wanted |= {"filter": filter_row} if args.filter else {}
    report = not (tables or wanted or args.generate)
    groups = grouped(folders) if figures or wanted or report else []
    names = [{"run": ", ".join(f.name for f in g["folders"]), "seeds": len(g["folders"])} for g in groups]
    for name, make in wanted.items():
        rows = [over_seeds([make(folder) for folder in group["folders"]]) for group in groups]
        tables[name] = [one | row for one, row in zip(names, rows)]
    if figures or report:
        add_results(groups, device)
    if report:
        tables["runs"] = [one | g["differing"] | g["results"] for one, g in zip(names, groups)]
    for rows in tables.values():
        print(markdown(rows))
    if report:
        print("±: standard error over seeds, or of one run over prompts; behind (95 %) that interval")
    if args.judge:
        print("LC: alpaca_eval's length_controlled_minimal without L1 penalty; ±: standard error")
    if args.json:
        write_json(Path(args.json), tables)
    for name, path in figures.items():
        draw(name, path, groups)


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
    prompts, (s, tokenizer, models) = read_prompts(args.generate), open_run(name, or_model=True)
    jobs, given = {out / "model_outputs.json": [*models.values()][-1]}, out / "reference_outputs.json"
    if not given.is_file() or given.with_suffix(".jsonl").is_file():
        if not args.baseline and not is_run(name):
            raise ValueError(f"{name} is no run: say with --baseline MODEL what to compare it with")
        jobs[given] = args.baseline or next(iter(models.values()))
    for path, source in jobs.items():
        own = lm.load_tokenizer(source) if source == args.baseline else tokenizer
        model = lm.load_model(source, s["seed"]).to(device).eval()
        generator = str(source).strip("/").replace("/", "__")  # alpaca_eval makes a file name of it
        write_outputs(path, generator, model, own, prompts, how)


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
