"""Dual Denoising Filtering (RMO, Eq. 6 to 9): which preference pairs to train on.

Takes two margins per pair, delta = log pi(y+|x) - log pi(y-|x), as float tensors [N]: `base` from the model
that preference training starts from, `proxy` from that model after plain training on all pairs. Step 1
removes the pairs whose margin was negative and fell further (Eq. 6, 7). Step 2 keeps each remaining pair with
a probability that grows with the size of its proxy margin (Eq. 8, 9).

Differs from the paper: 1) Eq. 8 as printed, 0.5 [1 - tanh((x - tau)/gamma)], keeps the *small* margins, while
the text ("small margin downsampling") and the reported 6 % at tau = 14 say the opposite. We read the printed
expression as the probability of removal; retention is 0.5 [1 + tanh((x - tau)/gamma)]. 2) The paper tunes tau
to reach a filter ratio; `tau_for_ratio` solves for it. The ratio counts what both steps remove, over N.

    gamma = 0.01 * proxy.std().item()    # the paper's 1 nat is for margins with a standard deviation of 142
    tau = tau_for_ratio(base, proxy, ratio=0.06, gamma=gamma)
    kept = dual_denoising_filter(base, proxy, tau, gamma, torch.Generator().manual_seed(0))

To borrow: copy this file; it imports torch only.
"""

import torch
from torch import Tensor


def margin_decrease(base: Tensor, proxy: Tensor) -> Tensor:
    """Step 1: bool [N], True where the pair is to be removed. Raises ValueError on unequal shapes or a NaN or
    infinity."""
    if base.shape != proxy.shape or base.dim() != 1:
        raise ValueError(
            f"base and proxy margins must be [N] each, not {list(base.shape)} and {list(proxy.shape)}"
        )
    if not (base.isfinite() & proxy.isfinite()).all():
        raise ValueError(
            f"{int((~(base.isfinite() & proxy.isfinite())).sum())} of {len(base)} margins are not finite"
        )
    return (base < 0) & (proxy < base)  # Eq. 6


def retention_probability(proxy: Tensor, tau: float, gamma: float = 1.0) -> Tensor:
    """Step 2: the probability [N] of keeping a pair; 0.5 where |proxy| = tau. tau, gamma: in the margins'
    unit.

    Raises ValueError unless gamma > 0.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, not {gamma}: it is the width of the soft threshold")
    return 0.5 * (1 + torch.tanh((proxy.double().abs() - tau) / gamma))  # Eq. 8, sign as meant (see above)


def tau_for_ratio(base: Tensor, proxy: Tensor, ratio: float, gamma: float = 1.0) -> float:
    """The tau at which both steps together remove `ratio` of the N pairs in expectation.

    Solved by bisection: the expected number removed grows with tau. Raises ValueError if the ratio is not in
    [0, 1) or if step 1 alone removes more.
    """
    decrease = margin_decrease(base, proxy)
    step1, wanted = int(decrease.sum()), ratio * len(base)
    if not 0 <= ratio < 1 or not len(base):
        raise ValueError(
            f"the filter ratio must be in [0, 1), of one pair at least: not {ratio} of {len(base)}"
        )
    if step1 > wanted + 1e-6:  # not by a rounding error
        raise ValueError(
            f"step 1 (negative and falling margins) alone removes {step1} of {len(base)} pairs "
            f"= {step1 / len(base):.2%}, more than the filter ratio {ratio:.2%}: raise it, or give tau"
        )
    rest = proxy[~decrease]
    # 20 gamma past the smallest and largest |margin| tanh is 1 to the last bit: nothing and all is removed
    low, high = -20 * gamma, float(proxy.abs().max()) + 20 * gamma
    for _ in range(100):
        tau = (low + high) / 2
        removed = step1 + (1 - retention_probability(rest, tau, gamma)).sum().item()
        low, high = (tau, high) if removed < wanted else (low, tau)
    return (low + high) / 2


def dual_denoising_filter(
    base: Tensor, proxy: Tensor, tau: float, gamma: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Both steps: the indices of the pairs to train on, long [K], ascending.

    generator: a CPU generator for the draw of Eq. 9. Every pair has its own number in that draw, whether or
    not step 1 removed it, so pair i's fate does not depend on the other pairs' margins. Raises as the
    functions above.
    """
    decrease = margin_decrease(base, proxy)
    draw = torch.rand(len(proxy), dtype=torch.float64, generator=generator).to(proxy.device)
    retained = draw < retention_probability(proxy, tau, gamma)
    return (~decrease & retained).nonzero().squeeze(1)  # Eq. 7 and 9
