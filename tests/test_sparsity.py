"Sparsity: the measure against its definition, streaming against the whole, the penalty, the monitor and its silence"
import copy, json, math
from functools import partial
from pathlib import Path

import matplotlib, numpy as np, pytest, timm, torch, torchvision
from fastai.basics import Callback, CancelEpochException, CancelFitException, Learner, load_learner, noop
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import LRFinder
from fastai.callback.training import GradientAccumulation
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from phantom_nb.contract import _n_hooks, check_regularizer
from phantom_nb.data import get_dls
from phantom_nb.experiments import bench
from phantom_nb.experiments.methods import make_method
from phantom_nb.hooks import unwrap
from phantom_nb.models import create_model
from phantom_nb.plain import attach
from phantom_nb.measures import sparsity as measure
from phantom_nb.measures.sparsity_monitor import LayerMeters, judge_alarm, loss_alarm, overfit_onset, sparsity_alarm
from phantom_nb.regularizers.sparsity import SparsityMonitor, TargetedSparsity, activation_sparsity, dead_units
from phantom_nb.regularizers.sparsity import fastest_rising, filter_correlation, measure_sparsity, perplexity, sparsity
from phantom_nb.regularizers.sparsity import target_layers

matplotlib.use('agg')
OVER = 'units','samples','positions'
SHAPES = [(7,5), (7,5,6), (7,5,3,4), (7,5,2,3,2)]
DTYPES = torch.float16,torch.bfloat16,torch.float32,torch.float64

def randn(*shape, seed=0, **kw): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kw)

def loop_sparsity(v):
    "From the definition, entry by entry"
    v = [abs(o) for o in v]
    if not sum(v): return 1.
    p = [o/sum(v) for o in v]
    return 1-(math.exp(-sum(o*math.log(o) for o in p if o))-1)/(len(v)-1)

def loop(a, over):
    a = a.flatten(2) if a.ndim>2 else a[...,None]
    r = a.abs().mean(2)
    vs = dict(units=r, samples=r.T, positions=a.flatten(0, 1))[over]
    return np.mean([loop_sparsity(v) for v in vs.tolist()])

def learner(*cbs, model=None, n_train=48, n_valid=20, bs=16, **kw):
    model = model or create_model('small_cnn', size=8, seed=0)
    learn = Learner(get_dls('digits', n_train=n_train, n_valid=n_valid, bs=bs, seed=0, device='cpu'), model, cbs=list(cbs), lr=.01, **kw)
    learn.logger,learn.create_mbar = noop,False
    return learn.remove_cbs(list(learn.cbs.filter(lambda o: isinstance(o, ProgressCallback))))


# The measure

@pytest.mark.parametrize('over', OVER)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_against_a_loop(shape, over):
    a = randn(*shape, dtype=torch.float64).where(randn(*shape, seed=1)>-.5, 0)
    if over=='positions' and len(shape)==2:
        with pytest.raises(ValueError, match="'positions' needs maps"): activation_sparsity(a, over)
    else: assert abs(activation_sparsity(a, over)-loop(a, over)) < 1e-12

@pytest.mark.parametrize('over', OVER)
def test_tokens_are_told_by_the_argument(over):
    a = randn(7, 5, 6)
    assert activation_sparsity(a.movedim(1, -1), over, channel_dim=-1)==activation_sparsity(a, over)
    assert abs(activation_sparsity(a, over, channel_dim=-1)-activation_sparsity(a, over))>1e-4

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('n', [2, 3, 64, 1000])
def test_exact_at_the_ends(n, dtype):
    a = torch.stack([torch.full((n,), .3), torch.eye(n)[1], torch.zeros(n)]).to(dtype)
    assert perplexity(a).tolist()==[n,1,1] and sparsity(a).tolist()==[0,1,1]

def test_one_unit_is_dense_unless_dead():
    assert sparsity(torch.tensor([[3.],[-1e-3],[0.]])).tolist()==[0,0,1]
    with pytest.raises(ValueError, match='at least one unit'): perplexity(torch.zeros(3, 0))

VALUES = st.one_of(st.just(0.), st.floats(-2.**127, 2.**127, width=32), st.floats(-2.**-120, 2.**-120, width=32), st.floats(-5, 5, width=32))

@settings(max_examples=150, deadline=None)
@given(st.lists(VALUES, min_size=12, max_size=12), st.sampled_from([(3,4), (2,3,2), (12,1), (1,12), (2,2,3)]))
def test_finite_and_in_range_whatever_comes(vals, shape):
    a = torch.tensor(vals).view(shape).requires_grad_()
    vs = [activation_sparsity(a, o) for o in OVER[:3 if len(shape)>2 else 2]] + [filter_correlation(a)]
    for v in vs:
        g, = torch.autograd.grad(v, a, retain_graph=True, allow_unused=True)
        assert 0<=v<=1 and (g is None or g.isfinite().all())

@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.floats(1e-12, 1e12))
def test_scale_sign_and_order_do_not_matter(seed, n, c):
    a = randn(4, n, seed=seed, dtype=torch.float64)
    i = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert (perplexity(-c*a[:,i])-perplexity(a)).abs().max() < 1e-9*n

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_half_precision_neither_overflows_nor_rounds(dtype):
    a = torch.full((4,3,20,20), torch.finfo(dtype).max/4, dtype=dtype)
    a[0] /= 2
    want = activation_sparsity(a.double()/a.double().max(), 'samples')
    v = activation_sparsity(a, 'samples')
    assert v.dtype==(torch.float64 if dtype==torch.float64 else torch.float32) and abs(v-want)<1e-5

def test_gradient_is_zero_where_dead_and_at_zeros_and_true_elsewhere():
    a = randn(4, 6, dtype=torch.float64).abs()
    a[0],a[1,2] = 0,0
    a.requires_grad_()
    g, = torch.autograd.grad(sparsity(a).sum(), a)
    p,n = a/a.sum(1, keepdim=True).clamp(min=1e-300),perplexity(a)[:,None]
    want = -(n/5/a.sum(1, keepdim=True))*(1/(n*p)).log()
    assert (g[0]==0).all() and g[1,2]==0 and (g-want)[a>0].abs().max()<1e-12

def test_nan_is_not_hidden():
    a = torch.ones(3, 4)
    a[1,1] = math.nan
    assert activation_sparsity(a).isnan() and filter_correlation(a).isnan()

def test_dead_units_are_silent_for_all():
    a = torch.zeros(3, 4, 2, 2)
    a[0,1,0,0],a[:,2] = -1,1
    assert dead_units(a)==.5

@pytest.mark.parametrize('bad', [dict(over='filters'), dict(channel_dim=2)], ids=str)
def test_wrong_option_is_named(bad):
    with pytest.raises(ValueError, match=repr(list(bad.values())[0])): activation_sparsity(torch.ones(2, 3), **bad)
    with pytest.raises(ValueError, match='give'): activation_sparsity(torch.ones(3))


# Correlation

@pytest.mark.parametrize('scale', [1e-15, 1., 1e30])
def test_correlation_is_numpys(scale):
    x = randn(40, 7) + 3
    want = np.abs(np.corrcoef(x.double().numpy().T))[np.triu_indices(7, 1)].mean()
    assert abs(filter_correlation(scale*x)-want) < 1e-5

def test_constant_channels_are_left_out():
    x = randn(20, 4)
    want = filter_correlation(x)
    padded = torch.cat([x, torch.full((20,1), .1), torch.zeros(20, 1), torch.full((20,1), 1e30)], 1)
    assert abs(filter_correlation(padded)-want) < 1e-6
    assert filter_correlation(padded[:,3:])==0 and filter_correlation(x[:1])==0

def test_correlated_filters_feel_a_force():
    x = randn(20, 2)
    x[:,1] = x[:,0]+.5*x[:,1]
    x.requires_grad_()
    before = filter_correlation(x)
    g, = torch.autograd.grad(before, x)
    assert filter_correlation(x-.1*g/g.norm()) < before-1e-4


# Streaming

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([(), (3,), (2,2)]), st.floats(0, 1e3))
def test_streaming_is_the_whole(seed, cuts, pos, shift):
    a = randn(sum(cuts), 5, *pos, seed=seed).relu()
    a[:,0] = 0
    a[:,1] += shift
    meter = measure.SparsityMeter()
    for o in a.split(cuts): meter.add(o)
    v = meter.values()
    for o in OVER if pos else OVER[:2]: assert abs(v[o]-activation_sparsity(a, o)) < 2e-5
    assert abs(v['dead']-dead_units(a))<1e-6
    ok = a.flatten(2).mean(2)[:,1:].std(0).min()>1e-2*(1+shift) if pos else a[:,1:].std(0).min()>1e-2*(1+shift)
    if len(a)>3 and ok: assert abs(v['correlation']-filter_correlation(a.double())) < 1e-4

def test_streaming_needs_two_sums_only_and_one_batch_to_begin():
    m = measure.SparsityMeter()
    with pytest.raises(ValueError, match='nothing was added'): m.values()
    m.add(torch.rand(10**4, 3))
    assert m.sums.shape==(3,3)

@pytest.mark.parametrize('bs', [1, 7, 60])
def test_whole_data_set_whatever_the_batches(bs):
    model,dls = create_model('small_cnn', size=8, seed=0),get_dls('digits', n_train=60, seed=0)
    x = dls.train.new(shuffle=False, bs=60).one_batch()[0]
    a,b = measure_sparsity(model, x.split(bs)),measure_sparsity(model, [x])
    assert np.allclose(a, b, atol=1e-5, equal_nan=True)


# Layers

def test_a_function_of_one_axis_is_no_layer():
    "A gate for each channel is a parameter behind a ReLU, not what units say of an image"
    class Gated(Functional):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.ones(10))
        def forward(self, x): return super().forward(x)*F.relu(self.gate)
    assert list(measure_sparsity(Gated(), [randn(4, 1, 8, 8)]).index)==['relu']

def test_every_call_of_a_shared_relu_is_a_layer():
    net = torchvision.models.resnet18(num_classes=10)
    df = measure_sparsity(net, [randn(2, 3, 32, 32)])
    assert {'relu','layer1.0.relu','layer1.0.relu:2','layer4.1.relu:2'} <= set(df.index) and len(df)==17

def test_calls_are_counted_anew_in_each_pass():
    net = create_model('small_cnn', size=8, seed=0)
    assert len(measure_sparsity(net, [randn(2, 1, 8, 8)]*3))==5

class Functional(nn.Module):
    "A network without activation modules"
    def __init__(self, act=F.relu, norm=True):
        super().__init__()
        self.act,self.conv,self.bn,self.fc = act,nn.Conv2d(1, 4, 3),nn.BatchNorm2d(4) if norm else nn.Identity(),nn.Linear(4, 10)
    def features(self, x): return self.act(self.bn(self.conv(x)))
    def forward(self, x): return self.fc(self.features(x).mean((2,3)))

@pytest.mark.parametrize('act', [F.relu, torch.relu, F.gelu, F.silu, lambda x: x.relu_()], ids=['relu','torch.relu','gelu','silu','relu_'])
@pytest.mark.parametrize('norm', [True, False])
def test_activations_that_are_functions_are_seen(act, norm):
    net,x = Functional(act, norm),randn(8, 1, 8, 8)
    df = measure_sparsity(net, [x])
    with torch.no_grad(): want = activation_sparsity(net.eval().features(x), 'samples')
    assert len(df)==1 and abs(df.samples.iloc[0]-want) < 1e-5
    for layers in ('auto','all','early'):
        learn = learner(TargetedSparsity(layers=layers), SparsityMonitor(), model=Functional(act, norm))
        learn.fit(1)
        assert learn.targeted_sparsity.to_frame().share.max()>0 and len(learn.sparsity_monitor.to_frame())==2 and _n_hooks(learn.model)==0

def test_modules_and_functions_give_the_same_penalty_and_gradient():
    def run(act):
        learn = learner(TargetedSparsity(1., 'all'), model=Functional(act).requires_grad_())
        torch.manual_seed(0)
        for p in learn.model.parameters(): nn.init.normal_(p, std=.3)
        learn.fit(2)
        return learn.targeted_sparsity.to_frame().penalty.tolist(),learn.model.conv.weight.detach()
    (p,w),(q,v) = run(nn.ReLU()),run(F.relu)
    assert p==q and torch.equal(w, v)

def test_modules_beside_functions_are_all_seen_once():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.relu = nn.Conv2d(1, 4, 3, padding=1),nn.ReLU()
            self.fc = nn.Linear(4, 4)
        def forward(self, x): return F.gelu(self.fc(F.relu(self.relu(self.conv(x))+1).mean((2,3))))
    df = measure_sparsity(Both(), [randn(3, 1, 8, 8)]*2)
    assert list(df.index)==['relu','relu:2()','gelu'] # the second is the function of the same name

def test_functions_of_the_loss_are_no_layers():
    net = Functional()
    learn = learner(TargetedSparsity(layers='all', target=.1), model=net, loss_func=lambda p, y: F.cross_entropy(F.relu(p)-F.relu(-p), y))
    seen = []
    learn.fit(1, cbs=Callback(after_pred=lambda cb: seen.extend(learn.targeted_sparsity.outputs)))
    assert set(seen)=={'relu'}

@pytest.mark.parametrize('act', [F.relu, nn.ReLU()], ids=['function','module'])
def test_a_loop_of_ones_own_gives_the_same_gradients(act):
    "Also where the loss itself calls F.relu"
    def loss(p, y): return F.cross_entropy(F.relu(p)-F.relu(-p), y)
    def grads(plain):
        torch.manual_seed(0)
        net,reg = Functional(act),TargetedSparsity(1., 'all', target=.1)
        x,y = randn(16, 1, 8, 8),torch.arange(16)%10
        if plain:
            with attach(net, reg) as penalty: (loss(net(x), y)+penalty(y)).backward()
        else:
            learn = learner(reg, model=net, loss_func=loss)
            stop = Callback(before_step=lambda cb: (_ for _ in ()).throw(CancelFitException()))
            learn.fit(1, cbs=[Callback(before_batch=lambda cb: (setattr(cb.learn, 'xb', (x,)), setattr(cb.learn, 'yb', (y,)))), stop])
        assert _n_hooks(net)==0
        return [p.grad.clone() for p in net.parameters()]
    assert all(map(torch.equal, grads(True), grads(False)))

class Recomputed(nn.Module):
    "Forgets what lies inside its block, and computes it again for the gradient"
    def __init__(self, reentrant):
        super().__init__()
        self.block,self.head,self.reentrant = nn.Sequential(nn.Linear(8, 6), nn.ReLU()),nn.Linear(6, 2),reentrant
    def forward(self, x): return self.head(checkpoint(self.block, x.requires_grad_(), use_reentrant=self.reentrant))

def test_activations_without_a_graph_are_refused():
    "Reentrant checkpoints compute them under no_grad, where the penalty would be a constant"
    def bias_grad(lam):
        torch.manual_seed(0)
        net,x,y = Recomputed(False),randn(16, 8),torch.arange(16)%2
        with attach(net, TargetedSparsity(lam, 'all')) as penalty: (F.cross_entropy(net(x), y)+penalty(y)).backward()
        return net.block[0].bias.grad
    assert not torch.equal(bias_grad(0.), bias_grad(1.))
    net = Recomputed(True)
    with attach(net, TargetedSparsity(1., 'all')) as penalty, pytest.raises(ValueError, match='use_reentrant=False'):
        net(randn(16, 8))
        penalty(torch.arange(16)%2)
    assert _n_hooks(net)==0

def test_auto_in_a_loop_of_ones_own_is_told_when_an_epoch_ends():
    net,reg = create_model('small_cnn', size=8, seed=0),TargetedSparsity(1., 'auto', rechoose=2)
    with attach(net, reg) as penalty:
        for _ in range(2):
            for i in range(3):
                net(randn(8, 1, 8, 8, seed=i))
                penalty(torch.arange(8)).backward()
            reg.end_epoch()
    assert len(reg.chosen)==2 and {len(v) for v in reg.history.values()}=={2} and _n_hooks(net)==0

def test_watching_functions_stops_where_there_are_none():
    watch = measure.ActivationWatch(create_model('small_cnn', size=8, seed=0))
    assert watch.watches_functions
    with watch.watching(lambda *args: None): watch.model(randn(2, 1, 8, 8))
    assert not watch.watches_functions

def test_what_is_written_by_hand_has_a_remedy_that_fits_the_network():
    x = randn(8, 1, 8, 8)
    by_hand = lambda x: x.clamp(min=0)
    for norm,layers in ((True, 'BatchNorm2d'), (False, 'Conv2d')):
        net = Functional(by_hand, norm)
        with pytest.raises(ValueError, match=f'no activation of Functional.*layers=nn.{layers}, act='): measure_sparsity(net, [x])
        with pytest.raises(ValueError, match=f'layers=nn.{layers}'): learner(TargetedSparsity(), model=net).fit(1)
        with pytest.raises(ValueError, match=f'layers=nn.{layers}'): learner(SparsityMonitor(), model=net).fit(1)
        with pytest.raises(ValueError, match=f'layers=nn.{layers}'):
            with SparsityMonitor().watch(net) as mon: net(x), mon.end_epoch()
        df = measure_sparsity(net, [x], layers=getattr(nn, layers), act=by_hand)
        assert abs(df.samples.iloc[0]-activation_sparsity(net.eval().features(x), 'samples')) < 1e-5
        learn = learner(TargetedSparsity(layers=getattr(nn, layers), act=by_hand), model=net)
        learn.fit(1)
        assert learn.targeted_sparsity.to_frame().share.max()>0

def test_what_cannot_be_measured_is_refused():
    model = create_model('small_cnn', size=8, seed=0)
    learn = Learner(get_dls('digits', n_train=20, n_valid=10), model)
    for args,what in (((learn, []), 'learn.model'), ((model, learn.dls), 'dls.valid')):
        with pytest.raises(ValueError, match=what): measure_sparsity(*args)
    with pytest.raises(ValueError, match='monitor.watch'): SparsityMonitor().end_epoch()
    for draw in ('plot','plot_layers'):
        with pytest.raises(ValueError, match="over='density'.*correlation, dead"): getattr(SparsityMonitor(), draw)('density')
    for f,kw in ((overfit_onset, dict(rise=-1)), (overfit_onset, dict(window=0)), (sparsity_alarm, dict(rise=-1)), (loss_alarm, dict(window=0))):
        with pytest.raises(ValueError, match=next(iter(kw))): f([1.,2.,3.], **kw)

def test_wrong_names_of_functions_and_no_batches_are_refused():
    with pytest.raises(ValueError, match="layers='zz' selects no activation of Functional; there are: relu"):
        measure_sparsity(Functional(), [randn(2, 1, 8, 8)], layers='zz')
    with pytest.raises(ValueError, match='batches is empty'): measure_sparsity(Functional(), [])

def test_tokens_behind_a_linear_layer_have_their_channels_last():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    dims = []
    with measure.ActivationWatch(layer).watching(lambda name, a, dim: dims.append((a.shape[-1], dim))): layer.eval()(randn(2, 5, 8))
    assert dims==[(16,-1)]

@pytest.mark.parametrize('name,dims', [('vit_tiny_patch16_224',-1), ('resnet18',1), ('mobilenetv3_small_050',1), ('convnext_tiny',-1)])
def test_channels_of_timms_models(name, dims):
    kw = dict(img_size=64, patch_size=16, depth=2) if name.startswith('vit') else {}
    net = timm.create_model(name, pretrained=False, num_classes=10, **kw)
    layers = measure.activation_layers(net)
    found = measure.channel_dims(net, layers)
    seen = {}
    with measure.ActivationWatch(net).watching(lambda k, a, dim: seen.setdefault(k, a.shape)): net.eval()(randn(2, 3, 64, 64))
    df = measure_sparsity(net, [randn(2, 3, 64, 64)])
    assert len(df)>=len(layers) and df[['units','samples']].notna().all().all() and {c.axis for c in found.values()}=={dims}
    for k,shape in seen.items(): assert dims==1 or name[:3]=='vit' or shape[-1] in {m.out_features for m in net.modules() if isinstance(m, nn.Linear)}

def test_tokens_behind_a_convolution_have_their_channels_last():
    "PVT: a Linear layer, a depthwise convolution of the tokens as a map, and tokens again"
    net,seen = timm.create_model('pvt_v2_b0', pretrained=False, num_classes=10).eval(),set()
    with torch.no_grad(), measure.ActivationWatch(net).watching(lambda k, a, dim: seen.add((a.shape[dim], dim))): net(randn(1, 3, 96, 96))
    assert seen=={(256,-1), (512,-1), (640,-1), (1024,-1)}

def test_layers_may_be_left_out_at_random():
    "What 'auto' learns of a layer is its mean over the batches in which it ran"
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.relu,self.other,self.calls = nn.Linear(64, 6),nn.Linear(6, 10),nn.ReLU(),nn.ReLU(),0
        def forward(self, x):
            self.calls += 1
            x = self.a(x.flatten(1))
            return self.b(self.relu(x) if self.calls%3 else self.other(x))
    learn = learner(TargetedSparsity(1., 'auto', rechoose=2), model=Skips())
    learn.fit(4)
    cb = learn.targeted_sparsity
    assert set(cb.history)=={'relu','other'} and cb.chosen and cb.to_frame().penalty.notna().all()
    one = TargetedSparsity(1., ['relu'])
    learner(one, model=Skips()).fit(1)
    assert (one.to_frame().penalty>0).tolist()==[True, True, False]

def test_threads_are_refused():
    with pytest.raises(ValueError, match='DataParallel splits the batch'): learner(TargetedSparsity(), model=nn.DataParallel(create_model('small_cnn', size=8, seed=0))).fit(1)

def test_conv1d_and_tokens_are_told_apart():
    conv = nn.Sequential(nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.ReLU())
    tokens = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU())
    assert measure.channel_dims(conv, ['2'])['2'].axis==1 and measure.channel_dims(tokens, ['2'])['2'].axis==-1

def test_groups_cut_the_layers_into_thirds():
    net = nn.Sequential(*[nn.ReLU() for _ in range(7)])
    cut = [list(target_layers(net, k)) for k in ('early','middle','late')]
    assert cut==[['0','1'], ['2','3','4'], ['5','6']] and list(target_layers(net, 'all'))==list('0123456')
    with pytest.raises(ValueError, match="'middle': only 2"): target_layers(net[:2], 'middle')
    assert [list(target_layers(net[:n], k)) for n,k in ((2,'early'), (2,'late'), (4,'early'), (4,'late'))]==[['0'], ['1'], ['0'], ['3']]

@pytest.mark.parametrize('kw', [dict(over='x'), dict(target=1.), dict(correlation=-.1), dict(rechoose=1), dict(lam=-1.), dict(channel_dim=0),
    dict(act='relu')], ids=str)
def test_options_are_refused(kw):
    with pytest.raises(ValueError, match=next(iter(kw))): TargetedSparsity(**kw)

def test_groups_are_named_where_a_layer_is_not_found():
    with pytest.raises(ValueError, match="or give 'auto', 'all', 'early'"): target_layers(create_model('small_cnn', size=8), 'lat')
    with attach(create_model('small_cnn', size=8), TargetedSparsity()) as penalty:
        with pytest.raises(ValueError, match='call the network first'): penalty(torch.zeros(4).long())


# The penalty

@pytest.mark.parametrize('over', OVER)
def test_penalty_is_the_mean_excess_over_the_chosen_layers(over):
    seen = []
    model = create_model('small_cnn', size=8, seed=0)
    cb = TargetedSparsity(1., ['stage2.0.relu','stage3.0.relu'], target=.05, over=over, correlation=.3)
    def look(self, f=cb.penalty):
        a = {k:v.detach() for k,(v,dim) in cb.outputs.items()}
        want = np.mean([max(0, activation_sparsity(o, over)-.05)+.3*filter_correlation(o) for o in a.values()])
        r = f()
        seen.append(abs(r.item()-want)<1e-6 and set(a)=={'stage2.0.relu','stage3.0.relu'})
        return r
    cb.penalty = partial(look, cb)
    learner(cb, model=model).fit(1)
    assert seen and all(seen)

def test_no_force_below_the_target():
    learn = learner(TargetedSparsity(1., 'all', target=.99))
    learn.fit(1)
    assert learn.targeted_sparsity.to_frame().penalty.max()==0 and learn.targeted_sparsity.to_frame().share.max()==0

class Cut(nn.Module):
    "Sets small numbers to zero, in place or not"
    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace
    def forward(self, x): return x.mul_(x.detach()>.2) if self.inplace else x*(x.detach()>.2)

@pytest.mark.parametrize('layers', [lambda inplace: [nn.ReLU(inplace)], lambda inplace: [nn.GELU(), Cut(inplace)]], ids=['itself','next'])
def test_inplace_activations_and_what_follows(layers):
    "Same numbers and gradients with and without in-place work around the layers"
    def run(inplace):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), *layers(inplace), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(6, 10))
        learn = learner(TargetedSparsity(1., 'all'), model=net)
        learn.fit(2)
        return learn.targeted_sparsity.to_frame().penalty.tolist(),net[0].weight.detach()
    (p,w),(q,v) = run(True),run(False)
    assert np.allclose(p, q) and torch.allclose(w, v, atol=1e-6)

def test_passes_after_the_prediction_are_not_measured():
    def first(*cbs):
        learn = learner(TargetedSparsity(1., 'all'), *cbs, model=create_model('small_cnn', size=8, seed=0))
        torch.manual_seed(0)
        learn.fit(1)
        return learn.targeted_sparsity.to_frame().penalty[0]
    again = Callback(after_pred=lambda cb: cb.learn.model(torch.zeros_like(cb.x)))
    again.order = 100
    assert first()==first(again)>0

def test_shared_relu_in_training():
    cb = TargetedSparsity(1., 'all')
    learner(cb, model=nn.Sequential(nn.Conv2d(1, 3, 1), torchvision.models.resnet18(num_classes=10)), n_train=16, bs=8).fit(1)
    assert len(cb._names if cb.layers=='auto' else cb.to_frame()) and cb.to_frame().share.max()>0

def test_auto_aims_where_sparsity_rises_fastest():
    cb = TargetedSparsity(0., 'auto', rechoose=2)
    cb.history = dict(a=[.1,.1,.1,.2], b=[.5,.4,.3,.6], c=[.2,.1,.9,.1])
    assert [fastest_rising(cb.history, n) for n in (2,3,4)]==[['b'],['b'],['c']]

def test_an_epochs_sparsity_is_that_of_its_own_batches():
    cb = TargetedSparsity(1., 'auto')
    for values,want in (((.1,.3), .2), ((.5,), .5)):
        cb._epoch.extend(dict(a=torch.tensor(v), b=torch.tensor(2*v)) for v in values)
        cb.end_epoch()
        assert {name:found[-1] for name,found in cb.history.items()}==pytest.approx(dict(a=want, b=2*want))

def test_auto_chooses_every_so_often_and_goes_on_after_loading(tmp_path):
    cb,again = TargetedSparsity(1., 'auto', rechoose=2),TargetedSparsity(1., 'auto', rechoose=2)
    learn = learner(cb, path=tmp_path)
    learn.fit(1)
    assert cb.chosen==[] and {len(v) for v in cb.history.values()}=={1}
    learn.fit(4)
    assert len(cb.chosen)==2 and {len(v) for v in cb.history.values()}=={4}
    learn.save('x')
    other = learner(again, path=tmp_path).load('x')
    other.add_cb(Callback(after_pred=lambda o: seen.append(list(again.chosen))))
    seen = []
    other.fit(1)
    assert seen[0]==cb.chosen and {len(v) for v in again.history.values()}=={5}

def test_force_stays_with_the_chosen():
    "Layers that are not aimed at get no gradient of their own"
    cb = TargetedSparsity(1., 'auto')
    cb.chosen = ['stage1.0.relu']
    net = create_model('small_cnn', size=8, seed=0)
    cb.selected,cb._epoch = target_layers(net),[]
    cb.outputs = {k:(torch.rand(4, 3, 2, 2, requires_grad=True), 1) for k in cb.selected}
    cb.penalty().backward()
    assert all(rho==0 for _,rho in cb.sparsities().values())
    assert [k for k,(a,dim) in cb.outputs.items() if a.grad is not None]==['stage1.0.relu']

def test_accumulation_keeps_one_penalty_a_batch():
    cb = TargetedSparsity(1., 'all')
    learner(cb, GradientAccumulation(32)).fit(1)
    assert len(cb.to_frame())==3

@pytest.mark.parametrize('how', ['wrapper','in place'])
def test_compiled_models(how):
    "The penalty is refused before the first batch; the monitor and the measure work, and change nothing"
    net,x = create_model('small_cnn', size=8, seed=0),randn(4, 1, 8, 8)
    want = measure_sparsity(net, [x])
    compiled = torch.compile(net, backend='eager') if how=='wrapper' else net
    if how=='in place': net.compile(backend='eager')
    assert np.allclose(measure_sparsity(compiled, [x]), want, atol=1e-6, equal_nan=True)
    with pytest.raises(ValueError, match='train it without compile'): learner(TargetedSparsity(), model=compiled).fit(1)
    learn = learner(SparsityMonitor(), model=compiled)
    learn.fit(2)
    assert len(learn.sparsity_monitor.to_frame())==2*2*5 and _n_hooks(net)==0
    with pytest.raises(ValueError, match='watch it before compiling'):
        with SparsityMonitor().watch(compiled): pass

def test_compiled_networks_are_seen_once_a_batch():
    "In a pass of the monitor's own, which is told when there is nothing to see"
    def rows(*cbs):
        learn = learner(SparsityMonitor(share=1.), *cbs, model=torch.compile(create_model('plain_cnn', size=8, seed=0), backend='eager'))
        torch.manual_seed(0)
        learn.fit(1, 0.)
        return learn.sparsity_monitor.rows
    again = Callback(after_batch=lambda cb: unwrap(cb.learn.model)(torch.zeros_like(cb.x)))
    again.order = 100
    assert rows()==rows(again)
    by_hand = Functional(lambda x: x.clamp(min=0))
    by_hand.compile(backend='eager')
    with pytest.raises(ValueError, match='no activation of Functional'): learner(SparsityMonitor(), model=by_hand).fit(1)


# The monitor

def state(learn): return [p.detach().clone() for p in learn.model.state_dict().values()] + [torch.get_rng_state()]

@pytest.mark.parametrize('kw', [dict(), dict(share=1.), dict(file=True)], ids=str)
def test_training_does_not_notice_the_monitor(kw, tmp_path):
    def train(*cbs):
        torch.manual_seed(3)
        learn = learner(*cbs, model=create_model('small_cnn', size=8, dropout=.3, seed=0))
        learn.fit(3)
        return learn,state(learn)
    if 'file' in kw: kw = dict(file=tmp_path/'picture.png')
    (learn,a),(_,b) = train(SparsityMonitor(**kw)),train()
    assert all(map(torch.equal, a, b)) and _n_hooks(learn.model)==0
    assert learn.recorder.values==_.recorder.values
    assert not kw.get('file') or (tmp_path/'picture.png').stat().st_size>1000

def test_measuring_leaves_no_trace():
    net = create_model('small_cnn', size=8, dropout=.5, seed=0).train()
    net.stage2.eval()
    before,modes = [o.clone() for o in net.state_dict().values()]+[torch.get_rng_state()],[m.training for m in net.modules()]
    measure_sparsity(net, [randn(5, 1, 8, 8)])
    after = [*net.state_dict().values(), torch.get_rng_state()]
    assert all(map(torch.equal, before, after)) and modes==[m.training for m in net.modules()] and _n_hooks(net)==0

def test_monitor_reports_what_the_layers_did():
    "With all batches watched and nothing learned, its numbers are those of the whole data set"
    learn = learner(SparsityMonitor(share=1., images=400), model=create_model('plain_cnn', size=8, seed=0))
    learn.fit(1, 0.)
    df = learn.sparsity_monitor.to_frame()
    for split,dl in (('train', learn.dls.train), ('valid', learn.dls.valid)):
        got = df[df.split==split].set_index('layer')
        want = measure_sparsity(learn.model, dl.new(shuffle=False))
        assert np.allclose(got[want.columns], want, atol=1e-5, equal_nan=True)
    losses = learn.sparsity_monitor.losses[0]
    assert abs(losses['valid_loss']-learn.validate()[0])<1e-6 and abs(losses['train_loss']-learn.validate(0)[0])<1e-5

@pytest.mark.parametrize('share,watched', [(.3, (1,4,7)), (.2, (2,7))])
def test_a_share_of_the_batches_is_watched(share, watched):
    "The middle of every three of ten batches, or of every five"
    calls = []
    class Counting(SparsityMonitor):
        def after_pred(self):
            if self.meters.split: calls.append((self.epoch, self.iter, self.meters.split))
            super().after_pred()
    learner(Counting(share=share), n_train=160).fit(2)
    assert [o[:2] for o in calls if o[2]=='train']==[(e,i) for e in (0,1) for i in watched] and sum(o[2]=='valid' for o in calls)==2

def test_an_epoch_that_is_passed_over_leaves_no_row():
    def skip(cb):
        if cb.epoch==1: raise CancelEpochException
    learn = learner(SparsityMonitor(), Callback(before_epoch=skip))
    learn.fit(3)
    assert len(learn.sparsity_monitor.losses)==2 and set(learn.sparsity_monitor.to_frame().epoch)=={0,1}

def test_passes_after_the_prediction_are_not_seen_by_the_monitor():
    def rows(*cbs):
        learn = learner(SparsityMonitor(share=1.), *cbs, model=create_model('plain_cnn', size=8, seed=0))
        torch.manual_seed(0)
        learn.fit(1, 0.)
        return learn.sparsity_monitor.rows
    again = Callback(after_pred=lambda cb: cb.learn.model(torch.zeros_like(cb.x)))
    again.order = 100
    assert rows()==rows(again)

def test_a_batch_that_is_run_by_hand_after_a_fit_is_not_watched():
    learn = learner(SparsityMonitor(share=1.))
    learn.fit(1)
    learn.one_batch(0, learn.dls.valid.one_batch())
    assert learn.sparsity_monitor.meters.found=={} and _n_hooks(learn.model)==0

@pytest.mark.parametrize('event', ['after_pred','before_backward','after_batch','before_validate'])
@pytest.mark.parametrize('exc', [RuntimeError, KeyboardInterrupt])
def test_hooks_go_after_an_exception(event, exc):
    learn = learner(SparsityMonitor(share=1.))
    def stop(cb): raise exc('on purpose')
    with pytest.raises(exc): learn.fit(1, cbs=Callback(**{event:stop}))
    assert _n_hooks(learn.model)==0

def test_hooks_go_after_an_exception_inside_the_model():
    learn = learner(SparsityMonitor(share=1.))
    learn.model.head.fc = nn.Linear(3, 10)
    with pytest.raises(RuntimeError): learn.fit(1)
    assert _n_hooks(learn.model)==0
    net = learn.model
    with pytest.raises(RuntimeError):
        with SparsityMonitor().watch(net): net(randn(2, 1, 8, 8))
    assert _n_hooks(net)==0

def test_monitor_lives_with_fastai(tmp_path):
    learn = learner(SparsityMonitor(), GradientAccumulation(32), path=tmp_path)
    mon = learn.sparsity_monitor
    learn.fit(2)
    rows = list(mon.rows)
    learn.fit(4, cbs=LRFinder(num_it=6, stop_div=False))
    learn.validate(), learn.get_preds()
    assert mon.rows==rows and len(mon.losses)==2
    learn.export('x.pkl')
    loaded = load_learner(tmp_path/'x.pkl')
    x = learn.dls.valid.one_batch()[0]
    assert torch.equal(loaded.model.eval()(x), learn.model.eval()(x)) and type(loaded.sparsity_monitor) is Callback and mon.rows==rows
    learn.fit(1)
    assert len(mon.losses)==1
    learn.fit(3, start_epoch=1)
    assert len(mon.losses)==3

def test_watch_tells_training_from_validation_and_epochs():
    net,x = create_model('small_cnn', size=8, seed=0),randn(6, 1, 8, 8)
    with SparsityMonitor(share=.5).watch(net) as mon:
        for e in range(2):
            for _ in range(4): net.train()(x)
            with torch.no_grad(): net.eval()(x)
            mon.end_epoch(1.5, 2.5)
    df = mon.to_frame()
    assert len(df)==2*2*5 and mon.losses[1]==dict(epoch=1, train_loss=1.5, valid_loss=2.5) and _n_hooks(net)==0

def test_a_share_of_the_passes_is_watched_in_a_loop():
    "Every other one, the first among them"
    net,parts = create_model('plain_cnn', size=8, seed=0).eval(),randn(4, 6, 1, 8, 8)
    with SparsityMonitor(share=.5).watch(net) as mon, torch.no_grad():
        for x in parts: net(x)
        mon.end_epoch()
    df = mon.to_frame().set_index('layer')
    assert (df.split=='valid').all() and df.samples.tolist()==pytest.approx(measure_sparsity(net, parts[::2]).samples.tolist())

def test_hooks_that_see_nothing_are_left_behind_after_an_epoch():
    "All activations of this network are modules: its other layers need no hook"
    net = create_model('small_cnn', size=8, seed=0)
    with SparsityMonitor().watch(net) as mon:
        net(randn(2, 1, 8, 8))
        before = _n_hooks(net)
        mon.end_epoch()
        assert 0<_n_hooks(net)<before

def test_an_activation_by_hand_is_given_values_alone():
    "So NumPy will do"
    net,x = Functional(),randn(4, 1, 8, 8)
    with SparsityMonitor(nn.BatchNorm2d, act=lambda a: torch.from_numpy(np.maximum(a.numpy(), 0))).watch(net) as mon:
        net(x)
        mon.end_epoch()
    assert mon.rows[0]['samples']==pytest.approx(activation_sparsity(net.features(x), 'samples').item(), abs=1e-5)

def test_a_monitor_goes_on_in_the_middle_of_an_epoch():
    "Its record is kept, and what the first batches showed counts in the epoch's row and loss"
    saved,found = [],[]
    def save(cb):
        if cb.training and (cb.epoch,cb.iter)==(1,0): saved.append(copy.deepcopy(cb.learn.sparsity_monitor.state_dict()))
    def load(cb):
        cb.learn.sparsity_monitor.load_state_dict(saved[0])
        found.append(copy.deepcopy(cb.learn.sparsity_monitor.state_dict()))
    save,load = Callback(after_batch=save),Callback(before_fit=load)
    save.order = load.order = 100
    learner(SparsityMonitor(share=1.), save).fit(2)
    learn = learner(SparsityMonitor(share=1.), load)
    learn.fit(1)
    mon,layer = learn.sparsity_monitor,'stage1.0.relu'
    assert found[0]['meters']['train'][layer]['n']==saved[0]['meters']['train'][layer]['n']==16
    assert len(mon.losses)==2 and mon.to_frame().groupby('epoch').size().tolist()==[10,10] and mon.rows[:10]==saved[0]['rows'][:10]

def test_meters_go_on_from_a_saved_state():
    net,(a,b) = create_model('plain_cnn', size=8, seed=0).eval(),randn(2, 6, 1, 8, 8)
    first,second = LayerMeters(net),LayerMeters(net)
    def look(meters, x):
        meters.open()
        meters.split = 'valid'
        with torch.no_grad(): net(x)
        meters.close()
    look(first, a)
    second.load_state_dict(first.state_dict())
    look(second, b)
    assert [row['samples'] for row in second.read()]==pytest.approx(measure_sparsity(net, [a,b]).samples.tolist())

def test_the_mean_over_layers_is_a_mean():
    mon = SparsityMonitor()
    mon.losses = [{}]*2
    mon.rows = [dict(epoch=1, split=split, layer=layer, samples=s) for split,layer,s in (('train','a',.2), ('train','b',.4), ('valid','a',.9))]
    assert mon.mean_over_layers()==pytest.approx([math.nan,.3], nan_ok=True) and mon.mean_over_layers(split='valid')[1]==.9

@pytest.mark.parametrize('kw', [dict(share=0), dict(share=1.5), dict(images=1), dict(over='all'), dict(rise=-1), dict(window=0)], ids=str)
def test_monitor_refuses(kw):
    SparsityMonitor(share=1., images=2, rise=0., window=1)
    with pytest.raises(ValueError, match=f"{list(kw)[0]}={list(kw.values())[0]!r}"): SparsityMonitor(**kw)
    with pytest.raises(ValueError, match='fit first'): SparsityMonitor().plot()

def test_pictures_and_the_lead():
    learn = learner(SparsityMonitor())
    learn.fit(2)
    mon = learn.sparsity_monitor
    assert len(mon.plot())==2 and mon.plot_layers().size==5
    for i,r in enumerate(mon.rows): r['samples'] = .1
    mon.losses = [dict(epoch=i, train_loss=1., valid_loss=abs(i-20)+1.) for i in range(40)]
    mon.rows = [dict(mon.rows[0], epoch=i, split='train', samples=.1 if i<12 else .3) for i in range(40)]
    assert mon.warning()==dict(epoch=12, onset=20, lead=8, judgement='hit')

@pytest.mark.processes
def test_cost_is_a_few_percent_on_any_machine(monkeypatch):
    "Ratios within one run, the best of three; on digits made of 28×28 points, since 8×8 leave little to train. All batches watched cost too much"
    def larger(cb): cb.learn.xb = (F.interpolate(cb.x, (28,28)),)
    small,monitor = bench.make_learner,bench.TimedMonitor
    monkeypatch.setattr(bench, 'make_learner', lambda *args: small(*args).add_cb(Callback(before_batch=larger)))
    def least(share):
        def watch(clock):
            cb = monitor(clock)
            cb.share = share
            return cb
        monkeypatch.setattr(bench, 'TimedMonitor', watch)
        return min(bench.bench_monitor('digits', sizes=(('small_cnn',700,300),), epochs=2).share[0] for _ in range(3))
    some,everything = least(.15),least(1.)
    assert 0<some<=.14 and some<everything, "3% of a network worth training is held by the record below; here it was 7% to 10%"

def test_recorded_cost():
    rows = [json.loads(o) for o in (Path(__file__).parents[1]/'results/bench-monitor.jsonl').read_text().splitlines()]
    assert {o['model']:o['share']<=(.03 if o['model']=='resnet9' else .06) for o in rows}==dict(small_cnn=True, resnet9=True)

def test_only_so_many_images_are_measured():
    meter,a = measure.SparsityMeter(),randn(20, 3, 4, 4)
    meter.add(a, 5)
    assert abs(meter.values()['positions']-activation_sparsity(a[:5], 'positions'))<1e-6 and abs(meter.values()['units']-activation_sparsity(a))<1e-6
    net,x = Functional().eval(),randn(20, 1, 8, 8)
    with SparsityMonitor(images=17).watch(net) as mon, torch.no_grad():
        net(x)
        mon.end_epoch()
    a,found = net.features(x),mon.rows[0]
    assert found['units']==pytest.approx(activation_sparsity(a[:17]).item(), abs=1e-6)
    assert found['positions']==pytest.approx(activation_sparsity(a[:2], 'positions').item(), abs=1e-6) # a sixteenth, rounded up
    learn = learner(SparsityMonitor(images=8))
    learn.fit(1)
    assert learn.sparsity_monitor.to_frame().shape[0]==10

def test_streaming_goes_on_from_a_saved_state():
    "Huge numbers first, whose plain mean over positions overflows"
    parts = [randn(n, 3, 4, 4, seed=n).tanh()*3e38 for n in (5,7)]
    first,second,whole = [measure.SparsityMeter() for _ in range(3)]
    first.add(parts[0])
    state = first.state_dict()
    assert {k for k,v in state.items() if isinstance(v, np.ndarray)}==set() and isinstance(state['sums'], torch.Tensor)
    second.load_state_dict(state)
    second.add(parts[1])
    whole.add(torch.cat(parts))
    assert second.n==12 and second.values()==pytest.approx(whole.values())
    huge = torch.full((2,1,8), 2e38)
    assert measure._fast_means(huge)[1].tolist()==huge[:,:,0].tolist()

@pytest.mark.parametrize('n,low,high', [(5, 0, 4), (15, 1, 13)])
def test_low_and_high_hold_most_of_the_filters(n, low, high):
    meter = measure.SparsityMeter()
    meter.add(randn(20, n).relu())
    found,f = meter.values(),sorted(meter.filters())
    assert (found['low'],found['high'])==(f[low],f[high])

def test_streaming_of_huge_values():
    a,meter = torch.full((4,2,20,20), 1e38),measure.SparsityMeter()
    a[0] = 0
    meter.add(a)
    assert abs(meter.values()['samples']-activation_sparsity(a, 'samples'))<1e-5 and abs(meter.values()['units']-.25)<1e-5


# Alarms

def test_alarms_see_the_past_only():
    s = np.r_[np.full(20, .1), np.full(20, .3)]
    for n in range(1, 40): assert sparsity_alarm(s[:n], .05, 3)==(None if n<21 else 20)
    assert loss_alarm([1,.5,.2,.05,.01], .3, 1)==2 and loss_alarm([1.], .3) is None
    assert sparsity_alarm([math.nan]*5) is None and sparsity_alarm([math.nan,.1,.1,.9], window=1)==3

def test_an_alarm_sounds_beyond_its_threshold():
    "Not at it: a rise of 0 is no rise"
    assert sparsity_alarm([.5,.5,.5], rise=0.) is None and sparsity_alarm([.5,.5,.51], rise=0., window=1)==2
    assert loss_alarm([1.,.5,.25], below=.5, window=1)==2 and overfit_onset([1.,1.,1.], rise=0., window=1) is None

@pytest.mark.parametrize('loss,want', [([3,2,1,2,3],2), ([3,2,1,1,1],None), ([3,2,1,1.02,1.04],None), ([1,2,3],0),
    ([3,1,2,.5,.5],None), ([3,.5,1],1), ([math.nan]*3,None)], ids=str)
def test_onset(loss, want): assert overfit_onset(loss, window=1)==want

@pytest.mark.parametrize('alarm,onset,want', [(10,20,'hit'), (20,20,'hit'), (9,20,'early'), (21,20,'late'), (None,20,'missed'), (3,None,'false'), (None,None,'quiet'), (0,0,'hit')])
def test_judgement(alarm, onset, want): assert judge_alarm(alarm, onset)==want

def test_contract_of_a_signed_activation():
    def make(**kw): return TargetedSparsity(**{'layers':nn.BatchNorm2d, 'over':'units', **kw})
    assert set(check_regularizer(make, points=[1,2,4,5]).result)=={'kept'}

def test_the_table_of_methods_has_every_option_and_either_half():
    cb, = make_method('targeted_sparsity', correlation=.5, target=.2, rechoose=3, over='units', layers='late').cbs
    assert (cb.correlation, cb.target, cb.rechoose, cb.over, cb.layers)==(.5, .2, 3, 'units', 'late')
    for during,expected in dict(first=(2., 0.), second=(0., 2.)).items():
        cb, = make_method('targeted_sparsity', lam=2., during=during).cbs
        assert (cb.lam(.49), cb.lam(.5))==expected
    with pytest.raises(ValueError, match="during='third'"): make_method('targeted_sparsity', during='third')
    with pytest.raises(ValueError, match='lam=-1'): make_method('targeted_sparsity', lam=-1, during='first')

def test_what_is_smaller_than_its_square_can_say_counts_as_nothing():
    "In float64 that is the root of the smallest number, not the number itself"
    tiny = torch.finfo(torch.float64).tiny
    for power,n in ((.6, 1), (.4, 4)): assert measure.perplexity(torch.full((4,), tiny**power, dtype=torch.float64))==n

def test_a_channel_that_varies_by_less_than_float32_can_say_is_constant():
    z = randn(64, 2).double()
    constant = torch.full((64,2), 3., dtype=torch.float64)+1e-9*z[:,:1]
    meter,alone = measure.SparsityMeter(),measure.SparsityMeter()
    meter.add(torch.cat([z, constant], 1))
    alone.add(z)
    assert meter.correlation()==pytest.approx(alone.correlation(), rel=1e-6)

def test_a_meter_reads_what_activations_are_below_zero_too():
    "Units without maps, of both signs"
    a = torch.randn(12, 5)
    meter = measure.SparsityMeter()
    for part in a.split(5): meter.add(part)
    assert meter.values()['units']==pytest.approx(activation_sparsity(a).item(), rel=1e-5)
    assert meter.values()['samples']==pytest.approx(activation_sparsity(a, 'samples').item(), rel=1e-5)

def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="over='position'"): activation_sparsity(torch.rand(2, 3, 4, 4), 'position')
