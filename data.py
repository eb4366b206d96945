"""Preference data: read, check, tokenize, truncate, collate; and the built-in synthetic preferences.

Every form of file becomes one at the door: a row {prompt, chosen, rejected, source}. Then one path:
row -> text -> token ids (`Pair`) -> one row of a batch, prompt + chosen + rejected, so that the prompt, most
of the tokens of multi-turn data, is computed once. What the model sees is what the row says:

- Messages go through the chat template as whole conversations, thinking off. The prompt is all that the
  template writes before the response's text, so that generation starts from exactly what training saw.
- A text is plain text: a BOS in front if the tokenizer has one, an end token behind; tokens in it are tokens.
- Prompt and response are split on token ids. A response has one end token, supervised, unless truncated.
- A pair that cannot be shown as it is written, or says nothing, is dropped and counted, the first one named.

    rows = read_preferences("pairs.jsonl")    # or "Anthropic/hh-rlhf:*/train.jsonl.gz", or a list of sources
    pairs, counts = tokenize_preferences(rows, tokenizer)
    batch = collate(pairs[:8])
"""

import fnmatch
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import zlib
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import accumulate, groupby
from os.path import commonprefix  # of any sequences
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download  # comes with transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Messages = list[dict[str, str]]  # {"role": "system", "user" or "assistant", "content": text}
Row = dict[str, Any]  # prompt: text or Messages; chosen, rejected: texts; source; drop: why it is unusable


class Pair(NamedTuple):
    """One preference pair as token ids. source: "file:line"; row: the row it was made from."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    source: str
    row: Row

    @property
    def size(self) -> int:  # tokens of the row that holds the prompt once
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def length(self) -> int:  # tokens of the longer plain row
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Splits(NamedTuple):
    train: list[Pair]
    sft: list[Pair]
    held_out: list[Pair]
    counts: dict[str, int]

    @property
    def everything(self) -> list[Pair]:  # in the order of a run's fingerprint
        return self.train + self.sft + self.held_out


class Unusable(ValueError):
    """Why a row is no usable pair: "what is counted", or "what is counted: what this row has of it"."""


# ------------------------------------------------------------------------------------------------------ files


def read_json(path: Path, default: Any = None) -> Any:
    """What is in the file, or the default if there is none. Raises ValueError naming the file."""
    if not Path(path).is_file():
        return default
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def write_json(path: Path, value: Any) -> None:
    write_whole(path, lambda unfinished: unfinished.write_text(json.dumps(value, indent=1), encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """A file or folder appears whole or not at all: `write` writes it beside, then it is renamed. A folder
    that is there already stays as it is (OSError)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # a killed run's
    try:
        write(unfinished)
        for part in filter(Path.is_file, [unfinished, *unfinished.rglob("*")]):
            with part.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)


def read_lines(path: Path) -> list[Any]:
    """The values of a .jsonl file, less lines that a crash cut short; of no file, none."""
    values = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):
                values.append(json.loads(line))
    return values


def keep_lines(path: Path, count: int) -> None:
    """Cut a .jsonl file after so many values."""
    text = "".join(json.dumps(value) + "\n" for value in read_lines(path)[:count])
    write_whole(path, lambda unfinished: unfinished.write_text(text))


def append_line(path: Path, value: Any) -> None:
    """Add a value to a .jsonl file, on a line of its own also where a crash cut the last one short."""
    with path.open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read() not in (b"", b"\n"):
            file.write(b"\n")
        file.write(json.dumps(value).encode() + b"\n")


# -------------------------------------------------------------------------------------- read: files to rows

BUILTIN = "built-in"
SOURCES = ".json, .jsonl or .ndjson files, .gz of these, .parquet, or owner/name:path of a hub dataset"


def read_preferences(
    source: str | list[str], limit: int | None = None, seed: int = 0, single_turn: bool = False
) -> list[Row]:
    """Rows of one or several SOURCES; the path in a hub dataset may hold *.

    single_turn: only conversations of one user turn. limit: a random K of the usable rows, drawn by seed.
    Raises ValueError for a file that cannot be read, that has no row of a known form, or a column to lose.
    """
    rows = []
    for one_source in [source] if isinstance(source, str) else source:
        for name, path in _files(one_source):
            rows += _read_file(name, path)
    for row in rows:
        if single_turn and "drop" not in row:
            roles = [message["role"] for message in as_messages(row["prompt"])]
            if roles.count("user") != 1:
                row["drop"] = "not one user turn"
    usable = [row for row in rows if "drop" not in row]
    if limit is not None and limit < len(usable):
        drawn = {id(row) for row in random.Random(seed).sample(usable, limit)}
        for row in usable:
            if id(row) not in drawn:
                row["drop"] = "not drawn, by the limit"
    return rows


def _files(source: str) -> list[tuple[str, Path]]:
    """(name, path) of each file of a source; a hub file is named owner/name:path."""
    if Path(source).is_file():
        return [(source, Path(source))]
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+):(.+)", source)
    if not hub:
        raise ValueError(f"{source}: no such file; give {SOURCES}")
    repository, wanted = hub.groups()
    try:  # without network this looks into its cache
        folder = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=wanted))
    except Exception as error:  # no such repository, gated, not in the cache, ...: whatever the client raises
        raise ValueError(f"{source}: no such file here, and none from the hub ({_one_line(error)})") from None
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    names = sorted(fnmatch.filter(names, wanted))
    if not names:
        raise ValueError(f"{source}: neither the hub's dataset nor the cache has such a file")
    return [(f"{repository}:{name}", folder / name) for name in names]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _read_file(name: str, path: Path) -> list[Row]:
    rows = []
    complaints = []
    for place, value in _values(name, path):
        try:
            rows.append(_recognise(value, place))
        except Unusable as error:
            rows.append({"source": place, "drop": f"of no known form: {error}"})
            columns = sorted(value) if isinstance(value, dict) else []
            prompt = next((key for key in PROMPTS if key in columns), "prompt")
            form = f"{prompt}, chosen, rejected, as texts or as messages"
            complaints.append(f"{place}: {error}; columns found: {columns}; the nearest form is {form}")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if not rows:
        raise ValueError(f"{name}: holds no pairs")
    if len(complaints) == len(rows):
        raise ValueError(complaints[0])
    return rows


def _values(name: str, path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) for each line of a .jsonl file, item of a .json list, or row of a .parquet file."""
    place = name
    values = []
    plain_name = name.removesuffix(".gz")
    if not name.endswith(".parquet") and not plain_name.endswith((".json", ".jsonl", ".ndjson")):
        raise ValueError(f"{name}: of no known kind; give {SOURCES}")
    opened = open if name == plain_name else gzip.open
    try:
        if name.endswith(".parquet"):
            from pyarrow import parquet

            values = parquet.read_table(path).to_pylist()
        elif plain_name.endswith(".json"):
            with opened(path, "rt", encoding="utf-8-sig") as file:
                values = json.load(file)
        else:
            with opened(path, "rt", encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    place = f"{name}:{number}"
                    if line.strip():
                        yield place, json.loads(line)
    except ImportError:
        raise ValueError(f"{name}: reading .parquet needs pyarrow: pip install pyarrow") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        hint = "a .jsonl file has one object a line, a .json file one list"
        raise ValueError(f"{place}: cannot be read ({_one_line(error)}); {hint}") from None
    if not isinstance(values, list):
        raise ValueError(f"{name}: a .json file must hold one list of pairs, not {type(values).__name__}")
    for number, value in enumerate(values, 1):
        yield f"{name}: item {number}", value


# --------------------------------------------------------------------------------- read: every form to one

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # turn marks of Anthropic HH's transcripts
NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
SYSTEMS = ("system", "system_prompt", "system_message")  # columns of a system message
PROMPTS = ("prompt", "conversations", "messages", "question", "instruction", "input")  # columns of a prompt
HARMLESS = {"role", "content", "from", "value", "name", "weight", "score", "id", "index", "timestamp"}
# Filled, these change what a model should have seen: they are refused, for to drop them would be silent.
MEANINGFUL = ("tools", "functions", "tool_calls", "function_call", "documents", "context", "history")
MEANINGFUL += ("image", "images", "video", "videos", "audio", "audios", "thinking", "reasoning_content")
MEANINGFUL += ("chat_history", "chat_template_kwargs", "image_path", "initial_reason_steps")
USED = {"chosen", "rejected", *PROMPTS, *SYSTEMS, *MEANINGFUL}  # columns; what else is filled is said


def make_row(prompt: str | Messages, chosen: str, rejected: str, source: str) -> Row:
    """A row from a prompt and two responses that models wrote. In a transcript a space stands before them."""
    if is_transcript(prompt):
        space = "" if prompt[-1].isspace() else " "
        chosen, rejected = space + chosen.lstrip(), space + rejected.lstrip()
    return _checked(prompt, chosen, rejected, source)


def _checked(prompt: str | Messages, chosen: str, rejected: str, source: str) -> Row:
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": source}
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Unusable(f"text that is no Unicode ({error.reason}): half a character?") from None
    if not any(turn["content"].strip() for turn in as_messages(prompt) if turn["role"] != "system"):
        row["drop"] = "empty prompt"
    elif not chosen.strip() or not rejected.strip():
        row["drop"] = "empty response"
    elif chosen == rejected:
        row["drop"] = "identical responses"
    return row


def _recognise(value: Any, place: str) -> Row:
    """A row from a value of any form: prompt and sides as text or messages, less what stands twice."""
    if not isinstance(value, dict):
        raise Unusable(f"a row must be an object, not {type(value).__name__}")
    if value.get("chosen") is None or value.get("rejected") is None:
        raise Unusable("no preference pair")
    _refuse_meaningful(value)
    given = _prompt(value)
    sides = [text_or_messages(value[key], key) for key in ("chosen", "rejected")]
    texts = all(isinstance(side, str) for side in sides)
    if texts and not isinstance(given, list):
        split = _split_texts(given, sides)
    else:
        responses = _without_last_turn(given, sides) if texts else sides
        split = [_split_messages(given, response) for response in responses]
    (prompt, chosen), (other_prompt, rejected) = split
    transcript = is_transcript(prompt)
    repeated = texts and given and not transcript and [chosen, rejected] != sides
    goes_on = transcript and (HUMAN in chosen or HUMAN in rejected)
    systems = [key for key in SYSTEMS if key in value]
    if (transcript or repeated) and (systems or isinstance(prompt, list)):
        # The space between prompt and response belongs to plain text.
        chosen, rejected = chosen.strip(), rejected.strip()
    if systems:  # also an empty one makes messages of a text: one file is rendered in one way
        filled = [value[key] for key in systems if value[key]]
        if len(filled) > 1:
            raise Unusable(f"{' and '.join(systems)} are filled: which one is the system message?")
        system = [_message({"role": "system", "content": text}) for text in filled]
        prompt = _join(system, as_messages(prompt or []))
        other_prompt = _join(system, as_messages(other_prompt or []))
    row = _checked(prompt, chosen, rejected, place)
    if repeated:
        row["repeated"] = True  # tokenize_preferences counts them
    unused = [key for key in value if value[key] and key not in USED]
    if unused:
        row["unused"] = unused
    if prompt != other_prompt:
        row["drop"] = "prompts differ"
    elif goes_on:
        row["drop"] = "a response that goes on with the human's turn"
    return row


def _refuse_meaningful(value: dict[str, Any]) -> None:
    for key, content in value.items():
        if key.lower() in MEANINGFUL and content and content not in ("[]", "{}", "null"):  # JSON of nothing
            remedy = "put it into the prompt, or remove it, or such rows"
            raise ValueError(f"{key!r} is filled and would be lost: {remedy}")


def _prompt(value: dict[str, Any]) -> str | Messages | None:
    """What stands before the responses as the file has it; None: nothing does."""
    given = {key: value[key] for key in PROMPTS if value.get(key)}
    if isinstance(given.get("instruction"), str) and isinstance(given.get("input"), str):
        given["instruction"] = f"{given['instruction']}\n{given.pop('input')}"
    if given.get("messages") in (value["chosen"], value["rejected"]):
        del given["messages"]  # ultrafeedback_binarized has chosen in it again
    if len({repr(content) for content in given.values()}) > 1:
        raise Unusable(f"{' and '.join(given)} are filled: which one is the prompt?")
    if given:
        name = next(iter(given))  # if there are several, they are the same
        return text_or_messages(given[name], name)
    return "" if any(value.get(key) == "" for key in PROMPTS) else None


def text_or_messages(value: Any, name: str) -> str | Messages:
    """What a column of this name holds, in one of the two forms. Raises ValueError if it has another."""
    if isinstance(value, str):
        if re.match(r"\s*\[\s*{\s*['\"](role|content|from|value)['\"]\s*:", value):
            raise Unusable(f"{name} is messages written as one text: make a list of it (json.loads)")
        return value
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise Unusable(f"{name} is {value!r:.40}, neither text nor messages")
    return [_message(message) for message in messages]


def _message(value: Any) -> dict[str, str]:
    """{role, content} of a message in OpenAI's or ShareGPT's form; roles are folded, text parts joined."""
    fields = value if isinstance(value, dict) else {}
    _refuse_meaningful(fields)
    lost = [key for key in fields if fields[key] and key not in HARMLESS]
    if lost:
        raise Unusable(f"a message has {', '.join(lost)}, which would be lost")
    role = fields.get("role") or fields.get("from")
    contents = [fields[key] for key in ("content", "value") if fields.get(key) is not None]
    if len(contents) > 1:
        raise Unusable("a message has content and value: which one is its text?")
    content = contents[0] if contents else None
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"text": part} for part in content]
        texts = [part.get("text") for part in parts if part.get("type", "text") == "text"]
        only_texts = len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
        content = "".join(texts) if only_texts else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise Unusable(f"a message must be {{role: text, content: text}}, not {value!r:.60}")
    role = ROLES.get(role.lower(), role.lower())
    if role not in NAMES:
        raise Unusable(f"a message has the role {role!r}, which is none of {', '.join(NAMES)}")
    return {"role": role, "content": content}


def _split_texts(prompt: str | None, sides: list[str]) -> list[tuple[str, str]]:
    """(prompt, response) of two sides that are responses, or whole texts."""
    split_at_mark = all(ASSISTANT in side for side in sides)
    if prompt is None and not split_at_mark:
        raise Unusable(f"no prompt, and no {ASSISTANT!r} to split at")
    if prompt:  # then only whole transcripts that have it in them are split
        split_at_mark = all(_is_whole_transcript(side, prompt) for side in sides)
    if split_at_mark:
        parts = [side.rpartition(ASSISTANT) for side in sides]
        return [(before + mark, response) for before, mark, response in parts]
    # One word may well begin two responses. Several, a question or a long text are the prompt, which stands
    # twice; Chinese has no spaces.
    start = prompt.strip()
    if len(start.split()) > 1 or len(start) > 20 or start.endswith(("?", "？")):
        if all(side.startswith(prompt) for side in sides):
            return [(prompt, side.removeprefix(prompt)) for side in sides]
        if all(side.strip().startswith(start) for side in sides):
            return [(start, side.strip().removeprefix(start)) for side in sides]
    return [(prompt, side) for side in sides]


def _is_whole_transcript(side: str, prompt: str) -> bool:
    return side.strip().startswith(HUMAN.strip()) and ASSISTANT in side and prompt.strip() in side


def _without_last_turn(prompt: Messages, sides: list[str]) -> list[str | Messages]:
    """Texts beside a prompt of messages, where they are whole: a transcript as messages, or what follows the
    last message's text."""
    last = prompt[-1]["content"]
    if all(_is_whole_transcript(side, last) for side in sides):
        return [_turns(side) for side in sides]
    return [response for _, response in _split_texts(last, sides)]


def _split_messages(prompt: str | Messages | None, side: str | Messages) -> tuple[Messages, str]:
    """(prompt, response) of a side that is a response, a whole conversation, or its last part."""
    if isinstance(side, str):
        side = [{"role": "assistant", "content": side}]
    turns = _join(as_messages(prompt or []), side[:-1])
    if side[-1]["role"] != "assistant" or (turns and turns[-1]["role"] == "assistant"):
        raise Unusable("a conversation must end with one message of role assistant")
    return turns, side[-1]["content"]


def _join(prompt: Messages, turns: Messages) -> Messages:
    """The turns before a response: the turns hold the prompt, or are its end, or follow it."""
    known = [(turn["role"], turn["content"].strip()) for turn in prompt]
    said = [(turn["role"], turn["content"].strip()) for turn in turns]
    if any(said[i : i + len(known)] == known for i in range(len(said))):
        return turns
    if known[-len(said) :] == said:
        return prompt
    if all(message["role"] == "system" for message in turns):
        return turns + prompt
    if turns[0]["role"] not in ("system", prompt[-1]["role"]):
        return prompt + turns
    raise Unusable("the prompt is not in the conversations of chosen and rejected, nor do they follow it")


def is_transcript(prompt: str | Messages) -> bool:
    """Whether a prompt is one of Anthropic HH's: \\n\\nHuman: ... \\n\\nAssistant:, stripped or not."""
    text = prompt.strip() if isinstance(prompt, str) else ""
    return text.startswith(HUMAN.strip()) and text.endswith(ASSISTANT)


def as_messages(prompt: str | Messages) -> Messages:
    """A prompt as messages: a transcript's turns, or a text as the user's only message."""
    if not is_transcript(prompt):
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return _turns(prompt.strip().removesuffix(ASSISTANT))


def _turns(transcript: str) -> Messages:
    parts = re.split(r"\n\n(Human|Assistant):", f"\n\n{transcript.strip()}")
    roles = ["user" if name == "Human" else "assistant" for name in parts[1::2]]
    return [{"role": role, "content": text.strip()} for role, text in zip(roles, parts[2::2])]


def as_text(prompt: str | Messages) -> str:
    """A prompt as plain text: messages become a transcript."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"\n\n{NAMES[turn['role']]}: {turn['content']}" for turn in prompt) + ASSISTANT


def prompt_text(prompt: str | Messages) -> str:
    """One text for a prompt: the text, the content of an only message, or the transcript of several turns."""
    return prompt[0]["content"] if isinstance(prompt, list) and len(prompt) == 1 else as_text(prompt)


# -------------------------------------------------------------------------------------------------- tokenize

SLICE = 1000  # rows tokenized at once: the tokenizer's own structures take 100 KiB a row
ANSWER = "answer"
# Some templates write today's date: data would change at midnight. Llama 3's falls back to this one.
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"


def tokenize_preferences(
    rows: list[Row],
    tokenizer: Any,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    chat: str = "auto",
) -> tuple[list[Pair], dict[str, int]]:
    """Rows of read_preferences -> pairs, and how many rows went which way, for `describe`.

    max_length: tokens of prompt plus one response. A longer prompt loses its beginning (but not its BOS) down
    to max_prompt_length, by default to what the longer response leaves, at least half of max_length; then
    each response by itself loses its end. chat: "auto" renders messages by the chat template, and transcripts
    too if there is one; "always" takes a text for a user's message; "never" makes plain text of everything.
    Raises ValueError if nothing is left, or if there are messages and no template.
    """
    if max_length < 2:
        raise ValueError(f"max_length {max_length} must be 2 or more")
    if max_prompt_length is not None and not 1 <= max_prompt_length < max_length:
        raise ValueError(f"max_prompt_length {max_prompt_length} must be 1 to below max_length {max_length}")
    end, marks = _end_and_marks(tokenizer)
    eos = tokenizer.eos_token_id
    special = _special_tokens(tokenizer)
    bos = [id for id in tokenizer("a").input_ids[:1] if id == tokenizer.bos_token_id]
    rendered = []
    dropped = defaultdict(list)  # places of rows by the reason
    for row in rows:
        try:
            rendered.append((row, *_render(row, tokenizer, chat, marks)))
        except Unusable as error:
            kind, _, detail = str(error).partition(": ")
            dropped[kind].append(f"{row['source']}: {detail}".removesuffix(": "))

    pairs = []
    notes = Counter()
    unused = sorted({column for row in rows for column in row.get("unused", [])})
    notes[f"with columns that are not used: {', '.join(unused)}"] = sum("unused" in row for row in rows)
    ids_of_rows = _token_ids([texts for _, _, texts in rendered], tokenizer)
    for (row, templated, texts), (prompt, *full) in zip(rendered, ids_of_rows):
        notes["with the prompt taken off the responses, which began with it"] += "repeated" in row
        if templated:
            changed = not _holds_messages(texts[0], as_messages(row["prompt"]))
            notes["with a message that the chat template leaves out or changes"] += changed
        else:
            unused = bool(tokenizer.chat_template) and chat == "auto"
            notes["as plain text, without the chat template (with it: --chat always)"] += unused
            is_messages = isinstance(row["prompt"], list)
            notes["with messages as Human/Assistant text, without a chat template"] += is_messages
            notes["with special tokens in plain text"] += not special.keys().isdisjoint(full[0] + full[1])
            if full[0][:1] != bos:
                prompt = bos + prompt
                full = [bos + ids for ids in full]
        # Tokens merged across the boundary are not those the prompt has alone: they go to the response.
        start = len(commonprefix([prompt, *full]))
        notes["with prompt and response merged at the boundary"] += start < len(prompt)
        prompt = prompt[:start]
        responses = [_one_end(ids[start:], templated, end, eos) for ids in full]

        longest = max(len(response) for response in responses)
        budget = max_prompt_length or max(max_length - longest, max_length // 2)
        kept = prompt[-budget:]
        if budget > 1 and prompt[:1] == [tokenizer.bos_token_id]:
            kept[0] = prompt[0]  # a cut prompt keeps its BOS
        room = max_length - len(kept)
        notes["with the prompt truncated"] += len(kept) < len(prompt)
        notes["with a response truncated"] += longest > room
        chosen, rejected = (response[:room] for response in responses)
        if not kept:
            dropped["empty prompt"].append(row["source"])
        elif chosen == rejected:
            dropped["identical after truncation"].append(row["source"])
        else:
            pairs.append(Pair(kept, chosen, rejected, row["source"], row))

    counts = {"read": len(rows)}
    counts.update((note, count) for note, count in notes.items() if count)
    for kind, places in dropped.items():
        counts[f"dropped: {kind} (first {places[0]})"] = len(places)
    counts["kept"] = len(pairs)
    if not pairs:
        place = rows[0]["source"] if rows else "no rows"
        remedy = "look at the data, --chat_template, --chat never or --max_length"
        raise ValueError(f"{place}: no pair is left ({describe(counts)}); {remedy}")
    return pairs, counts


def tokenize_prompts(
    prompts: list[str | Messages], tokenizer: Any, max_prompt_length: int | None, chat: str = "auto"
) -> tuple[list[list[int]], dict[str, int]]:
    """The token ids that generation starts from, those that training sees before a response; and the counts
    of tokenize_preferences. A longer prompt than max_prompt_length loses its beginning. Raises ValueError
    naming the first that cannot be rendered."""
    rows = []
    for prompt in prompts:
        text = prompt_text(prompt)
        # A space keeps a response from merging with a plain text's end, unless one is there already.
        space = "" if text[-1:].isspace() else " "
        rows.append(make_row(prompt, f"{space}a", f"{space}b", f"prompt {text!r:.60}"))
    pairs, counts = tokenize_preferences(rows, tokenizer, 10**9, max_prompt_length, chat)
    if len(pairs) < len(prompts):
        raise ValueError(f"{len(prompts) - len(pairs)} prompts cannot be rendered: {describe(counts)}")
    return [pair.prompt for pair in pairs], counts


def end_token(tokenizer: Any) -> int:
    """The token that ends a supervised message: the chat template's end of turn, else the tokenizer's eos."""
    return _end_and_marks(tokenizer)[0]


def describe(counts: dict[str, int]) -> str:
    """The counts of tokenize_preferences in one line."""
    return "; ".join(f"{count:,} {what}" for what, count in counts.items())


def show(pair: Pair, tokenizer: Any) -> str:
    """A pair as the model sees it: special tokens stand in ⟦ ⟧, letters that look like them do not, ⏎ is a
    line end. Of long texts the middle is left out."""
    special = _special_tokens(tokenizer)
    lines = [pair.source]
    for name, ids in zip(("prompt (no loss)", "chosen", "rejected"), pair[:3]):
        text = ""
        for is_special, run in groupby(ids, key=special.__contains__):
            if is_special:
                text += "".join(f"⟦{special[id]}⟧" for id in run)
            else:
                text += tokenizer.decode(list(run))
        if len(text) > 1000:
            text = f"{text[:500]} [...] {text[-500:]}"
        lines.append(f"--- {name}, {len(ids)} tokens:\n" + text.replace("\n", "⏎\n"))
    return "\n".join(lines)


def _render(row: Row, tokenizer: Any, chat: str, marks: re.Pattern[str]) -> tuple[bool, list[str]]:
    """Whether the chat template renders a row; the texts of its prompt, and of it with each response. Raises
    Unusable where that would not be what the row says."""
    if "drop" in row:
        raise Unusable(row["drop"])
    prompt = row["prompt"]
    responses = [row["chosen"], row["rejected"]]
    is_text = isinstance(prompt, str)
    template = tokenizer.chat_template
    templated = chat == "always"
    if chat == "auto":
        templated = not is_text or (is_transcript(prompt) and bool(template))
    if not templated:
        before = as_text(prompt)
        space = "" if is_text else " "
        responses = [_up_to_end_token(response, tokenizer.eos_token) for response in responses]
        return False, [before] + [before + space + response for response in responses]
    if not template:
        remedy = "give --chat_template FILE, or --chat never for Human/Assistant text"
        raise ValueError(f"{row['source']}: messages, but the tokenizer has no chat template: {remedy}")
    messages = as_messages(prompt)
    for text in [message["content"] for message in messages] + responses:
        mark = marks.search(text)
        if mark:
            raise Unusable(f"a turn mark of the chat template in a message: {mark[0]}")
    if is_text:  # the space between prompt and response belongs to plain text
        responses = [response.strip() for response in responses]
    before, _ = _around_answer(messages, tokenizer)
    texts = [before]
    for response in responses:
        texts.append(_apply_template(messages, response, tokenizer))
        written = texts[-1].removeprefix(before).lstrip()
        if not texts[-1].startswith(before) or not written.startswith(response.strip()):
            raise Unusable(f"response rewritten by the chat template: {texts[-1][-80:]!r}")
    return True, texts


def _up_to_end_token(response: str, eos: str) -> str:
    """A text without the line end that one in a template's form has behind its end token."""
    bare = response.rstrip()
    return bare if bare.endswith(eos) else response


def _holds_messages(text: str, messages: Messages) -> bool:
    """Whether the texts of all messages stand in this text, each at a place of its own."""
    contents = [message["content"].strip() for message in messages]
    for content in sorted(contents, key=len, reverse=True):  # a short one may stand in a long one
        if content not in text:
            return False
        text = text.replace(content, "", 1)
    return True


def _around_answer(messages: Messages, tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes before and behind the text of an answer to these messages."""
    text = _apply_template(messages, ANSWER, tokenizer)
    before, found, behind = text.rpartition(ANSWER)
    if not found:
        raise Unusable(f"response rewritten by the chat template: {text[-80:]!r}")
    return before.rstrip(" "), behind  # a space would merge with the answer's first word


def _apply_template(messages: Messages, response: str, tokenizer: Any) -> str:
    messages = [*messages, {"role": "assistant", "content": response}]
    options = {"tokenize": False, "enable_thinking": False, "thinking": False}
    try:
        template = FIXED_DATE + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(messages, chat_template=template, **options)
    except Exception as error:  # templates raise what they like, for example on a system message
        raise Unusable(f"refused by the chat template: {_one_line(error)}") from None


def _token_ids(groups: list[list[str]], tokenizer: Any) -> Iterator[tuple[list[int], ...]]:
    """The token ids of each group of three texts."""
    for start in range(0, len(groups), SLICE):
        texts = [text for group in groups[start : start + SLICE] for text in group]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        yield from zip(ids[0::3], ids[1::3], ids[2::3])


def _one_end(response: list[int], templated: bool, end: int, eos: int) -> list[int]:
    if templated and end in response:  # behind it a template may write a line end, or another one
        return response[: response.index(end) + 1]
    if response[-1:] in ([end], [eos]):
        return response
    return [*response, end if templated else eos]


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """id -> text of every token that is more than letters."""
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    for id, token in tokenizer.added_tokens_decoder.items():
        if token.special or token.content[:1] in ("<", "["):  # DeepSeek's turn marks are not special
            special[id] = token.content
    return special


def _end_and_marks(tokenizer: Any) -> tuple[int, re.Pattern[str]]:
    """The token that ends a message, and the turn marks and end tokens that no message may hold: learned from
    what the template writes around a few messages. Thinking tokens, which may stand there empty, are none."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end token (eos_token), so a response cannot end; set one")
    special = _special_tokens(tokenizer)
    marks = {tokenizer.eos_token}
    system, user, assistant = ({"role": role, "content": "a"} for role in ("system", "user", "assistant"))
    for messages in ([system, user], [user, assistant, user], [user]):
        try:
            texts = _around_answer(messages, tokenizer)
        except Unusable:
            continue  # a system message, perhaps, or there is no template
        before, behind = tokenizer(list(texts), add_special_tokens=False).input_ids
        found = [special[id] for id in before + behind if id in special]
        marks.update(token for token in found if "think" not in token.lower())
        end = next((id for id in behind if id in special), tokenizer.eos_token_id)
    return end, re.compile("|".join(re.escape(mark) for mark in sorted(marks)))


# ----------------------------------------------------------------------------------------------------- splits


def split_by_prompt(pairs: list[Pair], shares: tuple[float, ...], seed: int) -> list[list[Pair]]:
    """Disjoint parts of about these shares, and the rest last. A pair's part depends on (seed, its whole
    prompt's text) alone: pairs of one prompt stay together, and no other pair, nor the order, matters."""
    ends = list(accumulate(shares))
    parts: list[list[Pair]] = [[] for _ in range(len(shares) + 1)]
    for pair in pairs:
        digest = hashlib.sha256(f"{seed} {prompt_text(pair.row['prompt'])}".encode()).digest()
        drawn = int.from_bytes(digest[:8]) / 2**64  # uniform in [0, 1)
        parts[bisect(ends, drawn)].append(pair)
    return parts


def load_splits(settings: dict[str, Any], tokenizer: Any) -> Splits:
    """The pairs of a run from its settings (the fields of train.Settings, or a run's config.json). held_out:
    eval_data if given, else a share of the data. Where there is SFT, a fifth of the rest goes to it (1:4)."""
    seed = settings["seed"]
    single_turn = settings["single_turn"]
    lengths = settings["max_length"], settings["max_prompt_length"], settings["chat"]
    held_out_rows = None
    if list(settings["data"]) == [BUILTIN]:
        rows = synthetic_preferences(min(BUILTIN_PAIRS, settings["limit"] or BUILTIN_PAIRS), seed)
        held_out_rows = synthetic_preferences(BUILTIN_EVAL_PAIRS, seed, held_out=True)
    else:
        rows = read_preferences(settings["data"], settings["limit"], seed, single_turn)
    if settings["eval_data"]:
        held_out_rows = read_preferences(settings["eval_data"], single_turn=single_turn)
    pairs, counts = tokenize_preferences(rows, tokenizer, *lengths)
    counts.update(_rows_by_file(rows))
    held_out_share = 0.0 if held_out_rows else settings["eval_share"]
    sft_share = 0.2 if settings["sft_epochs"] or settings["sft_model"] else 0.0
    held_out, sft, train = split_by_prompt(pairs, (held_out_share, sft_share * (1 - held_out_share)), seed)
    if held_out_rows:
        held_out, held_out_counts = tokenize_preferences(held_out_rows, tokenizer, *lengths)
        held_out_counts.update(_rows_by_file(held_out_rows))
        counts.update((f"held out: {what}", count) for what, count in held_out_counts.items())
        seen = {prompt_text(pair.row["prompt"]) for pair in pairs}
        shared = sum(prompt_text(pair.row["prompt"]) in seen for pair in held_out)
        if shared:
            counts["held out: with a prompt that is trained on too"] = shared
    return Splits(train, sft, held_out, counts)


def _rows_by_file(rows: list[Row]) -> dict[str, int]:
    """To be said: without network, of a pattern in a hub dataset only what is in the cache is read."""
    files = Counter(row["source"].rpartition(":")[0] for row in rows)
    return {f"rows of {name}": count for name, count in files.items() if name != BUILTIN}


def fingerprint(pairs: list[Pair]) -> str:
    """What a model sees of these pairs, in 16 hex digits."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr(pair[:3]).encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------- collate


def micro_batches(pairs: list[Pair], tokens: int, one_row: bool = True) -> list[list[int]]:
    """Indices into pairs in groups of similar length, at most `tokens` when padded (or one pair)."""
    sizes = [pair.size if one_row else 2 * pair.length for pair in pairs]
    groups: list[list[int]] = []
    for index in sorted(range(len(pairs)), key=sizes.__getitem__, reverse=True):
        if groups and (len(groups[-1]) + 1) * sizes[groups[-1][0]] <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def collate(pairs: list[Pair], one_row: bool = True) -> dict[str, Tensor]:
    """B pairs -> the tensors that model.sequence_logps takes.

    One row a pair, prompt + chosen + rejected; two, of one response each, for models that take no such mask.
    R rows, T tokens of the longest, K predicting positions. Rejected may be empty (SFT).

    input_ids, position_ids   [R, T]; of plain rows no position_ids
    part                      [R, T]: 0 prompt, 1 chosen, 2 rejected, -1 padding; for may_attend
    attention_mask            [R, T] bool; of plain rows, in place of part
    positions                 [K], in rows that follow one another: where the next token is a response token
    target, owner             [K, 2]: the response tokens predicted there, and whose they are: 2 b of chosen,
                              2 b + 1 of rejected of pair b. The prompt's last position predicts the first of
                              both; where there is no second, target 0 and owner 2 B.
    lengths                   [B, 2]: tokens of chosen and of rejected
    """
    rows = []  # prompt, first and second response, owner of the first
    for b, pair in enumerate(pairs):
        rows.append((pair.prompt, pair.chosen, pair.rejected if one_row else [], 2 * b))
        if pair.rejected and not one_row:
            rows.append((pair.prompt, pair.rejected, [], 2 * b + 1))

    ids, parts, target, owner = [], [], [], []
    nobody = 2 * len(pairs)
    for prompt, first, second, owner_of_first in rows:
        ids.append(torch.tensor(prompt + first + second))
        parts.append(torch.tensor([0] * len(prompt) + [1] * len(first) + [2] * len(second)))
        at_prompt_end = len(target)
        target += [[token, 0] for token in first + second[1:]]
        owner += [[owner_of_first, nobody] for _ in first]
        owner += [[owner_of_first + 1, nobody] for _ in second[1:]]
        if second:
            target[at_prompt_end][1] = second[0]
            owner[at_prompt_end][1] = owner_of_first + 1

    part = pad_sequence(parts, batch_first=True, padding_value=-1)  # [R, T]: 0 the prompt, -1 padding
    here = part[:, :-1]
    following = part[:, 1:]
    keep = torch.zeros_like(part, dtype=torch.bool)
    keep[:, :-1] = (following > 0) & ((here == 0) | (here == following))  # not from chosen to rejected
    batch = {"input_ids": pad_sequence(ids, batch_first=True)}
    batch["positions"] = keep.flatten().nonzero().flatten()
    batch["target"] = torch.tensor(target)
    batch["owner"] = torch.tensor(owner)
    batch["lengths"] = torch.tensor([(len(pair.chosen), len(pair.rejected)) for pair in pairs])
    if not one_row:
        return batch | {"attention_mask": part >= 0}
    position = torch.arange(part.shape[1]) - (part == 2) * batch["lengths"][:, :1]  # rejected's restart
    return batch | {"part": part, "position_ids": position * (part >= 0)}


def may_attend(part: Tensor) -> Tensor:
    """The mask of rows that hold the prompt once, [R, T] -> [R, 1, T, T] bool: a token sees those before it,
    of the prompt and of its own side. Made on part's device, as a GPU would wait for the CPU's."""
    visible = (part[:, None] == 0) | (part[:, None] == part[:, :, None])  # [R, T, T]
    return visible.tril()[:, None]


# --------------------------------------------------------------------------------------- built-in preferences

BUILTIN_PAIRS, BUILTIN_EVAL_PAIRS = 2500, 300
FLIPPED_SHARE = 0.10  # annotation noise: this share of the labels is turned round after Eq. 3 has drawn them
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
QUESTIONS = ["How do I start with {}?", "What matters most in {}?", "Give me advice about {}."]
QUESTIONS += ["Can you teach me {}?"]
ASKERS = ["", "I am new here. ", "My sister asks. ", "This is for school. ", "I tried it once. "]
ASKERS += ["I have one hour. "]
TASK_PROMPTS = [a + q.format(topic) for topic in TOPICS for q in QUESTIONS for a in ASKERS]
DETAILS = [f"You need {detail}." for details in TOPICS.values() for detail in details]
POLITE = ["I am happy to help.", "Good question.", "I hope this helps.", "Enjoy it."]
RUDE = ["That is a silly question.", "I do not care.", "Go and ask someone else."]
FILLER = ["There are many ways to see it.", "People often talk about this.", "It depends on many things."]
WORTH = {**dict.fromkeys(DETAILS, -0.8), **dict.fromkeys(POLITE, 0.8)}
WORTH.update({**dict.fromkeys(RUDE, -1.0), **dict.fromkeys(FILLER, -0.2)})


def true_reward(prompt: str, response: str) -> float:
    """The built-in task's reward r(x, y): what the sentences of a response are worth for a prompt, in nats of
    Eq. 3: +0.8 for each detail of the topic asked about, -0.8 for one of another topic, +0.8 for politeness,
    -1 for rudeness, -0.2 for filler, -0.5 for a sentence said again or unknown. The stop may be missing."""
    worth = WORTH | dict.fromkeys(_asked(prompt), 0.8)
    reward = 0.0
    for sentence in re.findall(r"[^.]+", response.strip()):
        reward += worth.pop(sentence.strip() + ".", -0.5)  # said again, it is unknown
    return round(reward, 1)  # in another order the same sentences are worth the same, to the last bit


def _asked(prompt: str) -> list[str]:
    """The details of the topic that a prompt has among its words."""
    words = re.findall(r"\w+", prompt)
    return [f"You need {detail}." for topic in TOPICS if topic in words for detail in TOPICS[topic]]


def builtin_texts() -> list[str]:
    """Everything the built-in task can say, for its tokenizer."""
    return TASK_PROMPTS + [sentence for sentence in DETAILS + POLITE + RUDE + FILLER for _ in range(20)]


def synthetic_preferences(count: int, seed: int, held_out: bool = False) -> list[Row]:
    """Rows of the built-in task, with "truth": {margin: true reward, chosen minus rejected; flipped}. Labels
    are drawn from Eq. 3 on the true reward, so that close pairs are ambiguous by nature; FLIPPED_SHARE of
    them are then turned round. held_out: of prompts that the other rows never use (one in six)."""
    prompts = [*TASK_PROMPTS]
    random.Random(0).shuffle(prompts)
    prompts = prompts[: len(prompts) // 6] if held_out else prompts[len(prompts) // 6 :]
    draw = random.Random(f"{seed} {held_out}")
    rows = []
    for number in range(1, count + 1):
        prompt = draw.choice(prompts)
        chosen = _response(prompt, draw)
        rejected = _response(prompt, draw)
        margin = true_reward(prompt, chosen) - true_reward(prompt, rejected)
        flipped = draw.random() < FLIPPED_SHARE
        first_wins = draw.random() < torch.sigmoid(torch.tensor(margin)).item()  # Eq. 3
        if first_wins == flipped:
            chosen, rejected, margin = rejected, chosen, -margin
        row = _checked(as_messages(prompt), chosen, rejected, f"{BUILTIN}: row {number}")
        row["truth"] = {"margin": margin, "flipped": flipped}
        rows.append(row)
    return rows


def _response(prompt: str, draw: random.Random) -> str:
    kinds = [_asked(prompt), DETAILS, POLITE, RUDE, FILLER]
    drawn = draw.choices(kinds, [30, 20, 15, 15, 20], k=draw.randint(2, 5))
    return " ".join(draw.choice(kind) for kind in drawn)
