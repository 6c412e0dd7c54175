"""moco/builder.py against the papers' equations, computed here another way."""

import copy
import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from dense import EXACT, FP32, assert_close, frozen, randomize_adapters, resnet, trained, vit
from torch import nn

from moco.builder import MoCo, MoCoV3
from tests import dense
from toolkit.models.backbones import build_backbone, head_name


def tiny() -> nn.Module:
    """The least that can stand for a backbone: images (N, 3, 2, 2) -> classes, through 5 features."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh())
    return nn.Sequential(OrderedDict(body=body, fc=nn.Linear(5, 10)))


def test_the_encoders_start_equal_and_only_the_query_encoder_trains():
    """The loss is computed in float32 under autocast. Momentum is constant with a queue, and rises to 1 in v3."""
    for model, momentum in ((MoCo(tiny(), K=8, m=0.9), [0.9] * 3), (MoCoV3(tiny(), 6, 7, m=0.9), [0.9, 0.925, 1])):
        assert [model.momentum(t) for t in (0, 1 / 3, 1)] == pytest.approx(momentum)  # along half a cosine
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert copy.deepcopy(model)(*torch.randn(2, 4, 3, 2, 2), 0.9).dtype == torch.float32
        for _ in range(100):  # equal ones stay equal
            model.update_encoder_k(0.99)
        for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
            assert torch.equal(q, k) and q is not k
            assert q.requires_grad and not k.requires_grad


def move_apart(model: nn.Module, m: float) -> nn.Module:
    """The queries' encoder moves, as in training; a copy of the keys' follows with this momentum."""
    keys = copy.deepcopy(model.encoder_k)
    for q, k in zip(model.encoder_q.parameters(), keys.parameters(), strict=True):
        q.data += 0.1 * torch.randn_like(q)
        k.data = m * k + (1 - m) * q
    return keys


def test_queue_loss_equals_a_dense_computation():
    model = MoCo(tiny(), dim=6, K=8, m=0.9, T=0.3)
    keys = move_apart(model, 0.75)
    im_q, im_k = torch.randn(2, 4, 3, 2, 2)
    queue = model.queue.clone()
    q = model.encoder_q(im_q)
    k = keys(im_k)
    expected = 0.0
    for i in range(4):
        cosines = [F.cosine_similarity(q[i], key, dim=0) for key in (k[i], *queue.T)]
        expected -= (torch.stack(cosines) / 0.3).log_softmax(0)[0] / 4
    torch.testing.assert_close(model(im_q, im_k, 0.75), expected)
    torch.testing.assert_close(model.queue, torch.cat([F.normalize(k, dim=1).T, queue[:, 4:]], dim=1))


def test_v3_loss_equals_a_dense_computation():
    model = MoCoV3(tiny(), dim=6, mlp_dim=7, T=0.3).eval()  # BatchNorm by running statistics, for single images
    encoder_k = move_apart(model, 0.75)
    x1, x2 = torch.randn(2, 4, 3, 2, 2)
    expected = 0.0
    for a, b in ((x1, x2), (x2, x1)):
        for i in range(4):
            cosines = F.cosine_similarity(model.predictor(model.encoder_q(a[i : i + 1])), encoder_k(b))
            expected -= 2 * 0.3 * (cosines / 0.3).log_softmax(0)[i] / 4
    torch.testing.assert_close(model(x1, x2, 0.75), expected)


def test_the_queue_is_first_in_first_out_and_wraps_around():
    model = MoCo(tiny(), dim=2, K=5)
    expected = list(model.queue.T.clone())
    for start in range(0, 18, 3):
        keys = torch.arange(start, start + 3.0)[:, None].expand(3, 2)
        model.dequeue_and_enqueue(keys)
        for i, key in enumerate(keys):
            expected[(start + i) % 5] = key
        torch.testing.assert_close(model.queue, torch.stack(expected, dim=1), rtol=0, atol=0)
        assert int(model.queue_ptr) == (start + 3) % 5


def test_resnets_get_the_published_projectors():
    v2, v3 = (contrast(version, build_backbone("resnet18", 1)).encoder_q for version in (2, 3))
    assert trained(v2.fc).keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert trained(v3.fc).keys() == {"0.weight", "1.weight", "1.bias", "3.weight"}
    assert isinstance(v3.fc[4], nn.BatchNorm1d) and not v3.fc[4].affine
    assert v3(torch.randn(2, 3, 32, 32)).shape == (2, 6)


def test_a_vit_keeps_its_positions_and_patch_embedding():
    """Positions are sines and cosines of column and row; those that are frozen already stay as they are."""
    model = MoCoV3(build_backbone("vit_mini", 1), dim=6, mlp_dim=7)
    position = model.encoder_q.encoder.pos_embedding
    assert position.shape == (1, 17, 192) and (position[0, 0] == 0).all()
    row, column, i = 2, 3, 5
    frequency = 10000 ** (-i / 48)
    expected = [f(x * frequency) for x in (column, row) for f in (math.sin, math.cos)]
    torch.testing.assert_close(position[0, 1 + 4 * row + column, i::48], torch.tensor(expected))
    backbone = build_backbone("vit_mini", 1)
    positions = backbone.encoder.pos_embedding.requires_grad_(False).clone()
    assert torch.equal(MoCoV3(backbone, dim=6, mlp_dim=7).encoder_q.encoder.pos_embedding, positions)
    frozen = dict(model.encoder_q.named_parameters()).keys() - trained(model.encoder_q).keys()
    assert frozen == {"encoder.pos_embedding", "conv_proj.weight", "conv_proj.bias"}
    assert [m.out_features for m in model.encoder_q.heads.modules() if isinstance(m, nn.Linear)] == [7, 7, 6]


def contrast(version: int, backbone: nn.Module) -> MoCo | MoCoV3:
    if version == 3:
        return MoCoV3(backbone, dim=6, mlp_dim=7, T=0.3)
    return MoCo(backbone, dim=6, K=8, T=0.3)


def adapted(version: int, stock: nn.Module, use_qlora: bool = False) -> MoCo | MoCoV3:
    """MoCo over a frozen copy of the stock model, with adapters that differ between queries and keys."""
    model = contrast(version, frozen(copy.deepcopy(stock), use_qlora=use_qlora))
    if not use_qlora:
        model.double()
    return randomize_adapters(model, std=0.05)


def ordinary(version: int, stock: nn.Module, model: nn.Module) -> nn.Module:
    """The ordinary two-encoder MoCo of dense weights, in float64: each encoder has its own W + s B A."""
    twin = contrast(version, copy.deepcopy(stock)).double()
    for side in ("encoder_q", "encoder_k"):
        encoder = getattr(model, side)
        own, head = dense.dense_twin(stock, encoder), head_name(encoder)
        setattr(own, head, copy.deepcopy(getattr(encoder, head)).double())
        for module in own.train().modules():  # the backbone's statistics are frozen, the projector's are not
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        setattr(twin, side, own)
    twin.encoder_k.requires_grad_(False)
    others = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("encoder_")}
    twin.load_state_dict(others, strict=False)  # the predictor, or the queue
    return twin


@pytest.mark.parametrize("build", [resnet, vit], ids=["resnet", "vit"])
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("use_qlora", [False, True], ids=["float64", "4 bits"])
def test_over_one_base_loss_and_gradients_are_those_of_two_dense_encoders(build, version, use_qlora):
    stock = build()
    model = adapted(version, stock, use_qlora).train()
    twin = ordinary(version, dense.rounded(stock, model.encoder_q), model)
    x1, x2 = dense.images(16, 4), dense.images(16, 4)
    dtype = torch.float32 if use_qlora else torch.float64
    loss = model(x1.to(dtype), x2.to(dtype), 1.0)  # m = 1: encoder_k stays as it is
    expected = twin(x1.double(), x2.double(), 1.0)
    loss.backward()
    expected.backward()
    # A ReLU may change its mind for a rounding error of float32.
    tolerance = 200 * FP32 if use_qlora else EXACT
    assert_close(loss, expected, tolerance)
    gradients = list(dense.expected_gradients(twin.encoder_q, model.encoder_q))
    assert len(gradients) > 10
    if version == 3:
        for (name, ours), theirs in zip(trained(model.predictor).items(), twin.predictor.parameters(), strict=True):
            gradients.append((name, ours.grad, theirs.grad))
    else:
        assert_close(model.queue, twin.queue, tolerance)
    for name, gradient, wanted in gradients:
        assert_close(gradient, wanted, tolerance, name)


def test_the_keys_have_adapters_and_a_projector_of_their_own_which_alone_follow():
    model = adapted(2, vit(), use_qlora=True)
    places = []
    for encoder in (model.encoder_q, model.encoder_k):
        places.append({tensor.untyped_storage().data_ptr() for tensor in [*encoder.parameters(), *encoder.buffers()]})
    assert len(places[1] - places[0]) == len(trained(model.encoder_q))
    before = copy.deepcopy(model.state_dict())
    model.update_encoder_k(0.75)
    for name, now in model.state_dict().items():
        old = before[name]
        if name.startswith("encoder_k.") and ("lora_" in name or ".heads." in name):
            torch.testing.assert_close(now, 0.75 * old + 0.25 * before[name.replace("encoder_k", "encoder_q", 1)])
            assert "lora_B" not in name or not torch.equal(now, old)
        else:
            assert torch.equal(now, old), name
