"""lora_fusion.py"""


# ---------------------------------------------------------------------------------------------- folded BatchNorm


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
def test_a_resnet_with_folded_batch_norms_equals_the_stock_model(block, channels_last):
    stock, x = resnet(block).double(), images(dtype=torch.float64)
    model = copy.deepcopy(stock)
    if channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    frozen(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(type(m) is finetune_lora.FoldedBatchNorm2d for m in norms)
    assert [k for k in model.state_dict() if "lora_" not in k] == list(stock.state_dict())
    assert_equals_dense(stock, model, x, EXACT)


def test_a_hook_on_the_stem_s_activation_sees_what_it_always_saw():
    """Pooled first and rectified after, the stem is faster; who listens to one of the two gets the usual order."""
    stock = resnet(Bottleneck).eval()
    model = add_lora_to_model(copy.deepcopy(stock))
    x, seen = images(), {}
    for key, network in (("stock", stock), ("adapted", model)):
        for module in (network.relu, network.maxpool):
            module.register_forward_hook(lambda m, x, y, key=key: seen.setdefault(key, []).append(y))
        network(x)
    assert len(seen["stock"]) == 2
    for ours, expected in zip(seen["adapted"], seen["stock"], strict=True):
        assert_close(ours, expected, FP32)


def grey_stem(model: nn.Module) -> None:
    model.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)


def no_norm(model: nn.Module) -> None:
    model.bn1 = nn.Identity()


def other_norm(model: nn.Module) -> None:
    model.layer1[0].conv2 = nn.Identity()
    model.layer1[0].bn1 = nn.GroupNorm(4, 64)


@pytest.mark.parametrize("change", [grey_stem, no_norm, other_norm, nn.SyncBatchNorm.convert_sync_batchnorm])
def test_modules_may_be_replaced_beside_those_folded_into_them(change):
    """An operation is taken in only for as long as both stand where they were paired."""
    stock, x = resnet().double().eval(), images(dtype=torch.float64)
    model = frozen(copy.deepcopy(stock)).eval()
    for network in (stock, model):
        torch.manual_seed(5)
        change(network)
        network.double()
    assert_close(model(x), dense_twin(stock, model)(x), EXACT)


def test_modules_may_be_removed_beside_those_folded_into_them():
    stock = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    stock[2].running_mean.normal_()
    model = frozen(copy.deepcopy(stock))
    for network in (stock, model):
        del network[0]
    x = images()
    assert_close(model(x), dense_twin(stock, model)(x.double()), FP32)


def test_a_stem_without_pooling_stays_as_it_is():
    stock = resnet(Bottleneck).eval()
    stock.maxpool = nn.Identity()  # as for images of 32 pixels
    x = images()
    assert_close(add_lora_to_model(copy.deepcopy(stock))(x), stock(x), FP32)


def test_folding_in_low_precision():
    """A BatchNorm's scale is no bfloat16."""
    stock = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)).eval()
    stock[1].running_var.uniform_(0.1, 10), stock[1].running_mean.normal_()
    x = torch.randn(2, 8, 9, 9)
    model = frozen(copy.deepcopy(stock))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model(x), dense_twin(stock, model)(x.double()), 1e-2)
    stock.bfloat16()
    model = frozen(copy.deepcopy(stock))
    assert_close(model(x.bfloat16()), dense_twin(stock, model)(x.bfloat16().double()), 1e-2)


def test_a_folded_batch_norm_unfolds_when_it_trains():
    """Unfrozen, it normalises by the batch and counts it, as in the stock model; frozen again, it is folded again."""
    stock, x = resnet().double(), images(count=4, dtype=torch.float64)
    model = frozen(copy.deepcopy(stock))
    assert_equals_dense(stock, model, x, EXACT)
    freeze_backbone_params(model, freeze=False)
    twin = dense_twin(stock, model).train()
    compare_with_dense(stock.train(), model.train(), [x], EXACT)
    twin(x)
    for name, buffer in twin.named_buffers():
        assert_close(model.get_buffer(name), buffer, EXACT, name)
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    freeze_backbone_params(model)
    assert_equals_dense(stock, model, x, EXACT)


def test_a_trained_batch_norm_in_evaluation_mode_gets_its_gradients():
    stock, x = resnet().double().eval(), images(dtype=torch.float64)
    model = frozen(copy.deepcopy(stock)).eval()
    for name, parameter in model.named_parameters():
        if "bn1" in name:
            parameter.requires_grad_()
    compare_with_dense(stock, model, [x], EXACT)


def test_a_convolution_s_bias_trains_through_a_folded_batch_norm():
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    stock[1].running_mean.normal_(), stock[1].running_var.uniform_(0.5, 2)
    model = frozen(copy.deepcopy(stock))
    model[0].bias.requires_grad_()
    compare_with_dense(stock, model, [images(8)], FP32)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": None}])
def test_batch_norms_of_every_kind_stay_exact(options):
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options)).eval()
    if stock[1].running_mean is not None:
        stock[1].running_mean.normal_(), stock[1].running_var.uniform_(0.5, 2)
    assert_equals_dense(stock, frozen(copy.deepcopy(stock)), images(8), FP32)


class PreActivation(BasicBlock):
    """conv1 is followed by bn2, and conv2 by nothing."""

    def forward(self, x):
        return x + self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))


def unfoldable():
    relu, norm, conv = nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
    yield "something between", nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    yield "something between that is used before", nn.Sequential(relu, nn.Conv2d(4, 4, 3), relu, nn.BatchNorm2d(4))
    yield "a shared BatchNorm", nn.Sequential(nn.Conv2d(4, 4, 3), norm, nn.Conv2d(4, 4, 3), norm)
    yield "a shared convolution", nn.Sequential(conv, nn.BatchNorm2d(4), conv)
    yield "a BatchNorm before", nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    yield "a forward of its own", PreActivation(4, 4)


@pytest.mark.parametrize("case", list(unfoldable()), ids=lambda case: case[0])
def test_a_batch_norm_that_does_not_follow_one_convolution_is_not_folded(case):
    stock = copy.deepcopy(case[1]).eval()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    assert_equals_dense(stock, frozen(copy.deepcopy(stock)), torch.randn(2, 4, 9, 9), FP32)


def test_a_batch_norm_behind_a_convolution_without_adapter_is_not_folded():
    stock = resnet().double().eval()
    model = frozen(copy.deepcopy(stock), target_modules="conv2")
    folded = {n for n, m in model.named_modules() if isinstance(m, finetune_lora.FoldedBatchNorm2d)}
    assert folded == {f"layer{i}.0.bn2" for i in (1, 2, 3, 4)}
    assert_equals_dense(stock, model, images(dtype=torch.float64), EXACT)


def test_a_folded_batch_norm_stays_exact_when_adapters_are_merged_or_off():
    stock, x = resnet().double().eval(), images(dtype=torch.float64)
    model = frozen(copy.deepcopy(stock)).train()
    manager, expected = LoRAManager(model), dense_twin(stock, model)(x)
    with manager.disable_lora():
        assert_close(model(x), stock(x), EXACT)
    manager.merge_lora_weights()
    assert_close(model(x), expected, EXACT)
    with manager.disable_lora():
        assert_close(model(x), stock(x), EXACT)
    manager.unmerge_lora_weights()
    assert_close(model(x), expected, EXACT)
    assert_close(copy.deepcopy(model)(x), expected, EXACT)


def test_folding_with_dropout_keeps_its_meaning():
    """The BatchNorm is linear in eval mode: g (W x + s B A dropout(x)) + shift."""
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    stock[1].running_mean.normal_(), stock[1].running_var.uniform_(0.5, 2)
    x = images(8)
    model = frozen(copy.deepcopy(stock), lora_dropout=0.4).train()
    torch.manual_seed(7)
    y = model(x)
    torch.manual_seed(7)
    _, _, A, B = next(adapters(model[0]))
    delta = model[0].scaling * (B @ A).view_as(stock[0].weight)
    assert_close(y, stock[1](stock[0](x) + F.conv2d(F.dropout(x, 0.4), delta)), FP32)


# ------------------------------------------------------------------------------------------ gradient checkpointing


def loss_and_gradients(model: nn.Module, x: torch.Tensor, seed: int = 7):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = F.cross_entropy(model(x), torch.arange(len(x)) % 5)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """What a forward keeps for backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("four_bits", [False, True], ids=["float", "4 bits"])
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["", "dropout"])
def test_checkpointing_a_vit_changes_memory_and_nothing_else(mode, four_bits, dropout):
    """With dropout the same values are dropped the second time; attention's and the MLP's own included."""
    model = vit(dropout=dropout, attention_dropout=dropout)
    add_lora_to_model(model, r=2, use_qlora=four_bits, lora_dropout=dropout)
    freeze_backbone_params(randomize_adapters(model))
    model.train()
    x, keys = images(16, 8), list(model.state_dict())
    expected, before = loss_and_gradients(model, x), saved_bytes(model, x)
    set_gradient_checkpointing(model, mode)
    loss, gradients = loss_and_gradients(model, x)
    assert list(model.state_dict()) == keys
    assert torch.equal(loss, expected[0])
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[1][name], 1e-6, name)
    if not dropout:  # which keeps the LayerNorm's and GELU's output; without, LayerNorm's is kept in no mode
        assert saved_bytes(model, x) < {"selective": 0.85, "full": 0.5}[mode] * before
    set_gradient_checkpointing(model, "none")
    assert saved_bytes(model, x) == before
    assert torch.equal(loss_and_gradients(model, x)[0], expected[0])


def test_selective_checkpointing_equals_the_dense_stock_model():
    stock, x = vit().double(), images(16, dtype=torch.float64)
    model = frozen(copy.deepcopy(stock))
    set_gradient_checkpointing(model, "selective")
    assert_equals_dense(stock, model, x, EXACT)
    freeze_backbone_params(model, freeze=False)  # a LayerNorm that trains gets its gradients
    compare_with_dense(stock, model.train(), [x], EXACT)
    manager, expected = LoRAManager(model), dense_twin(stock, model)(x)
    freeze_backbone_params(model)
    with manager.disable_lora():
        assert_close(model(x), stock(x), EXACT)
    manager.merge_lora_weights()
    assert_close(model(x), expected, EXACT)


def test_selective_checkpointing_under_autocast():
    model, x = frozen(vit()), images(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, x)
        set_gradient_checkpointing(model, "selective")
        again, others = loss_and_gradients(model, x)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, 1e-6, name)


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "all trains"])
def test_checkpointing_a_resnet(freeze):
    """A BatchNorm that trains counts a batch once, though it is computed twice."""
    stock = add_lora_to_model(resnet(), r=2)
    randomize_adapters(stock, std=0.05)
    results, x = [], images(count=4)
    for mode in ("none", "full"):
        model = copy.deepcopy(stock)
        freeze_backbone_params(model, freeze)
        set_gradient_checkpointing(model.train(), mode)
        results.append((*loss_and_gradients(model, x), dict(model.named_buffers())))
    (loss, gradients, buffers), (again, others, counted) = results
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, 1e-5, name)
    for name, buffer in buffers.items():
        assert torch.equal(buffer, counted[name]), name


def test_checkpointing_pytorch_s_encoder_layer():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    freeze_backbone_params(randomize_adapters(add_lora_to_model(model)))
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def run():
        torch.manual_seed(7)
        return model(x, src_key_padding_mask=mask)

    expected = torch.autograd.grad(run().square().sum(), [p for p in model.parameters() if p.requires_grad])
    set_gradient_checkpointing(model, "full")
    actual = torch.autograd.grad(run().square().sum(), [p for p in model.parameters() if p.requires_grad])
    for gradient, wanted in zip(actual, expected, strict=True):
        assert_close(gradient, wanted, 1e-6)


def test_checkpointing_where_there_is_nothing_to_recompute():
    with pytest.raises(InputError, match="selective finds nothing to recompute"):
        set_gradient_checkpointing(add_lora_to_model(resnet()), "selective")
    with pytest.raises(InputError, match="full finds nothing to recompute"):
        set_gradient_checkpointing(nn.Linear(2, 2), "full")
    with pytest.raises(InputError, match="'some' is unknown"):
        set_gradient_checkpointing(vit(), "some")


def test_new_adapters_in_a_checkpointed_model_stay_exact():
    for mode in ("selective", "full"):
        for four_bits in (False, True):
            model, x = frozen(vit(), use_qlora=four_bits), images(16)
            set_gradient_checkpointing(model, mode)
            frozen(model, use_qlora=four_bits)
            expected = loss_and_gradients(model, x)[1]
            set_gradient_checkpointing(model, "none")
            for name, gradient in loss_and_gradients(model, x)[1].items():
                assert_close(expected[name], gradient, 1e-6, name)


def test_encoder_blocks_with_a_forward_of_their_own_are_left_alone():
    """One may use the LayerNorm's output twice."""

    class Own(EncoderBlock):
        def forward(self, input):
            x = self.ln_1(input)
            return x + self.self_attention(x, x, x, need_weights=False)[0]

    model = frozen(nn.Sequential(Own(2, 16, 32, 0.0, 0.0)))
    with pytest.raises(InputError, match="finds nothing to recompute"):
        set_gradient_checkpointing(model, "selective")
