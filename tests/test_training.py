"The training loop: scaled losses, errors at every event, a thousand fits, compiling before and after, export"
import copy, gc, random, subprocess, sys
from functools import partial

import numpy as np, pytest, torch
from PIL import Image
from fastai.basics import Callback, CancelFitException, Learner, SGD, noop
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import LRFinder
from fastai.vision.data import ImageDataLoaders
from fastcore.basics import risinstance
from torch import nn

from phantom_nb.contract import _n_hooks
from phantom_nb.core import Regularizer, TrainingCallback
from phantom_nb.data import get_dls
from phantom_nb.experiments.methods import METHODS, make_method
from phantom_nb.measures.intraclass import IntraclassMonitor
from phantom_nb.measures.sparsity_monitor import SparsityMonitor
from phantom_nb.regularizers.hyperspherical import MHE, CoMHE
from phantom_nb.regularizers.phantom import PhantomEmbeddings
from phantom_nb.regularizers.semantic import ISDA
from phantom_nb.regularizers.smoothness import SpectralPenalty
from phantom_nb.regularizers.sparsity import TargetedSparsity

def regularizer(name):
    "The method's callback, or None; what needs a larger network is told to take this one"
    found = [cb for cb in make_method(name).cbs if isinstance(cb, Regularizer)]
    for cb in found:
        if isinstance(cb, CoMHE): cb.first_layer = 'project'
        if isinstance(cb, CoMHE) and cb.projection!='group': cb.k = 4
    return found[0] if found else None

NAMES = [name for name in METHODS if regularizer(name) is not None]
MONITORS = dict(sparsity_monitor=partial(SparsityMonitor, share=1.), intraclass_monitor=partial(IntraclassMonitor, n=30))
EVERY = NAMES+list(MONITORS)
def callback(name): return MONITORS[name]() if name in MONITORS else regularizer(name)

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 10))

def learner(*cbs, n_train=64, bs=32, path=None):
    dls = get_dls('digits', n_train=n_train, n_valid=20, bs=bs, seed=0, device='cpu')
    learn = Learner(dls, network(), opt_func=partial(SGD, mom=.9), lr=.05, cbs=list(cbs), path=path)
    learn.logger,learn.create_mbar = noop,False
    return learn.remove_cbs(learn.cbs.filter(risinstance(ProgressCallback)))

class Spy(Callback):
    "Keep the gradients of the first step, as the optimizer sees them, then end the fit"
    order = 20
    def before_step(self):
        self.grads = [p.grad.clone() for p in self.model.parameters()]
        raise CancelFitException()

def gradients(*cbs, prepare=noop):
    spy,learn = Spy(),learner(*cbs)
    prepare(learn)
    torch.manual_seed(1)
    with learn.added_cbs(spy): learn.fit(1)
    return spy.grads


# Scaled losses, as float16 needs them

class Scaled(Callback):
    "fastai's `MixedPrecision` without a GPU: scale the loss ahead of the backward pass, and the gradients back"
    order = 10
    def before_fit(self): self.learn.scaler = self
    def get_scale(self): return 2.**12
    def before_backward(self): self.learn.loss_grad = self.loss_grad*self.get_scale()
    def before_step(self):
        for p in self.model.parameters(): p.grad /= self.get_scale()
    def after_fit(self): self.learn.scaler = None

@pytest.mark.parametrize('name', NAMES)
def test_a_scaled_loss_gives_the_same_gradients(name):
    "A power of two loses no digit"
    for a,b in zip(gradients(regularizer(name)), gradients(regularizer(name), Scaled())): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# Errors and Ctrl-C

EVENTS = 'before_fit before_epoch before_train before_batch after_pred after_loss before_backward before_step after_step after_batch ' \
    'after_train before_validate after_validate after_epoch after_fit'.split()
BEFORE_THE_STEP = EVENTS[:EVENTS.index('before_step')+1]

def state(learn):
    "What must not change: modes, whether parameters are trained, hooks, and entries of the learner"
    model = learn.model
    return [p.requires_grad for p in model.parameters()],_n_hooks(model),sorted({*vars(learn)}-{'one_batch'})

def weights(learn): return [t.clone() for t in learn.model.state_dict().values()]

def stopped(learn, event, error, order):
    "Break a fit at an event"
    def stop(cb): raise error('on purpose')
    breaker = Callback(**{event:stop})
    breaker.order = order
    try:
        with learn.added_cbs(breaker): learn.fit(1)
    except error: return
    except RuntimeError as e:
        if 'on purpose' not in str(e): raise

@pytest.mark.parametrize('name', EVERY)
def test_an_error_at_any_event_leaves_nothing_behind(name):
    "No hook, no entry of the learner, no changed mode; weights as before the step, and training goes on as if nothing had been"
    learn,plain = learner(callback(name)),learner()
    learn.fit(1)
    plain.fit(1)
    want = state(learn)
    for event in EVENTS:
        for error,order in ((RuntimeError, -100), (KeyboardInterrupt, 100)):
            before = weights(learn)
            for l in (learn, plain):
                l.model.train()
                stopped(l, event, error, order)
            assert state(learn)==want, f"{error.__name__} in {event}"
            assert [m.training for m in learn.model.modules()]==[m.training for m in plain.model.modules()], event
            now = dict(zip(learn.model.state_dict(), zip(before, weights(learn))))
            trained = [k for k,_ in learn.model.named_parameters()]
            if event in BEFORE_THE_STEP: assert all(torch.equal(*now[k]) for k in trained), f"{error.__name__} in {event}"
            assert all(p.isfinite().all() for p in learn.model.parameters())
    learn.fit(1)
    assert state(learn)==want

@pytest.mark.parametrize('name', NAMES)
def test_an_error_in_the_penalty_leaves_nothing_behind(name):
    learn = learner(regularizer(name))
    learn.fit(1)
    want,before,cb = state(learn),weights(learn),learn.cbs.filter(risinstance(Regularizer))[0]
    def broken(): raise KeyboardInterrupt
    cb.penalty = broken
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    del cb.penalty
    assert state(learn)==want and all(torch.equal(a, b) for a,b in zip(before, weights(learn)) if a.is_floating_point() and a.shape!=(6,))
    learn.fit(1)

def all_at_once(): return [MHE(), CoMHE('random', k=4, first_layer='project'), PhantomEmbeddings(queue=3, k=2), TargetedSparsity(), SpectralPenalty(),
    SparsityMonitor(share=1.)]

def test_a_thousand_fits_that_are_cancelled_leak_nothing():
    "Hooks, tensors and objects of the package, after a hundred fits and after a thousand"
    learn,chance = learner(*all_at_once(), n_train=16, bs=8),random.Random(0)
    def stop(cb): raise CancelFitException()
    def alive():
        gc.collect()
        found = gc.get_objects()
        return sum(isinstance(o, torch.Tensor) for o in found),sum(str(type(o).__module__).startswith('phantom_nb') for o in found),len(found)
    for i in range(1000):
        with learn.added_cbs(Callback(**{chance.choice(EVENTS[3:9]):stop})): learn.fit(1)
        if i==99: before = alive()
    assert _n_hooks(learn.model)==0
    tensors,own,everything = [b-a for a,b in zip(before, alive())]
    assert tensors<=40 and own<=5 and everything<2000, (tensors, own, everything)


# The learning rate finder

def same(a, b):
    "Whether two states are alike, tensors bit for bit"
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a)==len(b) and all(map(same, a, b))
    return a==b or a!=a and b!=b

@pytest.mark.parametrize('make', [*[partial(regularizer, name) for name in NAMES], partial(PhantomEmbeddings, queue=3, k=2)], ids=[*NAMES, 'queue'])
def test_the_finder_leaves_the_state_of_every_method_alone(make, tmp_path):
    learn = learner(make(), path=tmp_path)
    learn.fit(1)
    cb = learn.cbs.filter(risinstance(Regularizer))[0]
    before = copy.deepcopy((cb.state_dict(), cb.records))
    learn.fit(4, cbs=LRFinder(num_it=6, stop_div=False))
    assert same((cb.state_dict(), cb.records), before)


# Compiled networks

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('when', ['before', 'after'])
def test_compiling_before_and_after_gives_the_same_gradients_or_is_refused(name, when):
    torch._dynamo.reset()
    def prepare(learn, compiled):
        if when=='after': # a fit, and then
            with learn.added_cbs(Callback(before_step=lambda cb: (_ for _ in ()).throw(CancelFitException()))): learn.fit(1)
        if compiled: learn.model.compile(backend='eager')
    want = gradients(regularizer(name), prepare=partial(prepare, compiled=False))
    try: found = gradients(regularizer(name), prepare=partial(prepare, compiled=True))
    except ValueError as e: assert 'compile' in str(e)
    else:
        for a,b in zip(want, found): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# Export

OPENED = """
import sys, warnings
if sys.argv[2]=='without': sys.modules['phantom_nb'] = None # as if it were not installed
warnings.simplefilter('ignore')
import torch
from fastai.basics import load_learner
learn = load_learner(sys.argv[1])
x = torch.linspace(-1, 1, 384).view(2, 3, 8, 8)
with torch.no_grad(): print(*[f'{v:.5f}' for v in learn.model.eval()(x).flatten().tolist()])
"""

@pytest.mark.processes
@pytest.mark.parametrize('package', ['with', 'without'])
def test_an_exported_learner_predicts_in_a_fresh_process(package, tmp_path):
    "With all kinds of callbacks on it, and images from a folder, so that fastai alone can open it"
    for i in range(24):
        (tmp_path/'abc'[i%2]).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (8,8,3), dtype='uint8')
        Image.fromarray(pixels).save(tmp_path/'abc'[i%2]/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.3, bs=8, num_workers=0, seed=0)
    model = nn.Sequential(nn.Conv2d(3, 1, 1), network()[:-1], nn.Linear(32, 2))
    learn = Learner(dls, model, opt_func=SGD, lr=.05, cbs=all_at_once(), path=tmp_path)
    learn.logger,learn.create_mbar = noop,False
    learn.remove_cbs(learn.cbs.filter(risinstance(ProgressCallback))).fit(1)
    learn.export('learner.pkl')
    assert all(isinstance(cb, TrainingCallback) for cb in learn.cbs[-6:])
    args = [sys.executable, '-W', 'ignore', '-c', OPENED, str(tmp_path/'learner.pkl'), package]
    out = subprocess.run(args, capture_output=True, text=True)
    assert out.returncode==0, out.stderr[-2000:]
    with torch.no_grad(): want = learn.model.eval()(torch.linspace(-1, 1, 384).view(2, 3, 8, 8)).flatten().tolist()
    assert out.stdout.split()[-4:]==[f'{v:.5f}' for v in want]

@pytest.mark.parametrize('make', [lambda: PhantomEmbeddings(0., 'mix'), lambda: PhantomEmbeddings(0., choose='right'), lambda: ISDA(0.)])
def test_a_weight_of_zero_leaves_a_head_with_a_spectral_norm_alone(make):
    "Whose vectors move on whenever the weight is read in training"
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(20, 10)))
    states = []
    for cbs in ([], [make()]):
        torch.manual_seed(1)
        learn = Learner(get_dls('digits', n_train=60, n_valid=20, bs=20, device='cpu'), net(), opt_func=SGD, lr=.1, cbs=cbs)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        states.append(learn.model.state_dict())
    assert all(a.equal(b) for a,b in zip(states[0].values(), states[1].values()))
