"ISDA: logits, moments, and what is refused"
import copy
import pytest, torch
from fastai.basics import Callback, Learner, SGD
from fastai.callback.mixup import CutMix, MixUp
from fastai.losses import LabelSmoothingCrossEntropyFlat
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from phantom_nb.data import get_dls
from phantom_nb.kinds import ReplacedLoss
from phantom_nb.plain import attach
from phantom_nb.regularizers.semantic import ISDA, isda_logits, merge_moments

@settings(max_examples=20, deadline=None)
@given(b=st.integers(1, 9), c=st.integers(2, 7), d=st.integers(1, 5), diagonal=st.booleans())
def test_logits_never_fall_and_the_right_one_stays(b, c, d, diagonal):
    z,weight,root = torch.randn(b, d, dtype=torch.float64),torch.randn(c, d, dtype=torch.float64),torch.randn(c, d, d, dtype=torch.float64)
    cov,y = root@root.mT,torch.randint(c, (b,))
    logits = z@weight.T
    moved = isda_logits(logits, y, weight, cov.diagonal(dim1=1, dim2=2) if diagonal else cov, .7)
    assert (moved>=logits-1e-9).all() and torch.allclose(moved.gather(1, y[:,None]), logits.gather(1, y[:,None]))
    assert F.cross_entropy(moved, y)>=F.cross_entropy(logits, y)-1e-9

@pytest.mark.parametrize('n', [3, 12])
def test_logits_are_moved_by_half_the_variance_of_their_difference(n):
    "Against a loop over samples and classes, with fewer samples than classes and with more; full and diagonal"
    gen = torch.Generator().manual_seed(0)
    logits,weight,root = (torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in ((n,5), (5,4), (5,4,4)))
    y,cov = torch.randint(5, (n,), generator=gen),root@root.mT
    for given_cov,full in ((cov, cov), (cov.diagonal(dim1=1, dim2=2), torch.diag_embed(cov.diagonal(dim1=1, dim2=2)))):
        want = logits.clone()
        for i,own in enumerate(y):
            for j in range(5):
                d = weight[j]-weight[own]
                want[i,j] += .7/2*(d@full[own]@d)
        torch.testing.assert_close(isda_logits(logits, y, weight, given_cov, .7), want)

def test_gradients():
    gen = torch.Generator().manual_seed(0)
    logits,weight = [torch.randn(s, generator=gen, dtype=torch.float64, requires_grad=True) for s in ((6,3), (3,4))]
    cov,y = torch.randn(3, 4, 4, generator=gen, dtype=torch.float64),torch.randint(3, (6,), generator=gen)
    cov = (cov@cov.mT).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: isda_logits(a, y, w, cov, .5), (logits, weight))
    assert torch.autograd.grad(isda_logits(logits, y, weight, cov, .5).sum(), cov, allow_unused=True)==(None,)

@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5), diagonal=st.booleans())
def test_merging_is_exact(sizes, diagonal):
    z,y = torch.randn(sum(sizes), 3, dtype=torch.float64),torch.randint(4, (sum(sizes),))
    moments = None
    for part in torch.arange(len(z)).split(sizes): moments = merge_moments(moments, z[part], y[part], 4, diagonal)
    once = merge_moments(None, z, y, 4, diagonal)
    assert all(torch.allclose(a, b, atol=1e-10) for a,b in zip(moments, once))

def fit(*cbs, epochs=1, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))
    learn = Learner(get_dls('digits', n_train=64, n_valid=20, bs=32, device='cpu'), model, opt_func=SGD, lr=.1, cbs=list(cbs), **options)
    learn.logger,learn.create_mbar = (lambda *_: None),False
    with learn.no_bar(): learn.fit(epochs)
    return learn

def test_strength_rises_from_the_first_step():
    assert [row[2] for row in fit(ISDA(.8), epochs=2).isda.records]==pytest.approx([.2, .4, .6, .8])

def test_moments_begin_anew_with_a_fit_and_count_every_image():
    learn = fit(ISDA(.5), epochs=2)
    assert learn.isda.moments[0].sum()==128
    with learn.no_bar(): learn.fit(1)
    assert learn.isda.moments[0].sum()==64

def test_the_learners_own_loss_is_moved():
    penalties = [fit(ISDA(5.), loss_func=loss).isda.records[1][3] for loss in (None, LabelSmoothingCrossEntropyFlat(eps=.3))]
    assert all(p>0 for p in penalties) and penalties[0]!=penalties[1]

class Sharper(ReplacedLoss):
    "The loss of steeper logits"
    def outputs(self, pred, lam):
        assert pred.dtype==torch.float32
        return (1+lam)*pred

@pytest.mark.parametrize('lam,every', [(0.,1), (.5,1), (.5,2), (2.,2)])
def test_the_gradient_is_that_of_the_replaced_loss(lam, every):
    "Every second step has the change twice, so that the mean is right; without a weight nothing changes"
    learn,seen = fit(epochs=0),[]
    model,loss = learn.model,F.cross_entropy
    def step(cb):
        z = copy.deepcopy(model)(cb.x)
        plain,sharper = loss(z, cb.y),loss(z*(1+lam), cb.y)
        factor = every if cb.train_iter%every==0 and lam else 0
        want = torch.autograd.grad(plain+factor*(sharper-plain), z)[0]
        found = torch.autograd.grad(cb.learn.loss_grad, cb.pred, retain_graph=True)[0]
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)
        seen.append((cb.learn.loss-plain).abs().item()<1e-6)
    with learn.no_bar(), learn.added_cbs([Sharper(lam, every=every), Callback(before_backward=step)]): learn.fit(1)
    assert seen==[True]*2

@pytest.mark.parametrize('lam', [.5, 5.])
def test_the_gradient_is_that_of_the_moved_logits(lam):
    "Of all parameters, also along the weights that move the logits; the covariances are no variables"
    learn,seen = fit(epochs=0),[]
    def step(cb):
        isda,model = cb.learn.isda,copy.deepcopy(learn.model.cpu())
        for m in model.modules(): m._forward_hooks.clear(), m._forward_pre_hooks.clear()
        (name,_), = isda.selected.items()
        moved = isda_logits(model(cb.x).float(), cb.y, model.get_submodule(name).weight.flatten(1), isda.moments[2], isda.lam_now())
        want = torch.autograd.grad(F.cross_entropy(moved, cb.y), list(model.parameters()))
        found = torch.autograd.grad(cb.learn.loss_grad, list(learn.model.parameters()), retain_graph=True)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)
        seen.append(isda.lam_now())
    with learn.no_bar(), learn.added_cbs([ISDA(lam), Callback(before_backward=step)]): learn.fit(1)
    assert seen and max(seen)==pytest.approx(lam)

def test_outputs_of_half_precision_are_computed_in_full():
    model,x,y = nn.Linear(4, 3),100*torch.randn(5, 4),torch.arange(5)%3
    with attach(model, Sharper(.5)) as penalty:
        z = model(x).bfloat16()
        assert penalty(y, pred=z).item()==(F.cross_entropy(1.5*z.float(), y)-F.cross_entropy(z.float(), y)).item()

def test_outputs_that_are_no_logits_are_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        def forward(self, x): return self.net(x),x
    learn = fit(epochs=0)
    learn.model,learn.loss_func = Two(),lambda pred, y: F.cross_entropy(pred[0], y)
    with pytest.raises(ValueError, match='gives a tuple: Sharper needs logits'), learn.no_bar(), learn.added_cbs(Sharper()): learn.fit(1)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_labels_are_refused(mix):
    with pytest.raises(ValueError, match='leave one of the two out'): fit(ISDA(), mix())

def test_soft_labels_in_a_plain_loop_are_refused():
    model,x = nn.Sequential(nn.Linear(4, 3)),torch.randn(5, 4)
    with attach(model, ISDA(), total=3) as penalty:
        model(x)
        with pytest.raises(ValueError, match='one class an image'): penalty(torch.rand(5, 3))
    with pytest.raises(ValueError, match='give total='): attach(model, ISDA())

def test_moments_keep_no_gradient():
    z = torch.randn(6, 3, requires_grad=True)
    moments = merge_moments(None, z, torch.arange(6)%2, 2)
    assert not any(m.requires_grad for m in (*moments, *merge_moments(moments, z, torch.arange(6)%2, 2)))

def test_a_loaded_fit_goes_on_with_its_moments(tmp_path):
    "Twice as many images are counted as in a fit of its own"
    first = fit(ISDA(.5), path=tmp_path)
    first.save('state')
    learn = Learner(first.dls, first.model, opt_func=SGD, lr=.1, cbs=[ISDA(.5)], path=tmp_path)
    learn.logger,learn.create_mbar = (lambda *_: None),False
    learn.load('state')
    with learn.no_bar(): learn.fit(1)
    assert learn.isda.moments[0].sum()==128
    with learn.no_bar(): learn.fit(1)
    assert learn.isda.moments[0].sum()==64

@pytest.mark.parametrize('n', [3, 12])
def test_rounding_lowers_no_logit(n):
    "Four classes with equal weights in the diagonal form, where the variance is a difference of large equal sums"
    gen = torch.Generator().manual_seed(0)
    weight = 1e3*torch.randn(1, 40, generator=gen)*torch.tensor([[1.],[1.],[1.],[1.],[-3.]])
    moved = isda_logits(torch.zeros(n, 5), torch.arange(n)%4, weight, torch.rand(5, 40, generator=gen), .5)
    assert (moved>=0).all() and (moved[:,4]>0).all()

def test_moments_leave_out_who_has_no_class():
    z,y = torch.randn(6, 3),torch.tensor([0, -100, 1, 1, -1, 0])
    for diagonal in (False, True):
        found,want = merge_moments(None, z, y, 2, diagonal),merge_moments(None, z[y>=0], y[y>=0], 2, diagonal)
        assert all(torch.allclose(a, b, atol=1e-6) for a,b in zip(found, want))

def test_a_loop_goes_on_with_loaded_moments():
    model,x,y = nn.Sequential(nn.Linear(4, 3)),torch.randn(5, 4),torch.arange(5)%3
    first,second = ISDA(),ISDA()
    with attach(model, first, total=3) as penalty:
        model(x)
        penalty(y)
        state = penalty.state_dict()
    with attach(model, second, total=3) as penalty:
        penalty.load_state_dict(state)
        assert all(map(torch.equal, first.moments, second.moments))

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int32, torch.bool])
def test_classes_may_be_of_any_whole_type(dtype):
    z,y = torch.randn(8, 3),torch.arange(8)%2
    for a,b in zip(merge_moments(None, z, y.to(dtype), 2), merge_moments(None, z, y, 2)): assert torch.equal(a, b)
