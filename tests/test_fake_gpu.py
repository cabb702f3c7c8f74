"A GPU without a GPU: forward passes and penalties on fake CUDA tensors find what was left on the CPU, and what waits for the GPU"
import pytest, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from phantom_nb.core import Regularizer
from phantom_nb.experiments.methods import METHODS, make_method
from phantom_nb.models import create_model
from phantom_nb.plain import attach
from phantom_nb.regularizers.comhe import CoMHE

def penalties():
    "Methods whose term is a forward pass; backward passes and random states ask the driver, and so need a real GPU"
    for name in METHODS:
        cbs = make_method(name).cbs
        if name in ('gradient_penalty','spectral_penalty') or len(cbs)!=1 or not isinstance(cbs[0], Regularizer): continue
        if cbs[0].kind not in ('projection','second_pass'): yield name

def draw_fake(cb):
    "Projections as `CoMHE` draws them, without the generator, which needs a driver"
    cb.draw,cb.basis = 0,{}
    for key,n in cb._shapes.items():
        if cb.projection!='group': cb.basis[key] = torch.randn(*n, device='cuda')
        else: cb.basis[key] = torch.arange(cb.m, device='cuda') if 0<cb.m<n else None

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
