# SPDX-License-Identifier: MIT
"""Objectives of one preference pair, and Pairwise Margin Amplification (RMO, Eq. 4 and 14).

Objectives take scores of whole responses, log pi(y|x), as float tensors [B], one number a pair; all functions
return one loss a pair, [B]. Average them over the pairs of the *global* batch. RMO's total is Eq. 15:

    losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
    losses = losses + margin_amplification(chosen - rejected, median, alpha, weight)

A score is the sum of the log-probabilities of the response's tokens. The objectives in LENGTH_NORMALISED are
defined on their mean: give them means, for the reference and for the margin too.

Differs from the paper:
1) Algorithm 2 computes the "global median" inside the batch loop. Here it is an argument: give the median of
   the proxy's margins of all pairs, once a run.
2) alpha and weight have no default. The paper's alpha of 125 is for DPO's sums. Its 5 for SimPO is wider than
   margins of means are: perhaps its margins are multiplied by beta. Ours are not.

To borrow: copy this file; it imports torch only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH_NORMALISED = ("ipo", "simpo", "orpo")  # their scores are means over the response's tokens
REFERENCE_FREE = ("simpo", "orpo")


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(h), with h = beta [(chosen - ref_chosen) - (rejected - ref_rejected)]; ln 2 at the start.

    label_smoothing: the probability e, 0 <= e < 0.5, that a label is wrong; the loss is then
    -(1 - e) log sigmoid(h) - e log sigmoid(-h), "conservative" DPO.
    Rafailov et al. 2023 (arXiv 2305.18290, Eq. 7); e: Mitchell, "A note on DPO with noisy preferences".
    """
    h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)  # Eq. 4


def ipo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """(h - 1 / (2 beta))^2, with h = (chosen - ref_chosen) - (rejected - ref_rejected), on means over tokens.

    Azar et al. 2023 (arXiv 2310.12036, Eq. 17; their tau is beta). Means as its authors advise.
    """
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (h - 1 / (2 * beta)) ** 2


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma), on means over tokens, without a reference.

    Meng, Xia and Chen 2024 (arXiv 2405.14734, Eq. 6). gamma is the target margin itself, not its ratio to
    beta.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """-chosen - beta log sigmoid(log odds(chosen) - log odds(rejected)), on means, without a reference.

    log odds(s) = s - log(1 - exp(s)); the first term is the negative log-likelihood of chosen.
    Hong, Lee and Thorne 2024 (arXiv 2403.07691, Eq. 6 and 7).
    """
    ratio = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - beta * F.logsigmoid(ratio)


def _log_odds(score: Tensor) -> Tensor:
    # A response of probability 1 has infinite odds and a gradient of NaN.
    score = score.clamp(max=-1e-6)
    return score - torch.log(-torch.expm1(score))


def slic_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """max(0, 1 - beta [(chosen - ref_chosen) - (rejected - ref_rejected)]): the hinge of SLiC-HF.

    Zhao et al. 2023 (arXiv 2305.10425), with the reference inside as in RSO (Liu et al. 2023, arXiv
    2309.06657).
    """
    return F.relu(1 - beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def margin_amplification(margin: Tensor, median: float, alpha: float, weight: float) -> Tensor:
    """lambda sigmoid((median - margin) / alpha): pushes margins past the median.

    margin: chosen - rejected [B], with gradient; no reference subtracted, no beta. median and alpha:
    constants in the margin's unit. weight: lambda, in units of the loss. Raises ValueError unless alpha is
    positive and finite.
    """
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha is a width in the margin's unit, positive and finite, not {alpha}")
    return weight * torch.sigmoid((median - margin) / alpha)  # Eq. 14
