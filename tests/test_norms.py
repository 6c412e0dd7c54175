"""BatchNorm over two processes against PyTorch's own over all images in one."""

import copy
from pathlib import Path

import pytest
import torch
from children import together
from torch import nn

from moco import pretrain
from toolkit import InputError, distributed
from toolkit.models.norms import Freezable, SharedStatistics, freeze_statistics, share_statistics, stock_norm

SHARES = (5, 3)  # of eight images
KINDS = {
    "2d": (lambda: nn.BatchNorm2d(4, eps=0.1), (8, 4, 3, 5)),
    "2d, mean over all batches": (lambda: nn.BatchNorm2d(4, momentum=None), (8, 4, 3, 5)),
    "1d without weight": (lambda: nn.BatchNorm1d(6, affine=False), (8, 6)),
    "3d": (lambda: nn.BatchNorm3d(2), (8, 2, 2, 3, 2)),
}


def problem(kind: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A norm, images far from standardised, and what weighs each output in the loss."""
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    norm = make()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, weights = 3 * torch.randn(shape) + 7, torch.randn(shape)
    return norm.to(dtype), x.to(dtype), weights.to(dtype)


def answers(norm: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, gradients and buffers of two training steps' passes, and the output in eval mode."""
    x.requires_grad_()
    for _ in range(2):
        y = norm(x)
    (y * weights).sum().backward()
    found = {"y": y.detach(), "gx": x.grad, **dict(norm.named_buffers())}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in norm.named_parameters()}
    return found | {"y in eval mode": norm.eval()(x).detach()}


def answer_all() -> None:
    """In each of two processes: the answers for its share of the images, into a file."""

    def main(argv):
        distributed.join(torch.device("cpu"))
        rank = distributed.rank()
        own = slice(0, SHARES[0]) if rank == 0 else slice(SHARES[0], None)
        found = {}
        for dtype in (torch.float64, torch.bfloat16):
            for kind in KINDS:
                norm, x, weights = problem(kind, dtype)
                if dtype == torch.bfloat16:
                    norm.float()  # as under autocast
                share_statistics(norm)
                found[kind, dtype] = answers(norm, x[own], weights[own])
        torch.save(found, Path(argv[0]) / f"{rank}.pth")

    pretrain.main = main


def test_two_processes_normalise_as_one(tmp_path):
    children = together("moco.pretrain", str(tmp_path), tmp_path / "log", before=answer_all)
    assert [child.wait(120) for child in children] == [0, 0], [child.output for child in children]
    parts = [torch.load(tmp_path / f"{rank}.pth", weights_only=False) for rank in (0, 1)]
    for kind, dtype in parts[0]:
        norm, x, weights = problem(kind, dtype)
        expected = answers(norm.double(), x.double(), weights.double())
        close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
        first, second = (part[kind, dtype] for part in parts)
        for name, whole in expected.items():
            together_ = torch.cat([first[name], second[name]]) if name in ("y", "gx", "y in eval mode") else first[name]
            if name.startswith("gradient"):
                together_ = first[name] + second[name]
            torch.testing.assert_close(together_.to(whole.dtype), whole, **close, msg=f"{kind}, {dtype}: {name}")


def test_frozen_norms_and_a_single_process_are_left_alone(monkeypatch):
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.LayerNorm(2))
    freeze_statistics(model[0], freeze=True, training=True)
    before = [type(module) for module in model]
    share_statistics(model)
    assert [type(module) for module in model] == before
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    share_statistics(model)
    assert [type(module) is kind for module, kind in zip(model, before, strict=True)] == [True, False, True]
    assert isinstance(model[1], nn.BatchNorm2d)


@pytest.mark.parametrize("freezable", [False, True])
def test_copies_and_files_of_a_model_share_too(monkeypatch, freezable, tmp_path):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    model = nn.Sequential(nn.BatchNorm2d(2))
    if freezable:
        freeze_statistics(model[0], freeze=False, training=True)
    share_statistics(model)
    torch.save(model, tmp_path / "model.pth")
    for again in (copy.deepcopy(model), torch.load(tmp_path / "model.pth", weights_only=False)):
        assert type(again[0]) is type(model[0]) and isinstance(again[0], SharedStatistics)
        assert isinstance(again[0], Freezable) == freezable
        share_statistics(again)
        assert type(again[0]) is type(model[0])
    assert stock_norm(model[0]) is nn.BatchNorm2d


def test_a_norm_that_computes_more_is_refused(monkeypatch):
    class NormAndReLU(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(InputError, match=r"NormAndReLU cannot take statistics.*train in one"):
        share_statistics(nn.Sequential(NormAndReLU(2)))
