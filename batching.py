"""Batch Margin Diversification (RMO, Eq. 10 to 12 and Algorithm 1), and the two contrasts of Tables 1 and 3.

Splits N pairs into n batches of m so that the margins inside each batch vary as much as possible. Why it can
be fast:

    sum of batch variances = (N/m) mean(margin^2) - sum of (batch mean)^2

so Eq. 10 asks for batches with equal means. The most that can be reached is (N/m) Var(all margins),
`variance_bound`; a random split has (1 - 1/m) of it in expectation, so at m = 16 there is at most
1/15 = 6.7 % to gain (Table 3). Swapping a in B_p with b in B_q changes only the two batch sums: with
d = b - a the total grows by -2 d (S_p - S_q + d) / m^2, and no variance is ever computed again. Swaps in
disjoint pairs of batches do not touch one another, so one sweep, in which every batch meets one other, is a
handful of vector operations and still Algorithm 1.

Differs from the paper: 1) swaps come in sweeps, see above, and epsilon and patience count sweeps. 2) a is
random and b is its best partner in B_q, not random too: m gains instead of one, and the bound is reached much
sooner, also with heavy tails. 3) Algorithm 1 appends "improvement" to Q but divides by Q[-k]; Q holds the
total variance after each sweep. 4) epsilon is 1e-8 over 50 sweeps, not 0.1 %: sweeps are cheap, and the split
comes within 0.001 % of the bound. 5) N = n m in the paper; here the N mod m pairs left over, drawn at random,
sit out: batches are made anew each epoch, so others sit out in the next.

    batches = high_variance_batches(margins, 16, torch.Generator().manual_seed(epoch))  # [n, 16]

To borrow: copy this file; it imports torch only. Margins: float [N], any device; batches: long [n, m] on the
CPU, in random order. Variances are population variances, in float64. ValueError if N < m or a margin is not
finite.
"""

import torch
from torch import Generator, Tensor


def total_variance(margins: Tensor, batches: Tensor) -> Tensor:
    """The sum over batches of the variance of their margins, a float64 scalar."""
    return margins.double().cpu()[batches].var(dim=1, unbiased=False).sum()  # Eq. 10


def variance_bound(margins: Tensor, batch_size: int) -> Tensor:
    """The largest total variance that any split into batches of this size can have: (N/m) Var(margins)."""
    return margins.double().cpu().var(unbiased=False) * len(margins) / batch_size


def stratified_batches(margins: Tensor, batch_size: int) -> Tensor:
    """The start of Algorithm 1: batch j takes the sorted margins j, j + n, j + 2n, ... If N is not a multiple
    of m, evenly spaced ranks are used. No randomness: batches come in the order j = 1 .. n."""
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
    max_sweeps: int = 10_000,
) -> Tensor:
    """Algorithm 1: stop when `patience` sweeps together raised the total variance by less than the share
    `epsilon`."""
    n, m = _batch_count(margins, batch_size), batch_size
    seated = torch.randperm(len(margins), generator=generator)[: n * m].sort().values
    values = margins.detach().double().cpu()[seated]
    batches = stratified_batches(values, m)
    held = values[batches]  # [n, m], the margins where they sit
    held -= held.mean()  # variances do not change, and small sums round less
    sums = held.sum(1)  # [n]
    totals = [held.var(dim=1, unbiased=False).sum().item()]  # Q
    for _ in range(max_sweeps if n > 1 else 0):
        p, q = torch.randperm(n, generator=generator)[: n // 2 * 2].view(2, -1)  # disjoint pairs of batches
        i = torch.randint(m, (len(p),), generator=generator)  # a's seat in B_p
        a = held[p, i]
        d = held[q] - a[:, None]  # [n/2, m]
        gain, j = (-2 * d * ((sums[p] - sums[q])[:, None] + d) / m**2).max(1)  # b's in B_q
        b = held[q, j]
        d = b - a
        better = gain > 0  # Eq. 12
        p, q, i, j, a, b, d = (t[better] for t in (p, q, i, j, a, b, d))
        held[p, i], held[q, j] = b, a
        batches[p, i], batches[q, j] = batches[q, j], batches[p, i]
        sums[p] += d
        sums[q] -= d
        totals.append(totals[-1] + gain[better].sum().item())
        if len(totals) > patience and totals[-1] - totals[-1 - patience] <= epsilon * totals[-1 - patience]:
            break
    return _in_random_order(seated[batches], generator)


def low_variance_batches(margins: Tensor, batch_size: int, generator: Generator | None = None) -> Tensor:
    """The least total variance: neighbours in the sorted order share a batch. The paper flips Algorithm 1's
    objective; sorting is the exact minimum of that."""
    n = _batch_count(margins, batch_size)
    seated = torch.randperm(len(margins), generator=generator)[: n * batch_size].sort().values
    order = seated[margins.cpu()[seated].argsort(stable=True)]
    return _in_random_order(order.view(n, batch_size), generator)


def random_batches(margins: Tensor, batch_size: int, generator: Generator | None = None) -> Tensor:
    """A random split, as in plain DPO: only the number of margins is used."""
    n = _batch_count(margins, batch_size)
    return torch.randperm(len(margins), generator=generator)[: n * batch_size].view(n, batch_size)


def _in_random_order(batches: Tensor, generator: Generator | None) -> Tensor:
    return batches[torch.randperm(len(batches), generator=generator)]


def _batch_count(margins: Tensor, batch_size: int) -> int:
    if not 1 <= batch_size <= len(margins):
        raise ValueError(
            f"{len(margins)} pairs fill no batch of {batch_size}: it must be 1 to {len(margins)}"
        )
    if not margins.isfinite().all():
        raise ValueError(f"{int((~margins.isfinite()).sum())} of {len(margins)} margins are not finite")
    return len(margins) // batch_size
