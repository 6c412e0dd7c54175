"""Adapters of which some follow, on one base: switched, saved, loaded, merged, removed and copied in any order.

In float64, against a dense oracle: stock layers with ``W + s B A`` and each BatchNorm with the statistics that the
formulas of `lora.followed_norms` give.
"""

import copy
import random

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from finetune_lora import add_lora_to_model, freeze_backbone_params
from lora.adapted import adapted_layers
from lora.followed_norms import FollowedNorm, follow_statistics, followers
from lora_utils import LoRAManager, base_digests


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        shortcut = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
        self.blocks = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 6, 2, shortcut))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def stock() -> Net:
    torch.manual_seed(0)
    model = Net().double()
    for _ in range(5):
        model(torch.randn(8, 3, 8, 8, dtype=torch.float64) + 0.3)
    return model.eval()


def dense(model: nn.Module) -> nn.Module:
    """The adapter in use as a stock model of its own."""
    oracle = stock()
    for name, layer in adapted_layers(model).items():
        update = layer.scaling * layer.lora_B @ layer.lora_A
        oracle.get_submodule(name).weight.data += update.detach().view_as(layer.base())
    names = {module: name for name, module in model.named_modules()}
    for conv in followers(model):
        norm = oracle.get_submodule(names[conv.followed.norm])
        mean, variance = conv.followed.mean, conv.followed.variance
        if isinstance(conv.followed, FollowedNorm):
            h, W = conv.followed.inputs, conv.base().flatten(1)
            K = W + conv.scaling * conv.lora_B @ conv.lora_A
            v = [(h @ kernel.T).square().sum(0) + 0.01 * norm.running_var for kernel in (W, K)]
            mean = norm.running_mean + (K - W) @ conv.followed.centre
            variance = norm.running_var * v[1] / v[0]
        norm.running_mean, norm.running_var = mean.detach(), variance.detach()
    oracle.fc.load_state_dict({key: model.fc.state_dict()[key] for key in ("weight", "bias")})
    return oracle.requires_grad_(False)


def randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or name.startswith("fc")):
            nn.init.normal_(parameter, std=0.3)


def adapted(follows: bool, x: torch.Tensor) -> nn.Module:
    model = add_lora_to_model(stock(), r=2)
    freeze_backbone_params(model)
    if follows:
        follow_statistics(model, [x], required=True)
    randomize(model)
    return model


class Adapters:
    """A model with adapters, and the dense oracle of each, by name; None: the base."""

    def __init__(self, x: torch.Tensor, follows: bool, path):
        self.x, self.path = x, path
        self.manager = LoRAManager(adapted(follows, x))
        self.start = base_digests(stock())
        self.oracles = {"default": dense(self.manager.model)}
        other = adapted(not follows, x)
        LoRAManager(other).save_lora_checkpoint(path)
        self.manager.load_lora_checkpoint(path, name="other")
        self.oracles["other"] = dense(other)
        self.used = "default"

    def check(self) -> None:
        model = self.manager.model
        assert base_digests(model) == self.start
        if self.used is not None:
            oracle = self.oracles[self.used]
            for mode in (True, False):
                torch.testing.assert_close(model.train(mode)(self.x), oracle(self.x))
                with torch.no_grad():
                    torch.testing.assert_close(model(self.x), oracle(self.x))
            with self.manager.disable_lora():
                base = stock()
                base.fc = oracle.fc
                torch.testing.assert_close(model(self.x), base(self.x))

    def switch(self) -> None:
        self.used = random.choice([*self.manager.names, None])
        self.manager.use(self.used)

    def train(self) -> None:
        if self.used is not None:
            randomize(self.manager.model)
            self.oracles[self.used] = dense(self.manager.model)

    def save_and_load(self) -> None:
        if self.used is None:
            return
        self.manager.save_lora_checkpoint(self.path)
        name = f"copy {len(self.oracles)}"
        if random.random() < 0.5:
            randomize(self.manager.model)
            self.manager.load_lora_checkpoint(self.path)
        else:
            self.manager.load_lora_checkpoint(self.path, name=name)
            self.oracles[name] = self.oracles[self.used]

    def merge(self) -> None:
        if self.used is None:
            return
        self.manager.merge_lora_weights()
        self.check()
        merged = stock()
        merged.load_state_dict(self.manager.model.state_dict())
        torch.testing.assert_close(merged(self.x), self.oracles[self.used](self.x))
        alone = copy.deepcopy(self.manager.model)
        torch.testing.assert_close(LoRAManager(alone).unload(merge=True)(self.x), merged(self.x))
        self.manager.unmerge_lora_weights()

    def copy(self) -> None:
        torch.save(self.manager.model, self.path)
        model = copy.deepcopy(self.manager.model)
        self.manager = LoRAManager(random.choice([model, torch.load(self.path, weights_only=False)]))

    def remove(self) -> None:
        if len(self.manager.names) > 2:
            name = random.choice(self.manager.names)
            self.manager.remove(name)
            if name == self.used:
                self.used = None

    def unload(self) -> None:
        alone = LoRAManager(copy.deepcopy(self.manager.model)).unload()
        expected = stock().state_dict()
        for name, tensor in alone.state_dict().items():
            assert name.startswith("fc") or torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_what_can_be_done_leaves_each_adapter_and_the_base_as_they_are(seed, tmp_path):
    random.seed(seed)
    torch.manual_seed(seed)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    adapters = Adapters(x, follows=seed % 2 == 0, path=tmp_path / "adapter.pth")
    steps = [Adapters.switch, Adapters.train, Adapters.save_and_load, Adapters.merge, Adapters.copy]
    steps += [Adapters.switch, Adapters.remove, Adapters.unload]
    for _ in range(25):
        random.choice(steps)(adapters)
        adapters.check()
