"""Heat maps of what decides an answer: Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import center_crop

from toolkit import InputError, devices, temporarily
from toolkit.answers.evaluation import eval_mode
from toolkit.images.bands import Bands
from toolkit.images.transforms import View
from toolkit.models import backbones, dense


def grad_cam(model: nn.Module, images: Tensor, of: int | None = None) -> tuple[Tensor, Tensor]:
    """What speaks for an output of each image, (N, S, S) from 0 to 1, and the outputs (N, K, ...), on the CPU.

    The output is that with the number `of`; None: the highest of each image. Of a model with a class for every pixel
    it is the sum over the pixels whose answer that class is, or over all if none is (arXiv 2002.11434, equation 2).

    A heat map is ``relu(sum_k a_k F_k)``, with F the features of the last block, of a ViT the tokens that it receives,
    and a_k the mean of the output's gradient to F_k over all places (equations 1 and 2). The images (N, C, S, S) are
    normalised, on the model's device. Raises InputError if the model has no blocks.
    """
    blocks = backbones.block_names(model)
    if not blocks:
        raise InputError(f"a {type(model).__name__} has no blocks whose features could be looked at")
    kept: list[Tensor] = []

    def keep(_block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(output if output.dim() == 4 else inputs[0])

    checkpointed = filter(lambda module: hasattr(module, "grad_checkpointing"), model.modules())  # skips hooks
    hook = model.get_submodule(blocks[-1]).register_forward_hook(keep)
    with hook, temporarily(checkpointed, grad_checkpointing=False), eval_mode(model), torch.enable_grad():
        outputs = model(images.clone().requires_grad_())
        scores = outputs.amax(1) if of is None else outputs[:, of]
        if of is not None and scores.dim() > 1:
            answered = (outputs.argmax(1) == of).float()
            scores = scores * (answered + 1 - answered.amax((1, 2), keepdim=True))
        [gradient] = torch.autograd.grad(scores.sum(), kept[-1:])  # a block may be called several times
    features = _in_places(kept[-1].detach().float())
    shares = _in_places(gradient.float()).mean((2, 3), keepdim=True)
    heat = dense.enlarged((features * shares).sum(1, keepdim=True).relu(), images.shape[2:])[:, 0]
    heat = heat - heat.amin((1, 2), keepdim=True)
    heat = heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-12)
    return heat.cpu(), outputs.detach().float().cpu()


def _in_places(features: Tensor) -> Tensor:
    """Maps (N, D, h, h), maps with D at the end, or tokens (N, 1 + h h, D), as (N, D, h, h)."""
    if features.dim() == 4:
        return features if features.shape[2] == features.shape[3] else features.movedim(3, 1)
    side = int(features.shape[1] ** 0.5)
    return features[:, -side * side :].movedim(2, 1).unflatten(2, (side, side))  # class and register tokens come first


@dataclass
class Explainer:
    """Pictures of what a model sees of images, bright where most speaks for its answer."""

    model: nn.Module
    view: View  # from an image as `LabelledImages.undecoded` gives it to (C, S, S), normalised
    device: torch.device
    dtype: torch.dtype
    mean: Sequence[float]
    std: Sequence[float]
    bands: Bands | None = None  # of images that are no RGB photographs
    window: int | None = None  # of which only the middle is seen, in pixels

    def explain(self, image: Image.Image | np.ndarray, of: int | None = None) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """What the model sees, in grey under a heat map too, both (S, S, 3), 0 to 1; and its outputs (1, K, ...)."""
        import matplotlib

        normalised = self.view(image)
        if self.window is not None:
            normalised = center_crop(normalised, [self.window])
        with devices.autocast(self.device, self.dtype):
            heat, outputs = grad_cam(self.model, devices.to_device(normalised[None], self.device), of)
        mean, std = torch.tensor([self.mean, self.std])[..., None, None]
        picture = (normalised * std + mean).clamp(0, 1).movedim(0, 2).numpy()
        if self.bands is not None:
            picture = self.bands.picture(normalised)
        colours = matplotlib.colormaps["inferno"](heat[0].numpy())[..., :3]
        return picture, (picture.mean(2, keepdims=True) + colours) / 2, outputs
