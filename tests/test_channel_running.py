"""Running statistics: what a step leaves in them, when they are used, and what never touches them."""

import copy
from dataclasses import replace

import channel_cases as cases
import channel_oracle as oracle
import pytest
import torch
from torch import nn

import normext

SHAPES = {"1d": (5, 6, 7), "2d": (4, 6, 3, 5), "3d": (2, 6, 3, 2, 4)}
NAMES = [f"{kind}{dims}" for kind in ("BatchNorm", "InstanceNorm") for dims in SHAPES] + ["SyncBatchNorm"]
MOMENTA = [0.1, None, 0.0, 1.0]


def pair(name, device, dtype=torch.float64, **options):
    """Our module and torch's, in the same state. InstanceNorm keeps no statistics unless it is asked to."""
    if "Instance" in name:
        options = {"affine": True, "track_running_stats": True, **options}
    theirs = getattr(nn, name)(6, **options).to(device, dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours = getattr(normext, name)(6, **options).to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def input_of(name, device, dtype=torch.float64, **more):
    return torch.randn(SHAPES.get(name[-2:], SHAPES["2d"]), device=device, dtype=dtype, **more) * 3 + 5


def assert_same_state(ours, theirs):
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-12, atol=1e-12, msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.python
@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_steps_and_evaluation_follow_torch(name, momentum, device):
    """Five steps of training, evaluation between them, train() and eval() toggled; buffers and the counter after each."""
    ours, theirs = pair(name, device, momentum=momentum)
    for step in range(5):
        x = input_of(name, device)
        for module in (ours, theirs):
            module.train(step != 2)
        torch.testing.assert_close(ours(x), theirs(x))
        assert_same_state(ours, theirs)
        ours.eval(), theirs.eval()
        torch.testing.assert_close(ours(x), theirs(x))
        assert_same_state(ours, theirs)


@pytest.mark.python
@pytest.mark.parametrize("name", [name for name in NAMES if "Batch" in name])
def test_momentum_none_is_the_average_of_all_batches(name, device):
    ours = getattr(normext, name)(6, momentum=None).to(device, torch.float64)
    batches = [input_of(name, device) * k for k in range(1, 8)]
    dims = [0, *range(2, batches[0].dim())]
    for step, x in enumerate(batches, 1):
        ours(x)
        assert ours.num_batches_tracked.item() == step
        torch.testing.assert_close(ours.running_mean, sum(b.mean(dims) for b in batches[:step]) / step)
        torch.testing.assert_close(ours.running_var, sum(b.var(dims) for b in batches[:step]) / step)


@pytest.mark.python
@pytest.mark.parametrize("name", NAMES)
def test_without_tracking_there_is_nothing_to_keep(name, device):
    """track_running_stats=False: no buffers, and the statistics of the input in evaluation, too."""
    ours, theirs = pair(name, device, track_running_stats=False)
    assert ours.running_mean is None and ours.running_var is None and ours.num_batches_tracked is None
    x = input_of(name, device)
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x))
    assert_same_state(ours, theirs)


@pytest.mark.python
@pytest.mark.parametrize("name", NAMES)
def test_tracking_toggled_after_construction(name, device):
    """Switched off, BatchNorm leaves its buffers alone, and uses them in evaluation; InstanceNorm goes on writing to them."""
    ours, theirs = pair(name, device)
    for tracking in (True, False, True):
        for mode in (True, False):
            x = input_of(name, device)
            for module in (ours, theirs):
                module.track_running_stats = tracking
                module.train(mode)
            before = {k: v.clone() for k, v in ours.state_dict().items()}
            torch.testing.assert_close(ours(x), theirs(x))
            assert_same_state(ours, theirs)
            if not mode if tracking else "Batch" in name:
                assert all(v.equal(before[k]) for k, v in ours.state_dict().items())


@pytest.mark.python
@pytest.mark.parametrize("missing", ["running_mean", "running_var", "num_batches_tracked", "both"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_buffers_set_to_none(missing, mode, device):
    """Whatever torch makes of half a state."""
    ours, theirs = pair("BatchNorm2d", device)
    results = []
    for module in (ours, theirs):
        for name in ("running_mean", "running_var") if missing == "both" else (missing,):
            setattr(module, name, None)
        torch.manual_seed(3)
        try:
            results.append(module.train(mode)(input_of("2d", device)))
        except Exception as error:
            results.append((type(error).__name__, str(error)))
    if isinstance(results[1], torch.Tensor):
        torch.testing.assert_close(*results)
        assert_same_state(ours, theirs)
    else:
        assert results[0] == results[1]


@pytest.mark.parametrize("name", [name for name in NAMES if "Batch" in name])
def test_an_empty_batch_is_counted_and_changes_nothing_else(name, device):
    """Its mean would be NaN."""
    ours, theirs = pair(name, device, torch.float32)
    x = input_of(name, device, torch.float32)
    ours(x), theirs(x)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    assert ours(x[:0]).shape == theirs(x[:0]).shape == x[:0].shape
    for key, value in ours.state_dict().items():
        assert value.equal(before[key] + (key == "num_batches_tracked")), key
    assert ours.num_batches_tracked.equal(theirs.num_batches_tracked)


@pytest.mark.parametrize("name", [name for name in NAMES if "Instance" in name])
def test_no_images_of_instance_norm_are_what_torch_makes_of_them(name, device):
    """torch refuses them where there are statistics to update; these stay as they were."""
    ours, theirs = pair(name, device, torch.float32)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    results = []
    for module in (ours, theirs):
        try:
            results.append(module(input_of(name, device, torch.float32)[:0]).shape)
        except Exception as error:
            results.append((type(error).__name__, str(error)))
    assert results[0] == results[1]
    assert all(v.equal(before[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_one_value_per_channel_is_refused_before_anything_is_written(name, device):
    """Its unbiased variance would be NaN. torch counts the batch before it refuses."""
    ours, theirs = pair(name, device, torch.float32)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    x = torch.randn([1, 6] + [1] * (len(SHAPES.get(name[-2:], SHAPES["2d"])) - 2), device=device)
    texts = []
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="Expected more than 1") as caught:
            module(x)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    for key, value in ours.state_dict().items():
        assert value.equal(before[key]), key
    assert ours.eval()(x).shape == x.shape


def test_one_value_per_channel_of_functions(device):
    for shape in ((1, 4), (1, 4, 1), (1, 4, 1, 1)):
        x = torch.randn(shape, device=device)
        buffers = [torch.zeros(4, device=device), torch.ones(4, device=device)]
        for norm in (normext.batch_norm, normext.instance_norm):
            if x.dim() > 2 or norm is normext.batch_norm:
                with pytest.raises(ValueError, match="Expected more than 1"):
                    norm(x, *buffers, None, None, True)
        assert buffers[0].eq(0).all() and buffers[1].eq(1).all()
    images = torch.randn(3, 4, 1, device=device)  # fine for batch norm, not for instance norm
    with pytest.raises(ValueError, match="Expected more than 1 spatial element"):
        normext.instance_norm(images, *buffers)
    assert normext.batch_norm(images, *buffers, training=True).isfinite().all() and buffers[0].ne(0).all()


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_evaluation_writes_nothing(op, backend):
    """Neither statistics nor their version counters, with and without gradients."""
    case = cases.ChannelCase(op, 3, 6, (4, 5), training=False)
    t = cases.make(case, backend)
    before, versions = [b.clone() for b in t.buffers()], [b._version for b in t.buffers()]
    case.call(t)
    s = replace(t, x=t.x.clone().requires_grad_())
    torch.autograd.grad(case.call(s), s.x, s.dy)
    cases.assert_same(t.buffers(), before)
    assert [b._version for b in t.buffers()] == versions


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_training_updates_once(op, grad, backend):
    """One update per forward; none by backward, by create_graph or by second derivatives."""
    case = cases.ChannelCase(op, 3, 6, (4, 5), running=torch.float64, dtype=torch.float64)
    t = cases.make(case, backend)
    s = t.requires_grad() if grad else t.fresh()
    y = case.call(s)
    after = [b.clone() for b in s.buffers()]
    assert max(oracle.running_errors(case, t, s).values()) <= oracle.LIMIT
    if grad:
        grads = torch.autograd.grad(y, s.leaves(), s.dy, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), s.leaves(), allow_unused=True)
        cases.assert_same(s.buffers(), after)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_grad_mode_activation_residual_and_layout_do_not_change_the_statistics(op, backend):
    """They are of x alone; the two layouts may differ within the contract."""
    for layout in cases.BOTH:
        case = cases.ChannelCase(op, 3, 6, (9, 7), running=torch.float32, layout=layout, residual=op == "batch_norm")
        t = cases.make(case, backend)
        found = []
        for activation in (None, *cases.ACTIVATIONS):
            for s in (t.fresh(), t.requires_grad(), replace(t.fresh(), weight=None, bias=None)):
                replace(case, activation=activation).call(s)
                found.append(s.buffers())
        alone = t.fresh()
        replace(case, residual=False).call(alone)
        for one in found:
            cases.assert_same(one, alone.buffers())


@pytest.mark.parametrize("which", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_half_a_pair_is_what_torch_makes_of_it(op, training, which, backend):
    """torch updates the one it is given, and refuses evaluation."""
    case = cases.ChannelCase(op, 3, 6, (4, 5), running=torch.float64, dtype=torch.float64, training=training)
    t = cases.make(case, backend)
    results = []
    for call in (case.call, case.torch):
        s = replace(t.fresh(), **{which: None})
        try:
            results.append([call(s), *s.buffers()])
        except Exception as error:
            results.append((type(error).__name__, str(error)))
    if isinstance(results[1], tuple):
        assert results[0] == results[1]
    else:
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype, running", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float16,) * 2])
def test_small_updates_are_not_lost(dtype, running, device):
    """A momentum of 1e-3 on float32 statistics moves them, whatever the input's dtype."""
    x = torch.randn(64, 4, 5, 5, device=device).to(dtype)
    mean, var = torch.full((4,), 100.0, device=device, dtype=running), torch.ones(4, device=device, dtype=running)
    for _ in range(20):
        normext.batch_norm(x, mean, var, training=True, momentum=1e-3)
    expected = 100 * 0.999**20
    assert (mean.double() - expected).abs().max() < (0.02 if running == torch.float32 else 2.1)


def test_buffers_that_lie_apart(device):
    """Columns of one matrix: the neighbours keep their bits."""
    table = torch.arange(24.0, device=device).view(6, 4)
    before = table.clone()
    x = torch.randn(5, 6, 3, device=device)
    plain = [before[:, 1].clone(), before[:, 3].clone()]
    y = normext.batch_norm(x, table[:, 1], table[:, 3], training=True)
    assert y.equal(normext.batch_norm(x, *plain, training=True))
    assert table[:, 1].equal(plain[0]) and table[:, 3].equal(plain[1]) and table[:, ::2].equal(before[:, ::2])


@pytest.mark.parametrize("shared", ["running_mean", "running_var"])
@pytest.mark.parametrize("what", ["x", "residual", "weight", "bias"])
def test_buffers_that_are_an_input(what, shared, device):
    """The output is made of what was there before the update, in every channel."""
    read = {name: torch.rand(3, 300, 7, device=device) for name in ("x", "residual")}
    read |= {name: torch.rand(300, device=device) for name in ("weight", "bias")}
    buffers = {"running_mean": torch.rand(300, device=device), "running_var": torch.rand(300, device=device)}
    buffers[shared] = read[what].flatten()[-300:]
    copies = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in (read, buffers)]

    def step(read, buffers):
        return normext.batch_norm(read["x"], **buffers, **{n: t for n, t in read.items() if n != "x"}, training=True)

    expected = step(*copies)
    assert step(read, buffers).equal(expected)
    assert all(buffer.equal(copies[1][name]) for name, buffer in buffers.items())


def test_buffers_that_need_gradients_are_refused_as_in_torch(device):
    """A running statistic is not differentiable; in training it is written to, which a leaf that needs a gradient refuses."""
    import torch.nn.functional as F

    x = torch.randn(3, 4, 5, device=device)
    for training in (True, False):
        texts = []
        for function in (normext.batch_norm, F.batch_norm):
            buffers = [torch.zeros(4, device=device, requires_grad=True), torch.ones(4, device=device)]
            try:
                y = function(x.clone().requires_grad_(), *buffers, training=training)
                texts.append(y.requires_grad)
            except Exception as error:
                texts.append(type(error).__name__)
        assert texts[0] == texts[1], training


@pytest.mark.python
def test_update_bn_and_averaged_models(device):
    """torch.optim.swa_utils resets and refills the statistics of any BatchNorm."""
    from torch.optim.swa_utils import AveragedModel, update_bn

    states = []
    for library in (normext, nn):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 6), library.BatchNorm1d(6)).to(device)
        averaged = AveragedModel(model)
        averaged.update_parameters(model)
        update_bn([torch.randn(9, 4, device=device) for _ in range(3)], averaged)
        states.append(averaged.state_dict())
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value)


@pytest.mark.python
@pytest.mark.parametrize("name", NAMES)
def test_deep_copies_have_their_own_statistics(name, device):
    ours, _ = pair(name, device)
    twin = copy.deepcopy(ours)
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    ours(input_of(name, device))
    assert all(v.equal(before[k]) for k, v in twin.state_dict().items())
    assert not ours.running_mean.equal(before["running_mean"])


@pytest.mark.python
@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_half_precision_modules_keep_half_precision_statistics(name, device):
    """half() converts buffers; with float32 parameters and buffers 16-bit input works, too."""
    for dtype in cases.SIXTEEN_BIT:
        for module_dtype in (dtype, torch.float32):
            ours, theirs = pair(name, device, module_dtype)
            x = input_of(name, device, torch.float32).to(dtype)
            tolerance = {"rtol": 2e-2, "atol": 2e-2}
            torch.testing.assert_close(ours(x), theirs(x), **tolerance)
            assert ours.running_mean.dtype == module_dtype and ours.num_batches_tracked.dtype == torch.int64
            torch.testing.assert_close(ours.running_mean, theirs.running_mean, **tolerance)
            torch.testing.assert_close(ours.running_var, theirs.running_var, **tolerance)
            torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **tolerance)
