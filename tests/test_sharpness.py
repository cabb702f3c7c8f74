"Sharpness of networks whose answer is known; nothing of the network changes, whatever happens"
import copy, math
from functools import cache

import pytest, torch
from torch import nn

from phantom_nb.measures.sharpness import _bisect, norm_measures, path_norm, sharpness, sharpness_measures
from phantom_nb.models import create_model

GEN = torch.Generator().manual_seed(0)
X = torch.randn(80, 1, 8, 8, generator=GEN)

@cache
def trained():
    "Learns four classes by heart; running statistics are those of the whole sample"
    net,y = create_model('small_cnn', n_out=4, size=8, seed=0).train(),torch.arange(80)%4
    opt = torch.optim.Adam(net.parameters(), .01)
    for _ in range(40):
        opt.zero_grad()
        nn.functional.cross_entropy(net(X), y).backward()
        opt.step()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = 1.
    opt.zero_grad()
    with torch.no_grad(): net(X)
    return net.eval(),y

def network():
    net,y = trained()
    return copy.deepcopy(net),list(zip(X.split(30), y.split(30)))

def snapshot(net): return copy.deepcopy(net.state_dict()),[m.training for m in net.modules()],[(p.requires_grad, p.grad) for p in net.parameters()]

def unchanged(net, before):
    state,modes,grads = before
    assert all(torch.equal(v, state[k]) for k,v in net.state_dict().items())
    assert [m.training for m in net.modules()]==modes
    assert all(p.requires_grad==r and p.grad is g for p,(r,g) in zip(net.parameters(), grads))

def prepared():
    "In training, but one layer frozen; gradients are there"
    net,batches = network()
    net.train()
    net.stage1[0].bn.eval()
    net(X).sum().backward()
    next(net.parameters()).requires_grad_(False)
    return net,batches

@pytest.mark.parametrize('kw', [dict(), dict(worst=True, steps=11), dict(kernels=True, batch_stats=True),
    dict(worst=True, kernels=True, batch_stats=True, steps=11)], ids=['sigma1','alpha1','sigma2','alpha2'])
def test_nothing_changes_and_the_seed_decides(kw):
    net,batches = prepared()
    before,state = snapshot(net),torch.get_rng_state()
    kw = dict(draws=2, target=.6) | kw
    a = sharpness(net, batches, **kw)
    unchanged(net, before)
    assert torch.equal(torch.get_rng_state(), state) and 0<a<2
    torch.manual_seed(5)
    assert sharpness(net, batches, **kw)==a
    if not kw.get('worst'): assert sharpness(net, batches, **kw, seed=1)!=a

class Stop(nn.Module):
    "Fails at a chosen call"
    def __init__(self, at, exc):
        super().__init__()
        self.at,self.exc,self.n = at,exc,0
    def forward(self, x):
        self.n += 1
        if self.n==self.at: raise self.exc
        return x

@pytest.mark.parametrize('worst', [False, True])
@pytest.mark.parametrize('exc', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('at', [1, 2, 6, 9])
def test_nothing_changes_after_an_exception(worst, exc, at):
    net,batches = prepared()
    net = nn.Sequential(net, Stop(at, exc))
    before = snapshot(net)
    with pytest.raises(exc): sharpness(net, batches, worst=worst, batch_stats=True, target=.3, steps=20, bs=40)
    unchanged(net, before)
    assert torch.is_grad_enabled()

class Scale(nn.Module):
    "Right while its one weight is positive"
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.full((1, 1), float(w)))
    def forward(self, x): return torch.cat([self.w*x, -self.w*x], 1)

@pytest.mark.parametrize('w', [1., 50.])
def test_worst_case_of_a_known_network(w):
    "The weight changes sign at m = w/(w+0.001), beyond the upper bound of the search: it is never wrong"
    x = torch.rand(40, 1)+.5
    assert sharpness(Scale(w), [(x, torch.zeros(40, dtype=torch.long))], worst=True, lr=100., steps=20)==pytest.approx(.25, rel=2e-3)

def test_worst_case_reaches_the_corner_of_the_box():
    "Outputs x and 0.9x, with weights 1 and 0.9: they swap at 1-1.001m = 0.9+0.901m; a gradient that is NaN moves nothing"
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w,self.v = nn.Parameter(torch.tensor([[1.],[.9]])),nn.Parameter(torch.zeros(1))
        def forward(self, x): return x@self.w.T + 0*self.v.sqrt()
    x = torch.rand(50, 1, generator=torch.Generator().manual_seed(0))+.5
    got = sharpness(Two(), [(x, torch.zeros(50, dtype=torch.long))], worst=True, lr=10., steps=30)
    assert got==pytest.approx(.1/1.902, abs=2e-4)

def test_random_sharpness_of_a_known_network():
    "Right while 1+1.001 m xi > 0: P = Phi(1/1.001m) = 0.9 at m = 1/(1.001*1.2816), by the mean over many draws"
    x = torch.rand(4, 1)+.5
    got = sharpness(Scale(1.), [(x, torch.zeros(4, dtype=torch.long))], draws=4000)
    assert got==pytest.approx(1/(1.001*1.2816), rel=.05)

@pytest.mark.parametrize('w', [1., .001, -1.])
@pytest.mark.parametrize('seed', range(6))
def test_one_draw_of_a_known_network(seed, w):
    "Right until w + m (|w|+0.001) xi changes sign, which a xi of the sign of w never does"
    xi = torch.randn(1, generator=torch.Generator().manual_seed(seed)).item()
    got = sharpness(Scale(w), [(torch.ones(4, 1), torch.full((4,), int(w<0)))], draws=1, seed=seed)
    assert got==pytest.approx(min(2., -w/((abs(w)+.001)*xi)) if w*xi<0 else 2., rel=2e-3)

def test_the_search_ends_at_the_first_accuracy_near_the_target():
    "Within 0.005, or where the size is known to 0.2 %"
    tried = []
    def accuracy(m):
        tried.append(m)
        return 1-m/5
    found = _bisect(accuracy, 2., .9)
    near = [abs(1-m/5-.9)<.005 for m in tried]
    assert found==tried[-1] and near==[False]*(len(tried)-1)+[True]
    assert _bisect(lambda m: float(m<.3), 2., .9)==pytest.approx(.3, rel=2e-3)
    for high in (2., .25): assert _bisect(lambda m: 0., high, .9)==pytest.approx(high/10000, rel=2e-3)

class Noting(Scale):
    "Notes its weight, and whether it trains, whenever it is called with gradients; a little dropout"
    def __init__(self, w):
        super().__init__(w)
        self.seen = []
    def forward(self, x):
        if torch.is_grad_enabled(): self.seen.append((self.w.item(), self.training))
        return super().forward(nn.functional.dropout(x, .3, self.training))

@pytest.mark.parametrize('train_mode', [False, True])
def test_ascent_in_either_mode(train_mode):
    net,y = Noting(.1),torch.zeros(40, dtype=torch.long)
    data = [(torch.rand(40, 1, generator=torch.Generator().manual_seed(0))+.5, y)]
    def ascend(seed):
        torch.manual_seed(seed)
        net.seen.clear()
        sharpness(net, data, worst=True, steps=5, lr=1e-5, train_mode=train_mode)
        return list(net.seen)
    first = ascend(0)
    assert {training for _,training in first}=={train_mode} and ascend(1)==first

def test_the_last_steps_of_ascent_go_a_tenth_of_the_way():
    "Every step is the rate times the gradient of log(1+exp(-2wx)), here within the box; three of five at the full rate"
    net = Noting(.1).double()
    sharpness(net, [(torch.ones(9, 1).double(), torch.zeros(9, dtype=torch.long))], worst=True, steps=5, lr=1e-5)
    w = [w for w,_ in net.seen[:5]]
    assert w[0]==pytest.approx(.1)
    for a,b,rate in zip(w, w[1:], (1e-5,1e-5,1e-5,1e-6)): assert b-a==pytest.approx(-rate*2/(1+math.exp(2*a)), rel=1e-5)

def test_ascent_by_signs_goes_a_fifth_of_the_box_a_step():
    "The first box is 0.25/100, the middle of the search on a log scale, times 0.1+0.001"
    net = Noting(.1).double()
    sharpness(net, [(torch.ones(9, 1).double(), torch.zeros(9, dtype=torch.long))], worst=True, steps=5, signs=True)
    w = [w for w,_ in net.seen[:5]]
    assert [a-b for a,b in zip(w, w[1:])]==pytest.approx([.0025*.101/5]*4, rel=1e-5)

def test_ascent_does_not_end_at_the_target():
    "Nine of ten stay right: all steps are taken, and the search is over"
    net,y = Noting(.1),torch.tensor([0]*9+[1])
    sharpness(net, [(torch.ones(10, 1), y)], worst=True, steps=20, lr=1e-5)
    assert len(net.seen)==20

def test_kernels_alone():
    "The weight is a vector, so nothing is perturbed"
    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.tensor([1.,0.]))
        def forward(self, x): return self.b.expand(len(x), 2)
    data = [(torch.zeros(9, 1), torch.zeros(9, dtype=torch.long))]
    assert sharpness(Bias(), data, kernels=True)>1.99 and sharpness(Bias(), data, draws=200)<1.5

def test_batch_statistics_are_used():
    net,batches = network()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.add_(100)
    with pytest.raises(ValueError, match='below target'): sharpness(net, batches)
    assert sharpness(net, batches, batch_stats=True, draws=1)>0

def test_all_four():
    net,batches = network()
    few,kw = batches[:1],dict(draws=1, steps=5) # statistics of these 30 are not the running ones
    got = sharpness_measures(net, iter(few), **kw)
    assert list(got.index)==['sigma1','sigma2','alpha1','alpha2'] and got.alpha1<got.sigma1
    second = dict(kernels=True, batch_stats=True)
    assert got.sigma1==sharpness(net, few, **kw) and got.alpha1==sharpness(net, few, worst=True, **kw)
    assert got.sigma2==sharpness(net, few, **second, **kw)!=sharpness(net, few, kernels=True, **kw)
    assert got.alpha2==sharpness(net, few, worst=True, **second, **kw)

def test_an_accuracy_of_the_target_is_not_refused():
    "Half of eight samples are right"
    x,y = torch.ones(8, 1),torch.arange(8)%2
    assert sharpness(Scale(1.), [(x, y)], target=.5)>0
    with pytest.raises(ValueError, match='accuracy 0.500'): sharpness(Scale(1.), [(x, y)], target=.51)

@pytest.mark.parametrize('kw,message', [(dict(target=1.5), 'target=1.5'), (dict(draws=0), 'draws=0'), (dict(steps=0), 'steps=0'),
    (dict(lr=0.), 'lr=0.0'), (dict(bs=0), 'bs=0'), (dict(draws=2.5), 'draws=2.5')])
def test_refused_with_a_sentence(kw, message):
    with pytest.raises(ValueError, match=message): sharpness(*network(), **kw)

def test_labels_that_are_no_classes_are_refused():
    with pytest.raises(ValueError, match='one class a sample'): sharpness(network()[0], [(X, torch.rand(80))])


def test_the_scale_of_layers_does_not_matter():
    "Without batch normalization a factor passes ReLU: the same network, and nearly the same sharpness"
    def layers(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4, bias=False))
    net = layers()
    y = net(X).argmax(1)
    other = layers()
    other.load_state_dict({k:v*8 if k[0]=='1' else v/8 for k,v in net.state_dict().items()})
    a,b = sharpness(net, [(X, y)], draws=3),sharpness(other, [(X, y)], draws=3)
    assert b==pytest.approx(a, rel=.15)


# Norms

def test_norms_by_hand():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 4))
    y = net(X).argmax(1)
    got = norm_measures(net, [(X, y)])
    a,b = net[1].weight,net[3].weight
    assert got.param_norm==pytest.approx((a.square().sum()+b.square().sum()).item(), rel=1e-5)
    assert got.spectral==pytest.approx(2*sum(math.log(torch.linalg.svdvals(o)[0].item()) for o in (a, b)), rel=1e-4)
    top = net(X).topk(2, 1).values
    assert got.margin==pytest.approx((top[:,0]-top[:,1]).quantile(.1).item(), rel=1e-4)
    assert got.parameters==64*5+5+5*4+4
    assert got.inverse_margin==pytest.approx(-2*math.log(got.margin)) and got.spectral_margin==pytest.approx(got.spectral-2*math.log(got.margin))

def test_path_norm_by_hand():
    "All paths of a network of 3, 4 and 2 units; a bias is a path that starts at its unit"
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    (a,bias),b = [p.tolist() for p in net[0].parameters()],net[2].weight.tolist()
    paths = sum((b[k][h]*v)**2 for k in range(2) for h in range(4) for v in (*a[h],bias[h]))
    for n in (1, 5): assert path_norm(net, torch.zeros(n, 3))==pytest.approx(math.log(paths), abs=1e-6)

def test_norms_are_computed_in_64_bits():
    "4,097 squared is no number of 32 bits; a buffer of 64 bits keeps them"
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False))
    nn.init.constant_(net[1].weight, 4097.)
    assert norm_measures(net, [(X, torch.zeros(len(X), dtype=int))]).param_norm==64*4*4097.**2
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('scale', torch.tensor(.1, dtype=torch.float64))
        def forward(self, x): return x*self.scale
    net = nn.Sequential(nn.Linear(1, 1, bias=False).double(), Scaled())
    assert path_norm(net, torch.zeros(1, 1))==pytest.approx(math.log(net[0].weight.item()**2*.1), rel=1e-12)

def test_logarithms_of_nothing():
    "A layer of zeros has no path through it, and stretches nothing"
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for p in net[1].parameters(): nn.init.zeros_(p)
    got = norm_measures(net, [(torch.rand(5, 3), torch.zeros(5, dtype=torch.long))])
    assert got.path==got.spectral==-math.inf

def test_path_norm_folds_batch_normalization():
    "A convolution with batch normalization after it, against the same convolution with the two multiplied"
    conv,bn = nn.Conv2d(1, 3, 3),nn.BatchNorm2d(3)
    bn.running_var.uniform_(.3, 3, generator=GEN)
    bn.running_mean.normal_(generator=GEN)
    with torch.no_grad(): bn.weight.normal_(generator=GEN), bn.bias.zero_(), conv.bias.zero_()
    folded = nn.Conv2d(1, 3, 3, bias=False)
    with torch.no_grad(): folded.weight.copy_(conv.weight*(bn.weight/(bn.running_var+bn.eps).sqrt())[:,None,None,None])
    assert path_norm(nn.Sequential(conv, bn), X)==pytest.approx(path_norm(folded, X), abs=1e-6)

def test_a_network_that_is_wrong_has_no_margin():
    net,batches = network()
    got = norm_measures(net, [(x, (y+1)%4) for x,y in batches])
    assert got.margin<0 and math.isnan(got.inverse_margin) and math.isnan(got.spectral_margin)

def test_norms_leave_the_network_alone():
    net,batches = prepared()
    before = snapshot(net)
    norm_measures(net, batches)
    unchanged(net, before)

def test_the_spectral_norm_of_groups_is_that_of_the_dense_matrix():
    torch.manual_seed(0)
    grouped = nn.Sequential(nn.Conv2d(8, 8, 1, groups=4, bias=False), nn.Flatten(), nn.Linear(8, 3))
    dense = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Flatten(), nn.Linear(8, 3))
    dense[0].weight.data = torch.block_diag(*grouped[0].weight.data.flatten(1).view(4, 2, 2))[:,:,None,None]
    dense[2].load_state_dict(grouped[2].state_dict())
    batches = [(torch.randn(20, 8, 1, 1), torch.randint(3, (20,)))]
    a,b = norm_measures(grouped, batches),norm_measures(dense, batches)
    assert a.spectral==pytest.approx(b.spectral, rel=1e-5) and a.param_norm==pytest.approx(b.param_norm, rel=1e-5)
