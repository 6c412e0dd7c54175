"""The guide's snippets, as they stand there, on models as they come from torchvision."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet18
from torchvision.models.vision_transformer import VisionTransformer

from finetune_lora import LoRAConv2d, LoRALinear, add_lora_to_model, freeze_backbone_params
from lora_utils import LoRAManager

images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)


def build(arch: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if arch == "resnet18":
        return resnet18(num_classes=4)
    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=4)
    # torchvision starts the head as zero. Below a head that is not trained either, no adapter would get a gradient.
    torch.nn.init.normal_(model.heads.head.weight)
    return model


def base_of(model) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if "lora" not in name}


@pytest.mark.parametrize("arch", ["resnet18", "vit"])
def test_train_save_load_merge_deploy(arch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, base = build(arch), build(arch)

    model = add_lora_to_model(model, r=8, lora_alpha=16)
    freeze_backbone_params(model, freeze=True)
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if "lora" in name], lr=1e-4)

    before = base_of(model)
    assert before.keys() == base.state_dict().keys()
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert all(torch.equal(t, before[name]) for name, t in base_of(model).items())
    assert any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    expected = model.eval()(images)

    manager = LoRAManager(model)
    manager.save_lora_checkpoint("lora.pth")
    other = add_lora_to_model(base, r=8, lora_alpha=16).eval()
    manager = LoRAManager(other)
    manager.load_lora_checkpoint("lora.pth")
    # One of the two has its BatchNorms folded, which rounds differently.
    assert torch.allclose(other(images), expected, atol=1e-5)

    manager.merge_lora_weights()
    torch.save(other.state_dict(), "merged.pth")

    deployed = build(arch)  # plain torchvision: nothing of this toolkit is in it
    deployed.load_state_dict(torch.load("merged.pth", weights_only=True))
    assert not any(isinstance(m, LoRALinear | LoRAConv2d) for m in deployed.modules())
    assert torch.allclose(deployed.eval()(images), expected, atol=1e-5)
