"""MoCo: a query encoder learns to recognise, among many keys, the one that comes from the same image.

v2 (arXiv 1911.05722, 2003.04297) holds the other keys in a queue, v3 (2104.02057) takes them from the batch. In both,
the key encoder is a moving average of the query encoder. Each of several processes contrasts with the keys of all.
"""

import copy
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import VisionTransformer

from toolkit import distributed
from toolkit.answers.probe import linear_head
from toolkit.models import backbones, norms


class MomentumContrast(nn.Module):
    """The part that both versions share: encoder_q, and encoder_k, its moving average, which gets no gradient.

    `projector` (features -> embeddings) replaces the backbone's classifier head. Both encoders share frozen parameters:
    over a frozen backbone with adapters, encoder_k is a second set of adapters. `T`: temperature of the softmax.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, m: float, T: float):
        super().__init__()
        backbone.set_submodule(backbones.head_name(backbone), projector)
        self.encoder_q = backbone
        shared = [parameter for parameter in backbone.parameters() if not parameter.requires_grad]
        for module in backbone.modules():
            if norms.is_frozen(module):
                shared += module.buffers(recurse=False)
        self.encoder_k = copy.deepcopy(backbone, {id(tensor): tensor for tensor in shared}).requires_grad_(False)
        self.m = m
        self.T = T

    def momentum(self, progress: float) -> float:
        """The momentum at this share (0 to 1) of the training."""
        return self.m

    @torch.no_grad()
    def update_encoder_k(self, m: float) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q (1911.05722, equation 2), for all trainable parameters."""
        both = zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True)
        keys, queries = zip(*[(k, q) for k, q in both if k is not q], strict=True)
        torch._foreach_lerp_(keys, queries, 1 - m)  # equal values stay exactly equal


class MoCo(MomentumContrast):
    """v2: InfoNCE against a queue of K keys (1911.05722, algorithm 1), a projector with a hidden layer.

    BatchNorm normalises in each process by itself. So that its statistics cannot tell which key belongs to which query,
    keys are computed in another order than queries (section 3.3, shuffling BN). One process need not shuffle its batch.
    """

    def __init__(self, backbone, dim: int = 128, K: int = 65536, m: float = 0.999, T: float = 0.2):
        width = linear_head(backbone).in_features
        last = nn.Linear(width, dim)  # drawn first: a seed's start stays as it was
        super().__init__(backbone, nn.Sequential(nn.Linear(width, width), nn.ReLU(), last), m, T)
        self.K = K
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q: torch.Tensor, im_k: torch.Tensor, m: float) -> torch.Tensor:
        """Loss of two views (N, 3, S, S) of the same images; updates encoder_k and the queue."""
        q = F.normalize(full_precision(self.encoder_q(im_q)), dim=1)  # (N, dim)
        with torch.no_grad():
            self.update_encoder_k(m)
            keys = F.normalize(full_precision(shuffled(self.encoder_k, im_k)), dim=1)  # (W N, dim), of all W processes
            k = keys[distributed.rank() :: distributed.world_size()]  # (N, dim)
        with torch.autocast(q.device.type, enabled=False):  # similarities over T lose too much in half precision
            l_pos = (q * k).sum(dim=1, keepdim=True)  # (N, 1)
            l_neg = q @ self.queue.clone()  # (N, dim) @ (dim, K) -> (N, K)
        logits = torch.cat([l_pos, l_neg], dim=1) / self.T  # (N, 1 + K)
        labels = torch.zeros(len(q), dtype=torch.long, device=q.device)  # the positive comes first
        self.dequeue_and_enqueue(keys)
        return F.cross_entropy(logits, labels)

    def dequeue_and_enqueue(self, k: torch.Tensor) -> None:
        """Replace the oldest keys by the newest ones (N, dim)."""
        self.queue[:, (self.queue_ptr + torch.arange(len(k), device=k.device)) % self.K] = k.T
        self.queue_ptr[0] = (self.queue_ptr[0] + len(k)) % self.K


class MoCoV3(MomentumContrast):
    """v3: no queue, a predictor on the queries, both views as queries (2104.02057, algorithm 1).

    A ViT gets fixed sine-cosine positions, unless its positions are frozen already, and a frozen patch embedding,
    without which its training is unstable (section 4.1). The momentum rises from m to 1 along half a cosine.
    """

    def __init__(self, backbone, dim: int = 256, mlp_dim: int = 4096, m: float = 0.99, T: float = 0.2):
        hidden = [mlp_dim]
        if isinstance(backbone, VisionTransformer):
            hidden *= 2
            if backbone.encoder.pos_embedding.requires_grad:
                fix_positions(backbone)
            if isinstance(backbone.conv_proj, nn.Conv2d):  # a stem of several convolutions is trained
                backbone.conv_proj.requires_grad_(False)
        super().__init__(backbone, mlp([linear_head(backbone).in_features, *hidden, dim]), m, T)
        self.predictor = mlp([dim, mlp_dim, dim])

    def momentum(self, progress: float) -> float:
        return 1 - (1 - self.m) * 0.5 * (1 + math.cos(math.pi * progress))

    def forward(self, x1: torch.Tensor, x2: torch.Tensor, m: float) -> torch.Tensor:
        """Loss of two views (N, 3, S, S) of the same images; updates encoder_k."""
        q1 = self.predictor(self.encoder_q(x1))  # (N, dim)
        q2 = self.predictor(self.encoder_q(x2))
        with torch.no_grad():
            self.update_encoder_k(m)
            k1 = self.encoder_k(x1)  # (N, dim)
            k2 = self.encoder_k(x2)
        return self.contrast(q1, k2) + self.contrast(q2, k1)

    def contrast(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """InfoNCE with the other keys of the batch as negatives, times 2T as in the paper's ctr()."""
        q = F.normalize(full_precision(q), dim=1)
        k = F.normalize(full_precision(distributed.interleave(k)), dim=1)
        with torch.autocast(q.device.type, enabled=False):
            logits = q @ k.T / self.T  # (N, dim) @ (dim, W N) -> (N, W N), W processes
        labels = torch.arange(len(q), device=q.device) * distributed.world_size() + distributed.rank()
        return 2 * self.T * F.cross_entropy(logits, labels)


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in float64 if it already is."""
    return x if x.dtype == torch.float64 else x.float()


def shuffled(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Encode the images of all W processes, (N, 3, S, S) each, in random processes: (W N, dim)."""
    leaks = any(isinstance(module, _BatchNorm) and module.training for module in encoder.modules())
    if distributed.world_size() == 1 or not leaks:
        return distributed.interleave(encoder(images))
    everyones = distributed.interleave(images)
    order = torch.randperm(len(everyones)).to(images.device)
    distributed.broadcast([order])
    mine = order[distributed.rank() :: distributed.world_size()]
    return distributed.interleave(encoder(everyones[mine]))[order.argsort()]


def mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers with BatchNorm after each, ReLU between them; the last BatchNorm has no parameters."""
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(fan_in, fan_out, bias=False), nn.BatchNorm1d(fan_out), nn.ReLU()]
    layers += [nn.Linear(widths[-2], widths[-1], bias=False), nn.BatchNorm1d(widths[-1], affine=False)]
    return nn.Sequential(*layers)


def fix_positions(vit: VisionTransformer) -> None:
    """Fix the position embedding: sine-cosine in two dimensions, zero for the class token (2104.02057, section 4.4)."""
    side = vit.image_size // vit.patch_size
    position = vit.encoder.pos_embedding  # (1, 1 + side * side, D)
    frequency = 10000 ** -(torch.arange(vit.hidden_dim // 4) / (vit.hidden_dim // 4))  # (D / 4)
    angle = torch.outer(torch.arange(side), frequency)  # (side, D / 4)
    rows = angle.repeat_interleave(side, dim=0)  # (side * side, D / 4), row by row
    columns = angle.repeat(side, 1)
    grid = torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)  # (side * side, D)
    position.data = torch.cat([torch.zeros(1, vit.hidden_dim), grid])[None].to(position)
    position.requires_grad_(False)
