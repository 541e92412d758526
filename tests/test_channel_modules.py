"""The channel norm modules are their torch.nn namesakes in everything but the kernel."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import normext

pytestmark = pytest.mark.python
TRACKING_NORMS = (
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
)
NORMS = (*TRACKING_NORMS, "GroupNorm")
SHAPES = {"1d": (5, 6, 7), "2d": (4, 6, 3, 5), "3d": (2, 6, 3, 2, 4)}
TRACKED = [
    ((6,), {}),
    ((6, 1e-3, 0.3), {}),
    ((6,), {"affine": False}),
    ((6,), {"affine": True, "track_running_stats": True, "momentum": None}),
    ((6,), {"track_running_stats": False, "dtype": torch.float64}),
    ((6,), {"momentum": None, "eps": 1e-2, "dtype": torch.float16}),
]
ARGUMENTS = {
    name: [((2, 6), {}), ((3, 6, 1e-3), {}), ((1, 6), {"affine": False}), ((6, 6), {"dtype": torch.float64})]
    if name == "GroupNorm"
    else TRACKED
    for name in NORMS
}
CONSTRUCTED = [(name, args, kwargs) for name in NORMS for args, kwargs in ARGUMENTS[name]]
TRACKING = {"affine": True, "track_running_stats": True}


def build(library, name, device="cpu", **options):
    """With everything a state can have."""
    options = {**TRACKING, **options} if name.startswith("Instance") else options
    return getattr(library, name)(*([2, 6] if name == "GroupNorm" else [6]), **options).to(device)


def trained(library, name, device="cpu", **options):
    """A module whose state differs from that of a new one."""
    torch.manual_seed(11)
    module = build(library, name, device, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        for key, buffer in module.named_buffers():
            buffer.fill_(3) if key == "num_batches_tracked" else buffer.uniform_(0.5, 2)
    return module


def input_of(name, device, dtype=torch.float32):
    return torch.randn(SHAPES.get(name[-2:], SHAPES["2d"]), device=device).to(dtype)


@pytest.mark.parametrize("name, args, kwargs", CONSTRUCTED, ids=[f"{n}-{a}-{k}" for n, a, k in CONSTRUCTED])
def test_same_construction_repr_and_state(name, args, kwargs):
    a, b = getattr(normext, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
    assert isinstance(a, getattr(nn, name)) and type(a).__module__.startswith("normext")
    assert repr(a) == repr(b)
    assert list(a.state_dict()) == list(b.state_dict()) and a.state_dict()._metadata == b.state_dict()._metadata
    for key, value in b.state_dict().items():
        assert a.state_dict()[key].equal(value) and a.state_dict()[key].dtype == value.dtype
    assert [key for key, _ in a.named_buffers()] == [key for key, _ in b.named_buffers()]
    own = {k: v for k, v in vars(b).items() if not k.startswith("_")}
    assert {k: v for k, v in vars(a).items() if not k.startswith("_")} == own
    assert set(vars(b)) <= set(vars(a))


@pytest.mark.parametrize("name", NORMS)
def test_only_forward_is_overridden(name):
    """So that isinstance checks, state_dict versions and resets are torch's."""
    ours, theirs = getattr(normext, name), getattr(nn, name)
    for method in ("__init__", "_load_from_state_dict", "reset_parameters", "extra_repr", "state_dict", "_check_input_dim"):
        assert getattr(ours, method, None) is getattr(theirs, method, None), method
    assert ours.forward is not theirs.forward
    assert getattr(ours, "_version", None) == getattr(theirs, "_version", None)
    norm_base = nn.modules.batchnorm._NormBase
    assert issubclass(ours, norm_base) == issubclass(theirs, norm_base)


@pytest.mark.parametrize("name", NORMS)
def test_state_dicts_are_interchangeable(name, device):
    theirs = trained(nn, name, device)
    ours = build(normext, name, device)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    back = build(nn, name, device)
    back.load_state_dict(ours.state_dict(), strict=True)
    x = input_of(name, device)
    for mode in (False, True):
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x), rtol=1e-4, atol=1e-5)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TRACKING_NORMS)
def test_state_dicts_of_old_versions(name, device):
    """Version 1 had no num_batches_tracked; InstanceNorm without tracking explains what to do with buffers it does not have."""
    state = trained(nn, name, device).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    ours = build(normext, name, device)
    ours.load_state_dict(state, strict=True)
    assert ours.num_batches_tracked.item() == 0 and ours.running_mean.equal(state["running_mean"])
    if name.startswith("Instance"):
        texts = []
        for library in (normext, nn):
            with pytest.raises(RuntimeError, match="running_mean") as caught:
                build(library, name, device, track_running_stats=False).load_state_dict(state)
            texts.append(str(caught.value))
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", NORMS)
def test_copies_and_pickles(name, device):
    module = trained(normext, name, device)
    x = input_of(name, device)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    expected = module.eval()(x)
    for twin in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert type(twin) is type(module) and twin.eval()(x).equal(expected)
        assert list(twin.state_dict()) == list(module.state_dict())
    assert copy.deepcopy(module).weight is not module.weight


@pytest.mark.parametrize("name", NORMS)
def test_to_dtype_device_and_half(name, device):
    """half() converts parameters and statistics, never the counter; float32 parameters with 16-bit activations are served too."""
    x = input_of(name, device)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        ours, theirs = trained(normext, name, device).to(dtype), trained(nn, name, device).to(dtype)
        y = ours(x.to(dtype))
        assert y.dtype == dtype
        tolerance = {"rtol": 0.05, "atol": 0.05} if dtype.itemsize == 2 else {}
        torch.testing.assert_close(y, theirs(x.to(dtype)), **tolerance)
        for key, value in theirs.state_dict().items():
            assert ours.state_dict()[key].dtype == value.dtype
    half = trained(normext, name, device).half()
    assert half(x.half()).dtype == torch.float16
    mixed = trained(normext, name, device)
    torch.testing.assert_close(mixed(x.bfloat16()), trained(nn, name, device)(x.bfloat16()), rtol=0.05, atol=0.05)
    meta = build(normext, name).to("meta")
    assert meta(x.to("meta")).is_meta


@pytest.mark.parametrize("library", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NORMS)
def test_training_matches_torch(name, library, device):
    """A few optimizer steps from the same start stay together, in either memory format; then evaluation agrees."""
    dtype = getattr(torch, library)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if memory_format == torch.channels_last and name[-2:] in ("1d", "3d"):
            continue
        results = []
        for kind in (normext, nn):
            norm = trained(kind, name, device)
            scale = nn.Parameter(torch.ones(6, *[1] * (len(SHAPES.get(name[-2:], SHAPES["2d"])) - 2), device=device))
            optimizer = torch.optim.SGD([*norm.parameters(), scale], 0.05, momentum=0.9)
            torch.manual_seed(4)
            for _ in range(8):
                x = input_of(name, device)
                x = x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
                optimizer.zero_grad()
                loss = (norm((x * scale).to(dtype)).float() - x.roll(1, 0)).square().mean()
                loss.backward()
                optimizer.step()
            results.append((loss.item(), norm.eval()(x.to(dtype)).float().mean().item()))
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        assert all(abs(a - b) < tolerance * (1 + abs(b)) for a, b in zip(*results, strict=True)), results


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_instance_norm_of_other_channels(dims, device):
    """Without an affine, num_features is not used: torch warns and computes; with one it refuses. Unbatched input works."""
    name, shape = f"InstanceNorm{dims}d", [*[3, 4, 5][:dims], 2]
    for batched in (True, False):
        x = torch.randn([4] * batched + [7, *shape[:dims]], device=device)
        messages = []
        for library in (normext, nn):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                y = getattr(library, name)(6)(x)
            messages.append([str(w.message) for w in caught])
            torch.testing.assert_close(y, getattr(nn, name)(7)(x), rtol=1e-4, atol=1e-5)
        assert messages[0] == messages[1] and len(messages[0]) == 1
        known = getattr(normext, name)(7, affine=True).to(device)
        assert known(x).shape == x.shape
        with pytest.raises(ValueError, match="num_features"):
            getattr(normext, name)(6, affine=True).to(device)(x)


def test_sync_batch_norm_alone_is_batch_norm(device):
    """Without a process group: the same bits, statistics included, for every number of dimensions."""
    for shape in ((5, 6), (5, 6, 7), (4, 6, 3, 5), (2, 6, 3, 2, 4)):
        sync = trained(normext, "SyncBatchNorm", device)
        plain = getattr(normext, f"BatchNorm{max(len(shape) - 2, 1)}d")(6).to(device)
        plain.load_state_dict(sync.state_dict())
        for mode in (True, False):
            x = torch.randn(shape, device=device)
            assert sync.train(mode)(x).equal(plain.train(mode)(x))
        assert all(sync.state_dict()[k].equal(v) for k, v in plain.state_dict().items())


def test_convert_sync_batchnorm(device):
    """Both converters: ours gives our modules, with the very parameters and buffers, and torch's norms are converted as well."""
    model = nn.Sequential(normext.BatchNorm2d(6), nn.BatchNorm1d(6), nn.Sequential(normext.BatchNorm3d(6))).to(device)
    weights = list(model.parameters())
    converted = normext.SyncBatchNorm.convert_sync_batchnorm(model)
    kinds = [type(m) for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [normext.SyncBatchNorm] * 3
    assert all(one is other for one, other in zip(converted.parameters(), weights, strict=True))


def test_hooks_run_and_parametrized_weights(device):
    from torch.nn.utils import parametrize

    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    for name in NORMS:
        module, calls = build(normext, name, device), []
        module.register_forward_pre_hook(lambda *_, calls=calls: calls.append("before"))
        module.register_forward_hook(lambda *_, calls=calls: calls.append("after"))
        module.register_full_backward_hook(lambda *_, calls=calls: calls.append("backward"))
        x = input_of(name, device)
        plain = build(normext, name, device)(x)
        module(x.clone().requires_grad_()).sum().backward()
        assert calls == ["before", "after", "backward"]
        module = build(normext, name, device)
        parametrize.register_parametrization(module, "weight", Double())
        torch.testing.assert_close(module(x), 2 * plain)


def test_eval_and_train_of_a_network(device):
    """A small residual network in both libraries, both formats: outputs, gradients and state after two steps."""

    class Net(nn.Module):
        def __init__(self, library):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.a, self.b, self.c = library.BatchNorm2d(8), library.GroupNorm(4, 8), library.InstanceNorm2d(8, **TRACKING)

        def forward(self, x):
            y = torch.relu(self.a(self.first(x)))
            return self.c(self.b(self.second(y)) + y).mean((2, 3))

    for memory_format in (torch.contiguous_format, torch.channels_last):
        nets = []
        for library in (normext, nn):
            torch.manual_seed(9)
            net = Net(library).to(device, torch.float64).to(memory_format=memory_format)
            for _ in range(2):
                x = torch.randn(4, 3, 8, 8, dtype=torch.float64, device=device).contiguous(memory_format=memory_format)
                net.zero_grad()
                net(x).cos().sum().backward()
            nets.append((net, x))
        (ours, x), (theirs, _) = nets
        for (key, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-8, msg=lambda text, k=key: f"{k}: {text}")
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, msg=lambda text, k=key: f"{k}: {text}")
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_public_names():
    public = {*NORMS, "batch_norm", "group_norm", "instance_norm"}
    assert public <= set(normext.__all__)
    for name in public:
        assert getattr(normext, name).__doc__ and getattr(normext, name).__module__.startswith("normext")
    assert {n for n in public if n.islower()} <= set(dir(normext.functional))
