"CoMHE against the authors' recorded numbers, a slow loop, and itself; its layers, its state, its rules"
import copy, json, math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from fastai.basics import Callback, CancelFitException, Learner
from hypothesis import given, settings, strategies as st
from torch import nn

from phantom_nb.contract import check_regularizer
from phantom_nb.core import select_layers, weight_view
from phantom_nb.data import get_dls
from phantom_nb.models import create_model
from phantom_nb.regularizers.hyperspherical import MHE, CoMHE, adversarial_energy, angle_distortion, angle_preserving_energy
from phantom_nb.plain import attach
from phantom_nb.regularizers.hyperspherical import expected_energy, group_energy, hyperspherical_energy, projected_energy
from phantom_nb.regularizers.projections import cosines, split_coordinates

REF = Path(__file__).parent/'reference'
ARRAYS = np.load(REF/'hyperspherical.npz')
FUNCTIONS = dict(random=projected_energy, angle=angle_preserving_energy, adversarial=adversarial_energy)
CASES = [c for c in json.loads((REF/'hyperspherical.json').read_text())['cases'] if c['kind'] in FUNCTIONS]
FORMS = [dict(s=s, half_space=h, angular=a) for s in (0.,1.,2.) for h in (False,True) for a in (False,True)]

def array(key): return torch.from_numpy(ARRAYS[key])
def neurons(key): return torch.from_numpy(np.ascontiguousarray(ARRAYS[key].reshape(-1, ARRAYS[key].shape[-1]).T))
def close(a, b): return (a-b).abs().max() < 1e-4*b.abs().max()
def randn(*shape, seed=0, **kw): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kw)


# The functions

@pytest.mark.parametrize('c', CASES, ids=lambda c: c['key'])
def test_parity_with_the_authors_code(c):
    key,w,p = c['key'],neurons(c['w']).requires_grad_(),array(f"P_{c['key']}").requires_grad_()
    e = FUNCTIONS[c['kind']](w, p, *([c['lr']] if 'lr' in c else []), half_space=True, eps=1e-4)
    gw,gp = torch.autograd.grad(e, (w,p))
    assert abs(e.item()/c['loss']-1) < 1e-5 and close(gw, neurons(f'g_{key}'))
    if 'p_loss' not in c: return
    l = angle_distortion(w, p, 1e-4) if c['kind']=='angle' else projected_energy(w, p, eps=1e-4)
    assert abs(l.item()/c['p_loss']-1) < 1e-5
    assert close(gp, array(f'gp_{key}')) and close(torch.autograd.grad(l, p)[0], array(f'gpl_{key}'))

def test_all_three_kinds_are_recorded(): assert sorted(c['kind'] for c in CASES)==sorted(FUNCTIONS)

def unit(x, eps): return x/(x.square().sum()+eps).sqrt()

def loop_energy(ys, s, half_space, angular, eps):
    "Pair by pair, as the definition says"
    ys = [unit(y, eps) for y in ys]
    if half_space: ys = ys+[-y for y in ys]
    t = [(a@b).acos()/math.pi+eps if angular else (2-2*a@b).sqrt() for i,a in enumerate(ys) for b in ys[:i]]
    return torch.stack([-o.log() if s==0 else o**-s for o in t]).mean()

def loop_distortion(w, p, eps):
    x,y = [unit(o, eps) for o in w],[unit(p@o, eps) for o in w]
    return torch.stack([(y[i]@y[j]-x[i]@x[j]).square() for i in range(len(w)) for j in range(len(w))]).sum().sqrt()

def loop(kind, w, p, lr, s=2., half_space=False, angular=False, eps=1e-4):
    "Each projection and each pair on its own; steps by autograd"
    res = []
    for q in p:
        if kind=='angle': q = q - lr*torch.autograd.grad(loop_distortion(w, q, eps), q, create_graph=True)[0]
        if kind=='adversarial':
            e = loop_energy([q@o for o in w], s, False, angular, eps)
            q = q + lr*torch.autograd.grad(e, q, create_graph=True)[0]
        res.append(loop_energy([q@o for o in w], s, half_space, angular, eps))
    return torch.stack(res).mean()

@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(list(FUNCTIONS)), n=st.integers(2, 6), d=st.integers(3, 7), k=st.integers(2, 6), m=st.integers(1, 3),
    form=st.sampled_from(FORMS), seed=st.integers(0, 10**6))
def test_against_a_loop(kind, n, d, k, m, form, seed):
    w,p = randn(n, d, seed=seed, dtype=torch.float64).requires_grad_(),randn(m, k, d, seed=seed+1, dtype=torch.float64).requires_grad_()
    e = FUNCTIONS[kind](w, p, *([] if kind=='random' else [.1]), eps=1e-4, **form)
    oracle = loop(kind, w, p, .1, **form)
    assert abs(e-oracle) < 1e-8*(1+abs(oracle))
    for a,b in zip(torch.autograd.grad(e, (w,p)), torch.autograd.grad(oracle, (w,p))): assert (a-b).abs().max() < 1e-6*(1e-3+b.abs().max())

@pytest.mark.parametrize('form', FORMS, ids=str)
def test_groups_against_a_loop(form):
    w = randn(5, 11, dtype=torch.float64)
    for groups in (1, 2, 3, 5):
        each = [loop_energy(list(o), **form, eps=1e-4) for o in w.tensor_split(groups, dim=1)]
        e = group_energy(w, groups, eps=1e-4, **form)
        assert abs(e-torch.stack(each).mean()) < 1e-8
        assert abs(group_energy(w, groups, reduce='max', eps=1e-4, **form)-max(each)) < 1e-8

def test_reduce_by_the_maximum():
    w,p = randn(6, 9),randn(4, 3, 9, seed=1)
    assert torch.isclose(projected_energy(w, p, reduce='max'), max(projected_energy(w, q) for q in p))

def test_groups_of_neurons_are_not_compared():
    w,p = randn(3, 5, 8, dtype=torch.float64),randn(2, 4, 8, seed=1, dtype=torch.float64)
    each = torch.stack([projected_energy(o, p) for o in w]).mean()
    assert torch.isclose(projected_energy(w, p), each)
    total = torch.stack([angle_distortion(o, p[0]) for o in w]).norm()
    assert torch.isclose(angle_distortion(w, p[0]), total)
    assert torch.isclose(angle_distortion(w, p), (total+angle_distortion(w, p[1]))/2)
    q = p[0].clone().requires_grad_()
    q = q+.1*torch.autograd.grad(projected_energy(w, q), q)[0]
    assert torch.isclose(adversarial_energy(w, p[0], .1), projected_energy(w, q))

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('form', FORMS, ids=str)
def test_finite_for_degenerate_input(form, dtype):
    w,p = randn(8, 9),randn(4, 12, 9, seed=1)
    w[1],w[2],w[3],w[4],w[5],p[1],p[3,1:] = w[0],-w[0],0,w[0]*(1+1e-6),1e-4*w[6],0,0
    p[2] -= p[2]@torch.outer(w[7], w[7])/w[7].square().sum()
    calls = [(f, (p,) if k=='random' else (p,.1)) for k,f in FUNCTIONS.items()] + [(group_energy, (4,))]
    for x in (w, w[:1].repeat(4, 1), torch.zeros(4, 9)):
        for f,a in calls:
            x = x.detach().to(dtype).requires_grad_()
            e = f(x, *a, **form)
            g, = torch.autograd.grad(e, x)
            assert e.dtype==torch.float32 and e.isfinite() and g.isfinite().all(), f.__name__

def test_autocast_does_not_reach_in():
    w,p = randn(30, 40),randn(3, 8, 40, seed=1)
    for f,a in ((projected_energy, (p,)), (angle_preserving_energy, (p,.1)), (adversarial_energy, (p,.1)), (angle_distortion, (p,)), (group_energy, (3,))):
        with torch.autocast('cpu', dtype=torch.bfloat16): e = f(w, *a)
        assert torch.equal(e, f(w, *a))
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(cosines(w), cosines(w.clone())) and cosines(w).dtype==torch.float32

@pytest.mark.parametrize('f,args', [(projected_energy, ()), (angle_preserving_energy, (.1,)), (adversarial_energy, (.1,))])
def test_compiles_in_one_graph(f, args):
    w,p = randn(20, 30).requires_grad_(),randn(3, 8, 30, seed=1)
    g = torch.compile(lambda w: f(w, p, *args, half_space=True), backend='aot_eager', fullgraph=True)
    a,b = [torch.autograd.grad(o, w)[0] for o in (g(w), f(w, p, *args, half_space=True))]
    assert (a-b).abs().max() <= 1e-6*b.abs().max()

W,P = randn(4, 6),randn(2, 3, 6)
@pytest.mark.parametrize('call,what', [(lambda: projected_energy(W, P[...,:5]), r'\(2, 3, 5\): give \(k,6\)'), (lambda: projected_energy(W[:1], P), r'\(1, 6\).*n>=2'),
    (lambda: projected_energy(W, P, reduce='sum'), "reduce='sum'"), (lambda: projected_energy(W, P, s=-1.), 's=-1.0'), (lambda: angle_preserving_energy(W, P, -1.), 'lr=-1.0'),
    (lambda: angle_preserving_energy(W, P, .1, 'sum'), "reduce='sum'"),
    (lambda: adversarial_energy(W, P, math.nan), 'lr=nan'), (lambda: group_energy(W, 7), 'groups=7'), (lambda: angle_distortion(W[0], P), r'\(6,\)')])
def test_bad_input_is_refused(call, what):
    with pytest.raises(ValueError, match=what): call()


@pytest.mark.parametrize('k', [8, 20, 40])
def test_expected_energy_is_the_mean_of_random_projections(k):
    w = (randn(10, 50, dtype=torch.float64) + .5*randn(50, seed=2, dtype=torch.float64)).requires_grad_()
    mean,e = projected_energy(w, randn(3000, k, 50, seed=1, dtype=torch.float64), half_space=True),expected_energy(w, k)
    assert abs(mean/e-1) < .02
    a,b = torch.autograd.grad(e, w)[0],torch.autograd.grad(hyperspherical_energy(w, half_space=True), w)[0]
    assert torch.allclose(a, k/(k-3)*b)

@pytest.mark.parametrize('k', [3, 4.5, True])
def test_expected_energy_refuses(k):
    with pytest.raises(ValueError, match=f'k={k}'): expected_energy(W, k)

def test_projections_have_no_scale():
    for f,a in ((projected_energy, ()), (angle_distortion, ()), (angle_preserving_energy, (0.,))):
        for c,q in ((1e-20,1.), (1e20,1.), (1.,1e-9), (1.,1e9)): assert abs(f(c*W, q*P, *a)/f(W, P, *a)-1) < 1e-4


# The callback

class Odd(nn.Module):
    "Grouped, depthwise, transposed and narrow layers, two of equal shape, and a head"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = nn.Conv2d(1, 8, 3),nn.Conv2d(8, 8, 3, groups=2),nn.Conv2d(8, 8, 3, groups=8)
        self.d,self.e,self.f = nn.Conv2d(8, 8, 1),nn.Linear(8, 24),nn.Linear(24, 24)
        self.g,self.fc = nn.Linear(24, 24),nn.Linear(24, 10)
    def forward(self, x): return self.fc(self.g(self.f(self.e(self.d(self.c(self.b(self.a(x)).relu())).mean((2,3))))))

def learner(model, *cbs, **kw): return Learner(get_dls('digits', n_train=64, n_valid=20), model, cbs=list(cbs), **kw)

def fit(learn, epochs=1, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, **kw)
    return learn

def test_layers_are_told_apart():
    cb = CoMHE(k=10)
    fit(learner(Odd(), cb))
    assert cb.roles == dict(a='half', b='project', d='half', e='half', f='project', g='project', fc='full')
    assert list(cb.energies()) == list('abdefg')+['fc'] and len(cb.basis)==2

@pytest.mark.parametrize('o', [{}, dict(share_basis=True), dict(output_layer='project'), dict(first_layer='skip', output_layer='skip'), dict(reduce='max')], ids=str)
def test_energies_layer_by_layer(o):
    "Stacks, one launch and shared bases against one call a layer"
    cb = CoMHE(k=10, m=3, eps=1e-4, **o)
    fit(learner(Odd(), cb))
    es,total = cb.energies(),0
    assert set(es) == {k for k,v in cb.roles.items() if v!='skip'}
    for stack,names in cb.stacks.items():
        for i,k in enumerate(names):
            w = weight_view(getattr(cb.model, k)).detach()
            if stack.role!='project': e = hyperspherical_energy(w, half_space=stack.role=='half', eps=1e-4)
            else:
                p = cb.basis[cb.key(stack)][0 if cb.share_basis else i]
                e = projected_energy(w, p, cb.reduce, half_space=not stack.is_output, eps=1e-4)
            assert abs(e-es[k]) < 1e-5
            total += e*(10 if stack.is_output else 1)
    cb._advanced_at = cb.steps
    assert abs(cb.penalty()-total) < 1e-4

@pytest.mark.parametrize('share', [False, True])
@pytest.mark.parametrize('kind', ['angle', 'adversarial'])
def test_learned_projections_follow_the_authors_loop(kind, share):
    "`steps` SGD updates with decay on the sum over the layers that share P, then the unrolled one"
    cb = CoMHE(kind, k=10, steps=3, unrolled=True, share_basis=share, eps=1e-4, layers=['f','g','fc'])
    cb.p_wd = 1e-2
    learn = learner(Odd(), cb, lr=0.)
    fit(learn)
    ws = {k:weight_view(getattr(cb.model, k))[0].detach() for k in 'fg'}
    (p,) = cb.basis.values()
    ps = [q[0].clone().requires_grad_() for q in p]
    opt = torch.optim.SGD(ps, .1, weight_decay=1e-2)
    def learns(w, q): return angle_distortion(w, q, 1e-4) if kind=='angle' else -projected_energy(w, q, eps=1e-4)
    cb._advanced_at = None
    penalty = cb.penalty()
    for _ in range(3):
        opt.zero_grad()
        sum(learns(w, ps[0 if share else i]) for i,w in enumerate(ws.values())).backward()
        opt.step()
    assert all(torch.allclose(a, b[0], atol=1e-5) for a,b in zip(ps, next(iter(cb.basis.values()))))
    step = [torch.autograd.grad(sum(learns(w, q) for i,w in enumerate(ws.values()) if share or i==j), q)[0] for j,q in enumerate(ps)]
    after = [q-.1*g for q,g in zip(ps, step)]
    es = [projected_energy(w, after[0 if share else i], half_space=True, eps=1e-4) for i,w in enumerate(ws.values())]
    assert abs(penalty - sum(es) - 10*hyperspherical_energy(cb.model.fc.weight, eps=1e-4)) < 1e-4

def test_looking_changes_nothing():
    def train(look):
        torch.manual_seed(0)
        learn = learner(Odd(), CoMHE(lam=10., k=10))
        if look: learn.add_cb(Callback(after_epoch=lambda cb: cb.learn.co_mhe.energies(), after_step=lambda cb: cb.learn.co_mhe.energies()))
        fit(learn, 2)
        return list(learn.model.parameters())
    assert all(map(torch.equal, train(False), train(True)))

def test_redraws_when_it_should():
    def draws(redraw):
        seen,cb = [],CoMHE(lam=0., k=10, m=1, redraw=redraw)
        watch = Callback(after_loss=lambda o: o.training and seen.append(cb.draw))
        watch.order = 10
        fit(learner(Odd(), cb, watch), 7)
        return len({*seen}),len(seen)
    assert draws(0)[0]==1
    for r in (1, 2):
        n,steps = draws(r)
        assert steps==7 and n==-(-steps//r)

@pytest.mark.parametrize('kind', ['random', 'angle', 'adversarial'])
def test_state_goes_through_a_file(kind, tmp_path):
    make = partial(CoMHE, kind, k=10, m=2, redraw=3)
    a,b = learner(Odd(), make(), path=tmp_path),learner(Odd(), make(seed=7), path=tmp_path)
    fit(a, 2)
    a.save('a')
    b.load('a')
    fit(b, 1, cbs=Callback(before_batch=lambda cb: (_ for _ in ()).throw(CancelFitException())))
    ca,cb = a.co_mhe,b.co_mhe
    ca.energies()
    cb.energies()
    assert torch.equal(ca.gen.get_state(), cb.gen.get_state()) and (ca.draw,ca.age)==(cb.draw,cb.age)
    assert all(map(torch.equal, ca.basis.values(), cb.basis.values()))

def test_foreign_state_is_refused(tmp_path):
    a = fit(learner(Odd(), CoMHE('angle', k=10), path=tmp_path))
    a.save('a')
    for o in (dict(projection='angle', k=9), dict(projection='random', k=10)):
        b = learner(Odd(), CoMHE(**o), path=tmp_path)
        b.load('a')
        with pytest.raises(ValueError, match='load them with the options they were saved with'): fit(b)
        b = learner(Odd(), CoMHE(**o), path=tmp_path)
        b.load('a')
        with pytest.raises(ValueError, match='load them with the options they were saved with'): fit(b)
    fit(learner(Odd(), CoMHE(k=8), path=tmp_path)).save('c')
    drawn = learner(Odd(), CoMHE(k=4, m=3), path=tmp_path)
    drawn.load('c')
    with pytest.raises(ValueError, match=r'\(1, 1, 8, 36\).*needs.*\(1, 3, 4, 36\)'): fit(drawn)

def test_projections_follow_the_weights():
    learn = learner(Odd().double(), CoMHE('angle', k=10))
    def widen(cb): cb.learn.xb = (cb.x.double(),)
    fit(learn, cbs=Callback(before_batch=widen))
    assert {p.dtype for p in learn.co_mhe.basis.values()} == {torch.float64}
    learn.model.float()
    learn.co_mhe.setup()
    assert {p.dtype for p in learn.co_mhe.basis.values()} == {torch.float32}

def test_with_a_compiled_network():
    "The penalty is that of the plain network; its share is not measured, see core"
    model = Odd()
    plain,learn = [learner(o, CoMHE('angle', k=10)) for o in (copy.deepcopy(model), model)]
    learn.model = torch.compile(learn.model, backend='eager')
    a,b = [fit(o).co_mhe.records[0] for o in (plain, learn)]
    assert math.isnan(b[4]) and a[4] > 0 and abs(a[3]-b[3]) < 1e-5*a[3]

@pytest.mark.parametrize('make', [CoMHE, CoMHE.paper], ids=['CoMHE','paper'])
def test_projection_comes_first(make):
    a,b = make('group', 2.),make(lam=2., projection='group')
    assert (a.projection, a.lam)==(b.projection, b.lam)==('group', 2.)

def test_drawn_groups_are_unbiased():
    "The mean over draws is the energy of all groups, and micro-batches of a step see the same draw"
    model,values = Odd(),[]
    def started(m):
        cb = CoMHE('group', k=4, m=m, first_layer='skip', output_layer='skip')
        fit(learner(model, cb, lr=0.))
        return cb
    every,drawn = started(0),started(1)
    for step in range(400):
        drawn.steps = step+1000
        values.append(drawn.penalty().item())
        assert drawn.penalty().item()==values[-1]
    values = torch.tensor(values)
    assert values.std()>0 and abs(values.mean()-every.penalty())<4*values.std()/400**.5
    assert all(pick is None for pick in every.basis.values())

@pytest.mark.parametrize('size,n', [(3, 8), (5, 8), (1, 1), (7, 8)])
def test_groups_are_whole_channels(size, n):
    "One channel of a kernel of nine numbers or more, nine channels of a 1x1"
    cb = CoMHE('group')
    cb.selected = dict(a=nn.Conv2d(8, 4, size))
    assert cb.n_groups('a', 8*size*size)==n

def test_uneven_groups_do_not_cut_channels():
    "Three channels of two numbers in two groups: two channels, and one that ends in zeros"
    w = torch.arange(1., 7.).expand(1, 1, 4, 6)
    longer,shorter = split_coordinates(w, 2, size=2)[0,:,0,0]
    assert longer.tolist()==[1, 2, 3, 4] and shorter.tolist()==[5, 6, 0, 0]
    conv = nn.Conv2d(3, 8, 3)
    with attach(nn.Sequential(conv, nn.Conv2d(8, 4, 3)), cb := CoMHE('group', k=18, m=0, first_layer='project')):
        stack = next(stack for stack in cb.stacks if stack.shape[2]==27)
        parts = cb.project_stacks({stack:cb.stack_weights(cb.stacks[stack], True)}, False)[stack][0,:,0]
    assert torch.equal(parts[0], conv.weight[:,:2].flatten(1)) and torch.equal(parts[1,:,:9], conv.weight[:,2].flatten(1)) and not parts[1,:,9:].any()

@pytest.mark.parametrize('size', [1, 3, 5, 7])
def test_groups_of_one_channel(size):
    cb = CoMHE('group', k=1)
    cb.selected = dict(a=nn.Conv2d(8, 4, size))
    assert cb.n_groups('a', 8*size*size)==8

@pytest.mark.parametrize('n,projected', [(8, False), (9, False), (10, True), (18, True), (19, True)])
def test_layers_of_one_group_are_not_projected(n, projected):
    cb = CoMHE('group', k=9)
    cb.selected,cb.first,cb.last = dict(a=nn.Linear(n, 4)),None,None
    assert cb.n_groups('a', n)==-(-n//9) and (cb.role('a', n)=='project')==projected

def test_learned_projections_lower_the_energy():
    "What is learned goes the other way than the adversary, and the gradient does not go through the step"
    ends = {}
    for kind in ('learned','adversarial'):
        cb = CoMHE(kind, k=4, first_layer='skip', output_layer='skip', seed=1)
        fit(learner(Odd(), cb, lr=0.))
        before = cb.penalty().item()
        for _ in range(20):
            cb.steps += 1
            after = cb.penalty().item()
        ends[kind] = after-before
    assert ends['learned']<0<ends['adversarial']

@pytest.mark.parametrize('kind', ['angle','adversarial','learned'])
def test_alternating_penalty_holds_its_projections_fixed(kind):
    "The gradient is that of the projected energy at the projection which the update gave; the authors' goes through one more"
    cb = CoMHE(kind, k=4, first_layer='skip', output_layer='skip', eps=1e-4)
    fit(learner(Odd(), cb, lr=0.))
    cb.penalty()
    w = [m.weight for name,m in cb.selected.items() if cb.roles[name]=='project']
    found = torch.autograd.grad(cb.penalty(), w)
    ps = {name:cb.basis[stack][i] for stack,names in cb.stacks.items() if stack.role=='project' for i,name in enumerate(names)}
    terms = [projected_energy(weight_view(cb.selected[name]), p, half_space=True, eps=1e-4) for name,p in ps.items()]
    fixed = torch.autograd.grad(sum(terms), w)
    assert all(torch.allclose(a, b, atol=1e-6) for a,b in zip(found, fixed))
    assert not CoMHE(kind).unrolled and (kind=='learned' or CoMHE.paper(kind).unrolled)

def test_projections_by_width():
    "The authors' pnd: a projection for so many neurons"
    cb = CoMHE(per_neurons=4, k=5)
    fit(learner(Odd(), cb))
    assert all(len(p[0])==max(1, stack.shape[1]//4) for stack,p in cb.basis.items()) and len({len(p[0]) for p in cb.basis.values()})>1
    with pytest.raises(ValueError, match='per_neurons=4'): CoMHE('group', per_neurons=4)

def test_expected_is_half_space_with_a_larger_weight():
    cb = CoMHE('expected', k=10)
    fit(learner(Odd(), cb))
    es = cb.energies()
    for name in 'bfg': assert abs(es[name]-expected_energy(weight_view(getattr(cb.model, name)), 10))<1e-5

def test_in_a_plain_loop():
    "The network's rate is not known there; all else is the same"
    model,x = Odd(),randn(8, 1, 8, 8)
    for kind in ('random','angle','adversarial','group','expected'):
        with attach(model, CoMHE(kind, k=10)) as penalty:
            model(x)
            first = penalty()
            first.backward()
            model(x)
            assert penalty().isfinite() and first>0
    with pytest.raises(ValueError, match='p_lr=None'): attach(model, CoMHE.paper('angle', k=10)).__enter__()

def test_paper_preset():
    cb = CoMHE.paper()
    assert (cb.projection, cb.k, cb.m, cb.redraw, cb.p_steps, cb.eps, cb.hidden, cb.output) == ('random', 40, 20, 1, 0, 1e-4, 1., 10.)
    assert cb.share_basis and not CoMHE().share_basis
    cb = CoMHE.paper('angle')
    assert (cb.k, cb.m, cb.redraw, cb.p_steps, cb.unrolled, cb.p_lr, cb.p_wd) == (30, 1, 0, 1, True, None, 1e-3*5e-4)
    cb = CoMHE.paper('group')
    assert (cb.k, cb.m, cb.redraw, cb.p_steps, cb.unrolled) == (9, 0, 0, 0, False)
    cb.learn = SimpleNamespace(opt=SimpleNamespace(hypers=[dict(lr=.1), dict(lr=.2)]))
    assert cb.rate()==.2, "that of the last group of parameters"
    cb = CoMHE.paper('adversarial')
    assert (cb.k, cb.m, cb.redraw, cb.p_steps, cb.half_space, cb.s) == (30, 1, 0, 10, True, 2.)

def test_paper_roles_on_cnn9():
    "First layer half space, output full space, all others projected, as the authors' graph has it"
    cb = CoMHE.paper()
    cb.model,cb.learn = create_model('cnn9', 3, 100, 32, seed=0),None
    cb.selected = select_layers(cb.model)
    cb.setup()
    roles = list(cb.roles.values())
    assert roles == ['half'] + ['project']*9 + ['full']
    projected = {stack:cb.stack_weights(names) for stack,names in cb.stacks.items() if stack.role=='project'}
    assert len({y.shape[-2:] for y in cb.project_stacks(projected, False).values()}) == 3

@pytest.mark.parametrize('o,what', [(dict(steps=1), 'steps=1'), (dict(projection='group', m=-1), 'm=-1'), (dict(projection='expected', redraw=1), 'redraw=1'), (dict(projection='expected', k=3), 'k=3'),
    (dict(projection='expected', s=1.), 's=1.0'), (dict(projection='expected', output_layer='project'), 'output_layer'), (dict(output_layer='x'), "'x'"),
    (dict(unrolled=True), 'unrolled=True'), (dict(projection='group', share_basis=True), 'share_basis=True'), (dict(projection='expected', reduce='max'), "reduce='max'"),
    (dict(m=5, per_neurons=8), 'per_neurons=8'), (dict(projection='expected', half_space=False), 'half_space=False'), (dict(k=2.5), 'k=2.5'), (dict(p_lr=-1.), 'p_lr=-1.0'), (dict(seed=-1), 'seed=-1'), (dict(s=-1.), 's=-1.0')], ids=str)
def test_callback_refuses_at_construction(o, what):
    with pytest.raises(ValueError, match=what): CoMHE(**o)

def test_nothing_to_project_is_refused():
    with pytest.raises(ValueError, match=r"k=100.*'a' \(first layer, 9 inputs\): give first_layer='project' and k<9; 'b' \(36 inputs\): give k<36"): fit(learner(Odd(), CoMHE(k=100)))
    with pytest.raises(ValueError, match="output layer, 24 inputs.*output_layer='project' and k<24; or use MHE"): fit(learner(Odd(), CoMHE(layers='output')))

SETTINGS = [dict(projection='random', m=3, redraw=3, reduce='max'), dict(projection='angle', unrolled=True, k=5, m=2, share_basis=True, output_layer='project'),
    dict(projection='adversarial', steps=2, redraw=3, first_layer='project', k=8), dict(projection='group', reduce='max', m=2, redraw=2), dict(projection='expected'),
    dict(projection='learned', per_neurons=2)]
@pytest.mark.parametrize('o', SETTINGS, ids=str)
def test_contract(o): assert set(check_regularizer(partial(CoMHE, **o)).result) == {'kept'}

@pytest.mark.parametrize('kind', ['random', 'angle', 'adversarial'])
def test_contract_of_the_paper_preset(kind): assert set(check_regularizer(partial(CoMHE.paper, kind)).result) == {'kept'}

def test_composes_with_mhe():
    def grads(*cbs):
        torch.manual_seed(0)
        learn,seen = learner(Odd(), *cbs),[]
        def keep(cb):
            seen.extend(p.grad.clone() for p in cb.model.parameters())
            raise CancelFitException()
        with torch.random.fork_rng(): fit(learn, cbs=Callback(before_step=keep))
        return seen
    a,b,both,swapped,none = [grads(*[c() for c in cs]) for cs in ([partial(CoMHE, k=10)], [MHE], [partial(CoMHE, k=10), MHE], [MHE, partial(CoMHE, k=10)], [])]
    for x,y,z,v,n in zip(a, b, both, swapped, none): assert torch.allclose(x+y-n, z, atol=1e-5) and torch.allclose(z, v, atol=1e-6)

@pytest.mark.parametrize('kind', ['random','angle','adversarial','learned','group','expected'])
@pytest.mark.parametrize('options', [{}, dict(share_basis=True, unrolled=True)], ids=str)
def test_channels_last_weights_meet_the_same_projections(kind, options):
    "Large weights stay as they lie in memory, and energies, gradients and learned projections are those of contiguous ones"
    if kind in ('group','expected') and options: return
    gen,found = torch.Generator().manual_seed(0),{}
    convs = [nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 5, 1)]
    for conv in convs: conv.weight.data = torch.randn(conv.weight.shape, generator=gen)
    for layout in (torch.contiguous_format, torch.channels_last):
        model = copy.deepcopy(nn.Sequential(*convs)).to(memory_format=layout)
        cb = CoMHE(kind, k=6, **(options if kind!='random' else {o:v for o,v in options.items() if o!='unrolled'}))
        with attach(model, cb):
            for _ in range(3):
                cb.steps += 1
                penalty = cb.penalty()
        found[layout] = penalty,*torch.autograd.grad(penalty, [conv.weight for conv in model]),*[p for p in cb.basis.values() if p is not None]
    for a,b in zip(*found.values(), strict=True): assert torch.allclose(a, b, rtol=1e-3, atol=1e-5*b.abs().max().item())

def test_a_negative_epsilon_is_refused():
    with pytest.raises(ValueError, match='eps=-1'): angle_distortion(torch.randn(4, 3), torch.randn(2, 3), eps=-1.)
