"""The modules are their torch.nn namesakes in everything but the kernel."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import normext

pytestmark = pytest.mark.python
PAIRS = [(normext.LayerNorm, nn.LayerNorm), (normext.RMSNorm, nn.RMSNorm)]
ARGUMENTS = [
    ((8,), {}),
    ((8, 1e-3), {}),
    (([2, 4],), {"elementwise_affine": False}),
    ((torch.Size([8]),), {"eps": 1e-6, "dtype": torch.float64}),
]


@pytest.mark.parametrize("ours, theirs", PAIRS)
@pytest.mark.parametrize("args, kwargs", ARGUMENTS)
def test_same_construction_repr_and_state(ours, theirs, args, kwargs):
    a, b = ours(*args, **kwargs), theirs(*args, **kwargs)
    assert isinstance(a, theirs)
    assert repr(a) == repr(b)
    assert a.eps == b.eps and a.normalized_shape == b.normalized_shape and a.elementwise_affine == b.elementwise_affine
    assert list(a.state_dict()) == list(b.state_dict()) and a.state_dict()._metadata == b.state_dict()._metadata
    assert all(one.equal(other) for one, other in zip(a.parameters(), b.parameters(), strict=True))
    assert set(vars(b)) <= set(vars(a))


def test_layer_norm_without_bias():
    module = normext.LayerNorm(8, bias=False)
    assert module.bias is None and list(module.state_dict()) == ["weight"]
    x = torch.randn(3, 8)
    torch.testing.assert_close(module(x), nn.LayerNorm(8, bias=False)(x))


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_state_dicts_are_interchangeable(ours, theirs, device):
    a, b = ours(8, device=device), theirs(8, device=device)
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.normal_()
    a.load_state_dict(b.state_dict(), strict=True)
    theirs(8, device=device).load_state_dict(a.state_dict(), strict=True)
    x = torch.randn(5, 8, device=device)
    torch.testing.assert_close(a(x), b(x))


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_copies_and_pickles(ours, theirs, device):
    module = ours(8, device=device)
    with torch.no_grad():
        module.weight.normal_()
    x = torch.randn(5, 8, device=device)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert type(twin) is ours and twin(x).equal(module(x))
    assert copy.deepcopy(module).weight is not module.weight


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_to_dtype_and_mixed_parameters(ours, theirs, device):
    """half() converts parameters; float32 parameters with 16-bit activations are served as well."""
    x = torch.randn(5, 8, device=device)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        a = ours(8).to(device, dtype)
        assert a(x.to(dtype)).dtype == dtype
    a, b = ours(8, device=device), theirs(8, device=device)
    expected = b.cpu()(x.cpu().bfloat16()) if ours is normext.LayerNorm else a(x).bfloat16()  # torch mixes on the CPU only
    torch.testing.assert_close(a(x.bfloat16()), expected.to(device))


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_training_matches_torch(ours, theirs, device):
    """A few optimizer steps from the same start stay together."""
    losses = []
    for kind in (ours, theirs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), kind(32), nn.Linear(32, 4)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        x, y = torch.randn(64, 16, device=device), torch.randn(64, 4, device=device)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[1]


def test_modules_inside_a_transformer(device):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, device=device)
    x = torch.randn(2, 5, 16, device=device)
    expected = layer(x)
    for name in ("norm1", "norm2"):
        ours = normext.LayerNorm(16, device=device)
        ours.load_state_dict(getattr(layer, name).state_dict())
        setattr(layer, name, ours)
    torch.testing.assert_close(layer(x), expected)


def test_hooks_run(device):
    module, calls = normext.LayerNorm(8, device=device), []
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    module(torch.randn(3, 8, device=device, requires_grad=True)).sum().backward()
    assert calls == ["before", "after", "backward"]


def test_parametrized_and_pruned_weights(device):
    from torch.nn.utils import parametrize, prune

    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    x = torch.randn(3, 8, device=device)
    module = normext.RMSNorm(8, device=device)
    parametrize.register_parametrization(module, "weight", Double())
    torch.testing.assert_close(module(x), 2 * normext.RMSNorm(8, device=device)(x))
    pruned = prune.random_unstructured(normext.LayerNorm(8, device=device), "weight", 0.5)
    assert (pruned(x) == 0).sum() == 12


def test_public_names():
    """What README promises at top level is there, documented, and nothing else is exported by accident."""
    public = {"LayerNorm", "RMSNorm", "add_layer_norm", "add_rms_norm", "fused_add_rms_norm_", "layer_norm", "rms_norm"}
    assert public <= set(normext.__all__)
    for name in normext.__all__:
        item = getattr(normext, name)
        assert not callable(item) or item.__doc__, name
    for name in public:
        assert getattr(normext, name).__module__.startswith("normext")
    assert set(dir(normext.functional)) >= {n for n in public if n.islower()}
