"""DML: Deep Mutual Learning (Zhang, Xiang, Hospedales, Lu, CVPR 2018, equation 4),
https://arxiv.org/abs/1706.00384
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DML(nn.Module):
    """Kullback-Leibler divergence from the peer's prediction to the learner's, without temperature.

        loss = 1 / B * sum_b KL(softmax(out_t) || softmax(out_s))

    Both networks learn: the loss of the other network is the same call with the arguments
    exchanged. The second argument is a constant.
    Differs from the paper: as in KD-Zoo, both losses use one forward pass of each network. The
    paper updates one network after the other and computes the predictions again. Only two networks.
    """

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        """out_s, out_t: logits (B, K) of the learner and of its peer. Returns a scalar."""
        with torch.autocast(out_s.device.type, enabled=False):
            out_s, out_t = _float32(out_s), _float32(out_t.detach())
            log_p_s, log_p_t = F.log_softmax(out_s, dim=1), F.log_softmax(out_t, dim=1)
            return F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)


def _float32(x: Tensor) -> Tensor:
    """x in float32, unless it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
