"The optimizers of the engine: fastai's numbers, groups, freezing, saving"
from functools import partial

import fastai.optimizer as theirs
import pytest, torch
from fastai.basics import Callback, Learner, load_learner, no_random
from fastai.losses import CrossEntropyLossFlat
from torch._subclasses.fake_tensor import FakeTensorMode

import phantom_nb.experiments.learner as learner_module
from phantom_nb.data import get_dls
from phantom_nb.experiments.learner import OPTIMIZERS, make_learner
from phantom_nb.experiments.optimizer import fused_adam, fused_sgd
from phantom_nb.experiments.run import Run
from phantom_nb.models import create_model
from phantom_nb.pretrained import param_groups
from phantom_nb.regularizers.hyperspherical import CoMHE, MHE

PAIRS = dict(adam=(fused_adam, theirs.Adam), sgd=(fused_sgd, partial(theirs.SGD, mom=.9)))

def learner(opt_func, cbs=(), wd=.1, **options):
    dls = get_dls('digits', n_train=64, n_valid=20, bs=16, device='cpu')
    model = create_model('small_cnn', n_in=1, n_out=10, size=(8,8), seed=0)
    return Learner(dls, model, opt_func=opt_func, lr=.01, wd=wd, cbs=list(cbs), splitter=param_groups, **options)

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def fit(learn, epochs=2, **kwargs):
    with no_random(0), learn.no_bar(), learn.no_logging(): learn.fit(epochs, **kwargs)
    return learn

@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize('options', [dict(), dict(decouple_wd=False), dict(mom=0.)], ids=str)
def test_trains_what_fastai_trains(name, options):
    ours,other = (fit(learner(partial(make, **options)), lr=slice(1e-3, 1e-2)) for make in PAIRS[name])
    assert torch.allclose(weights(ours), weights(other), atol=2e-5)
    plain = fit(learner(PAIRS[name][0], wd=0.))
    assert not torch.allclose(weights(ours), weights(plain), atol=2e-5)

@pytest.mark.parametrize('name', PAIRS)
def test_norms_and_biases_are_not_decayed(name):
    learn = learner(PAIRS[name][0])
    learn.create_opt()
    learn.opt.set_hypers(lr=.1, wd=1.)
    before = {n:p.detach().clone() for n,p in learn.model.named_parameters()}
    for p in learn.model.parameters(): p.grad = torch.zeros_like(p)
    learn.opt.step()
    for n,p in learn.model.named_parameters(): assert torch.allclose(p, before[n] if p.ndim==1 else .9*before[n]), n

@pytest.mark.parametrize('name', PAIRS)
def test_frozen_weights_stay(name):
    learn = learner(PAIRS[name][0])
    learn.freeze()
    before = [p.detach().clone() for p in learn.model.parameters()]
    fit(learn)
    head = {id(p) for p in param_groups(learn.model)[-1]}
    for p,b in zip(learn.model.parameters(), before): assert torch.equal(p, b) == (id(p) not in head and p.ndim>1)
    learn.unfreeze()
    fit(learn, 1)
    assert not any(torch.equal(p, b) for p,b in zip(learn.model.parameters(), before))

@pytest.mark.parametrize('name', PAIRS)
def test_saved_and_loaded_goes_on_alike(name, tmp_path):
    "Two epochs, saved, two more; and loaded into a fresh learner, the regularizers' state with it"
    def make(): return learner(PAIRS[name][0], [MHE(.1), CoMHE('random', .1, redraw=3)])
    first = fit(make())
    first.path = tmp_path
    first.save('half')
    rest = fit(first)
    second = make()
    second.path = tmp_path
    second.load('half')
    second.dls.train.epoch = 2
    assert torch.equal(weights(fit(second)), weights(rest))

@pytest.mark.parametrize('name', PAIRS)
def test_accumulated_gradients_make_one_step(name):
    "Gradients are dropped after a step, not after a micro-batch"
    def model(): return create_model('small_cnn', n_in=1, n_out=10, size=(8,8), seed=0).eval() # without batch statistics
    x,y = get_dls('digits', n_train=32, n_valid=0, bs=32, device='cpu').train.one_batch()
    whole,parts = model(),model()
    for net,pieces in ((whole, 1), (parts, 4)):
        opt = PAIRS[name][0](list(net.parameters()), lr=.01)
        for x_part,y_part in zip(x.chunk(pieces), y.chunk(pieces)):
            (torch.nn.functional.cross_entropy(net(x_part), y_part)/pieces).backward()
        opt.step()
        opt.zero_grad()
        assert all(p.grad is None for p in net.parameters())
    for a,b in zip(whole.parameters(), parts.parameters()): assert torch.allclose(a, b, atol=1e-3)

def test_the_engine_steps_in_few_calls():
    for name,make in OPTIMIZERS.items():
        assert make in (fused_adam, fused_sgd)
        learn = make_learner(Run(n_train=40, epochs=1, opt=name), device='cpu')
        learn.fit(1)
        assert all(p.grad is None for p in learn.model.parameters())
        assert not hasattr(learn, 'recorder')

def test_a_training_that_diverges_ends_after_the_epoch():
    learn = make_learner(Run(n_train=40, epochs=5, lr=1e30), device='cpu')
    learn.fit(5)
    assert learn.epoch < 4

def test_a_step_never_waits_for_a_gpu():
    "On fake CUDA tensors, reading a value is an error"
    with FakeTensorMode(), torch.device('cuda'):
        weights = list(create_model('resnet9', n_in=3, n_out=10, size=(32,32), width=.25).parameters())
        opt = fused_adam(weights, lr=.01, wd=.1)
        for _ in range(2):
            for p in weights: p.grad = torch.zeros_like(p)
            opt.step()
            opt.zero_grad()
        assert all(v.device.type=='cuda' for state in opt.state.values() for v in state.values())

def test_the_quick_learner_trains_what_fastai_trains(monkeypatch, tmp_path):
    "Events, callbacks that are given as functions, a loss without reduction (mixup), and an exported learner"
    run = Run(n_train=40, epochs=2, method='mixup+half_mhe')
    def trained():
        seen = []
        with no_random(0):
            learn = make_learner(run, device='cpu')
            learn.fit(2, cbs=Callback(after_step=lambda cb: seen.append('step'), after_fit=lambda cb: seen.append('fit')))
        return learn,seen
    quick,seen = trained()
    monkeypatch.setattr(learner_module, 'QuickLearner', Learner)
    monkeypatch.setattr(learner_module, 'QuickCrossEntropy', CrossEntropyLossFlat)
    plain,also_seen = trained()
    assert torch.equal(weights(quick), weights(plain)) and seen == also_seen and seen[-1] == 'fit'
    quick.path = tmp_path
    quick.export('learner.pkl')
    loaded = load_learner(tmp_path/'learner.pkl')
    x,_ = quick.dls.test.one_batch()
    assert torch.equal(loaded.model.eval()(x), quick.model.eval()(x))
