"The energy against the authors' recorded numbers, a loop, and itself in other shapes; its memory; the callback on odd networks"
import json, math, subprocess, sys
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
from fastai.basics import Learner
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from phantom_nb.contract import check_regularizer
from phantom_nb.core import read_weight, select_layers
from phantom_nb.data import get_dls
from phantom_nb.experiments.bench import plain_energy
from phantom_nb.plain import attach
from phantom_nb.regularizers.energy import _fits_padding
from phantom_nb.regularizers.hyperspherical import MHE, CoMHE, authors_factors, hyperspherical_energy
from phantom_nb.regularizers.orthogonality import Orthogonality, SquaredCosine
from phantom_nb.regularizers.smoothness import SpectralPenalty

REF = Path(__file__).parent/'reference'
ARRAYS = np.load(REF/'hyperspherical.npz')
CASES = [c for c in json.loads((REF/'hyperspherical.json').read_text())['cases'] if c['kind'] in ('hidden','final')]
FORMS = [dict(s=s, half_space=h, angular=a) for s in (0,1,2,.7,5) for h in (False,True) for a in (False,True)]

class Operations(TorchDispatchMode):
    "Count what is launched"
    n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.n += 1
        return f(*args, **(kwargs or {}))

def neurons(key): return torch.from_numpy(np.ascontiguousarray(ARRAYS[key].reshape(-1, ARRAYS[key].shape[-1]).T))

@pytest.mark.parametrize('c', CASES, ids=lambda c: c['key'])
def test_parity_with_the_authors_code(c):
    o,w = dict(s=int(c['power'][-1]), angular=c['power'][0]=='a'),neurons(c['w']).requires_grad_()
    factor = authors_factors(**o)['output' if c['kind']=='final' else 'hidden']
    e = factor*hyperspherical_energy(w, half_space=c.get('model')=='half_mhe', eps=1e-4, **o)
    assert abs(e.item()/c['loss']-1) < 1e-5
    if f"g_{c['key']}" in ARRAYS:
        g = neurons(f"g_{c['key']}")
        assert (torch.autograd.grad(e, w)[0]-g).abs().max() < 1e-4*g.abs().max()

def loop(w, s, half_space, angular, eps=0.):
    if half_space: w = torch.cat([w,-w])
    w = [o/(o.square().sum()+eps).sqrt() for o in w]
    t = [(a@b).clamp(-1, 1).acos()/math.pi+eps if angular else (a-b).norm() for i,a in enumerate(w) for b in w[:i]]
    return torch.stack([-o.log() if s==0 else o**-s for o in t]).mean()

@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 9), d=st.integers(2, 6), form=st.sampled_from(FORMS), seed=st.integers(0, 10**6))
def test_against_a_loop(n, d, form, seed):
    w = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    e = hyperspherical_energy(w, **form)
    # arccos at a mirror image, and 2-2g of two near neurons, keep half of the sixteen digits
    assert abs(e-loop(w, **form)) < 1e-6*(1+abs(e))

@pytest.mark.parametrize('d', [12, 600], ids=['gradient', 'matrix'])
@pytest.mark.parametrize('form', FORMS, ids=str)
def test_panels_agree_with_autograd(form, d):
    "600 neurons make four panels, whether the gradient or M is kept; the plain differentiable formula is the oracle"
    w = torch.randn(600, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    x = torch.cat([w,-w]) if form['half_space'] else w
    x = x/(x.square().sum(1, keepdim=True)+1e-4).sqrt()
    i,j = torch.triu_indices(len(x), len(x), 1)
    g = (x@x.T)[i,j]
    t = g.acos()/math.pi+1e-4 if form['angular'] else (2-2*g).sqrt()
    oracle = (-t.log() if form['s']==0 else t**-form['s']).mean()
    e = hyperspherical_energy(w, eps=1e-4, **form)
    assert abs(e/oracle-1) < 1e-10
    a,b = torch.autograd.grad(e, w)[0],torch.autograd.grad(oracle, w)[0]
    assert (a-b).abs().max() < 1e-8*b.abs().max()

DTYPES = {torch.float64:30, torch.float32:20, torch.bfloat16:15, torch.float16:2} # and powers of ten that keep all digits (lengths below 1e-33 count as zero)

@settings(max_examples=150, deadline=None)
@given(n=st.integers(2, 12), d=st.integers(2, 40), form=st.sampled_from([f for f in FORMS if not f['angular']]), dtype=st.sampled_from(list(DTYPES)),
    power=st.floats(-1, 1), zeros=st.integers(0, 2), seed=st.integers(0, 10**6))
def test_every_type_and_scale_against_float64(n, d, form, dtype, power, zeros, seed):
    "To first order a cosine that is off by delta moves f(u) by 2|f'(u)|delta; delta is within 4+sqrt(d) units in the last place"
    w = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w[n-min(zeros, n-1):] = 0
    w = (w*10**(power*DTYPES[dtype])).to(dtype)
    e,exact = hyperspherical_energy(w, **form).double(),w.double()
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    exact = exact/exact.abs().amax().clamp_min(1e-300)
    exact = exact/exact.norm(dim=1, keepdim=True).clamp_min(1e-30)
    x = torch.cat([exact,-exact]) if form['half_space'] else exact
    i,j = torch.triu_indices(len(x), len(x), 1)
    u,s = 2-2*(x@x.T)[i,j],form['s']
    f = -u.log()/2 if s==0 else u**(-s/2)
    slope = 1/(2*u) if s==0 else s/2*u**(-s/2-1)
    delta = (4+d**.5)*eps
    assume((u>100*delta).all()) # first order ends there
    assert abs(e-f.mean()) <= 2*delta*slope.mean() + 8*eps*f.abs().mean()

@settings(max_examples=100, deadline=None)
@given(n=st.integers(2, 9), d=st.integers(1, 6), form=st.sampled_from(FORMS),
    dtype=st.sampled_from(list(DTYPES)), power=st.floats(-1, 1), seed=st.integers(0, 10**6))
def test_degenerate_rows_in_any_order(n, d, form, dtype, power, seed):
    "Copies, opposites and zeros: finite, and the order of the rows does not matter"
    gen = torch.Generator().manual_seed(seed)
    factors = torch.tensor([0., 1., -1., 2.])[torch.randint(4, (n,1), generator=gen)]
    w = torch.randn(3, d, generator=gen)[torch.randint(3, (n,), generator=gen)]*factors
    w = (w.double()*10**(power*min(DTYPES[dtype], 30))).to(dtype)
    order,energies = torch.randperm(n, generator=gen),[]
    for x in (w, w[order]):
        x = x.clone().requires_grad_()
        e = hyperspherical_energy(x, **form)
        g, = torch.autograd.grad(e, x)
        assert e.isfinite() and g.isfinite().all()
        energies.append(e.item())
    assert abs(energies[0]-energies[1]) <= 1e-3*abs(energies[0])+1e-6 # the cap keeps the last digits of copies out

def test_groups_are_a_mean_of_their_own():
    w = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    e,each = hyperspherical_energy(w, half_space=True),torch.stack([hyperspherical_energy(o, half_space=True) for o in w]).mean()
    assert torch.allclose(e, each)
    assert torch.allclose(*[torch.autograd.grad(o, w)[0] for o in (e, each)])

@pytest.mark.parametrize('d', [3, 6])
def test_second_derivative_through_an_unrolled_step(d):
    "The gradient through one descent step on the energy, against finite differences"
    w = torch.randn(5, d, dtype=torch.float64, requires_grad=True)
    def unrolled(w):
        g, = torch.autograd.grad(hyperspherical_energy(w), w, create_graph=True)
        return hyperspherical_energy(w-.1*g, half_space=True)
    assert torch.autograd.gradcheck(unrolled, w)

def test_functional_transforms():
    w = torch.randn(6, 4)
    g = torch.func.grad(partial(hyperspherical_energy, half_space=True))(w)
    x = w.clone().requires_grad_()
    assert torch.allclose(g, torch.autograd.grad(hyperspherical_energy(x, half_space=True), x)[0])

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('form', FORMS, ids=str)
def test_finite_for_degenerate_rows(form, dtype):
    w = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    w[1],w[2],w[3],w[4],w[5] = w[0],-w[0],0,w[0]*(1+1e-6),1e-4*w[6]
    for x in (w, w[:1].repeat(4, 1), torch.zeros(4, 9)):
        x = x.to(dtype).requires_grad_()
        e = hyperspherical_energy(x, **form)
        g, = torch.autograd.grad(e, x)
        assert e.dtype==torch.float32 and e.isfinite() and g.isfinite().all()

def test_equal_neurons_feel_no_force_but_near_ones_do():
    w = torch.tensor([[1.,0.,0.], [1.,0.,0.], [0.,0.,0.], [0.,1.,0.]], requires_grad=True)
    g, = torch.autograd.grad(hyperspherical_energy(w), w)
    assert torch.allclose(g[0], g[1]) and (g[2]==0).all() and g.norm() < 1
    near = torch.tensor([[1.,0.,0.], [1.,.01,0.]], requires_grad=True)
    g, = torch.autograd.grad(hyperspherical_energy(near), near)
    assert g[0,1]>1e3 and g[1,1]<-1e3

@pytest.mark.parametrize('d', [12, 60], ids=['gradient', 'matrix'])
@pytest.mark.parametrize('form', FORMS, ids=str)
def test_a_layer_has_no_scale(form, d):
    "Any common factor gives the same energy and gradient, in float32, a short and a zero neuron included; and w.grad(w) = 0"
    w = torch.randn(40, d, generator=torch.Generator().manual_seed(0))
    w[3],w[4],w[5] = 1e-5*w[3],2.5e-7*w[4],0
    energies,grads = [],[]
    for factor in (1., 1e-25, 1e25, 1e-12):
        x = (factor*w).requires_grad_()
        e = hyperspherical_energy(x, **form)
        g, = torch.autograd.grad(e, x)
        energies.append(e.item())
        grads.append(factor*g.double())
    assert all(abs(e/energies[0]-1)<1e-5 for e in energies)
    assert all(g.isfinite().all() and (g-grads[0]).norm()<1e-3*grads[0].norm() for g in grads)
    assert abs((grads[0]*w).sum()) < 1e-5*(grads[0].norm()*w.norm())

@pytest.mark.parametrize('d', [12, 60], ids=['gradient', 'matrix'])
def test_short_neurons_are_not_torn_away(d):
    "A neuron of length 2.5e-7 gets at most a thousand times the force of the others, a millionth was five million before"
    w = torch.randn(40, d, generator=torch.Generator().manual_seed(0))
    w[3] *= 2.5e-7/w[3].norm()
    for form in FORMS:
        x = w.clone().requires_grad_()
        norms = torch.autograd.grad(hyperspherical_energy(x, **form), x)[0].norm(dim=1)
        assert norms[3] < 3e3*norms.median()

@pytest.mark.parametrize('shape', [(7, 4), (4, 7)], ids=str)
def test_gradient_with_short_neurons_is_exact(shape):
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w[2] *= 1e-5
    def plain(w, half_space):
        x = w/torch.maximum(w.norm(dim=1), 1e-3*w.square().sum(1).mean().sqrt())[:,None]
        if half_space: x = torch.cat([x,-x])
        i,j = torch.triu_indices(len(x), len(x), 1)
        return (2-2*(x@x.T)[i,j]).reciprocal().mean()
    for half_space in (False,True):
        x = w.clone().requires_grad_()
        es = [f(x, half_space=half_space) for f in (hyperspherical_energy, plain)]
        a,b = [torch.autograd.grad(e, x)[0] for e in es]
        assert abs(es[0]-es[1])<1e-12 and (a-b).abs().max()<1e-9*b.abs().max()

def test_autocast_does_not_reach_in():
    w = torch.randn(30, 40)
    with torch.autocast('cpu', dtype=torch.bfloat16): e = hyperspherical_energy(w, half_space=True)
    assert torch.equal(e, hyperspherical_energy(w, half_space=True))

@pytest.mark.parametrize('args,what', [
    ((torch.ones(1, 3),), r'\(1, 3\).*n>=2'), ((torch.ones(4, 0),), r'\(4, 0\).*d>=1'),
    ((torch.ones(0, 4, 3),), r'\(0, 4, 3\)'), ((torch.ones(3),), r'\(3,\)'),
    ((torch.ones(2, 3, dtype=torch.long),), 'int64'), ((torch.eye(3), -1.), 's=-1.0'),
    ((torch.eye(3), 11), 's=11'), ((torch.eye(3), 2., False, False, -1.), 'eps=-1.0')])
def test_bad_input_is_refused(args, what):
    with pytest.raises(ValueError, match=what): hyperspherical_energy(*args)

@pytest.mark.processes
def test_memory_of_twenty_thousand_neurons():
    "The plain formula would need four matrices of 6.4 GB; 600 MB is the bound the design sets"
    code = "from phantom_nb.experiments.bench import _peak_mb; print(_peak_mb(20000, 512, 'cpu'))"
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout
    assert 80 < float(out.split()[-1]) < 600

def test_plain_program_is_the_same_function():
    w = torch.randn(40, 16, dtype=torch.float64)
    assert abs(plain_energy(w)-hyperspherical_energy(w, half_space=True, eps=1e-4)) < 1e-12


class Odd(nn.Module):
    "Grouped, depthwise and transposed convolutions, and a head"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = nn.Conv2d(1, 8, 3),nn.Conv2d(8, 8, 3, groups=2),nn.Conv2d(8, 8, 3, groups=8)
        self.d,self.fc = nn.ConvTranspose2d(8, 4, 3),nn.Linear(4, 10)
    def forward(self, x): return self.fc(self.d(self.c(self.b(self.a(x)).relu())).mean((2,3)))

def fit(model, cb, epochs=1):
    learn = Learner(get_dls('digits', n_train=64, n_valid=20), model, cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn

def test_odd_layers_and_authors_factors():
    learn = fit(Odd(), MHE.paper(half_space=True, s=0.))
    assert list(learn.mhe.selected) == ['a','b','d','fc']
    e,m = {k:v.item() for k,v in learn.mhe.energies().items()},learn.model
    expected = hyperspherical_energy(m.b.weight.view(2, 4, -1), s=0, half_space=True, eps=1e-4).item()
    assert abs(e['b']-expected)<1e-6
    assert abs(e['fc']-hyperspherical_energy(m.fc.weight, s=0, eps=1e-4).item())<1e-6
    assert abs(learn.mhe.penalty().item() - 2*(e['a']+e['b']+e['d']) - 20*e['fc']) < 1e-5

def test_layers_of_equal_shape_go_through_together():
    "As many launches as there are shapes, and the same energies as layer by layer"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), *[m for _ in range(4) for m in (nn.Linear(32, 32), nn.ReLU())], nn.Linear(32, 10))
    mhe = fit(model, MHE(half_space=True)).mhe
    assert [len(names) for names in mhe.stacks.values()] == [1, 4, 1]
    for name,e in mhe.energies().items():
        w = mhe.selected[name].weight
        assert abs(e-hyperspherical_energy(w, half_space=w.shape[0]!=10)) < 1e-6

def test_large_layers_go_through_as_they_lie():
    "On a CPU neither channels-last weights nor layers of one shape are copied, and the energies stay what they are"
    model = nn.Sequential(nn.Conv2d(1, 64, 3), nn.Conv2d(64, 128, 3), nn.Conv2d(128, 128, 3), nn.Conv2d(128, 128, 3), nn.Conv2d(128, 9, 3))
    want = [hyperspherical_energy(conv.weight.flatten(1).double(), half_space=i<4) for i,conv in enumerate(model)]
    mhe = MHE(half_space=True)
    with attach(model.to(memory_format=torch.channels_last), mhe):
        assert all(torch.isclose(e.double(), w, rtol=1e-6) for e,w in zip(mhe.energies().values(), want, strict=True))
        for names in mhe.stacks.values():
            assert [mhe.stack_weights(names).data_ptr()]==[mhe.selected[name].weight.data_ptr() for name in names]

@pytest.mark.parametrize('make', [partial(MHE, half_space=True), partial(MHE, s=0.), partial(CoMHE, 'random', k=5), partial(CoMHE, 'expected', k=5)])
def test_padded_as_on_a_gpu(monkeypatch, make):
    "All layers in one go give the energies and gradients of one by one, in fewer operations (views counted)"
    import phantom_nb.regularizers.energy as energy
    model = nn.Sequential(nn.Flatten(), *[nn.Linear(a, b) for a,b in ((64,32), (32,40), (40,7), (7,40), (40,12), (12,10))])
    found = {}
    for padded in (False, True):
        if padded: monkeypatch.setattr(energy, '_fits_padding', lambda ws: True)
        cb = make()
        with attach(model, cb) as penalty:
            model(torch.zeros(1, 64))
            with Operations() as counted: grads = torch.autograd.grad(penalty(), list(model.parameters()), allow_unused=True)
        found[padded] = cb.records[0][3],grads,counted.n
    assert abs(found[True][0]-found[False][0])<1e-5*abs(found[False][0])
    grads = [pair for pair in zip(found[True][1], found[False][1]) if pair[0] is not None]
    assert all((a-b).abs().max()<1e-5*b.abs().max() for a,b in grads) # neurons that nearly meet in few dimensions have large ones
    assert found[True][2]<.6*found[False][2]

def test_padding_is_for_small_layers_on_a_gpu():
    with FakeTensorMode():
        small,large = [[torch.empty(1, n, 8, device='cuda') for n in (4, size)] for size in (9, 3000)]
        assert _fits_padding(small) and not _fits_padding(large) and not _fits_padding(small[:1])
        assert _fits_padding([torch.empty(1, 200, 8, device='cuda')]*2) and _fits_padding([w.double() for w in small])
        assert not _fits_padding([small[0], small[1].half()]) and not _fits_padding([w.half() for w in small])
    assert not _fits_padding([torch.empty(1, 4, 8)]*2)

def test_energies_before_a_fit_say_what_to_do():
    with pytest.raises(ValueError, match='fit first'): MHE().energies()

def test_layers_of_one_input_have_no_angles():
    "Sixteen copies of left and right would be at distance 0, and drown the rest"
    model = nn.Sequential(nn.Conv2d(1, 16, 1), nn.Conv2d(16, 8, 3))
    with attach(model, mhe := MHE()): assert list(mhe.energies())==['1'] and mhe.penalty()<20
    with pytest.raises(ValueError, match='or one input'), attach(nn.Sequential(nn.Conv2d(1, 16, 1)), MHE()): pass

def test_a_shared_weight_is_the_output_layer_if_the_last_module_has_it():
    first,middle,last = [nn.Linear(8, 8) for _ in range(3)]
    last.weight = first.weight
    net = nn.ModuleDict(dict(first=first, middle=middle, last=last))
    assert list(select_layers(net, 'output'))==['first'] and list(select_layers(net, 'hidden'))==['middle']
    with attach(net, mhe := MHE(half_space=True)):
        want = 10*hyperspherical_energy(first.weight)+hyperspherical_energy(middle.weight, half_space=True)
        assert torch.isclose(mhe.penalty(), want)

@pytest.mark.parametrize('make', [MHE, SquaredCosine, CoMHE, partial(CoMHE, 'angle', k=4), partial(CoMHE, 'group', k=4), Orthogonality, SpectralPenalty],
    ids=lambda f: f.func.__name__+f.args[0] if isinstance(f, partial) else f.__name__)
def test_reading_a_weight_does_not_train_it(make):
    "Each reading of a spectral norm moves its vectors, in training"
    def trained(*cbs):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), spectral_norm(nn.Conv2d(8, 8, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            spectral_norm(nn.Linear(8, 10)))
        fit(net, list(cbs))
        for cb in cbs: cb.penalty()
        return {k:v.clone() for k,v in net.state_dict().items()},net
    (plain,_),(idle,net) = trained(),trained(make(lam=0.))
    assert all(torch.equal(plain[k], idle[k]) for k in plain)
    assert all(m.training for m in net.train().modules())
    net(torch.randn(1, 1, 8, 8))
    u = net[2].parametrizations.weight[0]._u.clone()
    used = net[2].parametrizations.weight[0].eval()(net[2].parametrizations.weight.original)
    assert torch.equal(read_weight(net.train()[2]), used) and torch.equal(u, net[2].parametrizations.weight[0]._u)

def test_only_depthwise_is_refused():
    with pytest.raises(ValueError, match="one neuron a group"): fit(Odd(), MHE(layers='c'))

def test_energy_falls_where_the_penalty_is_felt():
    def last(lam):
        torch.manual_seed(0)
        return fit(Odd(), MHE(lam=lam, layers='fc'), epochs=20).mhe.records[-1][3]
    assert last(10.) < last(0.)

@pytest.mark.parametrize('option', [dict(s=-1.), dict(hidden=-1.), dict(output=float('nan')), dict(eps=-1.)], ids=str)
def test_callback_refuses_at_construction(option):
    with pytest.raises(ValueError, match=next(iter(option))): MHE(**option)

def test_contract_of_the_paper_preset(): assert set(check_regularizer(partial(MHE.paper, half_space=True)).result) == {'kept'}

@pytest.mark.parametrize('new', [False, True], ids=['set_float32_matmul_precision','fp32_precision'])
def test_products_are_full_float32(monkeypatch, new):
    "Forward and backward, whatever the network was trained with; and the setting is put back"
    import phantom_nb.regularizers.energy as energy
    seen,panels,backend = [],energy._panels,torch.backends.mkldnn.matmul
    def watched(*args):
        seen.append(backend.fp32_precision)
        return panels(*args)
    monkeypatch.setattr(energy, '_panels', watched)
    before = backend.fp32_precision
    try:
        if new: backend.fp32_precision = 'bf16'
        else: torch.set_float32_matmul_precision('medium')
        w = torch.randn(4, 5, requires_grad=True)
        g, = torch.autograd.grad(hyperspherical_energy(w), w, create_graph=True)
        g.sum().backward()
        assert seen==['ieee','ieee'] and backend.fp32_precision=='bf16'
        assert new or torch.get_float32_matmul_precision()=='medium'
    finally:
        if new: backend.fp32_precision = before
        else: torch.set_float32_matmul_precision('highest')

@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('eps', [None, .1])
def test_padding_lifts_short_neurons_alike(monkeypatch, half, eps):
    "Short and zero neurons have a radial force of their own, in layers that are padded too"
    import phantom_nb.regularizers.energy as energy
    gen,found = torch.Generator().manual_seed(0),[]
    ws = [torch.randn(1, *shape, generator=gen, dtype=torch.float64) for shape in ((6,5), (4,7))]
    ws[0][0,1] *= 1e-5
    ws[1][0,2] = 0
    for padded in (False, True):
        monkeypatch.setattr(energy, '_fits_padding', lambda ws: padded)
        xs = [w.clone().requires_grad_() for w in ws]
        es = energy.energies_together(xs, [half, half], energy.Form(eps=eps))
        found.append([*es, *torch.autograd.grad(sum(e.sum() for e in es), xs)])
    for a,b in zip(*found): assert (a-b).abs().max()<=1e-9*b.abs().max()

def test_factors_of_layers_may_be_small_but_not_negative():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    cb = MHE(hidden=.5, output=0.)
    fit(model, cb)
    assert abs(cb.penalty()-.5*cb.energies()['1'])<1e-6
    for name in ('hidden','output'):
        with pytest.raises(ValueError, match=f'{name}=-0.5'): MHE(**{name:-.5})

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision_are_those_of_float32_and_never_infinite(dtype):
    torch.manual_seed(0)
    w = torch.randn(6, 5).to(dtype)
    def gradient(w, times=1.): return torch.autograd.grad(times*hyperspherical_energy(w.requires_grad_()).float(), w)[0]
    assert torch.allclose(gradient(w).float(), gradient(w.float()), rtol=.02, atol=1e-3)
    huge = gradient(w, 1e38) # beyond the range of either: the largest number with the right sign
    assert huge.isfinite().all() and torch.equal(huge.sign(), gradient(w).sign())

def test_groups_that_do_not_fit_together_count_alike(monkeypatch):
    import phantom_nb.regularizers.energy as energy
    w = torch.randn(5, 4, 3)
    want,each = hyperspherical_energy(w),hyperspherical_energy(w, each=True)
    monkeypatch.setattr(energy, '_together', lambda w: 2)
    assert torch.isclose(hyperspherical_energy(w), want) and torch.allclose(hyperspherical_energy(w, each=True), each)

def test_layers_of_one_shape_add_up():
    "Three hidden layers of one shape count three times, the output ten times"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), *[m for _ in range(3) for m in (nn.Linear(32, 32), nn.ReLU())], nn.Linear(32, 10))
    with attach(model, MHE(1., half_space=True)) as penalty:
        model(torch.zeros(1, 64))
        layers = [m for m in model if isinstance(m, nn.Linear)]
        want = sum(hyperspherical_energy(m.weight, half_space=True) for m in layers[:-1])+10*hyperspherical_energy(layers[-1].weight)
        assert torch.isclose(penalty(), want, rtol=1e-5)
