"A GPU without a GPU: fake CUDA tensors find what was left on the CPU, tensors without data find what waits for the GPU"
from contextlib import nullcontext

import pytest, torch
from fastai.basics import DataLoaders, noop
from fastai.callback.progress import ProgressCallback
from fastai.learner import Recorder
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from phantom_nb.core import Regularizer
from phantom_nb.experiments.learner import NoValidation, QuickCrossEntropy, QuickLearner, StopAtNaN, callbacks_of, optimizer_of
from phantom_nb.experiments.methods import METHODS, make_method
from phantom_nb.experiments.quantities import calibration_error
from phantom_nb.experiments.run import Run
from phantom_nb.measures import clustering, embeddings, sparsity
from phantom_nb.models import create_model
from phantom_nb.plain import attach
from phantom_nb.regularizers.comhe import CoMHE
from phantom_nb.regularizers.semantic import isda_logits, merge_moments

def penalties():
    "Methods whose term is a forward pass; backward passes and random states ask the driver, and so need a real GPU"
    for name in METHODS:
        cbs = make_method(name).cbs
        if name in ('gradient_penalty','spectral_penalty') or len(cbs)!=1 or not isinstance(cbs[0], Regularizer): continue
        if cbs[0].kind not in ('projection','second_pass'): yield name

def draw_fake(cb):
    "Projections as `CoMHE` draws them, without the generator, which needs a driver"
    cb.draw,cb.basis = 0,{}
    device = next(cb.model.parameters()).device
    for key,n in cb._shapes.items():
        if cb.projection!='group': cb.basis[key] = torch.randn(*n, device=device)
        else: cb.basis[key] = torch.arange(cb.m, device=device) if 0<cb.m<n else None

@pytest.mark.parametrize('name', list(penalties()))
def test_a_step_stays_on_the_gpu_and_never_waits(name, monkeypatch):
    monkeypatch.setattr(CoMHE, 'draw_new', draw_fake)
    (cb,) = make_method(name).cbs
    if getattr(cb, 'p_lr', 0) is None: cb.p_lr = .1 # a loop has no rate that it could take
    with FakeTensorMode() as mode, torch.device('cuda'):
        model = create_model('resnet9', n_in=3, n_out=10, size=(32,32), width=.25)
        x,y = torch.randn(8,3,32,32),torch.arange(8)
    with mode, attach(model, cb, total=20) as penalty:
        for _ in range(3):
            loss = F.cross_entropy(model(x), y)+penalty(y)
            assert loss.device.type=='cuda' and loss.shape==()
        cb.records.clear() # they are read when training ends, and may wait then

def test_the_check_finds_what_it_looks_for():
    with FakeTensorMode():
        x = torch.randn(4, device='cuda')
        with pytest.raises(Exception, match='_local_scalar_dense'): x.sum().item()
        with pytest.raises(Exception, match='[dD]evice'): x+torch.ones(4)
        with pytest.raises(Exception, match='unique'): x.unique()


# Whole training steps, the backward pass and the optimizer included: on tensors that have no data nothing can wait for data

class Batches(list):
    "A loader of batches without data"
    device,augment,after_batch,bs = torch.device('meta'),None,None,8
    dataset = [0]*24
    def new(self, *args, **kwargs): return self

def learner(name):
    "The engine's learner on tensors without data"
    pieces = make_method(name)
    for cb in pieces.cbs:
        if getattr(cb, 'p_lr', 0) is None: cb.p_lr = .1
    with torch.device('meta'):
        model = create_model('resnet9', n_in=3, n_out=10, size=(32,32), width=.25, dropout=pieces.dropout, norm=pieces.norm)
        batches = Batches([(torch.randn(8, 3, 32, 32), torch.arange(8))]*3)
    run,dls = Run(method=name),DataLoaders(batches, batches)
    dls.c = 10
    learn = QuickLearner(dls, model, pieces.loss_func or QuickCrossEntropy(), optimizer_of(run, pieces), lr=.1,
        cbs=[*callbacks_of(run, model), *pieces.cbs])
    learn.logger,learn.create_mbar = noop,False
    # they look at the loss when an epoch ends, or a picture of it
    return learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, (ProgressCallback, Recorder, StopAtNaN))])

@pytest.fixture
def no_data(monkeypatch):
    "What PyTorch lacks for tensors without data, and what a fit reads when it ends"
    monkeypatch.setattr(CoMHE, 'draw_new', draw_fake)
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda *args: False)
    monkeypatch.setattr(torch, 'get_autocast_dtype', lambda *args: torch.float32)
    monkeypatch.setattr(Regularizer, 'after_train', lambda cb: None)

AUGMENT = 'randaugment','trivial_augment' # torchvision's, image by image
@pytest.mark.parametrize('name', [name for name in METHODS if name not in (*AUGMENT, 'cutmix')])
def test_a_training_step_never_waits(name, no_data):
    "Forward, penalty, backward, optimizer and every callback's events, three steps"
    learn = learner(name)
    if name=='targeted_sparsity': learn.targeted_sparsity.layers = 'all' # 'auto' looks once an epoch
    learn.fit(1)
    assert learn.train_iter==3

def test_fastais_cutmix_waits_and_is_found(no_data):
    with pytest.raises(RuntimeError, match='(?s)CutMix.*item'): learner('cutmix').fit(1)

def test_a_wait_of_ones_own_is_found(no_data):
    class Waits(NoValidation):
        def after_loss(self): self.loss.item()
    with pytest.raises(RuntimeError, match='(?s)Waits.*item'): learner('mhe').fit(1, cbs=Waits())


# Measures may wait, for they end in numbers. They run on a device that is made of Python: its tensors meet none of the CPU's

class OnDevice(Tensor):
    "A tensor that says it is elsewhere ('meta' is the one device that needs no driver)"
    @staticmethod
    def __new__(cls, x): return Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=x.dtype, device='meta')
    def __init__(self, x): self.x = x
    def tolist(self): return self.x.tolist()
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): raise AssertionError(f"{func} outside of the device")

class Device(TorchDispatchMode):
    "Compute with tensors of the device, refuse to mix them with others, and count what waits"
    waits = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        here = [t for t in tensors if isinstance(t, OnDevice)]
        others = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim]
        copies = func._schema.name in ('aten::copy_', 'aten::_to_copy')
        if here and others and not copies: raise AssertionError(f"{func} mixes the CPU and the device")
        to = kwargs.get('device')
        to_cpu = to is not None and torch.device(to).type=='cpu'
        leaves = func._schema.name=='aten::_local_scalar_dense' or copies and bool(here) and to_cpu
        self.waits += leaves
        if to is not None: kwargs['device'] = 'cpu'
        def bare(t): return t.x if isinstance(t, OnDevice) else t
        out = func(*tree_map(bare, args), **tree_map(bare, kwargs))
        stays = not to_cpu if to is not None else bool(here)
        known = {id(t.x):t for t in here}
        def put(t): return known[id(t)] if id(t) in known else OnDevice(t)
        return tree_map(lambda t: put(t) if isinstance(t, Tensor) else t, out) if stays else out

def rows(seed=0): return torch.randn(24, 8, generator=torch.Generator().manual_seed(seed))
Y = torch.arange(24)%4
MEASURES = dict(silhouette=lambda x, y: clustering.silhouette_cosine(x, y), spread=lambda x, y: clustering.cosine_distance_std(x),
    c1=lambda x, y: clustering.subclass_selectivity([x], y%2, y), c2=lambda x, y: clustering.subclass_silhouette([x], y%2, y),
    c3=lambda x, y: clustering.variance_ratio([x], y), c4=lambda x, y: clustering.distance_spread_ratio([x], y),
    classes=lambda x, y: clustering.class_table([x], y).to_numpy().sum(),
    c0=lambda x, y: clustering.interpolation_drop(lambda b: b.softmax(1), x, y%2, y, torch.Generator().manual_seed(0)),
    metrics=lambda x, y: embeddings.embedding_metrics(x, x[:,:4], y)['margin'], within=lambda x, y: embeddings.within_class_share(x, y),
    margins=lambda x, y: embeddings.class_margins(x, y, 5).sum(), calibration=lambda x, y: calibration_error(x, y),
    units=lambda x, y: sparsity.activation_sparsity(x), correlation=lambda x, y: sparsity.filter_correlation(x),
    dead=lambda x, y: sparsity.dead_units(x), moments=lambda x, y: merge_moments(merge_moments(None, x, y, 4), x, y, 4)[2].sum(),
    logits=lambda x, y: isda_logits(x[:,:4], y, x[:4], merge_moments(None, x, y, 4, True)[2]).sum())

def meter(x, y):
    found = sparsity.SparsityMeter()
    found.add(x)
    return found.values()['units']
MEASURES['meter'] = meter

def bare(value): return value.x if isinstance(value, OnDevice) else torch.as_tensor(value)

@pytest.mark.parametrize('name', MEASURES)
@torch.no_grad()
def test_measures_leave_nothing_on_the_cpu(name, monkeypatch):
    "The same values as on the CPU; `as_subclass` would leave the device made of Python"
    f = MEASURES[name]
    want = f(rows(), Y)
    monkeypatch.setattr(Tensor, 'as_subclass', lambda x, cls: x)
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())
    with Device(): found = f(OnDevice(rows()), OnDevice(Y))
    assert torch.allclose(bare(found).double(), bare(want).double(), atol=1e-6)

def test_the_device_finds_what_is_mixed_and_what_waits():
    with Device() as device, torch.no_grad():
        x = OnDevice(rows())
        assert x.device.type=='meta' and isinstance(torch.arange(3, device=x.device)+1, OnDevice)
        with pytest.raises(AssertionError, match='mixes'): x+rows()
        with pytest.raises(AssertionError, match='mixes'): x[torch.arange(3)]
        assert not device.waits
        x.sum().item(), x.cpu()
        assert device.waits==2
