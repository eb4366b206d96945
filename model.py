"""The causal language model: loading, the built-in tiny one, LoRA, and log-probabilities of responses.

    s(y) = sum over the response's tokens of log pi(token | prompt and tokens before)
    margin = s(y+) - s(y-)    # Eq. 1

Prompt tokens are excluded, the end token is included. `sequence_logps` computes both sums of each pair from
the rows that data.collate makes, with logits at response positions only, the log-softmax in float32 and the
tokens' log-probabilities gathered explicitly. The margin is the policy's alone: no reference subtracted, no
beta.

Weights are float32 (bf16 autocast on CUDA), dropout is off, only safetensors are read and no remote code is
run.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BUILTIN, BUILTIN_VOCABULARY = "built-in", 640
CHECKSUMS = "checksums.json"  # the last file of a model folder that a run wrote
BUILTIN_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# ------------------------------------------------------------------------------------------------------- load


def load_tokenizer(name: str, chat_template: str | None = None) -> Any:
    """A tokenizer from a folder or the hub. chat_template: a file with a Jinja template, for tokenizers that
    have none."""
    tokenizer = _from_pretrained(AutoTokenizer, name)
    if chat_template:
        tokenizer.chat_template = Path(chat_template).read_text()
    return tokenizer


def load_model(name: str | Path, seed: int = 0) -> nn.Module:
    """A causal LM from a folder or the hub, in float32, without dropout; seed: of the built-in one's random
    weights. Raises ValueError if there is none, or one that is not as a run wrote it."""
    if name == BUILTIN:
        return builtin_model(seed)
    if (Path(name) / CHECKSUMS).is_file() and (wrong := damage(Path(name))):
        raise ValueError(f"{name}: {wrong}. Make it again; or, if you changed it, delete its {CHECKSUMS}")
    config = _from_pretrained(AutoConfig, name)
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if "drop" in key and isinstance(value, float):  # attention_dropout, resid_pdrop, ...
                setattr(part, key, 0.0)
    return _from_pretrained(
        AutoModelForCausalLM, name, config=config, dtype=torch.float32, use_safetensors=True
    )


def _from_pretrained(kind: Any, name: str | Path, **options: Any) -> Any:
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name}: no model folder (no config.json in it); give one, or a hub id")
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # missing or damaged files, no network, no causal LM, ...
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"{name}: cannot be loaded ({said}); give a causal language model") from None


def builtin_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts, with a chat template; the same texts give the same
    tokenizer."""
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, BUILTIN_VOCABULARY, 0, show_progress=False, special_tokens=special)
    named = {"eos_token": special[0], "pad_token": special[0], "additional_special_tokens": special[1:]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **named)
    tokenizer.chat_template = BUILTIN_TEMPLATE
    return tokenizer


def builtin_model(seed: int) -> nn.Module:
    """A Llama-type model of 0.4 million parameters with random weights."""
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {"vocab_size": BUILTIN_VOCABULARY, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(**sizes, **tokens, max_position_embeddings=1024, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def read_json(path: Path, default: Any = None) -> Any:
    """What is in the file, or the default if there is none. Raises ValueError naming the file."""
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """A file or folder appears whole or not at all: what `write` wrote elsewhere becomes `path` when on
    disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # a killed run's
    try:
        write(unfinished)
        for part in filter(Path.is_file, [unfinished, *unfinished.rglob("*")]):
            with part.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(path, ignore_errors=True)  # a damaged folder
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)


def save_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a Hugging Face folder that appears whole or not at all, with the checksums of its files."""

    def write(unfinished: Path) -> None:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        files = filter(Path.is_file, sorted(unfinished.rglob("*")))
        sums = {str(path.relative_to(unfinished)): checksum(path) for path in files}
        (unfinished / CHECKSUMS).write_text(json.dumps(sums, indent=1))

    write_atomically(folder, write)


def damage(folder: Path) -> str:
    """What is wrong with a folder that save_model wrote; nothing: ""."""
    try:
        if not (sums := read_json(folder / CHECKSUMS)):
            raise ValueError(f"nothing in {CHECKSUMS}")
        wrong = [name for name in sums if checksum(folder / name) != sums[name]]
    except (OSError, ValueError, TypeError) as error:
        return f"it is not whole ({error})"
    return f"{wrong[0]} is not as it was written" if wrong else ""


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(model: nn.Module) -> str:
    """16 hex digits of the architecture's names and shapes and of 1,000 to 2,000 evenly spaced weights of
    every tensor."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 1024)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- LoRA


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B A x with W frozen, A random, B zero. Hu et al. 2021 (arXiv 2106.09685, Eq.
    3)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        bound = linear.in_features**-0.5
        a = (2 * torch.rand(rank, linear.in_features, generator=generator) - 1) * bound
        self.a = nn.Parameter(a.to(linear.weight))  # [rank, in]
        self.b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))  # [out, rank]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * (x @ self.a.T @ self.b.T)


def add_lora(model: nn.Module, rank: int, seed: int) -> None:
    """Freeze the model and put LoRA (alpha = 2 rank) on every linear layer but the output head, in place."""
    model.requires_grad_(False)
    head, generator = model.get_output_embeddings(), torch.Generator().manual_seed(seed)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear layers for LoRA: leave out --lora_rank")
    for name, layer in layers:
        model.set_submodule(name, LoRALinear(layer, rank, 2.0 * rank, generator))


def merge_lora(model: nn.Module) -> None:
    """Fold LoRA into the weights, in place: what is left is the plain model. Without LoRA, nothing
    happens."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]:
        update = layer.scale * layer.b.data.double() @ layer.a.data.double()  # not in TF32
        layer.linear.weight.data += update.float()
        model.set_submodule(name, layer.linear)


# ------------------------------------------------------------------------------------------------------ speed


def fast_products() -> bool:
    """Let oneDNN do float32 matrix products on the CPU, where it does them in float32; says whether it does.

    PyTorch's default, MKL, leaves AVX-512 unused on AMD processors; oneDNN's kernels are up to twice as fast
    there. The setting is named for what it allows, rounding the factors to bf16, and processors with AMX do
    that. So a product is tried, and the setting kept only if it is exact to float32.

    Call it before the first product. oneDNN keeps a compiled kernel, megabytes, for each shape of the last
    1,024, and rows of text have ever new shapes: 32 are enough for one micro-batch.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    error = ((a @ b).double() - a.double() @ b.double()).abs().max().item()
    exact = error < 1e-3  # bf16 would be off by 0.1, float32 by 1e-5
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if exact else "ieee"
    AttentionInterface.register("sdpa", attention if exact else sdpa_attention_forward)
    return exact


BLOCK = 128  # queries that `attention` multiplies at a time


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention, in plain products where rows are short and have a mask.

    query [B, heads, T, width]; key, value [B, groups, T, width]; mask [B, 1, T, T] -> [B, T, heads, width].
    A block of queries meets the keys up to its end only, since no token sees later ones, and heads that share
    keys multiply them at once. PyTorch's fused kernel does neither, and has MKL multiply; it pays for long
    rows, where it need not store [T, T].
    """
    (b, heads, t, width), groups = query.shape, key.shape[1]
    special = any(options.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    plain = mask is not None and mask.dtype == torch.bool and t == key.shape[2] <= 512
    if special or not plain or options.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    query = (query * (options.get("scaling") or width**-0.5)).unflatten(1, (groups, -1))
    lowest = torch.finfo(query.dtype).min  # not -inf: padding may see nothing
    unseen = torch.zeros(mask.shape).masked_fill(~mask, lowest)
    found = []
    for start, end in ((k, min(k + BLOCK, t)) for k in range(0, t, BLOCK)):
        scores = query[:, :, :, start:end].flatten(2, 3) @ key[:, :, :end].mT  # [B, groups, queries, keys]
        scores.view(b, heads, -1, end).add_(unseen[:, :, start:end, :end])
        found.append((scores.softmax(-1) @ value[:, :, :end]).view(b, heads, -1, width))
    return torch.cat(found, 2).transpose(1, 2), None


class InPlace(torch.autograd.Function):
    """x W^T, or the rows of W at x where x are ids; the backward pass adds to W.grad where it multiplies."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, padding: int | None = None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight  # itself, not a saved copy of it, since its .grad is needed
        ctx.padding = padding
        return F.linear(x, weight) if x.is_floating_point() else F.embedding(x, weight)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor | None, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        if x.is_floating_point():
            weight.grad.addmm_(slope.flatten(0, -2).T, x.flatten(0, -2))
            return None, slope @ weight, None
        if ctx.padding is not None:  # nn.Embedding leaves that row alone
            slope = slope.masked_fill((x == ctx.padding)[..., None], 0)
        weight.grad.index_add_(0, x.flatten(), slope.flatten(0, -2))
        return None, None, None


def accumulate_in_place(model: nn.Module) -> None:
    """Let the backward pass add a micro-batch's gradients to .grad where they are computed.

    PyTorch writes each weight's gradient into new memory and adds it to .grad afterwards; a tied embedding's
    three times. For micro-batches of a few hundred tokens that costs a tenth of the step. Float32 and one
    rank only: under autocast .grad has another type than the products, and DDP wants to see the gradients,
    which torch.autograd.grad does not either.
    """

    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        found = InPlace.apply(layer.weight, x, getattr(layer, "padding_idx", None))
        return found if getattr(layer, "bias", None) is None else found + layer.bias

    for layer in model.modules():
        if type(layer) in (nn.Linear, nn.Embedding) and layer.weight.requires_grad:
            layer.forward = partial(forward, layer)


def positions(model: nn.Module) -> int:
    """How many tokens a plain row may have; a million where the model does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**6


def product_weights(model: nn.Module) -> tuple[int, int]:
    """(weights that multiply every token, weights of the head, which multiplies response tokens only).

    A training step costs 6 floating-point operations for each weight and token, or 4 where the weight is
    frozen; products between tokens, inside attention, come on top and are not counted.
    """
    head = model.get_output_embeddings().weight
    tables = {head} | {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if p.dim() == 2 and p not in tables), head.numel()


def product_speed(device: torch.device) -> float:
    """Floating-point operations a second of one large matrix product, the best of five."""
    n, seconds = 8192 if device.type == "cuda" else 1024, []
    a = torch.ones(n, n, device=device)
    for _ in range(5):
        started = time.perf_counter()
        with autocast(device):
            (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 where it is fast (CUDA); the weights stay float32."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


# -------------------------------------------------------------------------------------------------- log-probs


ROWS = 64  # of logits that TokenLogps has in float32 at a time


class TokenLogps(torch.autograd.Function):
    """log softmax(logits)[predictor, target] in float32, without a second tensor of the logits' size.

    logits [K, V]; predictor, target [S] -> [S]. The backward pass writes the gradient over the logits, so it
    can run once only.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, predictor: Tensor, target: Tensor) -> Tensor:
        log_sums = torch.cat([rows.float().logsumexp(dim=1) for rows in logits.split(ROWS)])  # [K]
        ctx.save_for_backward(logits, predictor, target, log_sums)
        return logits[predictor, target].float() - log_sums[predictor]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        logits, predictor, target, log_sums = ctx.saved_tensors
        total = torch.zeros_like(log_sums).index_add(0, predictor, slope)  # [K]
        for k, rows in zip(range(0, len(logits), ROWS), logits.split(ROWS)):
            part = slice(k, k + len(rows))
            gradient = rows.float().sub_(log_sums[part, None]).exp_().mul_(-total[part, None])  # [ROWS, V]
            here = predictor.clamp(k, k + len(rows) - 1)
            gradient.index_put_((here - k, target), slope.where(predictor == here, 0), accumulate=True)
            rows.copy_(gradient)  # nothing to do in float32, where they are the same
        return logits, None, None


def sequence_logps(model: nn.Module, batch: dict[str, Tensor], exact: bool = False) -> Tensor:
    """log pi(y|x) of chosen and rejected, summed over the response's tokens: [B, 2], float32.

    batch: as data.collate makes it, on the model's device. exact: no bf16, whatever the device.
    """
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    with nullcontext() if exact else autocast(batch["keep"].device):
        logits = model(**inputs, logits_to_keep=batch["keep"], use_cache=False).logits  # [K, V]
    if logits.dim() == 3:
        logits = logits[batch["keep"]]  # from a model that ignores logits_to_keep
    logps = TokenLogps.apply(logits, batch["predictor"], batch["target"])  # [S]
    sums = logps.new_zeros(batch["lengths"].numel()).index_add(0, batch["owner"], logps)
    return sums.view(-1, 2)  # [B, 2]


@torch.no_grad()
def shares_prompt(model: nn.Module, one_row: dict[str, Tensor], two_rows: dict[str, Tensor]) -> bool:
    """Whether one row a pair gives this model the log-probabilities of two plain rows (data.collate makes
    both, of the longest pair: data.both_ways). Not so for models whose mask is not ours to give
    (sliding windows shorter than a plain row, recurrent layers) or that take no position ids.
    """
    device = next(model.parameters()).device
    products = torch.backends.cuda.matmul
    precision, products.fp32_precision = products.fp32_precision, "ieee"
    try:
        batches = (to_device(batch, device) for batch in (one_row, two_rows))
        scores = [sequence_logps(model, batch, exact=True) for batch in batches]
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError):  # the model refuses the mask or the position ids
        return False
    finally:
        products.fp32_precision = precision
    return torch.allclose(*scores, rtol=1e-4, atol=1e-2)


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    if device.type == "cuda":
        return {key: value.pin_memory().to(device, non_blocking=True) for key, value in batch.items()}
    return batch


@torch.no_grad()
def score_pairs(
    model: nn.Module,
    batches: Iterator[tuple[list[int], dict[str, Tensor]]],
    names: list[str],
    label: str = "",
) -> Tensor:
    """log pi(y|x) of chosen and rejected of N pairs: [N, 2], float32, on the CPU and the same on every rank.

    batches: data.scoring_batches of this rank; a pair's scores are written by its index. names: of the pairs,
    [N]. label: of the progress bar, if one is wanted. Raises ValueError with the names of pairs that have no
    score, or none that is finite.
    """
    (rank, world), device = rank_and_world(), next(model.parameters()).device
    scores = torch.full((len(names), 2), -torch.inf, device=device)  # a pair that nobody scores is an error
    with tqdm(total=len(names), desc=label, unit="pair", disable=rank > 0 or not label) as bar:
        for index, batch in batches:
            scores[index] = sequence_logps(model, to_device(batch, device))
            bar.update(len(index) * world)
    if world > 1:
        dist.all_reduce(scores, dist.ReduceOp.MAX)
    if bad := (~scores.isfinite()).any(1).nonzero().flatten().tolist():
        of, which = f"{len(bad)} of {len(names)} pairs", ", ".join(names[i] for i in bad[:8])
        raise ValueError(f"{of} have no finite log-probability: {which}; look at them")
    return scores.cpu()
