# SPDX-License-Identifier: MIT
"""Dual Denoising Filtering (RMO, Eq. 6 to 9): which preference pairs to train on.

Takes two margins a pair, delta = log pi(y+|x) - log pi(y-|x), as float tensors [N]: `base` from the model
that preference training starts from, `proxy` from that model after plain training on all pairs. Step 1
removes the pairs whose margin was negative and fell (Eq. 6 and 7). Step 2 keeps each remaining pair with a
probability that grows with the size of its proxy margin (Eq. 8 and 9).

    sd = proxy.std(unbiased=False).item()    # the paper's tau of 14 and gamma of 1 are for an sd of 142
    tau, gamma = 0.1 * sd, 0.01 * sd    # or tau_for_ratio(base, proxy, 0.2, gamma): 20 % removed in all
    kept = dual_denoising_filter(base, proxy, tau, gamma, torch.Generator().manual_seed(0))

Differs from the paper:
1) Eq. 8 as printed, 0.5 [1 - tanh((x - tau) / gamma)], keeps the *small* margins. The text ("small margin
   downsampling") and the reported 6 % at tau = 14 say the opposite. We read the printed expression as the
   probability of removal: retention is 0.5 [1 + tanh((x - tau) / gamma)].
2) The paper tunes tau to reach a filter ratio; `tau_for_ratio` solves for it.
   The ratio counts what both steps remove, over N.
3) The default gamma of 1 is the paper's, for sums over tokens. For means (SimPO, IPO, ORPO) it is far too
   wide: give 0.01 sd.

To borrow: copy this file; it imports torch only.
"""

import torch
from torch import Tensor


def margin_decrease(base: Tensor, proxy: Tensor) -> Tensor:
    """Step 1: bool [N], True where the pair is to be removed.

    Raises ValueError unless both are [N] and finite.
    """
    if base.shape != proxy.shape or base.dim() != 1:
        shapes = f"{list(base.shape)} and {list(proxy.shape)}"
        raise ValueError(f"base and proxy margins must be [N] each, not {shapes}")
    infinite = ~(base.isfinite() & proxy.isfinite())
    if infinite.any():
        raise ValueError(f"{infinite.sum().item()} of {len(base)} margins are not finite")
    return (base < 0) & (proxy < base)  # Eq. 6


def retention_probability(proxy: Tensor, tau: float, gamma: float = 1.0) -> Tensor:
    """Step 2: the probability of keeping each pair, float64 [N]; 0.5 where |proxy| = tau.

    tau, gamma: threshold and its width, in the margins' unit. Raises ValueError unless both are finite and
    gamma > 0.
    """
    if not (0 < gamma < float("inf") and abs(tau) < float("inf")):
        raise ValueError(f"tau must be finite, and gamma positive and finite: not {tau} and {gamma}")
    return 0.5 * (1 + torch.tanh((proxy.double().abs() - tau) / gamma))  # Eq. 8, see 1) above


def tau_for_ratio(base: Tensor, proxy: Tensor, ratio: float, gamma: float = 1.0) -> float:
    """The tau at which both steps together remove the share `ratio` of the N pairs, in expectation.

    Solved by bisection. Raises ValueError if ratio is not in [0, 1), or if step 1 alone removes more.
    """
    if not 0 <= ratio < 1 or len(base) == 0:
        raise ValueError(
            f"the filter ratio must be in [0, 1), of one pair or more: not {ratio} of {len(base)}"
        )
    decrease = margin_decrease(base, proxy)
    step1 = decrease.sum().item()
    wanted = ratio * len(base)
    if step1 > wanted + 1e-6:  # more than a rounding error
        raise ValueError(
            f"step 1 (negative and falling margins) alone removes {step1} of {len(base)} pairs "
            f"= {step1 / len(base):.2%}, more than the filter ratio {ratio:.2%}: raise it, or give tau"
        )
    rest = proxy[~decrease]
    # 20 gamma beyond the smallest and the largest |margin|, tanh is 1 to the last bit.
    low = -20 * gamma
    high = proxy.abs().max().item() + 20 * gamma
    for _ in range(100):
        tau = (low + high) / 2
        step2 = (1 - retention_probability(rest, tau, gamma)).sum().item()
        if step1 + step2 < wanted:
            low = tau
        else:
            high = tau
    return (low + high) / 2


def dual_denoising_filter(
    base: Tensor, proxy: Tensor, tau: float, gamma: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Both steps: the indices of the pairs to train on, long [K], ascending.

    generator: a CPU generator, for Eq. 9. One number is drawn for every pair, removed or not, so its fate
    does not depend on other pairs' margins. Raises ValueError as margin_decrease and retention_probability.
    """
    decrease = margin_decrease(base, proxy)
    draw = torch.rand(len(proxy), dtype=torch.float64, generator=generator).to(proxy.device)
    retained = draw < retention_probability(proxy, tau, gamma)  # Eq. 9
    return (~decrease & retained).nonzero().squeeze(1)  # Eq. 7
