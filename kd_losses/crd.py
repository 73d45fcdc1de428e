"""CRD: Contrastive Representation Distillation (Tian, Krishnan, Isola, ICLR 2020, section 3.2,
equations 10, 17 and 19), https://arxiv.org/abs/1910.10699
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

GATHER = 24  # a bank of more rows than this for each one drawn takes `_fast_side`
SLICE = 2**23  # numbers gathered at a time: 32 MB


class CRD(nn.Module):
    """Noise-contrastive loss: pulls a sample's two embeddings together, and away from other
    classes.

        e = N(linear(feat)), N the L2 normalisation         one linear layer per network, learned
        score_s = exp(e_s . M_t[j] / nce_t),   score_t = exp(e_t . M_s[j] / nce_t)
        P = score / Z,   Z = n_data * mean(score) of the first call,   c = nce_n / n_data
        loss = -1/B * sum over both sides of
               sum_b log(P_0 / (P_0 + c)) + sum_j log(c / (P_j + c))      j = 0 the positive

    The banks M (n_data, feat_dim) keep an embedding of every training sample. After the scores are
    computed, M[idx] <- N(nce_mom * M[idx] + (1 - nce_mom) * e).

    s_dim, t_dim: widths of the features; feat_dim: of the embeddings (paper: 128); nce_n: negatives
    a sample (16384); nce_t: temperature (KD-Zoo 0.1, the paper's code 0.07); nce_mom: 0.5; n_data:
    training samples; labels: their classes (n_data,), needed to draw the negatives here; mode:
    'exact', the sample itself is the positive, or 'relax', any of its class; bank: 'device' keeps
    the banks on the module's device; 'host' keeps them in main memory and draws and computes the
    scores there, so only embeddings and gradients are copied (for a device with too little memory).
    Differs from the public code: negatives are drawn with replacement, from the other classes.
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
            raise ValueError(f"expected mode exact or relax, got {mode!r}")
        if bank not in ("device", "host"):
            raise ValueError(f"expected bank device or host, got {bank!r}")
        if nce_t <= 0 or not 0 <= nce_mom <= 1 or nce_n < 1 or feat_dim < 1:
            raise ValueError("expected nce_t > 0, 0 <= nce_mom <= 1, nce_n > 0 and feat_dim > 0")
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
        """feat_s (B, s_dim), feat_t (B, t_dim); idx: int64 (B,), the samples' places in the
        training set; sample_idx: int64 (B, 1 + nce_n), places of the positive and the negatives,
        drawn here where it is None. Returns a scalar. In eval mode banks and Z stay as they are.

        Raises ValueError if sample_idx is None and there are no labels to draw from.
        """
        if sample_idx is None:
            sample_idx = self.draw(idx)
        sample_idx = sample_idx.to(self.memory_s.device)
        with torch.autocast(feat_s.device.type, enabled=False):
            e_s = _unit(self.embed_s(_float32(feat_s).flatten(1)))
            e_t = _unit(self.embed_t(_float32(feat_t.detach()).flatten(1)))
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
            raise ValueError("CRD: give labels (to draw the negatives) or sample_idx")
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
            raise ValueError("CRD: expected at least two classes: it contrasts one with the others")
        kept = dict(
            labels=labels,
            order=labels.argsort(stable=True),
            start=count.cumsum(0) - count,
            count=count,
        )
        for name, value in kept.items():
            self.register_buffer(name, value, persistent=False)  # data, not state

    def _apply(self, fn, recurse: bool = True):
        """Of .to(), .cuda(), .double(): what stays on the host takes a new type alone."""
        stay = {id(x) for x in self.buffers(recurse=False) if self.bank == "host"}

        def apply(x: Tensor) -> Tensor:
            return x.to(fn(x.new_empty(0)).dtype) if id(x) in stay else fn(x)

        return super()._apply(apply, recurse)

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.z_is_set = False

    def _side(self, e: Tensor, memory: Tensor, log_z: Tensor, sample_idx: Tensor) -> Tensor:
        """One side's loss: the embeddings e (B, feat_dim) against rows of the other side's bank."""
        if self.n_data > GATHER * sample_idx.shape[1]:
            return self._fast_side(e, memory, log_z, sample_idx)
        # a copy: the bank moves before the gradient is taken
        product = e.to(memory.device) @ memory.clone().T
        log_score = product.gather(1, sample_idx) / self.nce_t
        if not self.z_is_set:
            log_z = self._estimate(log_score.logsumexp((0, 1)), log_z, sample_idx, e.device)
        log_p = log_score - log_z
        loss = self._nce(log_p[:, :1], log_p[:, 1:], sample_idx.shape[1] - 1)
        return (loss / len(e)).to(e.device)

    def _nce(self, positive: Tensor, negatives: Tensor, nce_n: int) -> Tensor:
        """The sum of -log(P / (P + c)) and of -log(c / (P + c)), from log P."""
        c = nce_n / self.n_data
        # P / (P + c) = sigmoid(log P - log c), which no P overflows; 1e-7 as in the public code
        log_c, rest = math.log(c + 1e-7), math.log((c + 1e-7) / c)
        loss = -F.logsigmoid(positive - log_c).sum() - F.logsigmoid(log_c - negatives).sum()
        return loss + rest * negatives.numel()

    def _fast_side(self, e: Tensor, memory: Tensor, log_z: Tensor, sample_idx: Tensor) -> Tensor:
        """`_side` from the drawn rows alone, a few columns at a time; the gradient in e is taken at
        once, since the bank moves right after."""
        # 1 281 167 rows, batch 64, one CPU thread: 0.6 s and 43 MB in the place of 2.8 s and 2.3 GB
        unit = e.detach().to(memory.device)
        if not self.z_is_set:
            log_scores = (self._log_score(unit, rows) for rows in _rows(memory, sample_idx))
            log_sum = torch.stack([x.logsumexp((0, 1)) for x in log_scores]).logsumexp(0)
            log_z = self._estimate(log_sum, log_z, sample_idx, e.device)
        unit.requires_grad_()
        loss, grad = torch.zeros_like(log_z), torch.zeros_like(unit)
        nce_n, positives = sample_idx.shape[1] - 1, 1
        for rows in _rows(memory, sample_idx):
            with torch.enable_grad():
                log_p = self._log_score(unit, rows) - log_z
                part = self._nce(log_p[:, :positives], log_p[:, positives:], nce_n)
            grad += torch.autograd.grad(part, unit)[0]
            loss += part.detach()
            positives = 0  # the first column is their only one
        loss, grad = (loss / len(e)).to(e.device), (grad / len(e)).to(e.device)
        carrier = (e * grad).sum()
        return loss + (carrier - carrier.detach())

    def _log_score(self, unit: Tensor, rows: Tensor) -> Tensor:
        return (unit[:, None] @ rows.mT)[:, 0] / self.nce_t

    @torch.no_grad()
    def _estimate(
        self, log_sum: Tensor, log_z: Tensor, sample_idx: Tensor, device: torch.device
    ) -> Tensor:
        """`log_z`, or where it is nan what these scores say, which training keeps."""
        estimate = log_sum + math.log(self.n_data / sample_idx.numel())
        estimate = _everyones(estimate[None].to(device)).to(log_z.device)
        estimate = estimate.logsumexp(0) - math.log(len(estimate))
        current = torch.where(log_z.isnan(), estimate, log_z)
        if self.training:
            log_z.copy_(current)
        return current

    @torch.no_grad()
    def _move(self, memory: Tensor, idx: Tensor, e: Tensor) -> None:
        idx, e = idx.to(memory.device), e.to(memory.device)
        row = self.nce_mom * memory[idx] + (1 - self.nce_mom) * e
        memory.index_copy_(0, idx, _unit(row).to(memory.dtype))


def _everyones(x: Tensor) -> Tensor:
    """The samples of all processes that train together: their banks stay equal."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _rows(memory: Tensor, sample_idx: Tensor):
    """The bank's rows (B, k, feat_dim) for a few columns of `sample_idx` at a time, written over
    the last ones, in no more memory than scores of half the batch with all rows would take."""
    width, (batch, samples) = memory.shape[1], sample_idx.shape
    numbers = min(SLICE, batch * len(memory) // 2)
    step = min(samples, max(1, numbers // (batch * width)))
    buffer = memory.new_empty(batch * step, width)
    for place in sample_idx.split(step, dim=1):
        out = buffer[: place.numel()]
        yield torch.index_select(memory, 0, place.flatten(), out=out).view(*place.shape, width)


def _unit(x: Tensor) -> Tensor:
    """x with rows, along the last dimension, of L2 norm 1; one of norm up to 1e-12 stays."""
    norm = x.norm(dim=-1, keepdim=True)  # whose gradient at 0 torch takes as 0
    return x / torch.where(norm > 1e-12, norm, 1)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
