"""Weights in 8 bits: equal to the same arithmetic written out in float64. tests/test_layers.py has them in layers."""

import copy

import pytest
import torch
from dense import BF16, assert_close, count_operations, frozen, images, relative_error, resnet, vit
from torch import Tensor, nn

import deploy_lora
import finetune_lora
from finetune_lora import add_lora_to_model, check_8_bits, multiply_in_8_bits
from lora import int8
from lora.adapted import LoRASettings
from lora_utils import LoRAManager
from toolkit import InputError, choices, devices

IN_8_BITS = 2e-2  # what rounding x and W, or gy and W, by rows may cost a layer of normal numbers
ROUNDING = 1e-5  # float32's
exact_products = pytest.mark.skipif(not int8.multiplies_exactly("cpu", 64, 64), reason="needs VNNI or AMX")


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of each row, as float32 computes them, in float64."""
    largest = x.float().abs().amax(1, keepdim=True).clamp_min(1e-30)
    return (x.float() * (int8.LARGEST / largest)).round().double(), (largest / int8.LARGEST).double()


@exact_products
def test_a_layer_multiplies_in_8_bits_with_its_adapter_and_without():
    """Also so many rows that floats would be merged."""
    layer = finetune_lora.LoRALinear.adapt(nn.Linear(8, 8), LoRASettings(2), torch.int8)
    for layer.lora_enabled in (True, False):
        assert count_operations(lambda: layer(torch.randn(100, 8)), "_int_mm") == 1


@exact_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows, width, out", [(600, 768, 64), (1, 7, 5), (3, 1, 5), (0, 8, 4)])
def test_a_product_is_that_of_the_rounded_rows(rows, width, out, dtype, monkeypatch):
    """To the rounding of its dtype: the sums are integers. In blocks of rows that do not divide their number."""
    monkeypatch.setattr(int8, "ROUNDED_AT_ONCE", 1000)
    monkeypatch.setattr(int8, "MULTIPLIED_AT_ONCE", 1000)
    x = torch.randn(rows, width, dtype=dtype)
    gy = torch.randn(rows, out, dtype=dtype)
    bias = torch.randn(out, dtype=dtype)
    W = torch.randn(out, width)
    weight = int8.Int8Weight.quantize(W)
    W_codes, d = rounded_rows(W)
    assert_close(weight.dense(torch.float32), W_codes * d, ROUNDING)
    codes, scale = rounded_rows(x)
    y = codes @ W_codes.T * scale * d.T
    codes, scale = rounded_rows(gy * d.T.float())
    products = [(weight.times(x), y), (weight.times(x, bias), y + bias), (weight.back(gy), codes @ W_codes * scale)]
    for product, expected in products:
        assert product.dtype == dtype
        assert_close(product, expected, BF16 if dtype == torch.bfloat16 else ROUNDING)


@exact_products
def test_sums_are_as_exact_as_float32_and_rows_of_zeros_or_not_finite_stay_apart():
    """Kept in bf16, which has 32259 as 32256, nothing would be left of what is small beside them. Zeros give the bias
    exactly. What diverges must show, and only in its own row."""
    x = torch.tensor([[127, 127, 1]], dtype=torch.bfloat16)
    assert int8._multiplied(x, None, x.T.to(torch.int8), None, torch.tensor([-32258.0])).item() == 1
    x = torch.randn(4, 8)
    x[0], x[1, 3], x[2, 3] = 0, torch.nan, torch.inf
    weight = int8.Int8Weight.quantize(torch.randn(16, 8))
    bias = torch.randn(16)
    y = weight.times(x, bias)
    assert torch.equal(y[0], bias) and torch.equal(y[3:], weight.times(x[3:], bias))
    assert not y[1:3].isfinite().any()
    assert int8.quantize_rows(torch.zeros(1, 8))[1].item() > 0  # else their codes would be 0 times infinity


def test_layers_below_the_last_blocks_are_in_8_bits_too_and_convolutions_and_other_dtypes_never():
    model = frozen(vit(), base_dtype=torch.int8, adapt_last=1, target_modules="mlp")
    stored = [name for name, layer in model.named_modules() if getattr(layer, "base_bits", 32) == 8]
    assert len(stored) == 4 + 2  # in the first block attention with its projection, and the MLP; in the last the MLP
    assert LoRAManager(model).get_lora_info()["num_layers"] == 2
    both = add_lora_to_model(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4)), r=2, base_dtype=torch.int8)
    assert [layer.base_bits for layer in both] == [32, 8]
    with pytest.raises(InputError, match="8 bits are for linear layers and attention"):
        add_lora_to_model(nn.Sequential(nn.Conv2d(4, 4, 3)), r=2, base_dtype=torch.int8)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(InputError, match=r"0 is in torch\.\w+, 8 bits are made of float32"):
            add_lora_to_model(nn.Sequential(nn.Linear(4, 4)).to(dtype), r=2, base_dtype=torch.int8)


@pytest.mark.slow
def test_it_is_exported_for_batches_of_any_size():
    """And compiled into one graph. Both compute what the model does."""
    model = frozen(vit(hidden_dim=64), base_dtype=torch.int8).eval()
    x = images(16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    for batch in (x, images(16, 5), images(16, 40)):
        assert_close(program(batch), model(batch), 1e-3)
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x), 1e-3)


@pytest.mark.parametrize("run", [finetune_lora, deploy_lora], ids=["finetune", "deploy"])
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_8_bits_are_for_the_cpu(run, device, monkeypatch):
    monkeypatch.setattr(devices, "select_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    command = [] if run is finetune_lora else ["predict", "lora.pth", "images", "--output", "p.csv"]
    with pytest.raises(InputError, match=f"--arithmetic int8 is for CPUs, not {device}: add --device cpu"):
        run.main([*command, "--arithmetic", "int8", "--device", device])


TRAINED = {
    "float": {},
    "8 bits": {"base_dtype": torch.int8},
    "4 bits": {"use_qlora": True, "adapt_last": 1},
    "upper blocks": {"adapt_last": 1},
    "everything": None,
}


@exact_products
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("trained", TRAINED)
def test_a_trained_model_answers_in_8_bits(trained, autocast):
    """All layers but the head and the patch embedding, near the dense model in float64."""
    model = vit(hidden_dim=128, mlp_dim=256, image_size=32).eval()
    if TRAINED[trained] is not None:
        frozen(model, **TRAINED[trained])
    x = images(32, 8)
    dense = LoRAManager(copy.deepcopy(model)).unload(merge=True).double()
    multiply_in_8_bits(model)
    kept = {name for name, p in model.named_parameters() if p.dim() > 1 and p.dtype == torch.float32 and p.numel()}
    assert kept == {"class_token", "encoder.pos_embedding", "conv_proj.weight", "heads.head.weight"}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert 1e-4 < relative_error(model(x), dense(x.double())) < 5e-2


def test_a_model_of_convolutions_or_of_too_large_layers_is_refused_before_its_adapters_are_merged(monkeypatch):
    model = add_lora_to_model(resnet(), r=2)
    with pytest.raises(InputError, match=r"8 bits are for linear layers and attention.*use --arithmetic float"):
        multiply_in_8_bits(model)
    assert model.layer1[0].conv1.r == 2
    monkeypatch.setattr(int8, "multiplies_exactly", lambda device, *shape: (device, *shape) != ("cpu", 64, 16))
    check_8_bits(vit(mlp_dim=32))
    with pytest.raises(InputError, match="8 bits overflow on this CPU"):
        check_8_bits(vit(mlp_dim=64))


@exact_products
def test_a_probe_reads_features_in_8_bits(finetune, images):
    """`--lora-rank 0`: so does what evaluates its file, which is that of a float base."""
    results = finetune("--epochs 1 --batch-size 32 --lora-rank 0 --arithmetic int8")
    losses = {}
    for kind in choices.ARITHMETICS:
        words = f"evaluate {results['folder']}/lora.pth {images}/val --device cpu --arithmetic {kind}"
        losses[kind] = deploy_lora.main(words.split())["loss"]
    assert losses["int8"] == pytest.approx(results["val_loss"], rel=5e-5)
    assert losses["float"] != pytest.approx(results["val_loss"], rel=1e-4)
    assert losses["float"] == pytest.approx(results["val_loss"], rel=0.05)
