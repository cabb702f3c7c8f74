"Phantom embeddings: the functions against loops, plain and mixed labels, the callback's promises beyond the contract"
import math, warnings
from collections import deque
from functools import partial

import pytest, torch
from fastai.basics import Callback, CrossEntropyLossFlat, Learner, SGD, noop
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation
from fastai.losses import LabelSmoothingCrossEntropyFlat
from hypothesis import example, given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from phantom_nb.contract import _learner
from phantom_nb.data import get_dls
from phantom_nb.experiments.libraries import EMA
from phantom_nb.experiments.methods import METHODS, make_method
from phantom_nb.experiments.runner import Run, train_run
from phantom_nb.experiments.tune import search_space
from phantom_nb.measures.embeddings import embeddings_of
from phantom_nb.models import create_model
from phantom_nb.plain import attach
from phantom_nb.regularizers.phantom import (MODES, ClassQueue, PhantomEmbeddings, class_phantoms, combine_with_phantoms,
    interclass_similarity, phantom_embeddings, phantom_loss)
from phantom_nb.regularizers.phantoms import members

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=14)
def gen(seed=0): return torch.Generator().manual_seed(seed)
def batch(labels, d=6, seed=0): return torch.randn(len(labels), d, generator=gen(seed), dtype=torch.float64), torch.tensor(labels)


# The functions

@settings(max_examples=40, deadline=None)
@given(LABELS)
def test_mean_of_all_others_is_the_loop(labels):
    z,y = batch(labels)
    p,valid = phantom_embeddings(z, y)
    for i,c in enumerate(labels):
        others = [z[j] for j in range(len(labels)) if j!=i and labels[j]==c]
        assert valid[i].item()==bool(others)
        torch.testing.assert_close(p[i], torch.stack(others).mean(0) if others else torch.zeros(6, dtype=torch.float64))

@settings(max_examples=40, deadline=None)
@given(LABELS, st.integers(1, 20))
def test_k_different_others_of_the_class(labels, k):
    "With one-hot embeddings a phantom shows what it is made of"
    n,y = len(labels),torch.tensor(labels)
    w,valid = phantom_embeddings(torch.eye(n, dtype=torch.float64), y, k, gen())
    for i,c in enumerate(labels):
        m = min(k, labels.count(c)-1)
        used = w[i].nonzero()[:,0].tolist()
        assert len(used)==m and i not in used and all(labels[j]==c for j in used) and valid[i].item()==(m>0)
        if m: assert abs(w[i].sum()-1)<1e-9 and (w[i]>=0).all()
        if m: torch.testing.assert_close(w[i][used], torch.full((m,), 1/m, dtype=torch.float64))

def test_draws_are_uniform_and_independent_between_samples():
    n,k,times = 6,2,4000
    g,y = gen(),torch.zeros(n, dtype=torch.long)
    w = torch.stack([phantom_embeddings(torch.eye(n), y, k, g)[0] for _ in range(times)])
    share = (w>0).float().mean(0)[~torch.eye(n, dtype=torch.bool)]
    assert (share-k/(n-1)).abs().max() < 5*(.4*.6/times)**.5
    assert ((w[:,0,2:]>0)==(w[:,1,2:]>0)).all(1).float().mean()<.6

@pytest.mark.parametrize('k', [1,3,8])
def test_variance_of_a_phantom(k):
    z,y = torch.randn(64, 2000, generator=gen(), dtype=torch.float64),torch.zeros(64, dtype=torch.long)
    p,_ = phantom_embeddings(z, y, k, gen())
    assert abs(p.square().mean()*k-1)<.1

def test_chance_comes_from_the_generator_alone():
    z,y = batch([0]*8)
    before = torch.get_rng_state()
    a,b,c = [phantom_embeddings(z, y, 3, gen(s))[0] for s in (1,1,2)]
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(before, torch.get_rng_state())

def test_without_a_generator_chance_is_pytorchs_own():
    z,y = batch([0]*8)
    def draw(seed):
        torch.manual_seed(seed)
        return phantom_embeddings(z, y, 3)[0]
    with torch.random.fork_rng(): a,b,c = map(draw, (1,1,2))
    assert torch.equal(a, b) and not torch.equal(a, c)

@pytest.mark.parametrize('labels', [[3], [2,2,2], [0,1,2], [0,0,1], list(range(300)), [i//2 for i in range(400)], [-100,-100,0,0], []], ids=str)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_any_batch_is_finite(labels, mode, dtype):
    z = torch.randn(len(labels), 5, generator=gen()).to(dtype)
    if len(labels)>1: z[0] = 0
    z.requires_grad_()
    y = torch.tensor(labels, dtype=torch.long)
    r = phantom_loss(z, y, mode, lambda o: o.repeat(1, 60), n_classes=300)
    g, = torch.autograd.grad(r, z)
    assert r.dtype==torch.float32 and r.isfinite() and g.isfinite().all() and g.dtype==dtype
    if mode!='separate' and len(set(labels))==len(labels): assert r==0

def test_classes_that_ignore_index_leaves_out_have_no_phantom():
    z,y = batch([-100,-100,1,1])
    assert phantom_embeddings(z, y)[1].tolist()==[False,False,True,True]
    assert class_phantoms(z, y, 3)[1].tolist()==[False,True,False]
    losses = [phantom_loss(z, c, 'mix', lambda o: o[:,:3], lambda x, y: F.cross_entropy(x, y, reduction='none')) for c in (y, y.clamp_min(-1))]
    assert losses[0]==losses[1]>0

def test_members_are_counted():
    "Of plain labels one each, of mixed ones the most that an image is made of; of no image one, or no class at all"
    mixed = torch.tensor([[.2,0.,.8],[0.,1.,0.]])
    for y,m in ((torch.tensor([2,-1]), 1), (mixed, 2), (mixed[1:], 1), (mixed[:0], 1)):
        classes,share = members(y)
        assert classes.shape==share.shape==(len(y),m) and share.dtype==torch.float32
    assert members(torch.tensor([2,-1]))[1].tolist()==[[1.],[0.]] and members(mixed)[0].tolist()[0]==[2,0]
    assert class_phantoms(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))[0].shape==(0,4)

def test_autocast_is_off_inside():
    z,y = torch.randn(12, 50, generator=gen()),torch.arange(12)%3
    plain = [phantom_loss(z, y, m) for m in ('contrast','separate')] + [phantom_embeddings(z, y)[0]]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        low = [phantom_loss(z, y, m) for m in ('contrast','separate')] + [phantom_embeddings(z, y)[0]]
    assert all(torch.equal(a, b) for a,b in zip(plain, low))

REFUSED = [(dict(z=torch.ones(3)), 'shape (3,)'), (dict(z=torch.ones(3, 2, dtype=torch.long)), 'int64'), (dict(y=torch.zeros(4, dtype=torch.long)), '(4,)'),
    (dict(y=torch.ones(3, 3)), 'soft labels'), (dict(y=torch.full((3,3), -.1)), 'soft labels'), (dict(y=torch.ones(2, 3)/3), '(2, 3)'), (dict(y=torch.ones(3)), 'float32'), (dict(k=0), 'k=0'), (dict(k=1.5), 'k=1.5')]

@pytest.mark.parametrize('kw,what', REFUSED, ids=[o[1] for o in REFUSED])
@pytest.mark.parametrize('f', [phantom_embeddings, class_phantoms, phantom_loss])
def test_wrong_input_is_refused_by_name(f, kw, what):
    with pytest.raises(ValueError) as e: f(**{'z':torch.ones(3, 2), 'y':torch.zeros(3, dtype=torch.long), **kw})
    assert what in str(e.value)

def test_what_is_no_tensor_and_what_does_not_classify_is_refused():
    z,y = torch.ones(3, 2),torch.tensor([0,0,2])
    for kw,what in ((dict(z=z.tolist()), 'z is a list: give a tensor'), (dict(y=y.numpy()), 'y is a ndarray')):
        with pytest.raises(ValueError, match=what): phantom_loss(**{'z':z, 'y':y, **kw})
    for options in (dict(mode='mix'), dict(choose='right')):
        with pytest.raises(ValueError, match='one for each of 3 classes'): phantom_loss(z, y, head=lambda o: o, n_classes=3, **options)
        with pytest.raises(ValueError, match='one for each of 10 classes'):
            learner(create_model('small_cnn', size=8, seed=0), PhantomEmbeddings(head='stage3.1.relu', **options)).fit(1)
    with pytest.raises(ValueError, match='name the same thing'): PhantomEmbeddings(head='fc', layers='fc')
    p = class_phantoms(z, y)
    with pytest.raises(ValueError, match='the first that class_phantoms returns'): combine_with_phantoms(z, p, nn.Linear(2, 3))
    with pytest.raises(ValueError, match='n_classes=4'): combine_with_phantoms(z, p[0], nn.Linear(2, 4))

def test_a_batch_of_ignored_labels_has_no_penalty():
    z = torch.ones(3, 2, requires_grad=True)
    for mode in MODES: assert phantom_loss(z, torch.full((3,), -100), mode, lambda o: o)==0

def test_it_is_told_that_an_epoch_had_no_penalty():
    learn = learner(create_model('small_cnn', size=8, seed=0), PhantomEmbeddings())
    learn.dls = get_dls('digits', n_train=12, n_valid=10, seed=0, bs=1)
    with pytest.warns(UserWarning, match='PhantomEmbeddings did nothing: its penalty was 0 in all 12 steps') as told: learn.fit(2)
    assert sum('did nothing' in str(w.message) for w in told)==1
    with warnings.catch_warnings(record=True) as told: learner(create_model('small_cnn', size=8, seed=0), EMA()).fit(1)
    assert not any('did nothing' in str(w.message) for w in told) # it has no penalty, and works

@pytest.mark.parametrize('kw,what', [(dict(mode='push'), "mode='push': give one of mix"), (dict(alpha=0.), 'alpha=0.0'), (dict(alpha=1.1), 'alpha=1.1'),
    (dict(tau=0.), 'tau=0.0'), (dict(mode='mix'), 'give the head'), (dict(mode='separate', detach=True), 'nothing would be left'),
    (dict(margin=0.), 'margin=0.0'), (dict(margin=2.5), 'margin=2.5'), (dict(choose='best'), "choose='best'"), (dict(choose='nearest'), 'nearest of how many'),
    (dict(choose='right'), 'give the head'), (dict(mode='separate', choose='nearest', k=2), 'phantoms of classes alone')], ids=str)
def test_wrong_options_of_the_loss(kw, what):
    with pytest.raises(ValueError) as e: phantom_loss(torch.ones(3, 2), torch.zeros(3, dtype=torch.long), **kw)
    assert what in str(e.value)


@pytest.mark.parametrize('mode', MODES)
def test_classes_that_the_head_does_not_have_are_refused(mode):
    z,y = batch([0,1,7,7])
    with pytest.raises(ValueError, match='y holds class 7, n_classes=3: classes are 0 to 2'): phantom_loss(z, y, mode, lambda o: o, n_classes=3)
    with pytest.raises(ValueError, match='a share for every class'): phantom_loss(z, torch.full((4,2), .5), mode, lambda o: o, n_classes=3)

@pytest.mark.parametrize('loss_func', [F.cross_entropy, lambda x, y: x, lambda x, y: x.mean()], ids=['mean','map','scalar'])
def test_a_loss_that_has_averaged_is_refused_in_mix(loss_func):
    z,y = batch([0,0,1,1])
    with pytest.raises(ValueError, match='one value a sample'): phantom_loss(z, y, 'mix', lambda o: o, loss_func)


# Mixed labels

def shares(labels, n=5, seed=7, lam=None):
    "Labels of a batch that is mixed with itself in another order, as MixUp does"
    y = torch.tensor(labels, dtype=torch.long)
    order = torch.randperm(len(y), generator=gen(seed))
    lam = torch.rand(len(y), 1, generator=gen(seed), dtype=torch.float64) if lam is None else lam
    return lam*F.one_hot(y, n).double() + (1-lam)*F.one_hot(y[order], n).double()

@settings(max_examples=40, deadline=None)
@given(LABELS, st.sampled_from(MODES), st.sampled_from([None,1,2]))
def test_one_hot_labels_are_plain_labels(labels, mode, k):
    z,y = batch(labels)
    w = torch.randn(6, 5, generator=gen(3), dtype=torch.float64)
    z.requires_grad_()
    results = []
    for t in (y, F.one_hot(y, 5).double(), F.one_hot(y, 5).float()):
        r = phantom_loss(z, t, mode, lambda o: o@w, n_classes=5, k=k, generator=gen(2))
        g, = torch.autograd.grad(r, z, allow_unused=True) if r.requires_grad else (None,)
        results.append((r, torch.zeros_like(z) if g is None else g))
    for r,g in results[1:]:
        torch.testing.assert_close(r, results[0][0], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(g, results[0][1], rtol=1e-7, atol=1e-9)

def loop_mixed(z, t, mode, w, tau, alpha):
    "Equations (9) to (11), written down"
    n,n_classes = t.shape
    if mode=='pairs':
        losses = []
        for i in range(n):
            others = [j for j in range(n) if j!=i and t[j].sum()>0]
            weight = [(t[i]@t[j]).item() for j in others]
            if sum(weight)==0: continue
            top = torch.tensor([cos(z[i], z[j])/tau for j in others], dtype=torch.float64).logsumexp(0).item()
            losses.append(sum(v*(top-cos(z[i], z[j])/tau) for v,j in zip(weight, others))/sum(weight))
        return sum(losses)/max(1, len(losses))
    def phantom(c, but=None):
        weight = [0. if j==but else t[j,c].item() for j in range(n)]
        return sum(v*z[j] for j,v in enumerate(weight))/sum(weight) if sum(weight)>0 else None
    if mode=='separate':
        ps = [p for p in map(phantom, range(n_classes)) if p is not None]
        pairs = [max(0., cos(a, b)) for i,a in enumerate(ps) for j,b in enumerate(ps) if i!=j]
        return sum(pairs)/max(1, len(pairs))
    total = weight = 0.
    for i in range(n):
        ps = {c:phantom(c, i) for c in range(n_classes)}
        ps = {c:p for c,p in ps.items() if p is not None}
        mine = {c:t[i,c].item() for c in range(n_classes) if t[i,c]>0}
        if mode=='mix':
            if not all(c in ps for c in mine): continue
            logits = ((1-alpha)*z[i]+alpha*sum(v*ps[c] for c,v in mine.items()))@w
            total += F.cross_entropy(logits[None], t[i][None]).item()
            weight += 1
        elif mode in ('pull','margin'):
            for c,v in mine.items():
                if c not in ps: continue
                nearest = max([cos(z[i], p) for d,p in ps.items() if d!=c], default=-9.)
                total += v*((z[i]-ps[c]).square().sum().item()/2 if mode=='pull' else max(0., .3+nearest-cos(z[i], ps[c])))
                weight += v
        else:
            rivals = torch.tensor([cos(z[i], p)/tau for p in ps.values()], dtype=torch.float64).logsumexp(0).item() if ps else 0.
            for c,v in mine.items():
                if c not in ps: continue
                total += v*(rivals-cos(z[i], ps[c])/tau)
                weight += v
    return total/weight if weight else 0.

@pytest.mark.parametrize('mode', MODES)
@settings(max_examples=12, deadline=None)
@given(labels=LABELS, seed=st.integers(0, 5))
@example(labels=[0,0,0,1,1,2], seed=0) # images of one class and of two, and a class that one image has alone
def test_mixed_labels_are_the_loop(labels, mode, seed):
    z,_ = batch(labels)
    t = shares(labels, seed=seed)
    w = torch.randn(6, 5, generator=gen(3), dtype=torch.float64)
    r = phantom_loss(z, t, mode, lambda o: o@w, alpha=.3, tau=.4).item()
    assert abs(r-loop_mixed(z, t, mode, w, .4, .3))<1e-6

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('k', [None,2])
def test_gradcheck_of_mixed_labels(mode, k):
    z,_ = batch([0,0,1,1,2,2], d=4)
    w = torch.randn(4, 5, generator=gen(3), dtype=torch.float64)
    t = shares([0,0,1,1,2,2])
    assert torch.autograd.gradcheck(lambda z: phantom_loss(z, t, mode, lambda o: o@w, k=k, generator=gen(1)), z.requires_grad_())

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('t', [torch.zeros(0, 5), torch.ones(1, 5)/5, torch.zeros(3, 5), torch.ones(4, 5)/5,
    torch.tensor([[.5,.5,0,0,0]]*2+[[0,0,1.,0,0]])], ids=str)
def test_any_mixed_batch_is_finite(t, mode):
    z = torch.ones(len(t), 3)
    if len(z)>1: z[0] = 0
    r = phantom_loss(z.requires_grad_(), t, mode, lambda o: o.repeat(1, 2)[:,:5])
    g, = torch.autograd.grad(r, z)
    assert r.isfinite() and g.isfinite().all()

@pytest.mark.parametrize('mode', MODES)
def test_mixed_labels_in_a_plain_loop(mode):
    model,x = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)),torch.randn(6, 4, 4, generator=gen())
    t = shares([0,0,1,1,2,2]).float()
    with attach(model, PhantomEmbeddings(.3, mode=mode)) as penalty:
        model(x)
        term = penalty(t)
    torch.testing.assert_close(term, .3*phantom_loss(model[:-1](x), t, mode, model[-1]))

def test_images_count_by_their_share():
    "Class phantoms of shares in tenths are those of plain labels with every image repeated"
    z,_ = batch([0]*4)
    counts = torch.tensor([[7,3,0],[0,4,6],[10,0,0],[2,0,8]])
    many = torch.cat([z[i].expand(n, 6) for i in range(4) for n in counts[i]])
    labels = torch.cat([torch.full((n,), c) for i in range(4) for c,n in enumerate(counts[i].tolist())])
    torch.testing.assert_close(class_phantoms(z, counts.double()/10)[0], class_phantoms(many, labels)[0])

def test_a_memory_keeps_no_mixed_labels(tmp_path):
    z,_ = batch([0,0,1])
    with pytest.raises(ValueError, match='leave it out'): phantom_loss(z, shares([0,0,1]), bank=(z, torch.tensor([0,0,1])))
    seen = []
    learn = _learner(PhantomEmbeddings(queue=4), MixUp(), Callback(before_batch=lambda cb: seen.append(1)), path=tmp_path)
    with pytest.raises(ValueError, match='queue=4: the memory keeps one class an image, and MixUp gives two'): learn.fit(1)
    learn = _learner(PhantomEmbeddings(), MixUp(), CutMix(), Callback(before_batch=lambda cb: seen.append(1)), path=tmp_path)
    with pytest.raises(ValueError, match='MixUp and CutMix mix labels twice'): learn.fit(1)
    assert not seen

# The losses against loops

def cos(a, b): return (a@b/(a.norm()*b.norm())).item()

def loop_contrast(z, y, tau):
    res = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j!=i and y[j]==y[i]]
        if not others: continue
        own = cos(z[i], z[others].mean(0))/tau
        rest = [cos(z[i], z[y==c].mean(0))/tau for c in y.unique() if c!=y[i]]
        res.append(-torch.log_softmax(torch.tensor([own,*rest], dtype=torch.float64), 0)[0].item())
    return sum(res)/max(1, len(res))

def loop_separate(z, y, f=lambda v: max(0, v)):
    cs = y.unique()
    pairs = [f(cos(z[y==a].mean(0), z[y==b].mean(0))) for a in cs for b in cs if a!=b]
    return sum(pairs)/max(1, len(pairs))

@settings(max_examples=30, deadline=None)
@given(LABELS)
def test_losses_are_the_loops(labels):
    z,y = batch(labels)
    w = torch.randn(6, 5, generator=gen(3), dtype=torch.float64)
    assert abs(phantom_loss(z, y, 'contrast', tau=.2).item()-loop_contrast(z, y, .2))<1e-9
    assert abs(phantom_loss(z, y, 'separate').item()-loop_separate(z, y))<1e-9
    assert abs(interclass_similarity(z, y).item()-loop_separate(z, y, lambda v: v))<1e-9
    p,valid = phantom_embeddings(z, y)
    mixed = F.cross_entropy((.7*z+.3*p)[valid]@w, y[valid]).item() if valid.any() else 0.
    assert abs(phantom_loss(z, y, 'mix', lambda o: o@w, alpha=.3).item()-mixed)<1e-9

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kw', [{}, dict(k=1), dict(k=2)], ids=str)
def test_gradcheck(mode, kw):
    z,y = batch([0,0,0,1,1,2], d=4)
    w = torch.randn(4, 3, generator=gen(3), dtype=torch.float64)
    f = lambda z: phantom_loss(z, y, mode, lambda o: o@w, generator=gen(1), **kw)
    assert torch.autograd.gradcheck(f, z.requires_grad_())

def test_detach_stops_what_goes_through_the_phantom_alone():
    z,y = batch([0,0,1,1])
    z.requires_grad_()
    p,_ = phantom_embeddings(z, y, detach=True)
    assert not p.requires_grad
    on,off = [torch.autograd.grad(phantom_loss(z, y, 'contrast', detach=o), z)[0] for o in (False,True)]
    assert off.norm()>0 and not torch.allclose(on, off)

def test_a_bank_adds_phantoms_and_gets_no_gradient():
    z,y = batch([0,1])
    bank = torch.randn(3, 6, generator=gen(5), dtype=torch.float64, requires_grad=True),torch.tensor([0,0,-1])
    z.requires_grad_()
    p,valid = phantom_embeddings(z, y, bank=bank)
    assert valid.tolist()==[True,False]
    torch.testing.assert_close(p[0], bank[0][:2].mean(0))
    g = torch.autograd.grad(phantom_loss(z, y, 'contrast', bank=bank), (z, bank[0]), allow_unused=True)
    assert g[0][0].norm()>0 and g[1] is None
    c,present = class_phantoms(z, y, 4, bank=bank)
    torch.testing.assert_close(c[0], torch.cat([z[:1], bank[0][:2]]).mean(0))
    assert present.tolist()==[True,True,False,False]
    c0,c1,c2 = [cos(z[0].detach(), o.detach()) for o in (z[1], *bank[0][:2])]
    loss = math.log(sum(math.exp(c/.3) for c in (c0,c1,c2)))-(c1+c2)/2/.3 # the other image has no partner
    assert abs(phantom_loss(z, y, 'pairs', bank=bank).item()-loss)<1e-9
    g, = torch.autograd.grad(c[0].sum(), z)
    torch.testing.assert_close(g, torch.tensor([[1/3],[0.]], dtype=g.dtype).expand(2, 6))

def test_the_nearest_of_mixed_images_are_chosen_class_by_class():
    z,_ = batch([0]*9)
    t = shares([0,0,1,1,2,2,0,1,1])
    p,valid = phantom_embeddings(z, t, 2, nearest=True)
    for i in valid.nonzero()[:,0].tolist():
        total = 0
        for c in t[i].nonzero()[:,0].tolist():
            near = sorted((j for j in range(9) if j!=i and t[j,c]>0), key=lambda j: -cos(z[i], z[j]))[:2]
            total = total+t[i,c]*(t[near,c,None]*z[near]).sum(0)/t[near,c].sum()
        torch.testing.assert_close(p[i], total)
    assert valid.sum()>4 and (t>0).sum(1).max()==2

# The memory

def test_a_state_is_a_copy_and_goes_on():
    queue,new = ClassQueue(3, 2, 1),(torch.tensor([[3.],[4.]]),torch.tensor([0,2]))
    queue.push(torch.tensor([[1.],[2.]]), torch.tensor([0,1]))
    state = queue.state()
    before,other = {k:v.clone() for k,v in state.items()},ClassQueue.restored(state, 2)
    for q in (queue, other): q.push(*new)
    assert all(torch.equal(state[k], v) for k,v in before.items()) and all(map(torch.equal, queue.items(), other.items()))

@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 3), max_size=7), min_size=1, max_size=5), st.integers(1, 3))
def test_queue_is_a_deque_a_class(batches, size):
    q,naive,n = ClassQueue(4, size, 1),[deque(maxlen=size) for _ in range(4)],0.
    for labels in batches:
        z = n+1+torch.arange(len(labels), dtype=torch.float)[:,None]
        n += len(labels)
        q.push(z, torch.tensor(labels, dtype=torch.long))
        for v,c in zip(z[:,0].tolist(), labels):
            if c>=0: naive[c].append(v)
    z,y = q.items()
    assert [sorted(z[y==c,0].tolist()) for c in range(4)]==[sorted(o) for o in naive] and (y>=-1).all()


# The callback

def spy():
    class Spy(Callback):
        order = 20
        def before_step(self): self.grads = [p.grad.clone() for p in self.model.parameters()]
    return Spy()

def one_step(tmp_path, *cbs, **kw):
    learn,s = _learner(*cbs, path=tmp_path, **kw),spy()
    learn.dls.train.shuffle = False
    batches = []
    learn.add_cbs([s, Callback(before_batch=lambda cb: batches.append((cb.x, cb.y)))])
    learn.fit(1)
    return learn,s,batches

@pytest.mark.parametrize('kw', [dict(mode='mix'), dict(mode='contrast'), dict(mode='separate'), dict(mode='mix', alpha=1.), dict(mode='contrast', tau=.5), dict(mode='margin', margin=.5), dict(mode='pull'),
    dict(mode='pairs', tau=.1), dict(mode='contrast', choose='right'), dict(mode='mix', choose='nearest', k=2)], ids=str)
@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), LabelSmoothingCrossEntropyFlat(eps=.3), nn.CrossEntropyLoss(weight=torch.arange(1., 11))], ids=['plain','smoothed','weighted'])
def test_penalty_and_gradient_are_the_function_on_the_heads_input(tmp_path, kw, loss):
    if kw['mode']!='mix' and not isinstance(loss, CrossEntropyLossFlat): pytest.skip('the loss matters to mix alone')
    cb = PhantomEmbeddings(.7, **kw)
    learn,s,batches = one_step(tmp_path, cb, loss_func=loss, bs=64)
    model,(x,y) = _learner(path=tmp_path).model.train(),batches[0]
    z = model[:-1](x)
    options = {**kw, 'loss_func':partial(F.cross_entropy, reduction='none', weight=getattr(loss, 'weight', None), label_smoothing=.3 if hasattr(loss, 'eps') else 0.)}
    r = phantom_loss(z, y, head=model[-1], n_classes=10, **options)
    assert abs(cb.records[0][3]-r.item())<1e-5
    expected = torch.autograd.grad(loss(model(x), y)+.7*r, list(model.parameters()))
    for a,b in zip(s.grads, expected): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('mode', MODES)
def test_penalty_of_mixed_images_is_the_function_on_their_shares(tmp_path, mix, mode):
    cb,mixer,seen = PhantomEmbeddings(.7, mode=mode),mix(),[]
    def keep(o): seen.append((o.learn.xb[0].clone(), o.learn.yb[0].clone(), mixer.yb1[0].clone(), torch.as_tensor(mixer.lam).clone()))
    learn,s,_ = one_step(tmp_path, cb, mixer, Callback(after_pred=keep), bs=64)
    model = _learner(path=tmp_path).model.train()
    x,y,y1,lam = seen[0]
    t = torch.lerp(F.one_hot(y1, 10).float(), F.one_hot(y, 10).float(), lam.reshape(-1, 1))
    r = phantom_loss(model[:-1](x), t, mode, model[-1])
    assert abs(cb.records[0][3]-r.item())<1e-5 and cb.records[0][3]>0
    expected = torch.autograd.grad(F.cross_entropy(model(x), t)+.7*r, list(model.parameters()))
    for a,b in zip(s.grads, expected): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)

@pytest.mark.parametrize('mode', MODES)
def test_soft_labels_of_one_class_train_as_plain_ones(tmp_path, mode):
    def soften(cb): cb.learn.yb = (F.one_hot(cb.y, 10).float(),)
    runs = []
    for cbs in ([], [Callback(before_batch=soften)]):
        learn,s,_ = one_step(tmp_path, PhantomEmbeddings(mode=mode), *cbs, loss_func=nn.CrossEntropyLoss(), bs=64)
        runs.append((s.grads, learn.phantom_embeddings.records[0][3]))
    (a,r),(b,q) = runs
    assert abs(r-q)<1e-6
    for x,y in zip(a, b): torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)

@pytest.mark.parametrize('change,what', [(lambda y: y.float(), 'one class an image'), (lambda y: y[:,None].repeat(1, 2), 'one class an image'),
    (lambda y: F.one_hot(y, 10).float()*2, 'add up to 1')], ids=['float','two','several'])
def test_labels_that_are_no_classes_are_refused(tmp_path, change, what):
    def spoil(cb): cb.learn.yb = (change(cb.y),)
    learn = _learner(PhantomEmbeddings(), Callback(before_batch=spoil), loss_func=lambda x, y: x.mean(), path=tmp_path)
    with pytest.raises(ValueError, match=what): learn.fit(1)
    assert not learn.model[-1]._forward_pre_hooks and not learn.model[-1]._forward_hooks

def test_a_loss_without_values_a_sample_is_refused_for_mix(tmp_path):
    learn = _learner(PhantomEmbeddings(mode='mix'), loss_func=lambda x, y: F.cross_entropy(x, y), path=tmp_path)
    with pytest.raises(ValueError, match="no reduction='none'"): learn.fit(1)
    _learner(PhantomEmbeddings(mode='contrast'), loss_func=lambda x, y: F.cross_entropy(x, y), path=tmp_path).fit(1)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.a,self.b = nn.Linear(64, 8),nn.Linear(8, 10),nn.Linear(8, 10, bias=False)
    def forward(self, x): return self.a(self.body(x.flatten(1)).relu())

class Pair(Two):
    "A network with two outputs"
    def forward(self, x):
        z = self.body(x.flatten(1)).relu()
        return self.a(z), self.b(z)

def test_a_network_with_two_outputs_is_understood_if_one_label_and_a_head_say_what_is_meant():
    both = lambda out, y: F.cross_entropy(out[0], y)+F.cross_entropy(out[1], y)
    learn = learner(Pair(), PhantomEmbeddings(head='a'))
    learn.loss_func = both
    learn.remove_cbs([o for o in learn.cbs if o.name=='recorder'])
    learn.fit(1)
    assert learn.phantom_embeddings.records[0][3]>0
    learn = learner(Pair(), PhantomEmbeddings(head='body'))
    learn.loss_func = both
    learn.remove_cbs([o for o in learn.cbs if o.name=='recorder'])
    with pytest.raises(ValueError, match='y holds class|was applied'): learn.fit(1)

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.fc = nn.Linear(64, 8),nn.Linear(8, 10)
    def forward(self, x): return sum(self.fc(self.body(o.flatten(1)).relu()) for o in (x, x.flip(-1)))

def learner(model, *cbs, **kw):
    learn = Learner(get_dls('digits', n_train=64, n_valid=20, seed=0, device='cpu', **{'bs':32, **kw}), model, opt_func=SGD, lr=.05, cbs=list(cbs))
    learn.logger,learn.create_mbar = noop,False
    return learn.remove_cbs([o for o in learn.cbs if o.name=='progress'])

def test_a_head_that_is_applied_twice_is_refused():
    learn = learner(Twice(), PhantomEmbeddings())
    with pytest.raises(ValueError, match="'fc' was applied 2 times"): learn.fit(1)
    assert not learn.model.fc._forward_pre_hooks and not learn.model.fc._forward_hooks

def test_two_heads_are_refused_and_named():
    with pytest.raises(ValueError, match="'a' \\(10\\), 'b' \\(10\\)"): learner(Two(), PhantomEmbeddings()).fit(1)
    learner(Two(), PhantomEmbeddings(head='a')).fit(1)
    with pytest.raises(ValueError, match="'b' was applied 0 times"): learner(Two(), PhantomEmbeddings(layers='b')).fit(1)

def test_a_convolution_as_the_head():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    cb = PhantomEmbeddings(mode='mix')
    learner(model, cb).fit(2)
    assert len(cb.records)==4 and cb.records[0][4]>0

def test_other_peoples_hooks_see_the_head_once_a_batch(tmp_path):
    calls = []
    learn = _learner(PhantomEmbeddings(mode='mix'), path=tmp_path)
    learn.model[-1].register_forward_hook(lambda *a: calls.append(1))
    learn.fit(1)
    assert len(calls)==2+1 # two batches of training, one of validation

def test_a_frozen_body_leaves_the_head_its_gradient(tmp_path):
    learn = _learner(PhantomEmbeddings(mode='mix'), path=tmp_path)
    for p in learn.model[:-1].parameters(): p.requires_grad_(False)
    learn.fit(1)
    assert learn.phantom_embeddings.records[0][4]>0
    learn = _learner(PhantomEmbeddings(mode='contrast'), path=tmp_path)
    for p in learn.model[:-1].parameters(): p.requires_grad_(False)
    learn.fit(1)
    assert learn.phantom_embeddings.records[0][4]==0

@pytest.mark.parametrize('mode', ['mix','contrast'])
def test_compiled_network_gets_the_same_gradient(tmp_path, mode):
    torch._dynamo.reset()
    def grads(compiled):
        learn,s = _learner(PhantomEmbeddings(mode=mode, k=2), path=tmp_path),spy()
        if compiled: learn.model.compile(backend='eager')
        learn.add_cb(s).fit(2)
        return s.grads,[o[3] for o in learn.phantom_embeddings.records]
    (a,r),(b,q) = grads(False),grads(True)
    assert r==pytest.approx(q, rel=1e-4) and len(r)==4
    for x,y in zip(a, b): torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3)

def test_queue_gives_phantoms_to_batches_of_two():
    "Without a memory a batch of two images has hardly any phantom; with one nearly every sample has"
    off,on = [PhantomEmbeddings(queue=q) for q in (0,4)]
    learner(create_model('small_cnn', size=8, seed=0), off, bs=2).fit(1)
    learner(create_model('small_cnn', size=8, seed=0), on, bs=2).fit(1)
    assert (off.to_frame().penalty>0).mean()<.2<.7<(on.to_frame().penalty>0).mean()
    z,y = on.memory.items()
    assert z.shape==(40,64) and not z.requires_grad and torch.bincount(y+1).tolist()==[0]+[4]*10

def test_queue_with_accumulation_sees_other_micro_batches():
    cb = PhantomEmbeddings(queue=4)
    learner(create_model('small_cnn', size=8, seed=0), cb, GradientAccumulation(16), bs=4).fit(1)
    assert cb.steps==4 and len(cb.records)==16 and (cb.to_frame().penalty.iloc[8:]>0).all()

def test_a_memory_that_does_not_fit_is_refused(tmp_path):
    learn = _learner(PhantomEmbeddings(queue=3), path=tmp_path)
    learn.fit(1)
    learn.save('three')
    other = _learner(PhantomEmbeddings(queue=2), path=tmp_path).load('three')
    with pytest.raises(ValueError, match='queue=2: the saved memory holds 3 of each class'): other.fit(1)

def test_a_saved_memory_goes_on_in_the_next_fit_alone(tmp_path):
    def state(cb): return cb.gen.get_state(),cb.memory and cb.memory.state()
    learn,seen = _learner(PhantomEmbeddings(queue=3, k=1), path=tmp_path),[]
    learn.fit(1)
    learn.save('one')
    gen,memory = state(learn.phantom_embeddings)
    def look(cb): seen.extend([state(cb.learn.phantom_embeddings)] if cb.training and not cb.iter else [])
    other = _learner(PhantomEmbeddings(queue=3, k=1, seed=5), Callback(before_batch=look), path=tmp_path).load('one')
    for _ in range(2): other.fit(1)
    assert torch.equal(seen[0][0], gen) and all(torch.equal(memory[k], seen[0][1][k]) for k in memory) and seen[1][1] is None
    _learner(PhantomEmbeddings(k=1), path=tmp_path).load('one').fit(1) # no memory, so it is not taken over

def test_a_saved_memory_goes_on_in_a_plain_loop():
    model,x,y = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)),torch.randn(8, 6, generator=gen()),torch.arange(8)%3
    first,second = PhantomEmbeddings(queue=2),PhantomEmbeddings(queue=2)
    with attach(model, first) as penalty:
        model(x)
        penalty(y)
        state = penalty.state_dict()
        with pytest.raises(ValueError, match='use queue=0 with mixed labels'):
            model(x)
            penalty(F.one_hot(y, 3).float())
    with attach(model, second) as penalty:
        penalty.load_state_dict(state)
        assert all(map(torch.equal, first.memory.items(), second.memory.items())) and second.memory.count.sum()==8

def test_a_second_fit_begins_with_an_empty_memory_and_other_draws(tmp_path):
    learn = _learner(PhantomEmbeddings(queue=3, k=1), path=tmp_path)
    learn.fit(1)
    first,state = learn.phantom_embeddings.memory,learn.phantom_embeddings.gen.get_state()
    learn.fit(1)
    assert learn.phantom_embeddings.memory is not first and not torch.equal(state, learn.phantom_embeddings.gen.get_state())

def test_classes_that_no_batch_holds():
    "A hundred outputs of which ten are used"
    cb = PhantomEmbeddings(head='head.fc', queue=2)
    learner(create_model('small_cnn', n_out=100, size=8, seed=0), cb).fit(1)
    assert cb.to_frame().penalty.gt(0).all() and cb.memory.count[10:].sum()==0

def test_classes_lie_further_apart_with_phantoms():
    "The same training with and without: similarity of the classes' means, over images that were trained on"
    from fastai.basics import Adam
    def similarity(*cbs):
        learn = learner(create_model('small_cnn', size=8, seed=0), *cbs)
        learn.opt_func = Adam
        learn.fit(15, 5e-3)
        z,_,y = embeddings_of(learn.model, learn.dls.train.new(shuffle=False))
        return interclass_similarity(z, y).item()
    plain = similarity()
    assert similarity(PhantomEmbeddings(1.))<similarity(PhantomEmbeddings())-.02<plain-.04
    assert similarity(PhantomEmbeddings(1., mode='separate'))<plain-.05

def test_every_run_records_how_its_test_embeddings_lie():
    row = train_run(Run(epochs=2, n_train=40, method='phantom'))
    m = torch.tensor(row['confusion'])
    assert m.sum()==797 and abs(m.trace().item()/797-row['accuracy'])<1e-9 and m.sum(1).tolist()==torch.bincount(get_dls('digits', n_train=40).test_ds.y.cpu()).tolist()
    assert -1<=row['similarity']<=1 and row['similarity']<row['nearest']<=1 and 0<row['within']<1

@pytest.mark.parametrize('name', [o for o in METHODS if o.startswith('phantom')])
def test_methods_are_the_callback_and_the_default_searches_nothing(name):
    cb, = make_method(name).cbs
    assert isinstance(cb, PhantomEmbeddings) and cb.mode==(PhantomEmbeddings().mode if name=='phantom' else name.split('_')[1])
    assert set(search_space(name))==({'lr'} if name=='phantom' else {'lr','lam'}) and (cb.lam==PhantomEmbeddings().lam or name=='phantom_pull')
    assert all(getattr(PhantomEmbeddings(), k)==v for k,v in METHODS[name].defaults.items() if k not in ('mode','lam') or name=='phantom')

def test_threads_are_refused_before_the_first_batch():
    with pytest.raises(ValueError, match='learn.distrib_ctx'): learner(nn.DataParallel(create_model('small_cnn', size=8, seed=0)), PhantomEmbeddings()).fit(1)


# What others have where forms coincide

def test_pairs_is_supcon_of_pytorch_metric_learning():
    losses = pytest.importorskip('pytorch_metric_learning.losses')
    for labels in ([0,0,1,1,2,2,2], [0,0,1,2,2]):
        z,y = batch(labels)
        assert abs(phantom_loss(z, y, 'pairs', tau=.2)-losses.SupConLoss(temperature=.2)(z, y)).item()<1e-9

def test_margin_is_the_triplet_of_sample_own_and_nearest_phantom():
    losses = pytest.importorskip('pytorch_metric_learning.losses')
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.reducers import MeanReducer
    z,y = batch([0,0,0,1,1,2,2,2])
    own,_ = phantom_embeddings(z, y)
    p,_ = class_phantoms(z, y)
    cosines = (F.normalize(z)@F.normalize(p).T).scatter(1, y[:,None], -2.)
    triplet = losses.TripletMarginLoss(margin=.7, distance=CosineSimilarity(), reducer=MeanReducer())
    n,i = len(z),torch.arange(len(z))
    refs = torch.cat([own, p])
    theirs = triplet(z, i, indices_tuple=(i, i, n+cosines.argmax(1)), ref_emb=refs, ref_labels=torch.arange(len(refs)))
    assert abs(phantom_loss(z, y, 'margin', margin=.7)-theirs).item()<1e-9

def test_pull_is_centre_loss_around_the_batchs_own_means():
    "For n of a class, (n/(n-1))**2 times half the squared distance to the class's mean"
    z,y = batch([0]*4+[1]*4)
    centres = torch.stack([z[y==c].mean(0) for c in (0,1)])
    torch.testing.assert_close(phantom_loss(z, y, 'pull'), (4/3)**2*(z-centres[y]).square().sum(1).mean()/2)

# Chosen subsets, earlier layers, and after training

def test_the_nearest_are_the_nearest():
    z,y = batch([0]*6+[1]*3)
    p,_ = phantom_embeddings(z, y, 2, nearest=True)
    for i in range(9):
        others = sorted([j for j in range(9) if j!=i and y[j]==y[i]], key=lambda j: -cos(z[i], z[j]))[:2]
        torch.testing.assert_close(p[i], z[others].mean(0))

@pytest.mark.parametrize('mode', MODES)
def test_phantoms_of_those_that_are_right(mode):
    z,y = batch([0,0,0,1,1,1])
    w = torch.randn(6, 3, generator=gen(3), dtype=torch.float64)
    right = (z@w).argmax(1)==y
    assert 0<right.sum()<6
    r = phantom_loss(z, y, mode, lambda o: o@w, choose='right', n_classes=3)
    p,valid = phantom_embeddings(z, y, right=right)
    for i in range(6):
        others = [j for j in range(6) if j!=i and y[j]==y[i] and right[j]]
        assert valid[i].item()==bool(others)
        if others: torch.testing.assert_close(p[i], z[others].mean(0))
    if mode=='mix': torch.testing.assert_close(r, F.cross_entropy((.5*z+.5*p)[valid]@w, y[valid]))
    if mode=='pull': torch.testing.assert_close(r, (z-p)[valid].square().sum(1).mean()/2)
    shares_too = phantom_loss(z, F.one_hot(y, 3).double(), mode, lambda o: o@w, choose='right')
    torch.testing.assert_close(r, shares_too, rtol=1e-7, atol=1e-9)

def test_the_input_of_an_earlier_layer(tmp_path):
    model = create_model('small_cnn', size=8, seed=0)
    learn = learner(model, PhantomEmbeddings(.7, head='stage3'), bs=64)
    learn.dls.train.shuffle = False
    seen = []
    learn.add_cb(Callback(after_pred=lambda cb: seen.append((cb.x, cb.y))))
    learn.fit(1)
    fresh = create_model('small_cnn', size=8, seed=0).train()
    x,y = seen[0]
    z = fresh[:2](x).flatten(2).mean(2)
    assert abs(phantom_loss(z, y)-learn.phantom_embeddings.records[0][3]).item()<1e-5

def test_combination_is_a_vote_about_the_likely_classes():
    z,y = batch([i%4 for i in range(40)])
    w = torch.randn(6, 4, generator=gen(3), dtype=torch.float64)
    p,_ = class_phantoms(z, y)
    head = lambda x: x@w
    for likely in (1,2,4):
        r = combine_with_phantoms(z, p, head, .4, likely, .2)
        for i in range(40):
            top = head(z[i]).topk(likely)[1].tolist()
            v = torch.softmax(torch.tensor([cos(z[i], p[c])/.2 for c in top], dtype=torch.float64), 0)
            torch.testing.assert_close(r[i], head(.6*z[i]+.4*sum(a*p[c] for a,c in zip(v, top))))
    with pytest.raises(ValueError, match='likely=5'): combine_with_phantoms(z, p, head, likely=5)
    with pytest.raises(ValueError, match='alpha=2'): combine_with_phantoms(z, p, head, alpha=2)

def test_a_queue_leaves_out_any_negative_label():
    "-100 is what PyTorch ignores"
    queue = ClassQueue(3, 2, 1)
    queue.push(torch.tensor([[3.],[4.]]), torch.tensor([-100,1]))
    z,y = queue.items()
    assert y.tolist().count(-1)==5 and z[y==1].tolist()==[[4.]]

@pytest.mark.parametrize('options', [dict(mode='mix'), dict(choose='right')], ids=str)
@pytest.mark.parametrize('layer', [nn.BatchNorm1d(10), nn.Dropout(.1)], ids=['norm', 'dropout'])
def test_a_head_that_changes_when_applied_is_refused(options, layer):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Sequential(nn.Linear(12, 10), layer, nn.Linear(10, 10)))
    with pytest.raises(ValueError, match='apply it twice: name the last Linear'): learner(net, PhantomEmbeddings(head='3', **options)).fit(1)
    learner(net, PhantomEmbeddings(head='3.2', **options)).fit(1)

def test_widths_and_types_of_what_is_given():
    z,y = batch([0,0,1,1,2,2])
    with pytest.raises(ValueError, match='bank holds'): phantom_loss(z, y, bank=(torch.randn(4, z.shape[1]+1), torch.arange(4)%3))
    p,half = class_phantoms(z.float(), y, 3),z.half()
    logits = combine_with_phantoms(half, p[0] if isinstance(p, tuple) else p, lambda z: z[:,:3])
    assert logits.dtype==torch.float16 and logits.isfinite().all()
    with pytest.raises(ValueError, match='layers= is another name of head='): learner(create_model('small_cnn', size=8, seed=0), PhantomEmbeddings(layers='blah')).fit(1)
