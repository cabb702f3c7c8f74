"SAM, ASAM and AMP: the second pass leaves no trace, whatever else trains along"
import copy
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np, pytest, torch
from fastai.basics import Callback, Learner, SGD
from fastai.callback.training import GradientAccumulation
from torch import nn
from torch.nn import functional as F

from phantom_nb.core import L2Penalty
from phantom_nb.kinds import _is_copy, _with_random_state, scalar_with_gradients, SecondPass
from phantom_nb.data import get_dls
from phantom_nb.plain import attach
from phantom_nb.regularizers.flatness import AMP, SAM, amp_displacement, sam_displacement

def network(dropout=0., bn=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if bn else nn.Identity(), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 10))

def learner(*cbs, bs=32, model=None, **options):
    torch.manual_seed(1)
    dls = get_dls('digits', n_train=64, n_valid=20, bs=bs, device='cpu')
    learn = Learner(dls, model or network(), opt_func=SGD, lr=.1, cbs=list(cbs), **options)
    learn.logger,learn.create_mbar = (lambda *_: None),False
    return learn

def trained(*cbs, epochs=1, **options):
    learn = learner(*cbs, **options)
    with learn.no_bar(): learn.fit(epochs)
    return learn

def same(a, b, tol=1e-6):
    pairs = zip(a.model.state_dict().values(), b.model.state_dict().values())
    return all(torch.allclose(x.float(), y.float(), atol=tol) for x,y in pairs)

def test_lengths():
    w,g = [torch.randn(3, 4), torch.randn(5)],[torch.randn(3, 4), torch.randn(5)]
    norm = nn.utils.get_total_norm
    assert torch.isclose(norm(sam_displacement(w, g, .3)), torch.tensor(.3))
    scaled = [e/(v.abs()+.01) for e,v in zip(sam_displacement(w, g, .3, adaptive=True), w)]
    assert torch.isclose(norm(scaled), torch.tensor(.3))
    assert norm(amp_displacement(g, lambda d: g, eps=.3, lr=1., steps=4))<=.3+1e-6
    assert all((e==0).all() for e in sam_displacement(w, [torch.zeros_like(v) for v in g], .3))

@pytest.mark.parametrize('steps', [1, 2, 3])
@pytest.mark.parametrize('eps,lr', [(.5,.2), (.3,1.), (5.,.5)])
def test_amp_climbs_as_algorithm_1_says(steps, eps, lr):
    "A quadratic loss of two tensors, climbed in numpy; gradients are asked for where it stands, once a further step"
    gen,asked = np.random.default_rng(0),[]
    half = gen.normal(size=(5,5))
    square,w = half@half.T,gen.normal(size=5)
    def parts(v): return [torch.tensor(v[:2]),torch.tensor(v[2:])]
    def joined(d): return torch.cat(list(d)).numpy()
    def gradients_at(d):
        asked.append(joined(d))
        return parts(square@(w+joined(d)))
    found = joined(amp_displacement(parts(square@w), gradients_at, eps, lr, steps))
    d,stood = np.zeros(5),[]
    for i in range(steps):
        if i: stood.append(d)
        g = square@(w+d)
        d = d+lr*g/np.linalg.norm(g)
        d = d*min(1, eps/np.linalg.norm(d))
    np.testing.assert_allclose(found, d, rtol=1e-6)
    assert len(asked)==len(stood)==steps-1 and all(np.allclose(a, b) for a,b in zip(asked, stood))
    assert (w+found)@square@(w+found)>w@square@w, 'the loss is higher there'

def test_displacements_carry_no_graph_and_steps_may_be_short():
    w,g = [torch.ones(3, requires_grad=True)],[torch.ones(3)]
    assert not any(e.requires_grad for e in sam_displacement(w, g, adaptive=True))
    assert AMP(eps=.1, lr=.1).lr==.1 and AMP(lr=0, eps=0).eps==0

@pytest.mark.parametrize('make', [lambda: SAM(rho=0.), lambda: AMP(eps=0.)])
def test_no_radius_is_plain_training(make): assert same(trained(make(), model=network(.5)), trained(model=network(.5)))

def test_dropout_drops_the_same_units_in_both_passes():
    sam = SAM(rho=0.)
    trained(sam, model=network(.5))
    assert all(abs(row[3])<1e-7 for row in sam.records)

def test_accumulation_takes_each_micro_batch_by_itself():
    class Grads(Callback):
        order = 90
        def before_step(self): self.grads = [p.grad.clone() for p in self.model.parameters()]
    ours = trained(SAM(rho=.2), GradientAccumulation(64), Grads(), model=network(bn=False)).grads.grads
    model = network(bn=False)
    torch.manual_seed(1)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x,y in get_dls('digits', n_train=64, n_valid=20, bs=32, device='cpu').train:
        weights = list(model.parameters())
        step = sam_displacement(weights, torch.autograd.grad(F.cross_entropy(model(x), y), weights), .2)
        moved = copy.deepcopy(model)
        for p,e in zip(moved.parameters(), step): p.data.add_(e)
        total = [t+g/2 for t,g in zip(total, torch.autograd.grad(F.cross_entropy(moved(x), y), list(moved.parameters())))]
    assert all(torch.allclose(a, b, atol=1e-6) for a,b in zip(ours, total))

class Spare(nn.Module):
    "A layer that nobody calls, beside a network"
    def __init__(self):
        super().__init__()
        self.net,self.spare = network(),nn.Linear(2, 2)
    def forward(self, x): return self.net(x)

@pytest.mark.parametrize('scale', [1., 2., 1024.])
def test_scaled_loss_and_an_unused_layer_give_the_same_gradients(scale):
    plain,scaled = learner(SAM(.2)),learner(SAM(.2), model=Spare())
    scaled.scaler,spare = SimpleNamespace(get_scale=lambda: scale),scaled.model.spare.weight.clone()
    for learn in (plain, scaled):
        with learn.no_bar(): learn.fit(1)
    assert torch.equal(spare, scaled.model.spare.weight)
    scaled.model = scaled.model.net
    assert same(plain, scaled)

def test_the_record_is_how_much_the_loss_rises():
    cb = SAM(.2)
    learn = learner(cb)
    model,(x,y) = network().train(),next(iter(learner().dls.train))
    loss = F.cross_entropy(model(x), y)
    weights = list(model.parameters())
    step = sam_displacement(weights, torch.autograd.grad(loss, weights), .2)
    for w,e in zip(weights, step): w.data.add_(e)
    with learn.no_bar(): learn.fit(1)
    assert cb.records[0][3]==pytest.approx((F.cross_entropy(model(x), y)-loss).item(), rel=1e-4)

def test_an_error_in_the_second_pass_puts_everything_back():
    class Breaks(SecondPass):
        def displacement(self, weights, gradients, gradients_at): return [torch.ones_like(w) for w in weights]
        def _loss_again(self): raise RuntimeError('broken')
    learn = learner(Breaks())
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(RuntimeError, match='broken'), learn.no_bar(): learn.fit(1)
    after = learn.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if not k.startswith('1.')) # statistics moved in the first pass
    assert after['1.num_batches_tracked']==1

def test_frozen_and_unchosen_weights_stay():
    model = network()
    for p in model[0].parameters(): p.requires_grad_(False)
    first = model[0].weight.clone()
    learn = trained(SAM(.2), model=model)
    assert torch.equal(learn.model[0].weight, first)
    seen = []
    class Watch(SAM):
        def displacement(self, weights, gradients, gradients_at):
            seen[:] = super().displacement(weights, gradients, gradients_at)
            return list(seen)
    trained(Watch(.2, layers='output'))
    assert [bool((e!=0).any()) for e in seen]==[False]*4+[True]*2

def test_a_penalty_keeps_its_gradient_at_the_weights():
    "SAM alone hands its gradient over; with a penalty the sum goes through the graph: both give the same"
    class Spy(Callback):
        order = 90
        def before_step(self): self.grads = getattr(self, 'grads', None) or [p.grad.clone() for p in self.model.parameters()]
    def grads(*cbs): return trained(*cbs, Spy()).spy.grads
    none,sam,l2,both = grads(),grads(SAM(.2)),grads(L2Penalty(1.)),grads(L2Penalty(1.), SAM(.2))
    assert all(torch.allclose(b-n, (s-n)+(l-n), atol=1e-6) for n,s,l,b in zip(none, sam, l2, both))

def test_plain_loop_equals_a_learner():
    learn,model = trained(SAM(.2)),network()
    opt = torch.optim.SGD(model.parameters(), .1)
    torch.manual_seed(1)
    with attach(model, SAM(.2)) as penalty:
        for x,y in get_dls('digits', n_train=64, n_valid=20, bs=32, device='cpu').train:
            loss = F.cross_entropy(model(x), y)
            opt.zero_grad()
            (loss+penalty(y, loss=loss, again=lambda: F.cross_entropy(model(x), y))).backward()
            opt.step()
    assert all(torch.allclose(a.float(), b.float(), atol=1e-6) for a,b in zip(model.state_dict().values(), learn.model.state_dict().values()))

def test_a_scalar_has_its_value_its_gradients_and_a_memory_of_its_own():
    value,w = torch.tensor(3.),torch.ones(2, requires_grad=True)
    scalar = scalar_with_gradients(value, [torch.tensor([1.,2.])], [w])
    (5*scalar).backward()
    with torch.no_grad(): scalar.zero_()
    assert value==3 and w.grad.tolist()==[5,10]

class Backwards(torch.autograd.Function):
    "Count backward passes"
    n = 0
    @staticmethod
    def forward(context, x): return x.clone()
    @staticmethod
    def backward(context, gradient):
        Backwards.n += 1
        return gradient

class Counts(nn.Module):
    def forward(self, x): return Backwards.apply(x)

@pytest.mark.parametrize('every,n', [(1, 2+2), (2, 2+1)])
def test_sam_alone_goes_back_through_each_graph_once(every, n):
    "Once at the weights and once at the displaced ones, in those of two steps that have a second pass"
    Backwards.n = 0
    trained(SAM(.2, every=every), model=nn.Sequential(network(), Counts()))
    assert Backwards.n==n

def test_a_method_may_ask_for_gradients_elsewhere():
    "Those of a copy of the network with other weights"
    class Asks(SecondPass):
        def displacement(self, weights, gradients, gradients_at):
            steps = [torch.full_like(w, .1) for w in weights]
            moved = copy.deepcopy(self.model)
            for p,e in zip(moved.parameters(), steps): p.data.add_(e)
            with torch.enable_grad(): want = torch.autograd.grad(F.cross_entropy(moved(self.learn.x), self.learn.y), list(moved.parameters()))
            for a,b in zip(gradients_at(steps), want): torch.testing.assert_close(a, b)
            seen.append(len(want))
            return steps
    seen = []
    trained(Asks())
    assert seen==[6, 6]

def test_a_layer_that_is_used_at_the_weights_alone_has_no_gradient_elsewhere():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.net,self.gate,self.more = network(),nn.Linear(1, 1),nn.Linear(10, 10)
            nn.init.ones_(self.gate.bias)
        def forward(self, x):
            z = self.net(x)*self.gate.bias.abs()
            return z+self.more(z) if self.gate.bias>0 else z
    class Closes(SecondPass):
        def displacement(self, weights, gradients, gradients_at): return [torch.full_like(w, -2. if w.shape==(1,) else 0.) for w in weights]
    seen = []
    trained(Closes(), Callback(before_step=lambda cb: seen.append(bool(cb.model.more.weight.grad.abs().max()>1e-6))), model=Gated())
    assert seen==[False]*2

def test_the_random_state_of_a_gpu_is_put_back_for_the_second_pass(monkeypatch):
    seen,device = [],torch.device('cuda', 1)
    monkeypatch.setattr(torch.random, 'fork_rng', lambda devices: nullcontext(seen.append(devices)))
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda *state: seen.append(state))
    with _with_random_state((device, torch.get_rng_state(), 'of the GPU')): pass
    assert seen==[[device], ('of the GPU', device)]

def test_a_weight_of_zero_is_plain_training(): assert same(trained(SAM(.2, lam=0.)), trained())

def test_what_a_second_pass_opens_is_closed_before_the_backward_pass():
    class Opens(SAM):
        is_open = False
        def open(self):
            super().open()
            self.is_open = True
        def close(self): self.is_open = False
    seen,cb = [],Opens(.2)
    trained(cb, Callback(before_backward=lambda _: seen.append(cb.is_open), after_pred=lambda _: seen.append(cb.is_open)))
    assert seen==[True,False]*2+[False] # the last one is of the validation

def test_one_that_was_on_a_learner_goes_to_a_loop():
    "Where the graph of the loss is still needed behind it"
    cb,model,(x,y) = SAM(.2),network(),learner().dls.one_batch()
    trained(cb)
    with attach(model, cb) as penalty:
        loss = F.cross_entropy(model(x), y)
        (loss+penalty(y, loss=loss, again=lambda: F.cross_entropy(model(x), y))).backward()
    assert all(p.grad is not None for p in model.parameters())

def test_two_passes_through_one_compiled_graph_are_refused():
    "Another regularizer makes them two; a compiled network alone, or two regularizers on a plain one, are welcome"
    def compiled():
        model = network()
        model._compiled_call_impl = model._call_impl # as `model.compile()` leaves it
        return model
    with pytest.raises(ValueError, match='SAM with L2Penalty goes twice through one graph'): trained(L2Penalty(), SAM(.2), model=compiled())
    assert same(trained(SAM(.2), model=compiled()), trained(SAM(.2)))

@pytest.mark.parametrize('make,copied', [(lambda x: x, True), (lambda x: x.clone(), True), (lambda x: x.clone().clone(), True), (lambda x: x+0, False),
    (lambda x: (x+0).clone(), False), (lambda x: torch.ones(()), False)])
def test_a_copy_is_made_by_copying_alone(make, copied):
    x = torch.ones((), requires_grad=True)*2
    assert _is_copy(make(x), x)==copied

def test_refusals():
    with pytest.raises(ValueError, match='choose one'): trained(SAM(), AMP())
    with pytest.raises(ValueError, match='rho=-1'): SAM(rho=-1)
    with pytest.raises(ValueError, match='steps=0'): AMP(steps=0)
    with attach(network(), SAM()) as penalty, pytest.raises(ValueError, match='again='): penalty()

class CountsAnew(nn.Module):
    "Puts a new tensor in the place of its buffer at every pass"
    def __init__(self):
        super().__init__()
        self.register_buffer('n', torch.zeros(()))
    def forward(self, x):
        self.n = self.n+1
        return x

def test_a_buffer_that_is_replaced_is_put_back():
    net = nn.Sequential(CountsAnew(), nn.Flatten(), nn.Linear(64, 10))
    learn = Learner(get_dls('digits', n_train=64, n_valid=16, bs=16), net, opt_func=SGD, cbs=SAM())
    def count(cb):
        if cb.training: cb.learn.seen.append(net[0].n.item())
    learn.seen = []
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Callback(after_batch=count))
    assert learn.seen==[1,2,3,4]

@pytest.mark.parametrize('make', [lambda: SAM(.1), lambda: AMP(.1)])
def test_both_passes_have_the_precision_of_training(make):
    from phantom_nb.experiments.learner import Bfloat16
    seen,learn = [],learner(make(), Bfloat16())
    hook = learn.model[0].register_forward_hook(lambda module, inputs, out: seen.append(out.dtype) if learn.training else None)
    with learn.no_bar(): learn.fit(1)
    hook.remove()
    assert len(seen)>=4 and set(seen)=={torch.bfloat16}

def test_without_a_step_the_second_pass_adds_nothing_in_mixed_precision():
    from phantom_nb.experiments.learner import Bfloat16
    learn = trained(SAM(1e-12), Bfloat16())
    assert learn.sam.to_frame().share.dropna().max()<1e-6
