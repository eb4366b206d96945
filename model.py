"""The causal language model: loading and saving, LoRA, and log-probabilities of responses (RMO, Eq. 1).

    s(y) = sum over the response's tokens of log pi(token | prompt and tokens before)
    margin = s(y+) - s(y-)    # Eq. 1

Prompt tokens are excluded, the end token is included. Length-normalised objectives take the mean for the sum.

    scores = score_pairs(model, pairs)                       # [N, 2], of chosen and rejected
    scores = sequence_logps(model, data.collate(pairs))      # the same of one batch, with gradient

Logits are computed at response positions only, their log-softmax in float32, a few positions at a time.
Weights are float32 (bf16 autocast on CUDA), dropout is off. Only safetensors are read, no remote code is run.
"""

import copy
import hashlib
import os
from os.path import commonprefix  # of any sequences
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import BUILTIN, Pair, collate, end_token, may_attend, micro_batches, write_whole

LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**27}  # in float32: little memory on a CPU, few kernels on a GPU
BUILTIN_VOCABULARY = 640
BUILTIN_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MERGE_ADAPTER = """{0} is a LoRA adapter, no model; merge it first:
    peft.AutoPeftModelForCausalLM.from_pretrained("{0}").merge_and_unload().save_pretrained("merged")
    transformers.AutoTokenizer.from_pretrained("{0}").save_pretrained("merged")"""


def choose_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    # cuDNN's attention with an explicit mask gives NaN gradients at some row lengths (pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    # No TF32, also where the environment asks for it: autocast leaves little but rotary angles in float32,
    # and it would round those.
    torch.backends.cuda.matmul.allow_tf32 = False
    return device


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many processes train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def fast_products() -> None:
    """Let oneDNN do float32 matrix products on the CPU, if it does them in float32.

    PyTorch's default, MKL, leaves AVX-512 unused on AMD processors; oneDNN is up to twice as fast there. The
    setting allows rounding to bf16, which processors with AMX do, so a product is tried. Call it before the
    first one: oneDNN keeps a compiled kernel, megabytes, for each shape, and 32 are enough.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    error = ((a @ b).double() - a.double() @ b.double()).abs().max()
    if error > 1e-3:  # bf16 is off by 0.1, float32 by 1e-5
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"


# -------------------------------------------------------------------------------------------- load and save


def load_tokenizer(name: str | Path, chat_template: str | None = None) -> Any:
    """A tokenizer from a folder or the hub. chat_template: a file with a Jinja template to use instead."""
    tokenizer = _from_pretrained(transformers.AutoTokenizer, name)
    if chat_template:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


def load_model(name: str | Path, seed: int = 0) -> nn.Module:
    """A causal LM from a folder or the hub, in float32, without dropout, on the CPU.

    seed: of the built-in model's random weights. Raises ValueError if there is no such model.
    """
    if name == BUILTIN:
        return builtin_model(seed)
    config = _from_pretrained(transformers.AutoConfig, name)
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if "drop" in key and isinstance(value, float):  # attention_dropout, resid_pdrop, ...
                setattr(part, key, 0.0)
    options = {"config": config, "dtype": torch.float32, "use_safetensors": True}
    return _from_pretrained(transformers.AutoModelForCausalLM, name, **options)


def weights_fingerprint(name: str | Path) -> str:
    """Of the weights in a model folder, in 16 hex digits; all that is no folder has the same."""
    digest = hashlib.sha256()
    for path in sorted(Path(name).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _from_pretrained(kind: Any, name: str | Path, **options: Any) -> Any:
    folder = Path(name)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(MERGE_ADAPTER.format(name))
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{name}: no model folder (no config.json in it); give one, or a hub id")
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # missing or damaged files, no network, no causal LM, ...
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"{name}: cannot be loaded ({reason}); give a causal language model") from None


def builtin_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer trained on the texts, with a chat template; a function of the texts."""
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, BUILTIN_VOCABULARY, 0, show_progress=False, special_tokens=special)
    names = {"eos_token": special[0], "pad_token": special[0], "additional_special_tokens": special[1:]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)
    tokenizer.chat_template = BUILTIN_TEMPLATE
    return tokenizer


def builtin_model(seed: int) -> nn.Module:
    """A Llama-type model of 0.4 million parameters with random weights."""
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {"vocab_size": BUILTIN_VOCABULARY, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    other = {"max_position_embeddings": 1024, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(**sizes, **tokens, **other)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def save_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a Hugging Face folder, whole or not at all; its responses end where supervised ones do."""
    generation = copy.deepcopy(model.generation_config)
    generation.eos_token_id = end_tokens(model, tokenizer)

    def write(unfinished: Path) -> None:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        # transformers would refuse to save a changed one that was odd before (a temperature, no sampling).
        generation.to_json_file(unfinished / "generation_config.json")

    write_whole(folder, write)


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """The ids that end a response: the supervised one, the tokenizer's, and the model's own."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    ids = {end_token(tokenizer), tokenizer.eos_token_id, *own}
    return sorted(ids - {None})


def positions(model: nn.Module) -> int:
    """How many tokens a plain row may have; a million where the model does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**6


def check_pairs(model: nn.Module, pairs: list[Pair]) -> None:
    """Raises ValueError if a pair is longer than the model has positions, or has tokens it does not know."""
    longest = max(pairs, key=lambda pair: pair.length)
    if longest.length > positions(model):
        most = f"the model has {positions(model)} positions: --max_length {positions(model)}"
        raise ValueError(f"{longest.source}: {longest.length} tokens, {most}")
    rows = model.get_input_embeddings().num_embeddings
    token = max(max(pair.prompt + pair.chosen + pair.rejected) for pair in pairs)
    if token >= rows:
        raise ValueError(f"the model's embedding has {rows} rows, none for the tokenizer's token {token}")


# ----------------------------------------------------------------------------------------------------- LoRA


class LoRALinear(nn.Module):
    """y = W x + 2 B A x; W frozen, A random, B zero (arXiv 2106.09685, Eq. 3, with alpha = 2 rank)."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator, owner: str):
        super().__init__()
        self.linear = linear
        self.owner = owner
        bound = linear.in_features**-0.5
        a = (2 * torch.rand(rank, linear.in_features, generator=generator) - 1) * bound
        self.a = nn.Parameter(a.to(linear.weight))  # [rank, in]
        self.b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))  # [out, rank]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 2.0 * (x @ self.a.T @ self.b.T)

    @property
    def weight(self) -> Tensor:
        raise ValueError(f"{self.owner} reads the weight of a linear layer itself, past LoRA")


def add_lora(model: nn.Module, rank: int, seed: int) -> float:
    """Freeze the model and put LoRA (alpha = 2 rank) on every nn.Linear but the output head, in place.

    A mixture's experts are none in most models. Returns the share of the model's weights that these layers
    hold. Raises ValueError if there are none.
    """
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear layers for LoRA: leave out --lora_rank")
    share = sum(layer.weight.numel() for layer in layers.values()) / model.num_parameters()
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        model.set_submodule(name, LoRALinear(layer, rank, generator, type(model).__name__))
    return share


def merge_lora(model: nn.Module) -> None:
    """Fold LoRA into the weights, in place: what is left is the plain model. Without LoRA nothing happens."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            update = 2.0 * layer.b.data.double() @ layer.a.data.double()
            layer.linear.weight.data += update.float()
            model.set_submodule(name, layer.linear)


# ------------------------------------------------------------------------------------------------ log-probs


def sequence_logps(
    model: nn.Module, batch: dict[str, Tensor], mean: bool = False, exact: bool = False
) -> Tensor:
    """log pi(y|x) of chosen and rejected: [B, 2], float32, with gradient.

    batch: as data.collate makes it. mean: over the response's tokens, instead of the sum.
    exact: in float32 on CUDA too.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":  # so that the copy goes on while kernels are queued
        batch = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    if "part" in batch:
        inputs["attention_mask"] = may_attend(batch["part"])

    def at_responses(head: nn.Module, states: tuple[Tensor]) -> Tensor:
        """Let the output head see response positions only, [R, T, D] -> [K, D]."""
        return states[0].flatten(0, 1)[batch["positions"]]

    # transformers' logits_to_keep does so for a boolean mask, but waits for the GPU to count it.
    head = getattr(model, "module", model).get_output_embeddings()  # "module": behind DDP
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and not exact)
    with half, head.register_forward_pre_hook(at_responses):
        logits = model(**inputs, use_cache=False).logits  # [K, V]
    at_once = max(1, LOGITS_AT_ONCE[device.type] // logits.shape[-1])
    logps = [
        checkpoint(token_logps, part, target, use_reentrant=False, preserve_rng_state=False)
        for part, target in zip(logits.split(at_once), batch["target"].split(at_once))
    ]
    logps = torch.cat(logps).flatten()  # [2 K]
    lengths = batch["lengths"]  # [B, 2]
    sums = logps.new_zeros(lengths.numel() + 1).index_add(0, batch["owner"].flatten(), logps)
    scores = sums[:-1].view(-1, 2)  # [B, 2]; the last one is nobody's
    return scores / lengths if mean else scores


def token_logps(logits: Tensor, target: Tensor) -> Tensor:
    """log softmax(logits) of two targets a row, in float32: [K, V] and [K, 2] -> [K, 2]."""
    return logits.float().log_softmax(dim=1).gather(1, target)


@torch.no_grad()
def score_pairs(
    model: nn.Module, pairs: list[Pair], micro_batch_tokens: int = 2048, mean: bool = False, label: str = ""
) -> Tensor:
    """log pi(y|x) of chosen and rejected of N pairs: [N, 2], float32, on the CPU and the same on every rank.

    micro_batch_tokens: at most so many at a time. mean: over tokens, instead of the sum. label: of a
    progress bar. Raises ValueError naming the pairs whose score is not finite.
    """
    rank, world = rank_and_world()
    device = next(model.parameters()).device
    one_row = takes_one_row(model, pairs)
    mine = range(rank, len(pairs), world)
    order = []
    found = []
    with tqdm(total=len(pairs), desc=label, unit="pair", disable=rank > 0 or not label) as bar:
        for group in micro_batches([pairs[i] for i in mine], micro_batch_tokens, one_row):
            index = [mine[i] for i in group]
            batch = collate([pairs[i] for i in index], one_row)
            found.append(sequence_logps(model, batch, mean))
            order += index
            bar.update(len(index) * world)
    scores = torch.full((len(pairs), 2), -torch.inf, device=device)  # a pair that nobody scores is an error
    if found:  # put in their places at once: each time would wait for the GPU
        scores[order] = torch.cat(found)
    if world > 1:
        dist.all_reduce(scores, dist.ReduceOp.MAX)
    bad = (~scores.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        sources = ", ".join(pairs[i].source for i in bad[:8])
        raise ValueError(f"{len(bad)} of {len(pairs)} pairs have no finite log-probability: {sources}")
    return scores.cpu()


@torch.no_grad()
def takes_one_row(model: nn.Module, pairs: list[Pair]) -> bool:
    """Whether one row a pair gives this model the scores of two; tried once, and kept as model.one_row.

    False if the model makes its own mask (sliding windows, recurrent layers), or takes no position ids.
    """
    if not hasattr(model, "one_row"):
        model.one_row = all(_rows_agree(model, pair) for pair in probes(pairs))
    return model.one_row


def _rows_agree(model: nn.Module, pair: Pair) -> bool:
    two_rows = sequence_logps(model, collate([pair], one_row=False), exact=True)
    try:
        one_row = sequence_logps(model, collate([pair]), exact=True)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError):  # the model refuses the mask or the position ids
        return False
    return torch.allclose(one_row, two_rows, rtol=1e-5, atol=1e-4)


def probes(pairs: list[Pair]) -> list[Pair]:
    """Pairs to try a model on: the longest, the shortest, and the one whose responses begin most alike."""
    longest = max(pairs, key=lambda pair: pair.length)
    shortest = min(pairs, key=lambda pair: pair.length)
    alike = max(pairs, key=lambda pair: len(commonprefix([pair.chosen, pair.rejected])))
    return [longest, shortest, alike]


def freeze_unreached(model: nn.Module, pairs: list[Pair]) -> int:
    """Take weights that text does not reach (a vision tower's) out of training; how many those are.

    Two pairs are tried. An expert of a mixture that both of them miss would be taken out too.
    """
    batch = collate(probes(pairs)[1:], takes_one_row(model, pairs))
    sequence_logps(model, batch).sum().backward()
    unreached = [weight for weight in model.parameters() if weight.requires_grad and weight.grad is None]
    for weight in unreached:
        weight.requires_grad_(False)
    model.zero_grad()
    return sum(weight.numel() for weight in unreached)
