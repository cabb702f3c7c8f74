"Phantom embeddings: the functions against loops, heads of known networks, the callback's promises beyond the contract"
import warnings
from collections import deque
from functools import partial

import pytest, torch
from fastai.basics import Callback, CrossEntropyLossFlat, Learner, SGD, noop
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastai.vision.learner import create_head
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from phantom_nb.core import _learner
from phantom_nb.data import get_dls
from phantom_nb.experiments.methods import METHODS, make_method
from phantom_nb.experiments.runner import Run, train_run
from phantom_nb.experiments.tune import search_space
from phantom_nb.models import MODELS, create_model
from phantom_nb.regularizers.embeddings import ClassQueue, apply_head, as_embeddings, embeddings_of, find_head
from phantom_nb.regularizers.phantom import (PhantomEmbeddings, class_phantoms, embedding_metrics, interclass_similarity, nearest_class_similarity,
    phantom_embeddings, phantom_loss, within_class_share)

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
@given(LABELS, st.integers(1, 20), st.sampled_from(['mean','dirichlet']))
def test_k_different_others_of_the_class(labels, k, weights):
    "With one-hot embeddings a phantom shows what it is made of"
    n,y = len(labels),torch.tensor(labels)
    w,valid = phantom_embeddings(torch.eye(n, dtype=torch.float64), y, k, gen(), weights)
    for i,c in enumerate(labels):
        m = min(k, labels.count(c)-1)
        used = w[i].nonzero()[:,0].tolist()
        assert len(used)==m and i not in used and all(labels[j]==c for j in used) and valid[i].item()==(m>0)
        if m: assert abs(w[i].sum()-1)<1e-9 and (w[i]>=0).all()
        if m and weights=='mean': torch.testing.assert_close(w[i][used], torch.full((m,), 1/m, dtype=torch.float64))

def test_draws_are_uniform_and_independent_between_samples():
    n,k,times = 6,2,4000
    g,y = gen(),torch.zeros(n, dtype=torch.long)
    w = torch.stack([phantom_embeddings(torch.eye(n), y, k, g)[0] for _ in range(times)])
    share = (w>0).float().mean(0)[~torch.eye(n, dtype=torch.bool)]
    assert (share-k/(n-1)).abs().max() < 5*(.4*.6/times)**.5
    assert ((w[:,0,2:]>0)==(w[:,1,2:]>0)).all(1).float().mean()<.6

@pytest.mark.parametrize('weights,expected', [('mean', lambda k: 1/k), ('dirichlet', lambda k: 2/(k+1))], ids=['mean','dirichlet'])
@pytest.mark.parametrize('k', [1,3,8])
def test_variance_of_a_phantom(weights, expected, k):
    z,y = torch.randn(64, 2000, generator=gen(), dtype=torch.float64),torch.zeros(64, dtype=torch.long)
    p,_ = phantom_embeddings(z, y, k, gen(), weights)
    assert abs(p.square().mean()/expected(k)-1)<.1

def test_chance_comes_from_the_generator_alone():
    z,y = batch([0]*8)
    before = torch.get_rng_state()
    a,b,c = [phantom_embeddings(z, y, 3, gen(s))[0] for s in (1,1,2)]
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(before, torch.get_rng_state())

@pytest.mark.parametrize('labels', [[3], [2,2,2], [0,1,2], [0,0,1], list(range(300)), [i//2 for i in range(400)], [-100,-100,0,0], []], ids=str)
@pytest.mark.parametrize('mode', ['mix','contrast','separate'])
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

def test_autocast_is_off_inside():
    z,y = torch.randn(12, 50, generator=gen()),torch.arange(12)%3
    plain = [phantom_loss(z, y, m) for m in ('contrast','separate')] + [phantom_embeddings(z, y)[0]]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        low = [phantom_loss(z, y, m) for m in ('contrast','separate')] + [phantom_embeddings(z, y)[0]]
    assert all(torch.equal(a, b) for a,b in zip(plain, low))

REFUSED = [(dict(z=torch.ones(3)), 'shape (3,)'), (dict(z=torch.ones(3, 2, dtype=torch.long)), 'int64'), (dict(y=torch.zeros(4, dtype=torch.long)), '(4,)'),
    (dict(y=torch.ones(3, 3)), 'soft labels'), (dict(y=torch.ones(3)), 'float32'), (dict(k=0), 'k=0'), (dict(k=1.5), 'k=1.5'), (dict(weights='sum'), "weights='sum'")]

@pytest.mark.parametrize('kw,what', REFUSED, ids=[o[1] for o in REFUSED])
@pytest.mark.parametrize('f', [phantom_embeddings, class_phantoms, phantom_loss])
def test_wrong_input_is_refused_by_name(f, kw, what):
    with pytest.raises(ValueError) as e: f(**{'z':torch.ones(3, 2), 'y':torch.zeros(3, dtype=torch.long), **kw})
    assert what in str(e.value)

@pytest.mark.parametrize('kw,what', [(dict(mode='pull'), "mode='pull': choose from mix"), (dict(alpha=0.), 'alpha=0.0'), (dict(alpha=1.1), 'alpha=1.1'),
    (dict(tau=0.), 'tau=0.0'), (dict(mode='mix'), 'give the head'), (dict(mode='separate', detach=True), 'nothing would be left')], ids=str)
def test_wrong_options_of_the_loss(kw, what):
    with pytest.raises(ValueError) as e: phantom_loss(torch.ones(3, 2), torch.zeros(3, dtype=torch.long), **kw)
    assert what in str(e.value)


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

@pytest.mark.parametrize('mode', ['mix','contrast','separate'])
@pytest.mark.parametrize('kw', [{}, dict(k=1), dict(k=2, weights='dirichlet')], ids=str)
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

def test_measures_at_their_extremes():
    y = torch.arange(12)%3
    corners = torch.eye(3)[y]
    simplex = corners-1/3
    assert interclass_similarity(corners, y)==0 and abs(interclass_similarity(simplex, y)+.5)<1e-6 and abs(interclass_similarity(torch.ones(12, 3), y)-1)<1e-6
    assert abs(nearest_class_similarity(simplex, y)+.5)<1e-6 and within_class_share(corners, y)<1e-6
    near = torch.tensor([[1.,0.],[1.,0.],[0.,1.]])
    assert abs(nearest_class_similarity(near, torch.tensor([0,1,2]))-2/3)<1e-6
    assert abs(within_class_share(torch.tensor([[1.,0.],[0.,1.]]*2), torch.tensor([0,0,1,1]))-1)<1e-6
    assert interclass_similarity(torch.ones(3, 2), torch.zeros(3, dtype=torch.long))==0
    m = embedding_metrics(corners, corners.roll(1, 0), y)
    assert m['confusion']==[[0,0,4],[4,0,0],[0,4,0]] and embedding_metrics(corners, torch.ones(12, 21), y).keys()=={'similarity','nearest','within'}


# Heads

def torchvision_model(name, **kw):
    import torchvision
    with torch.device('meta'): return getattr(torchvision.models, name)(num_classes=10, **kw)

HEADS = dict(resnet18='fc', vgg11_bn='classifier.6', mobilenet_v3_small='classifier.3', efficientnet_b0='classifier.1', vit_b_16='heads.head',
    convnext_tiny='classifier.2', squeezenet1_1='classifier.1', swin_t='head', densenet121='classifier', shufflenet_v2_x0_5='fc')

@pytest.mark.parametrize('name', HEADS)
@pytest.mark.parametrize('n_out', [10, None])
def test_head_of_torchvision_models(name, n_out): assert find_head(torchvision_model(name), n_out=n_out)[0]==HEADS[name]

@pytest.mark.parametrize('name,head', [('resnet18','fc'), ('convnext_atto','head.fc'), ('vit_tiny_patch16_224','head'), ('mobilenetv3_small_050','classifier'),
    ('efficientnet_b0','classifier'), ('swin_tiny_patch4_window7_224','head.fc')])
def test_head_of_timm_models(name, head):
    timm = pytest.importorskip('timm')
    with torch.device('meta'): model = timm.create_model(name, num_classes=7)
    assert find_head(model, n_out=7)==(head, model.get_submodule(head))

@pytest.mark.parametrize('name', MODELS)
def test_head_of_our_models(name):
    model = create_model(name, 3, 10, 32, seed=0)
    assert find_head(model, n_out=10)[1]==[m for m in model.modules() if isinstance(m, nn.Linear)][-1]

def test_head_of_a_fastai_learner_and_of_wrappers():
    body = nn.Sequential(nn.Conv2d(3, 512, 3))
    model = nn.Sequential(body, create_head(512, 5))
    name,head = find_head(model, n_out=5)
    assert name=='1.8' and head.out_features==5 and find_head(nn.DataParallel(model), n_out=5)[1] is head
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert find_head(torch.compile(model), n_out=5)==(name, head)

def test_a_hidden_layer_as_wide_as_the_classes_is_no_rival():
    mlp = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(9, 4), nn.ReLU()), nn.Linear(4, 4))
    assert find_head(mlp, n_out=4)[0]=='2'

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.a,self.b = nn.Linear(64, 8),nn.Linear(8, 10),nn.Linear(8, 10, bias=False)
    def forward(self, x): return self.a(self.body(x.flatten(1)).relu())

def distilled():
    timm = pytest.importorskip('timm')
    with torch.device('meta'): return timm.create_model('deit_tiny_distilled_patch16_224', num_classes=10)

@pytest.mark.parametrize('make,n_out,what', [(Two, 10, "could be the classifier: 'a' (10), 'b' (10)"), (lambda: torchvision_model('googlenet', aux_logits=True), 10, "'aux1.fc2' (10)"),
    (distilled, 10, "'head' (10), 'head_dist' (10)"), (lambda: nn.Sequential(nn.Conv2d(3, 10, 3)), 10, 'no layer'), (lambda: nn.Sequential(nn.Linear(3, 4)), 10, "there are: '0' (4)"),
    (lambda: nn.ReLU(), None, 'there are: none')], ids=['two','auxiliary','distilled','conv','width','nothing'])
def test_two_heads_or_none_name_the_remedy(make, n_out, what):
    with pytest.raises(ValueError) as e: find_head(make(), n_out=n_out)
    assert what in str(e.value) and 'head=' in str(e.value)

def test_a_head_that_is_named():
    net = Two()
    assert find_head(net, 'b')[1] is net.b is find_head(net, net.b)[1] is find_head(net, 'output')[1] and find_head(net, lambda k,m: k=='a')[0]=='a'
    with pytest.raises(ValueError, match="head='\\[ab\\]' selects 2 layers"): find_head(net, '[ab]')
    with pytest.raises(ValueError, match="layers='c' selects no layer"): find_head(net, 'c')
    vgg = torchvision_model('vgg11_bn')
    assert find_head(vgg, 'classifier')==('classifier', vgg.classifier)

@pytest.mark.parametrize('head,shape,applied', [(nn.Linear(6, 3, bias=False), (4,6), (4,6)), (nn.Conv2d(6, 3, 1), (4,6,2,5), (4,6)), (nn.Linear(6, 3), (4,7,6), (4,6))], ids=['linear','conv','tokens'])
def test_inputs_of_heads_become_embeddings(head, shape, applied):
    x = torch.randn(*shape, generator=gen())
    z = as_embeddings(x, head)
    assert z.shape==applied
    out = head(x)
    out = out.flatten(2).mean(2) if out.ndim==4 else out.flatten(1, -2).mean(1) if out.ndim==3 else out
    torch.testing.assert_close(apply_head(head, z), out)

def test_a_head_that_reads_maps_is_refused():
    with pytest.raises(ValueError, match='name a head that reads'): as_embeddings(torch.ones(2, 3, 4, 4), nn.Flatten())


# The memory

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

@pytest.mark.parametrize('kw', [dict(mode='mix'), dict(mode='contrast'), dict(mode='separate'), dict(mode='mix', alpha=1., detach=True), dict(mode='contrast', tau=.5)], ids=str)
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
def test_mixed_images_are_refused_before_the_first_batch(tmp_path, mix):
    seen = []
    learn = _learner(PhantomEmbeddings(), mix(), Callback(before_batch=lambda cb: seen.append(1)), path=tmp_path)
    with pytest.raises(ValueError, match=f'leave out {mix.__name__} or PhantomEmbeddings'): learn.fit(1)
    assert not seen

@pytest.mark.parametrize('soften', [lambda y: F.one_hot(y, 10).float(), lambda y: y.float(), lambda y: y[:,None].repeat(1, 2)], ids=['soft','float','two'])
def test_labels_that_are_no_classes_are_refused_before_a_forward_pass(tmp_path, soften):
    def change(cb): cb.learn.yb = (soften(cb.y),)
    calls = []
    learn = _learner(PhantomEmbeddings(), Callback(before_batch=change), path=tmp_path)
    learn.cbs[-1].order = -20
    learn.model.register_forward_hook(lambda *a: calls.append(1))
    with pytest.raises(ValueError, match='needs one class a sample'): learn.fit(1)
    assert not calls

def test_a_loss_without_values_a_sample_is_refused_for_mix(tmp_path):
    learn = _learner(PhantomEmbeddings(mode='mix'), loss_func=lambda x, y: F.cross_entropy(x, y), path=tmp_path)
    with pytest.raises(ValueError, match="no reduction='none'"): learn.fit(1)
    _learner(PhantomEmbeddings(mode='contrast'), loss_func=lambda x, y: F.cross_entropy(x, y), path=tmp_path).fit(1)

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
    assert not learn.model.fc._forward_pre_hooks

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
    with pytest.raises(ValueError, match='queue=2: the saved memory holds'): other.fit(1)

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
    assert set(search_space(name))==({'lr'} if name=='phantom' else {'lr','lam'}) and cb.lam==PhantomEmbeddings().lam
    assert all(getattr(PhantomEmbeddings(), k)==v for k,v in METHODS[name].defaults.items() if k!='mode' or name=='phantom')

def test_threads_are_refused_before_the_first_batch():
    with pytest.raises(ValueError, match='train with learn.distrib_ctx'): learner(nn.DataParallel(create_model('small_cnn', size=8, seed=0)), PhantomEmbeddings()).fit(1)
