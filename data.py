"""Preference data: read, check, tokenize, truncate, collate; and the built-in synthetic preferences.

A pair travels as text {prompt, chosen, rejected} -> three lists of token ids (`Pair`) -> one row of a batch:
prompt + chosen + rejected, so that the prompt, most of the tokens in multi-turn data, is computed once.
Position ids of rejected restart where the prompt ends, and a mask lets each token see those before it, except
that rejected never sees chosen. Nothing after model.py knows about tokens.

The rules, each with a test of its name: message lists go through the chat template as whole conversations and
get no further special tokens; plain strings are plain text, one BOS in front if the tokenizer has one, one
end token behind; special tokens written inside a text are encoded as text, so that they cannot forge a turn;
prompt and response are split on token ids; a response has exactly one end token, supervised, unless it was
truncated; padding is known by length, never by id. Pairs with an empty response, with identical responses
(before or after truncation: their margin is exactly 0), or with unequal prompts are dropped and counted by
reason. Bad files raise ValueError naming file and line.
"""

import gzip
import hashlib
import json
import random
import re
import secrets
import zlib
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import accumulate, chain, islice
from os.path import commonprefix  # of any sequences
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

HH_MARK = "\n\nAssistant:"
ENDING = re.compile(r"\.(jsonl?)(\.gz)?$")
# Llama 3's template writes today's date into the system prompt: data would change at midnight, and with it
# splits and fingerprints. This is the date that it falls back to.
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
MARK = secrets.token_hex()  # around special tokens that a user wrote, while a template is rendered
FORMATS = (
    'give {"prompt", "chosen", "rejected"} as strings or as message lists, {"chosen", "rejected"} as message '
    "lists that begin alike, or Anthropic HH transcripts"
)


class Pair(NamedTuple):
    """One preference pair as token ids. source: "file:line"; row: its place among the rows read."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    source: str
    row: int

    @property
    def size(self) -> int:
        """Tokens of the row that holds the prompt once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def length(self) -> int:
        """Tokens of the longer plain row."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


# ------------------------------------------------------------------------------------------------------- read


def read_preferences(source: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows {prompt, chosen, rejected, source} from a .json or .jsonl file, .gz of these, or a hub dataset.

    source: a path; or "owner/name", or "owner/name:file/in/it.jsonl.gz" where the repository holds several
    such files. prompt, chosen, rejected: strings, or a message list and two messages. limit: only the first K
    rows. A row that is no usable pair also has "drop": why.
    """
    path = Path(source)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", source):
        path = _download(source)
    if not path.is_file():
        raise ValueError(f"{source}: no such file; give a .json or .jsonl file, .gz of these, or a hub id")
    rows = [_recognise(value, place) for place, value in islice(_json_values(path), limit)]
    if not rows:
        raise ValueError(f"{source}: holds no pairs; {FORMATS}")
    return rows


def _download(source: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    name, _, file = source.partition(":")
    try:
        files = [file for file in HfApi().list_repo_files(name, repo_type="dataset") if ENDING.search(file)]
        file = file or (files[0] if len(files) == 1 else "")
        if file in files:
            return Path(hf_hub_download(name, file, repo_type="dataset"))
    except Exception as error:  # offline, no such repository, gated, ...: whatever the hub's client raises
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ValueError(f"{source}: no such file, and the hub gave no such dataset ({reason})") from None
    if files:
        raise ValueError(f"{source}: name one of its files, as {name}:{files[0]} (of {', '.join(files[:8])})")
    raise ValueError(f"{source}: holds no .json or .jsonl file; convert it with datasets' Dataset.to_json")


def _json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) for each line of a .jsonl file or each item of a .json list."""
    kind = ENDING.search(path.name)
    if not kind:
        raise ValueError(f"{path}: the name must end in .json, .jsonl, .json.gz or .jsonl.gz")

    def unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(items)) < len(items):
            raise ValueError(f"a key stands twice in {[key for key, _ in items]}")
        return dict(items)

    def parse(text: str, place: str) -> Any:
        try:
            return json.loads(text, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            if kind[1] == "json" and isinstance(error, json.JSONDecodeError):
                place += f":{error.lineno}"
            hint = "a .jsonl file has one object a line, a .json file one list"
            raise ValueError(f"{place}: not JSON ({getattr(error, 'msg', error)}); {hint}") from None

    try:
        with (gzip.open if kind[2] else open)(path, "rt", encoding="utf-8-sig") as file:
            if kind[1] == "jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", parse(line, f"{path}:{number}")
                return
            values = parse(file.read(), str(path))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, list):
        raise ValueError(f"{path}: a .json file must hold one list of pairs, not {type(values).__name__}")
    yield from ((f"{path}: item {number}", value) for number, value in enumerate(values, 1))


def _recognise(row: Any, place: str) -> dict[str, Any]:
    """A row of read_preferences from one in any of the FORMATS."""

    def refuse(why: str) -> NoReturn:
        raise ValueError(f"{place}: {why}; {FORMATS}")

    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        refuse(f"no preference pair (found {sorted(row) if isinstance(row, dict) else type(row).__name__})")
    sides, prompt = [row["chosen"], row["rejected"]], row.get("prompt")
    if isinstance(sides[0], list) and sides[0][:1] == [{"role": "user", "content": prompt}]:
        prompt = None  # it stands twice
    given = sides if prompt is None else [prompt, *sides]
    if all(isinstance(value, str) for value in given):
        prompts, answers = [prompt, prompt], sides
        if prompt is None:
            if not all(HH_MARK in side for side in sides):
                refuse(f"no prompt, and no {HH_MARK!r} to split at")
            prompts = [side[: side.rindex(HH_MARK) + len(HH_MARK)] for side in sides]
            answers = [side.removeprefix(start) for side, start in zip(sides, prompts)]
        texts = answers
    elif all(isinstance(value, list) and value for value in given):
        talks = [(prompt or []) + side for side in sides]
        for message in talks[0] + talks[1]:
            fits = isinstance(message, dict) and message.keys() == {"role", "content"}
            if not (fits and all(isinstance(value, str) for value in message.values())):
                refuse(f"a message must be {{role: text, content: text}}, not {str(message)[:80]}")
        prompts, answers = [talk[:-1] for talk in talks], [talk[-1] for talk in talks]
        if any(answer["role"] != "assistant" for answer in answers):
            refuse("chosen and rejected must end with a message of role assistant")
        texts = [answer["content"] for answer in answers]
    else:
        kinds = {key: type(row[key]).__name__ for key in ("prompt", "chosen", "rejected") if key in row}
        refuse(f"{kinds} are not all strings or all message lists")
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: text that is no Unicode ({error.reason}): half a character?") from None
    found = {"prompt": prompts[0], "chosen": answers[0], "rejected": answers[1], "source": place}
    faults = {
        "prompts differ": prompts[0] != prompts[1],
        "empty prompt": not prompts[0],
        "empty response": not all(text.strip() for text in texts),
        "identical responses": texts[0] == texts[1],
    }
    return found | next(({"drop": fault} for fault, holds in faults.items() if holds), {})


# --------------------------------------------------------------------------------------------------- tokenize


def tokenize_preferences(
    rows: list[dict[str, Any]], tokenizer: Any, max_length: int = 1024, max_prompt_length: int | None = None
) -> tuple[list[Pair], dict[str, int]]:
    """Rows of read_preferences -> pairs, and the number of rows by what happened to them.

    max_length: tokens of prompt plus one response. A longer prompt loses its beginning (but not its BOS) down
    to max_prompt_length, by default to what the longer response leaves, at least half of max_length; then
    each response by itself loses its end. Raises ValueError if nothing is left, or if the rows hold messages
    and the tokenizer has no chat template.
    """
    if not 2 <= max_length or not (max_prompt_length is None or 1 <= max_prompt_length < max_length):
        raise ValueError(f"max_prompt_length {max_prompt_length} must be 1 to below max_length {max_length}")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token (eos_token), so a response cannot end; set one")
    counts = Counter({"read": len(rows)})
    usable = [(index, row) for index, row in enumerate(rows) if "drop" not in row]
    counts.update("dropped: " + row["drop"] for row in rows if "drop" in row)
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
    controls = "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)"  # the longest first
    bos = tokenizer.bos_token_id
    bos_added = bos is not None and tokenizer("a").input_ids[:1] == [bos]

    texts = []  # prompt, prompt + chosen, prompt + rejected of each row in turn
    for _, row in usable:
        parts = [_parts(row, side, tokenizer, controls) for side in (None, "chosen", "rejected")]
        said = [text for text in parts for text in text[1::2]]
        counts["control tokens in a text, encoded as text"] += any(re.search(controls, text) for text in said)
        texts += parts
    ids = _encode(texts, tokenizer)

    pairs, control_ids = [], set(special.values())
    for (index, row), alone, *full in zip(usable, ids[0::3], ids[1::3], ids[2::3]):
        plain = isinstance(row["prompt"], str)
        if plain:
            start = [bos] if bos_added and alone[:1] != [bos] else []
            alone, full = start + alone, [start + side + [tokenizer.eos_token_id] for side in full]
        # Tokens merged across the boundary differ from those the prompt has alone: they go to the response.
        prompt = commonprefix([alone, *full])
        if not plain:
            full = [_one_end_token(side, len(prompt), control_ids, tokenizer) for side in full]
        counts["prompt and response merged at the boundary"] += len(prompt) < len(alone)
        responses = [side[len(prompt) :] for side in full]
        longest = max(map(len, responses))
        budget = max_prompt_length or max(max_length - longest, max_length // 2)
        if len(prompt) > budget:
            counts["prompt truncated"] += 1
            keep_bos = prompt[:1] if prompt[0] == bos and budget > 1 else []
            prompt = keep_bos + prompt[len(prompt) - budget + len(keep_bos) :]
        room = max_length - len(prompt)
        counts["response truncated"] += longest > room
        chosen, rejected = (response[:room] for response in responses)
        if not prompt:
            counts["dropped: empty prompt"] += 1
        elif chosen == rejected:
            counts["dropped: identical after truncation"] += 1
        else:
            pairs.append(Pair(prompt, chosen, rejected, row["source"], index))
    counts["kept"] = len(pairs)
    counts = {reason: count for reason, count in counts.items() if count}
    if not pairs:
        raise ValueError(
            f"{rows[0]['source']}: no pair is left ({listed(counts)}): look at data or max_length"
        )
    return pairs, counts


def listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items())


def _parts(row: dict[str, Any], side: str | None, tokenizer: Any, controls: str) -> list[str]:
    """The text of prompt (+ response) in parts; control tokens in every second one are mere text."""
    if isinstance(row["prompt"], str):
        return ["", row["prompt"] + (row[side] if side else "")]
    if not tokenizer.chat_template:
        raise ValueError(
            f"{row['source']}: messages, but the tokenizer has no template: --chat_template FILE"
        )
    messages = row["prompt"] + ([row[side]] if side else [])
    safe = [m | {"content": re.sub(controls, rf"{MARK}\g<0>{MARK}", m["content"])} for m in messages]
    try:
        how = {"chat_template": FIXED_DATE + tokenizer.get_chat_template(), "tokenize": False}
        rendered = tokenizer.apply_chat_template(safe, add_generation_prompt=side is None, **how)
    except Exception as error:  # templates raise what they like, for example on a system message
        raise ValueError(f"{row['source']}: the chat template refuses this conversation ({error})") from None
    return re.split(f"{MARK}({controls}){MARK}", rendered)


def _encode(texts: list[list[str]], tokenizer: Any) -> list[list[int]]:
    """All parts of all texts in two calls of the tokenizer, put together again."""
    ids = []
    for literal in (False, True):
        parts = [part for text in texts for part in text[literal::2]]
        how = {"add_special_tokens": False, "split_special_tokens": literal, "verbose": False}
        ids.append(iter(tokenizer(parts, **how).input_ids if parts else []))
    return [[id for k in range(len(text)) for id in next(ids[k % 2])] for text in texts]


def _one_end_token(ids: list[int], prompt_length: int, control_ids: set[int], tokenizer: Any) -> list[int]:
    """Cut what a template puts behind the end of turn (newline, second end token); add one if none."""
    end = None
    for last in range(len(ids) - 1, prompt_length - 1, -1):
        if ids[last] in control_ids:
            end = last + 1
        elif tokenizer.decode(ids[last]).strip():
            break
    return ids + [tokenizer.eos_token_id] if end is None else ids[:end]


def split_by_prompt(pairs: list[Pair], shares: tuple[float, ...], seed: int) -> list[list[Pair]]:
    """Disjoint parts of about these shares, and the rest last. A prompt's part depends on (seed, prompt)
    alone, so pairs with the same prompt stay together and no other pair, nor the order, matters."""
    ends = list(accumulate(shares))
    parts: list[list[Pair]] = [[] for _ in (*shares, 1)]
    for pair in pairs:
        place = int.from_bytes(hashlib.sha256(f"{seed} {pair.prompt}".encode()).digest()[:8]) / 2**64
        parts[bisect(ends, place)].append(pair)
    return parts


def load_splits(
    settings: dict[str, Any], tokenizer: Any
) -> tuple[dict[str, list[Pair]], list[dict[str, Any]], dict[str, int]]:
    """The pairs of a run from its settings (the fields of train.Settings, or a run's config.json): {"train",
    "sft", "eval"}, the rows read for train and sft (pair.row points into them), and what tokenize_preferences
    counted.

    eval is eval_data if given, else a share of the data; with sft_epochs, a fifth of the rest goes to SFT
    (1:4, as in the paper).
    """
    held_out = None
    if settings["data"] == BUILTIN:
        rows = synthetic_preferences(BUILTIN_PAIRS, settings["seed"])[: settings["limit"]]
        held_out = synthetic_preferences(BUILTIN_EVAL_PAIRS, settings["seed"], held_out=True)
    else:
        rows = read_preferences(settings["data"], settings["limit"])
    if settings["eval_data"]:
        held_out = read_preferences(settings["eval_data"])
    lengths = settings["max_length"], settings["max_prompt_length"]
    pairs, counts = tokenize_preferences(rows, tokenizer, *lengths)
    shares = (0.0 if held_out else settings["eval_share"], 0.2 if settings["sft_epochs"] else 0.0)
    shares = shares[0], shares[1] * (1 - shares[0])
    evaluation, sft, train = split_by_prompt(pairs, shares, settings["seed"])
    if held_out:
        evaluation, _ = tokenize_preferences(held_out, tokenizer, *lengths)
    return {"train": train, "sft": sft, "eval": evaluation}, rows, counts


def fingerprint(pairs: list[Pair]) -> str:
    """What a model sees of these pairs, in 16 hex digits: data, order, tokenizer, template and truncation are
    all in it."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr(pair[:3]).encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------- collate


def micro_batches(pairs: list[Pair], tokens: int, shared_prompt: bool = True) -> list[list[int]]:
    """Indices into pairs in groups of similar length, at most `tokens` when padded (or 1 pair)."""
    sizes = [pair.size if shared_prompt else 2 * pair.length for pair in pairs]
    groups: list[list[int]] = []
    for index in sorted(range(len(pairs)), key=lambda i: -sizes[i]):
        if groups and (len(groups[-1]) + 1) * sizes[groups[-1][0]] <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def scoring_batches(
    pairs: list[Pair], tokens: int, shared_prompt: bool = True, rank: int = 0, world: int = 1
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(indices, batch) that together cover this rank's pairs, rank, rank + world, ... once, for
    model.score_pairs."""
    mine = range(rank, len(pairs), world)
    for group in micro_batches([pairs[i] for i in mine], tokens, shared_prompt):
        index = [mine[i] for i in group]
        yield index, collate([pairs[i] for i in index], shared_prompt)


def both_ways(pairs: list[Pair]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The pair with the longest plain row as one row and as two rows, for model.shares_prompt."""
    longest = [max(pairs, key=lambda pair: pair.length)]
    return collate(longest, True), collate(longest, False)


def collate(pairs: list[Pair], shared_prompt: bool = True) -> dict[str, Tensor]:
    """B pairs -> the tensors that model.sequence_logps takes.

    One row a pair (R = B, T = the longest prompt + chosen + rejected); or, for models that cannot take such a
    mask, two rows a pair: prompt + chosen, prompt + rejected. Padding stands on the right, where no token
    looks. A response may be empty (for SFT, which has no rejected ones).

    input_ids, position_ids   [R, T]
    attention_mask            [R, 1, T, T] bool, True = may attend; for plain rows [R, T], no position_ids
    keep                      [R, T] bool: where the next token is a response token, so logits are needed;
                              K in all. The prompt's last position predicts two tokens.
    predictor, target, owner  [S]: for each response token, which of the K logits predicts it, its id, and
                              whose it is: 2 b for chosen and 2 b + 1 for rejected of pair b
    lengths                   [B, 2]: tokens of chosen and of rejected
    """
    ids, positions, owners = [], [], []  # of the R rows; owner -1: the prompt's
    for b, pair in enumerate(pairs):
        sides = [(2 * b + k, response) for k, response in enumerate(pair[1:3]) if response]
        for row in [sides] if shared_prompt else [[side] for side in sides]:
            start = range(len(pair.prompt))
            ids.append(pair.prompt + [id for _, response in row for id in response])
            positions.append([*start, *(len(start) + i for _, response in row for i in range(len(response)))])
            owners.append([-1 for _ in start] + [side for side, response in row for _ in response])

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    input_ids, position_ids, owner = padded(ids, 0), padded(positions, 0), padded(owners, -2)  # [R, T]
    r, t = (owner >= 0).nonzero(as_tuple=True)  # [S], row by row
    prompt_last = (owner == -1).sum(1) - 1  # [R]
    before = torch.where(owner[r, t - 1] == owner[r, t], t - 1, prompt_last[r])  # [S]
    keep = torch.zeros_like(owner, dtype=torch.bool)
    keep[r, before] = True
    batch = {"input_ids": input_ids, "keep": keep, "target": input_ids[r, t], "owner": owner[r, t]}
    batch["predictor"] = keep.flatten().cumsum(0).view_as(keep)[r, before] - 1
    batch["lengths"] = torch.tensor([(len(pair.chosen), len(pair.rejected)) for pair in pairs])
    if not shared_prompt:
        return batch | {"attention_mask": owner > -2}
    visible = (owner[:, None] == -1) | (owner[:, None] == owner[:, :, None])  # prompt, own side: [R, T, T]
    return batch | {"position_ids": position_ids, "attention_mask": visible.tril()[:, None]}


# --------------------------------------------------------------------------------------- built-in preferences

TOPICS = {
    "bread": ("flour", "yeast", "a hot oven", "a long rest"),
    "gardens": ("good soil", "young seeds", "morning water", "full sun"),
    "bicycles": ("chain oil", "firm tires", "new brakes", "a bright lamp"),
    "chess": ("quick pawns", "a safe king", "open lines", "calm endgames"),
    "painting": ("soft brushes", "a clean canvas", "mixed colors", "dry layers"),
    "running": ("light shoes", "slow miles", "warm muscles", "steady breath"),
    "tea": ("fresh leaves", "hot water", "a thin cup", "three minutes"),
    "camping": ("a dry tent", "warm blankets", "fire wood", "a flat place"),
}
DETAILS = [*chain(*TOPICS.values())]
QUESTIONS = (
    "How do I start with {}?",
    "What matters most in {}?",
    "Give me advice about {}.",
    "Can you teach me {}?",
)
ASKERS = (
    "",
    "I am new here. ",
    "My sister asks. ",
    "This is for school. ",
    "I tried it once. ",
    "I have one hour. ",
)
POLITE = ("I am happy to help.", "Good question.", "I hope this helps.", "Enjoy it.")
RUDE = ("That is a silly question.", "I do not care.", "Go and ask someone else.")
FILLER = ("There are many ways to see it.", "People often talk about this.", "It depends on many things.")
BUILTIN, BUILTIN_PAIRS, BUILTIN_EVAL_PAIRS = "built-in", 2500, 300
FLIPPED_SHARE = 0.10  # annotation noise: this share of the labels is turned round after Eq. 3 has drawn them


def true_reward(prompt: str, response: str) -> float:
    """The built-in task's reward r(x, y): what the sentences of a response are worth for a prompt, in nats of
    Eq. 3.

    +0.8 for each detail of the topic asked about, -0.8 for one of another topic, +0.8 for politeness, -1
    for rudeness, -0.2 for filler, and -0.5 for a sentence said again or unknown (made-up words).
    """
    worth, reward, said = _worth(_details(prompt)), 0.0, set()
    for sentence in map(str.strip, re.findall(r"[^.]+\.?", response.strip())):
        reward += -0.5 if sentence in said else worth.get(sentence, -0.5)
        said.add(sentence)
    return reward


def _details(prompt: str) -> tuple[str, ...]:
    """Those of the topic asked about, the first of TOPICS whose letters are in the prompt: so "Can you teach
    me camping?" asks about tea."""
    return next((details for topic, details in TOPICS.items() if topic in prompt), ())


@cache
def _worth(asked: tuple[str, ...]) -> dict[str, float]:
    """What each known sentence is worth where these details are asked for; the last one may lack its stop."""
    worth = dict.fromkeys(POLITE, 0.8) | dict.fromkeys(RUDE, -1.0) | dict.fromkeys(FILLER, -0.2)
    for detail in DETAILS:
        value = 0.8 if detail in asked else -0.8
        worth |= {f"You need {detail}.": value, f"You need {detail}": value}
    return worth


def _prompts() -> list[str]:
    return [asker + question.format(topic) for topic in TOPICS for question in QUESTIONS for asker in ASKERS]


def builtin_texts() -> list[str]:
    """Everything the built-in task can say, for its tokenizer."""
    details = [f"You need {detail}." for detail in DETAILS]
    return _prompts() + [sentence for sentence in (*details, *POLITE, *RUDE, *FILLER) for _ in range(20)]


def synthetic_preferences(count: int, seed: int, held_out: bool = False) -> list[dict[str, Any]]:
    """Rows of the built-in task, as read_preferences gives them, with the truth beside: "truth": {margin,
    flipped}.

    Two responses of two to five random sentences; the label is drawn from Eq. 3 on the true reward, so that
    close pairs are ambiguous by nature, and then FLIPPED_SHARE of the labels are turned round. truth.margin:
    the true reward of chosen minus that of rejected. held_out: prompts that the other rows never use (one in
    six).
    """
    draw = random.Random(f"{seed} {held_out}")
    prompts = _prompts()
    random.Random(0).shuffle(prompts)
    prompts = prompts[: len(prompts) // 6] if held_out else prompts[len(prompts) // 6 :]

    def response(prompt: str) -> str:
        kinds = _details(prompt), DETAILS, POLITE, RUDE, FILLER
        sentences = [
            draw.choice(draw.choices(kinds, (30, 20, 15, 15, 20))[0]) for _ in range(draw.randint(2, 5))
        ]
        return " ".join(s if s.endswith(".") else f"You need {s}." for s in sentences)

    rows = []
    for number in range(1, count + 1):
        prompt = draw.choice(prompts)
        first, second = response(prompt), response(prompt)
        margin = true_reward(prompt, first) - true_reward(prompt, second)
        flipped = draw.random() < FLIPPED_SHARE
        if (draw.random() < torch.sigmoid(torch.tensor(margin)).item()) == flipped:  # Eq. 3, then the flip
            first, second, margin = second, first, -margin
        row = {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": first}],
            "rejected": [{"role": "assistant", "content": second}],
        }
        place = f"built-in: row {number}"
        rows.append(_recognise(row, place) | {"truth": {"margin": margin, "flipped": flipped}})
    return rows
