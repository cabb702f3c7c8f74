"Spectral norms against dense matrices, gradient penalties that leave the batch alone"
import pytest, torch
from fastai.basics import Learner, SGD
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from phantom_nb.data import get_dls
from phantom_nb.plain import attach
from phantom_nb.regularizers.smoothness import GradientPenalty, SpectralPenalty, gradient_penalty, spectral_norm, top_vectors

def dense_norm(layer, shape):
    unit = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad(): return torch.linalg.matrix_norm((layer(unit)-layer(torch.zeros_like(unit))).flatten(1).T, 2)

@settings(max_examples=15, deadline=None)
@given(stride=st.integers(1, 3), padding=st.integers(0, 2), dilation=st.integers(1, 2), groups=st.sampled_from([1, 2]), side=st.integers(5, 8))
def test_convolutions(stride, padding, dilation, groups, side):
    layer = nn.Conv2d(2, 4, 3, stride, padding, dilation, groups).double()
    assert torch.allclose(spectral_norm(layer, (side, side), 3000), dense_norm(layer, (2, side, side)), rtol=1e-4)

def test_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match='in_shape=None'): spectral_norm(nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match='no linear map'): spectral_norm(nn.ReLU(), (3, 3))
    with pytest.raises(ValueError, match=r'in_shape=\(8,\)'): spectral_norm(nn.Conv2d(1, 1, 3), (8,))
    with pytest.raises(ValueError, match='steps=0'): spectral_norm(nn.Linear(3, 3), steps=0)

def test_channels_may_be_in_the_shape():
    layer = nn.Conv2d(2, 4, 3)
    assert spectral_norm(layer, (2, 6, 7))==spectral_norm(layer, (6, 7))

def test_spectral_norm_has_the_gradient_of_the_largest_singular_value():
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    value = spectral_norm(layer, steps=500)
    got, = torch.autograd.grad(value, layer.weight)
    want, = torch.autograd.grad(torch.linalg.matrix_norm(layer.weight, 2), layer.weight)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert not any(t.requires_grad for t in top_vectors(layer, torch.ones(1, 5).double(), 3))

def test_the_start_is_fixed_or_that_of_the_generator():
    layer,state = nn.Linear(50, 50),torch.get_rng_state()
    def after_a_round(seed=None):
        return spectral_norm(layer, steps=1, generator=None if seed is None else torch.Generator().manual_seed(seed)).item()
    assert after_a_round()==after_a_round() and after_a_round(1)==after_a_round(1)!=after_a_round(2)
    assert torch.equal(torch.get_rng_state(), state)

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))

def fit(*cbs, epochs=1):
    learn = Learner(get_dls('digits', n_train=64, n_valid=20, bs=32, device='cpu'), network(), opt_func=SGD, lr=.05, cbs=list(cbs))
    learn.logger,learn.create_mbar = (lambda *_: None),False
    with learn.no_bar(): learn.fit(epochs)
    return learn

def test_spectral_penalty_follows_the_weights():
    learn = fit(SpectralPenalty(.01), epochs=20)
    value = learn.spectral_penalty.records[-1][3]
    model = learn.model.double()
    exact = .5*(dense_norm(model[0], (1, 8, 8))**2 + torch.linalg.matrix_norm(model[3].weight, 2)**2)
    assert abs(value/exact.item()-1)<.03 # of the step before the last, one round of power iteration a step

def test_spectral_penalty_has_the_gradient_of_the_exact_one():
    "Images of three channels; after a second step of many rounds"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    x,y = torch.randn(5, 3, 4, 4),torch.arange(5)%3
    with attach(model, reg := SpectralPenalty(1., rounds=300)) as penalty:
        for _ in range(2):
            model(x)
            value = penalty(y)
    dense = model[0](torch.eye(48).view(-1, 3, 4, 4))-model[0](torch.zeros(48, 3, 4, 4))
    want = sum(torch.linalg.matrix_norm(w, 2).square() for w in (dense.flatten(1), model[2].weight))/2
    weights = [model[0].weight,model[2].weight]
    for a,b in zip(torch.autograd.grad(value, weights), torch.autograd.grad(want, weights)): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert value.item()==pytest.approx(want.item(), rel=1e-4)
    assert [tuple(v.shape) for v in reg.state_dict()['vectors'].values()]==[(1,3,4,4),(1,16)] # of one input each

def test_gradient_penalty_leaves_the_batch_alone():
    model,x,y = network(),torch.randn(6, 1, 8, 8),torch.arange(6)
    with attach(model, GradientPenalty(.1)) as penalty:
        loss = F.cross_entropy(model(x), y)
        (loss+penalty(y, loss=loss)).backward()
    assert not x.requires_grad and x.grad is None and all(p.grad is not None for p in model.parameters())

def test_passes_without_a_penalty_leave_batch_and_attention_alone():
    "Such as the two passes of an evaluation"
    model,several = network(),torch.randn(2, 6, 1, 8, 8).unbind()
    fused = torch.backends.cuda.flash_sdp_enabled()
    with attach(model, GradientPenalty(.1)):
        for x in several: model(x)
        assert not several[0].requires_grad
    assert not several[1].requires_grad and torch.backends.cuda.flash_sdp_enabled()==fused

@pytest.mark.parametrize('scale', [2.**-20, 2., 2.**20])
def test_the_scale_on_the_way_does_not_matter(scale):
    x = torch.randn(6, 5, requires_grad=True)
    assert gradient_penalty(x.pow(3).sum(), x, scale).item()==pytest.approx(9*x.pow(4).sum(1).mean().item(), rel=1e-5)

@pytest.mark.parametrize('of', ['loss', 'logit'])
def test_gradient_penalty_by_hand(of):
    model,x,y = network(),torch.randn(6, 1, 8, 8),torch.arange(6)
    with attach(model, GradientPenalty(1., of=of)) as penalty:
        model(x)
        ours = penalty(y)
    total = 0.
    for i in range(6):
        xi = x[i:i+1].clone().requires_grad_()
        out = model(xi)
        value = F.cross_entropy(out, y[i:i+1]) if of=='loss' else out[0,y[i]]
        total += torch.autograd.grad(value, xi, create_graph=True)[0].square().sum()/6
    assert torch.isclose(ours, total, rtol=1e-4)
    weights = [model[0].weight,model[3].weight]
    for a,b in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(total, weights)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

def test_integers_and_compiled_networks_are_refused():
    embed = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match='floating-point'), attach(embed, GradientPenalty()): embed(torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(ValueError, match='do not compile'), attach(torch.compile(network()), GradientPenalty()): pass

def test_a_sum_over_the_batch_is_refused_and_no_class_is_left_out():
    net,x = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),torch.randn(8, 1, 8, 8)
    learn = Learner(get_dls('digits', n_train=32, n_valid=10, bs=16), net, nn.CrossEntropyLoss(reduction='sum'), opt_func=SGD, cbs=GradientPenalty())
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match="reduction='sum'"): learn.fit(1)
    y = torch.arange(8)
    for of in ('loss','logit'): # a mean over the images that have a class
        found = []
        for labels,images in ((torch.where(y<4, y, -100), x), (y[:4], x[:4])):
            with attach(net, GradientPenalty(1., of=of)) as penalty:
                loss = F.cross_entropy(net(images), labels)
                found.append(penalty(labels, loss=loss).item())
        assert found[0]==pytest.approx(found[1], rel=1e-5)

def test_the_logit_of_a_class_needs_classes_and_logits():
    net,x = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),torch.randn(4, 1, 8, 8)
    with attach(net, GradientPenalty(of='logit')) as penalty:
        net(x)
        with pytest.raises(ValueError, match='class 255, n_classes=10.*negative'): penalty(torch.tensor([1,2,255,3]))

def test_a_second_learner_starts_from_vectors_of_its_own():
    reg = SpectralPenalty()
    def first(reg):
        torch.manual_seed(1)
        learn = Learner(get_dls('digits', n_train=32, n_valid=10, bs=16), nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
            opt_func=SGD, cbs=reg)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
        return reg.records[0][3]
    first(reg)
    torch.manual_seed(2)
    assert first(reg)==pytest.approx(first(SpectralPenalty()), rel=1e-6)

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_spectral_penalty_in_any_precision_of_the_weights(dtype):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10)).to(dtype)
    with attach(net, SpectralPenalty(1.)) as penalty:
        net(torch.randn(4, 1, 8, 8, dtype=dtype))
        penalty().backward()
    assert all(m.weight.grad.isfinite().all() for m in (net[0], net[2]))

def test_spectral_penalty_wakes_up_with_a_layer_that_begins_at_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(model[2].weight)
    x,y,reg = torch.randn(16, 4),torch.randint(3, (16,)),SpectralPenalty(.01)
    opt = torch.optim.SGD(model.parameters(), .3)
    with attach(model, reg) as penalty:
        for _ in range(60):
            before = [layer.weight.detach().clone() for layer in (model[0], model[2])]
            (nn.functional.cross_entropy(model(x), y)+penalty(y)).backward()
            opt.step()
            opt.zero_grad()
    exact = sum(torch.linalg.matrix_norm(w, 2)**2 for w in before)/2
    assert reg.records[0][3]>0 and reg.records[-1][3]==pytest.approx(exact.item(), rel=.03)
