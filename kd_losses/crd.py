"""CRD: Contrastive Representation Distillation (Tian, Krishnan, Isola, ICLR 2020, section 3.2,
equations 10, 17 and 19), https://arxiv.org/abs/1910.10699
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# With more rows in a bank than this for each one drawn, the rows drawn are gathered; with fewer, their
# scores, out of one product with the whole bank. As fast at 24, on a CPU, batch 64; no GPU was measured.
GATHER = 24
SLICE = 2**23  # numbers gathered at a time: 32 MB


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
    'exact', the sample itself is the positive, or 'relax', any of its class; bank: 'device', the banks
    go where the module goes, or 'host', they stay in the CPU's memory, with draws and scores taken there,
    so that embeddings and their gradients are all that travels: for a device without room for them.
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
        bank: str = "device",
    ):
        super().__init__()
        if mode not in ("exact", "relax"):
            raise ValueError(f"mode must be exact or relax, not {mode!r}")
        if bank not in ("device", "host"):
            raise ValueError(f"bank must be device or host, not {bank!r}")
        if nce_t <= 0 or not 0 <= nce_mom <= 1 or nce_n < 1 or feat_dim < 1:
            raise ValueError(
                "nce_t above 0, nce_mom in 0..1, nce_n and feat_dim above 0 are wanted"
            )
        self.nce_n, self.nce_t, self.nce_mom, self.n_data = nce_n, nce_t, nce_mom, n_data
        self.mode, self.bank = mode, bank
        self.embed_s = nn.Linear(s_dim, feat_dim)
        self.embed_t = nn.Linear(t_dim, feat_dim)
        home = "cpu" if bank == "host" else None
        bound = math.sqrt(3 / feat_dim)
        for name in ("memory_s", "memory_t"):
            rows = torch.empty(n_data, feat_dim, device=home).uniform_(-bound, bound)
            self.register_buffer(name, rows)
        # the logarithm of Z, nan until the first call; whether it is set, as far as one can tell
        # without asking the device
        self.z_is_set = False
        self.register_buffer("log_z_s", torch.tensor(math.nan, device=home))
        self.register_buffer("log_z_t", torch.tensor(math.nan, device=home))
        if labels is not None:
            self._sort_by_class(labels.to(home or labels.device))

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
            sample_idx = torch.cat([self.draw(part).to(torch.int32) for part in idx.chunk(4)])
        sample_idx = sample_idx.to(self.memory_s.device)
        with torch.autocast(feat_s.device.type, enabled=False):
            e_s = self._embed(self.embed_s, feat_s)
            e_t = self._embed(self.embed_t, feat_t.detach())
            loss = self._side(e_s, self.memory_t, self.log_z_s, sample_idx)
            loss = loss + self._side(e_t, self.memory_s, self.log_z_t, sample_idx)
            if self.training:
                self.z_is_set = True
                idx, e_s, e_t = (_everyones(x.detach()) for x in (idx, e_s, e_t))
                self._move(self.memory_s, idx, e_s)
                self._move(self.memory_t, idx, e_t)
        return loss

    @torch.no_grad()
    def draw(self, idx: Tensor) -> Tensor:
        """Places (B, 1 + nce_n) of a positive and of negatives from the other classes."""
        if not hasattr(self, "order"):
            raise ValueError("CRD needs the training labels to draw negatives, or sample_idx")
        idx = idx.to(self.order.device)
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

    def _randint(self, shape: tuple[int, int], high: Tensor) -> Tensor:
        """Whole numbers in [0, high), `high` one bound a row."""
        # float32 has 2^24 steps, too few to be fair to each of a million
        dtype = torch.float64 if self.n_data > 2**18 else torch.float32
        share = torch.rand(shape, device=high.device, dtype=dtype)
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

    def _apply(self, fn, recurse: bool = True):
        """Of .to(), .cuda(), .double(): what stays on the host takes on a new type, not a new place."""
        stay = {id(x) for x in self.buffers(recurse=False) if self.bank == "host"}

        def apply(x: Tensor) -> Tensor:
            return x.to(fn(x.new_empty(0)).dtype) if id(x) in stay else fn(x)

        return super()._apply(apply, recurse)

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.z_is_set = False

    def _side(self, e: Tensor, memory: Tensor, log_z: Tensor, sample_idx: Tensor) -> Tensor:
        """One side's loss, its gradient in `e` taken at once, since the bank moves right after."""
        unit = e.detach()
        if not self.z_is_set:
            log_z = self._estimate(unit, memory, log_z, sample_idx)
        loss, grad = self._nce(unit, memory, log_z, sample_idx)
        carrier = (e * grad).sum()
        return loss + (carrier - carrier.detach())

    @torch.no_grad()
    def _estimate(self, e: Tensor, memory: Tensor, log_z: Tensor, sample_idx: Tensor) -> Tensor:
        """`log_z`, or where it is nan what these scores say, which training keeps."""
        unit = e.to(memory.device)
        if self.n_data > GATHER * sample_idx.shape[1]:
            scores = ((unit[:, None] @ rows.mT)[:, 0] for rows in _rows(memory, sample_idx))
        else:
            parts = _parts(8, unit, sample_idx)
            scores = ((some @ memory.T).gather(1, place.long()) for some, place in parts)
        sums = torch.stack([(score / self.nce_t).logsumexp((0, 1)) for score in scores])
        estimate = sums.logsumexp(0) + math.log(self.n_data / sample_idx.numel())
        estimate = _everyones(estimate[None].to(e.device)).to(log_z.device)
        estimate = estimate.logsumexp(0) - math.log(len(estimate))
        current = torch.where(log_z.isnan(), estimate, log_z)
        if self.training:
            log_z.copy_(current)
        return current

    @torch.no_grad()
    def _nce(
        self, e: Tensor, memory: Tensor, log_z: Tensor, sample_idx: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One side's loss and its gradient in `e`, both where `e` is."""
        unit = e.to(memory.device)
        grad = torch.zeros_like(unit)
        count = sample_idx.shape[1] - 1
        c = count / self.n_data
        # log(P / (c + 1e-7)): the loss is that of a logistic regression, but for a constant
        origin = log_z + math.log(c + 1e-7)
        loss = torch.zeros_like(log_z)
        if self.n_data > GATHER * sample_idx.shape[1]:
            for i, rows in enumerate(_rows(memory, sample_idx)):
                margin = (unit[:, None] @ rows.mT)[:, 0].div_(self.nce_t).sub_(origin)
                loss += _logistic(margin, positives=int(i == 0))
                grad += (margin[:, None] @ rows)[:, 0]
        else:
            # the scores of half the batch with the whole bank, then their gradient: more and smaller
            # products would take more time
            board = unit.new_empty(-(-len(e) // 2), self.n_data)
            for some, places, out in _parts(2, unit, sample_idx, grad):
                scores = torch.mm(some, memory.T, out=board[: len(some)])
                for score, place in _parts(4, scores, places):
                    margin = score.gather(1, place.long()).div_(self.nce_t).sub_(origin)
                    loss += _logistic(margin, positives=1)
                    score.zero_().scatter_add_(1, place.long(), margin)
                    del margin  # before the next one is made
                torch.mm(scores, memory, out=out)
        loss = loss / len(e) + count * math.log((c + 1e-7) / c)
        return loss.to(e.device), (grad / (self.nce_t * len(e))).to(e.device)

    @torch.no_grad()
    def _move(self, memory: Tensor, idx: Tensor, e: Tensor) -> None:
        idx, e = idx.to(memory.device), e.to(memory.device)
        row = self.nce_mom * memory[idx] + (1 - self.nce_mom) * e
        memory.index_copy_(0, idx, _normalise(row).to(memory.dtype))


def _everyones(x: Tensor) -> Tensor:
    """The samples of all processes that train together: their banks stay equal."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _rows(memory: Tensor, sample_idx: Tensor):
    """The bank's rows (B, k, feat_dim) for a few columns of `sample_idx` at a time, written over the
    last ones, in no more memory than a board of scores would take."""
    width, (batch, samples) = memory.shape[1], sample_idx.shape
    numbers = min(SLICE, batch * len(memory) // 2)
    step = min(samples, max(1, numbers // (batch * width)))
    buffer = memory.new_empty(batch * step, width)
    for place in sample_idx.split(step, dim=1):
        out = buffer[: place.numel()]
        yield torch.index_select(memory, 0, place.flatten(), out=out).view(*place.shape, width)


def _logistic(margin: Tensor, positives: int) -> Tensor:
    """Sum of the terms, those of positives in the first columns; `margin` becomes the gradient."""
    loss = F.softplus(margin, threshold=40).sum() - margin[:, :positives].sum()
    margin.sigmoid_()[:, :positives] -= 1
    return loss


def _parts(n: int, *tensors: Tensor):
    return zip(*(x.chunk(n) for x in tensors))


def _normalise(x: Tensor) -> Tensor:
    # the gradient of a square root at 0 is infinite; a zero row stays as it is
    square = x.square().sum(1, keepdim=True)
    return x / torch.where(square > 0, square, 1).sqrt()
