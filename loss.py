"""Objectives on pairs, and Pairwise Margin Amplification (RMO, Eq. 4, 14 and 15).

Every objective takes log-probabilities of whole responses, log pi(y|x), as float tensors [B], one number a
pair, and returns one loss a pair [B]; average over the pairs of the *global* batch. RMO's total is Eq. 15:

    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
         + margin_amplification(chosen - rejected, median, alpha, weight=2.0)

The objectives in LENGTH_NORMALISED are defined on the *mean* log-probability of the response's tokens, the
others on the sum; pass what the objective is defined on, for the reference too, and use the same scores for
the margin.

Differs from the paper: 1) Algorithm 2 computes the "global median" inside the batch loop; it is the median of
the proxy's margins, a constant of the run, so it is an argument here. 2) alpha has no default: 125 (DPO) and
5 (SimPO) fit the paper's models; train.py takes the standard deviation of the proxy's margins.

To borrow: copy this file; it imports torch only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH_NORMALISED = ("ipo", "simpo", "orpo")  # scores are means over the response's tokens
REFERENCE_FREE = ("simpo", "orpo")
BATCH_LEVEL = ("kto", "beta_dpo")  # a pair's loss depends on the other pairs of its batch


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float | Tensor = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(h), h = beta [(chosen - ref_chosen) - (rejected - ref_rejected)]; ln 2 at the start.

    label_smoothing e in [0, 0.5): -(1 - e) log sigmoid(h) - e log sigmoid(-h), "conservative" DPO for labels
    that are wrong with probability e. Rafailov et al. 2023 (arXiv 2305.18290, Eq. 7); e: Mitchell, "A note on
    DPO with noisy preferences".
    """
    h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)  # Eq. 4


def ipo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """(h - 1/(2 beta))^2, h = (chosen - ref_chosen) - (rejected - ref_rejected), on means over tokens.

    Azar et al. 2023 (arXiv 2310.12036, Eq. 17, their tau is beta); means as the authors advise.
    """
    return ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta)) ** 2


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma), on means over tokens, no reference.

    Meng, Xia and Chen 2024 (arXiv 2405.14734, Eq. 6). gamma is the target margin itself, not its ratio to
    beta.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """-chosen - beta log sigmoid(log odds(chosen) - log odds(rejected)), on means over tokens, no reference.

    log odds(s) = s - log(1 - exp(s)). Hong, Lee and Thorne 2024 (arXiv 2403.07691, Eq. 6, 7); the first term
    is the NLL of chosen. Scores must be below 0: a response of probability 1 has infinite odds.
    """

    def log_odds(s: Tensor) -> Tensor:
        return s - torch.log(-torch.expm1(s))

    return -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def slic_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """max(0, 1 - beta [(chosen - ref_chosen) - (rejected - ref_rejected)]): the hinge of SLiC-HF.

    Zhao et al. 2023 (arXiv 2305.10425), with the reference inside as in RSO (Liu et al. 2023, arXiv
    2309.06657).
    """
    return F.relu(1 - beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def kto_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    batch: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """KTO on pairs: 1 - sigmoid(beta (r+ - z-)) and 1 - sigmoid(beta (z+ - r-)), averaged over the two sides.

    r = log pi - log pi_ref of a side, z = max(0, mean of r over the batch), without gradient: the divergence
    from the reference, estimated on the other side. Ethayarajh et al. 2024 (arXiv 2402.01306, Eq. 7) with
    pairs as TRL's "kto_pair" had.

    batch: (r+, r-) of every pair in the global batch, [m] each; by default the pairs given. z couples the
    pairs, so a micro-batch must be told its batch, or the loss would depend on how the batch is split.
    """
    r_chosen, r_rejected = chosen - ref_chosen, rejected - ref_rejected
    z_chosen, z_rejected = (r.detach().mean().clamp(min=0) for r in batch or (r_chosen, r_rejected))
    wins = 1 - torch.sigmoid(beta * (r_chosen - z_rejected))
    losses = 1 - torch.sigmoid(beta * (z_chosen - r_rejected))
    return (wins + losses) / 2


def beta_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    batch: tuple[Tensor, Tensor] | None = None,
    threshold: float = 0.0,
    scale: float = 0.6,
) -> Tensor:
    """DPO whose beta is set for each batch: beta [1 + scale (M - threshold)], kept above 0.001.

    M = beta mean(r+ - r-) over the batch, without gradient; threshold is a running mean of M (0.9 old + 0.1
    new), which the caller keeps. Wu et al. 2024 (arXiv 2407.08639), without their data filter: RMO has its
    own. batch: as in kto_loss.
    """
    r_chosen, r_rejected = batch or (chosen - ref_chosen, rejected - ref_rejected)
    reward_margin = beta * (r_chosen - r_rejected).detach().mean()
    batch_beta = (beta * (1 + scale * (reward_margin - threshold))).clamp(min=1e-3)
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, batch_beta)


def margin_amplification(margin: Tensor, median: float, alpha: float, weight: float) -> Tensor:
    """weight * sigmoid((median - margin) / alpha): pushes margins past the median.

    margin: chosen - rejected [B], with gradient, in the objective's own scores (nats, or nats a token), no
    reference subtracted and no beta. median, alpha: constants in the same unit. weight: lambda_reg, in units
    of the loss. Raises ValueError unless alpha is positive and finite.
    """
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha is a width in the margin's unit, positive and finite, not {alpha}")
    return weight * torch.sigmoid((median - margin) / alpha)  # Eq. 14


def preference_loss(
    objective: str,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    simpo_gamma: float | None = None,
    batch: tuple[Tensor, Tensor] | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """The objective of this name: "dpo", "ipo", "simpo", "orpo", "slic", "kto" or "beta_dpo"."""
    scores, reference = (chosen, rejected), (ref_chosen, ref_rejected)
    match objective:
        case "dpo":
            return dpo_loss(*scores, *reference, beta, label_smoothing)
        case "ipo":
            return ipo_loss(*scores, *reference, beta)
        case "simpo":
            return simpo_loss(*scores, beta, 1.0 if simpo_gamma is None else simpo_gamma)
        case "orpo":
            return orpo_loss(*scores, beta)
        case "slic":
            return slic_loss(*scores, *reference, beta)
        case "kto":
            return kto_loss(*scores, *reference, beta, batch)
        case "beta_dpo":
            return beta_dpo_loss(*scores, *reference, beta, batch, threshold)
    raise ValueError(f"unknown objective {objective!r}")
