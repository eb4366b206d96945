# SPDX-License-Identifier: MIT
"""Batch Margin Diversification (RMO, Eq. 10 to 12 and Algorithm 1), and the two contrasts of Tables 1 and 3.

Splits N pairs into n batches of m so that the margins inside each batch vary as much as possible. As

    sum of batch variances = (N/m) mean(margin^2) - sum of (batch mean)^2,

Eq. 10 asks for batches with equal means, and (N/m) Var(all margins) is an upper bound. A random split has
(1 - 1/m) of it in expectation: at m = 16, 1/15 = 6.7 % is to gain (Table 3: 7.0 to 8.1 %, on one draw each).
Swapping a in B_p with b in B_q changes only the two batch sums. With d = b - a the total grows by

    -2 d (S_p - S_q + d) / m^2,

and no variance is computed again. In one sweep every batch meets one other. Their swaps do not touch one
another, so a sweep is a few vector operations.

    batches = high_variance_batches(margins, 16, torch.Generator().manual_seed(epoch))  # [n, 16]

Differs from the paper:
1) Swaps come in sweeps; patience counts sweeps, not swaps.
2) a is random and b is its best partner in B_q, not random too: it nears the bound much sooner.
3) Algorithm 1 appends an "improvement" to Q but divides by Q[-k]. Here Q holds the total variance.
4) epsilon is 1e-8 over 50 sweeps, not 0.1 %: sweeps are cheap, and end within 0.001 % of the bound where
   batches can be balanced at all (N = 8,000 margins, m = 16).
5) N = n m in the paper. Here the N mod m pairs left over, drawn at random, sit out.

To borrow: copy this file; it imports torch only. Margins are float [N], on any device. Batches are long
[n, m] indices into them, on the CPU. Variances are population variances, in float64.
All functions that make batches raise ValueError if N < m or a margin is not finite.
"""

import torch
from torch import Generator, Tensor


def total_variance(margins: Tensor, batches: Tensor) -> Tensor:
    """The sum over batches of the variance of their margins, a float64 scalar. batches: long [n, m]."""
    return margins.double().cpu()[batches].var(dim=1, unbiased=False).sum()  # Eq. 10


def variance_bound(margins: Tensor, batch_size: int) -> Tensor:
    """What total variance cannot exceed, and can reach only if m divides N: (N/m) Var(margins)."""
    return margins.double().cpu().var(unbiased=False) * len(margins) / batch_size


def stratified_batches(margins: Tensor, batch_size: int) -> Tensor:
    """The start of Algorithm 1: batch j takes the sorted margins j, j + n, j + 2n, ...: long [n, m].

    Called with N not a multiple of m, it takes evenly spaced ranks; Algorithm 1 drops the rest before.
    Nothing is random: batches come in the order of j.
    """
    n = _batch_count(margins, batch_size)
    ranks = torch.arange(n * batch_size) * len(margins) // (n * batch_size)  # 0, 1, 2, ... if N = n m
    order = margins.cpu().argsort(stable=True)[ranks]
    return order.view(batch_size, n).T.contiguous()  # Eq. 11


def high_variance_batches(
    margins: Tensor,
    batch_size: int,
    generator: Generator | None = None,
    epsilon: float = 1e-8,
    patience: int = 50,
) -> Tensor:
    """Algorithm 1: batches of nearly equal means, long [n, m], in random order.

    Stops when `patience` sweeps together raised the total variance by no more than the share `epsilon`.
    """
    pairs = _without_remainder(margins, batch_size, generator)
    values = margins.detach().double().cpu()[pairs]
    batches = stratified_batches(values, batch_size)  # [n, m] into values
    grid = values[batches]  # [n, m], the margin at each place
    grid -= grid.mean()  # variances stay as they are, and smaller sums round less
    sums = grid.sum(dim=1)  # [n]
    n, m = batches.shape
    totals = [total_variance(values, batches).item()]  # Q
    while True:
        # Line 12: batches meet two by two, B_p and B_q; of an odd number one waits.
        p, q = torch.randperm(n, generator=generator)[: n // 2 * 2].view(2, -1)  # [n/2] each
        # Line 13: a at a random place i of B_p, and b at the place j of B_q where the swap gains most.
        i = torch.randint(m, (len(p),), generator=generator)
        d = grid[q] - grid[p, i][:, None]  # [n/2, m], b - a for every b
        gains = -2 * d * ((sums[p] - sums[q])[:, None] + d) / m**2
        gain, j = gains.max(dim=1)  # [n/2]
        # Lines 14 to 16: swap where the total variance increases.
        better = gain > 0  # Eq. 12
        p, q, i, j = p[better], q[better], i[better], j[better]
        a, b = grid[p, i], grid[q, j]
        grid[p, i], grid[q, j] = b, a
        batches[p, i], batches[q, j] = batches[q, j], batches[p, i]
        sums[p] += b - a
        sums[q] -= b - a
        # Lines 17 to 21: early stopping.
        totals.append(totals[-1] + gain[better].sum().item())
        if len(totals) > patience:
            before = totals[-1 - patience]
            if totals[-1] - before <= epsilon * before:
                return _in_random_order(pairs[batches], generator)


def low_variance_batches(margins: Tensor, batch_size: int, generator: Generator | None = None) -> Tensor:
    """The least total variance, long [n, m]: neighbours in the sorted order share a batch. In random order.

    The paper flips Algorithm 1's objective; sorting is the exact minimum of that.
    """
    pairs = _without_remainder(margins, batch_size, generator)
    order = margins.cpu()[pairs].argsort(stable=True)
    return _in_random_order(pairs[order].view(-1, batch_size), generator)


def random_batches(margins: Tensor, batch_size: int, generator: Generator | None = None) -> Tensor:
    """A random split as in plain DPO, long [n, m]: only the number of margins is used."""
    n = _batch_count(margins, batch_size)
    return torch.randperm(len(margins), generator=generator)[: n * batch_size].view(n, batch_size)


def _without_remainder(margins: Tensor, batch_size: int, generator: Generator | None) -> Tensor:
    """Indices of the n m pairs that are batched, ascending; a random remainder sits out."""
    n = _batch_count(margins, batch_size)
    return torch.randperm(len(margins), generator=generator)[: n * batch_size].sort().values


def _in_random_order(batches: Tensor, generator: Generator | None) -> Tensor:
    return batches[torch.randperm(len(batches), generator=generator)]


def _batch_count(margins: Tensor, batch_size: int) -> int:
    if not 1 <= batch_size <= len(margins):
        raise ValueError(
            f"{len(margins)} pairs fill no batch of {batch_size}: it must be 1 to {len(margins)}"
        )
    infinite = (~margins.isfinite()).sum().item()
    if infinite:
        raise ValueError(f"{infinite} of {len(margins)} margins are not finite")
    return len(margins) // batch_size
