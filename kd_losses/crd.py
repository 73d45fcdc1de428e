"""CRD: Contrastive Representation Distillation (Tian, Krishnan, Isola, ICLR 2020, section 3.2,
equations 10, 17 and 19), https://arxiv.org/abs/1910.10699
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = 2  # of a batch, and of each part again; more parts take less memory and more time


class CRD(nn.Module):
    """Noise-contrastive loss that draws a sample's two embeddings together, away from other classes'.

        e = N(linear(feat)), N the L2 normalisation         one linear layer per network, learned
        score_s = exp(e_s . M_t[j] / nce_t),   score_t = exp(e_t . M_s[j] / nce_t)
        P = score / Z,   Z = n_data * mean(score) of the first call,   c = nce_n / n_data
        loss = -1/B * sum over both sides of
               sum_b log(P_0 / (P_0 + c)) + sum_j log(c / (P_j + c))      j = 0 the positive

    The banks M (n_data, feat_dim) keep an embedding of every training sample, and after the scores
    are taken M[idx] <- N(nce_mom * M[idx] + (1 - nce_mom) * e).

    s_dim, t_dim: widths of the features; feat_dim: of the embeddings (paper: 128); nce_n: negatives
    a sample (16384); nce_t: temperature (KD-Zoo 0.1, the paper's code 0.07); nce_mom: 0.5; n_data:
    training samples; labels: their classes (n_data,), needed to draw the negatives here; mode:
    'exact', the sample itself is the positive, or 'relax', any of its class.
    Differs from the public code: negatives are drawn with replacement, from the other classes alone.
    """

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        feat_dim: int = 128,
        nce_n: int = 16384,
        nce_t: float = 0.1,
        nce_mom: float = 0.5,
        n_data: int = 50000,
        labels: Tensor | None = None,
        mode: str = "exact",
    ):
        super().__init__()
        if mode not in ("exact", "relax"):
            raise ValueError(f"mode must be exact or relax, not {mode!r}")
        if nce_t <= 0 or not 0 <= nce_mom <= 1 or nce_n < 1 or feat_dim < 1:
            raise ValueError(
                "nce_t above 0, nce_mom in 0..1, nce_n and feat_dim above 0 are wanted"
            )
        self.nce_n, self.nce_t, self.nce_mom, self.n_data = nce_n, nce_t, nce_mom, n_data
        self.mode = mode
        self.embed_s = nn.Linear(s_dim, feat_dim)
        self.embed_t = nn.Linear(t_dim, feat_dim)
        bound = math.sqrt(3 / feat_dim)
        for name in ("memory_s", "memory_t"):
            self.register_buffer(name, torch.empty(n_data, feat_dim).uniform_(-bound, bound))
        # the logarithm of Z, nan until the first call
        self.register_buffer("log_z_s", torch.tensor(math.nan))
        self.register_buffer("log_z_t", torch.tensor(math.nan))
        if labels is not None:
            self._sort_by_class(labels)

    def forward(
        self, feat_s: Tensor, feat_t: Tensor, idx: Tensor, sample_idx: Tensor | None = None
    ) -> Tensor:
        """feat_s (B, s_dim), feat_t (B, t_dim); idx: int64 (B,), the samples' places in the training
        set; sample_idx: int64 (B, 1 + nce_n), places of the positive and the negatives, drawn here where
        it is None. Returns a scalar. In eval mode banks and Z stay as they are.

        Raises ValueError where sample_idx is None and there are no labels to draw from.
        """
        if sample_idx is None:
            # kept at half the size: they live as long as the scores
            sample_idx = torch.cat([self.draw(part).to(torch.int32) for part in idx.chunk(PARTS)])
        with torch.autocast(feat_s.device.type, enabled=False):
            e_s = self._embed(self.embed_s, feat_s)
            e_t = self._embed(self.embed_t, feat_t.detach())
            loss = self._side(e_s, self.memory_t, self.log_z_s, sample_idx)
            loss = loss + self._side(e_t, self.memory_s, self.log_z_t, sample_idx)
            if self.training:
                self._move(self.memory_s, idx, e_s)
                self._move(self.memory_t, idx, e_t)
        return loss

    @torch.no_grad()
    def draw(self, idx: Tensor) -> Tensor:
        """Places (B, 1 + nce_n) of a positive and of negatives from the other classes."""
        if not hasattr(self, "order"):
            raise ValueError("CRD needs the training labels to draw negatives, or sample_idx")
        label = self.labels[idx]
        start, count = self.start[label, None], self.count[label, None]
        shape = (len(idx), self.nce_n)
        others = self.n_data - count
        rank = self._randint(shape, others)
        # sorted by class, the other classes are everything but one interval
        negatives = self.order[rank + count * (rank >= start)]
        if self.mode == "exact":
            positive = idx[:, None]
        else:
            positive = self.order[start + self._randint((len(idx), 1), count)]
        return torch.cat([positive, negatives], dim=1)

    @staticmethod
    def _randint(shape: tuple[int, int], high: Tensor) -> Tensor:
        """Whole numbers in [0, high), `high` one bound a row."""
        share = torch.rand(shape, device=high.device)
        return torch.minimum((share * high).long(), high - 1)  # rounding may reach the bound

    def _sort_by_class(self, labels: Tensor) -> None:
        labels = labels.detach().clone()
        if len(labels) != self.n_data:
            raise ValueError(f"{len(labels)} labels for n_data {self.n_data}")
        count = torch.bincount(labels)
        if (count > 0).sum() < 2:
            raise ValueError("CRD needs at least two classes: it contrasts one with the others")
        kept = dict(
            labels=labels,
            order=labels.argsort(stable=True),
            start=count.cumsum(0) - count,
            count=count,
        )
        for name, value in kept.items():
            self.register_buffer(name, value, persistent=False)  # data, not state

    @staticmethod
    def _embed(linear: nn.Linear, feat: Tensor) -> Tensor:
        return _normalise(
            linear(feat.to(torch.promote_types(feat.dtype, torch.float32)).flatten(1))
        )

    def _side(self, e: Tensor, memory: Tensor, log_z: Tensor, sample_idx: Tensor) -> Tensor:
        """One side's loss, its gradient in `e` taken at once, since the bank moves right after."""
        loss, grad = self._nce(e.detach(), memory, log_z, sample_idx)
        carrier = (e * grad).sum()
        return loss + (carrier - carrier.detach())

    @torch.no_grad()
    def _nce(
        self, e: Tensor, memory: Tensor, log_z: Tensor, sample_idx: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One side's loss and its gradient in `e`, by parts of the batch: one small `board` holds
        the scores with the whole bank, then their gradient."""
        board = e.new_empty(-(-len(e) // PARTS), self.n_data)
        margin, grad = e.new_empty(sample_idx.shape), torch.empty_like(e)
        for rows, places, out in _parts(e, sample_idx, margin):
            # all scores in one product, then a gather: far cheaper than gathering the bank's rows
            scores = torch.mm(rows, memory.T, out=board[: len(rows)])
            for score, place, chosen in _parts(scores, places, out):
                torch.gather(score, 1, place.long(), out=chosen)
        margin /= self.nce_t
        estimate = torch.cat([m.logsumexp(1) for m in margin.chunk(PARTS**2)]).logsumexp(0)
        estimate += math.log(self.n_data / margin.numel())
        current = torch.where(log_z.isnan(), estimate, log_z)
        if self.training:
            log_z.copy_(current)
        # log(P / (c + 1e-7)): the loss is that of a logistic regression, but for a constant
        count = sample_idx.shape[1] - 1
        c = count / self.n_data
        margin -= current + math.log(c + 1e-7)
        loss = count * math.log((c + 1e-7) / c) - margin[:, 0].mean()
        for places, margins, out in _parts(sample_idx, margin, grad):
            scores = board[: len(margins)].zero_()
            for score, place, m in _parts(scores, places, margins):
                loss += F.softplus(m, threshold=40).sum() / len(e)
                m.sigmoid_()[:, 0] -= 1
                score.scatter_add_(1, place.long(), m)
            torch.mm(scores, memory, out=out)
        return loss, grad / (self.nce_t * len(e))

    @torch.no_grad()
    def _move(self, memory: Tensor, idx: Tensor, e: Tensor) -> None:
        row = self.nce_mom * memory[idx] + (1 - self.nce_mom) * e
        memory.index_copy_(0, idx, _normalise(row).to(memory.dtype))


def _parts(*tensors: Tensor):
    return zip(*(x.chunk(PARTS) for x in tensors))


def _normalise(x: Tensor) -> Tensor:
    # the gradient of a square root at 0 is infinite; a zero row stays as it is
    square = x.square().sum(1, keepdim=True)
    return x / torch.where(square > 0, square, 1).sqrt()
