"The contract must be able to fail: one broken regularizer for each of its nine promises, and the base class's own edges"
import copy, logging, math, pickle, re, subprocess, sys, warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np, pytest, torch
from PIL import Image
from fastai.basics import Callback, Learner, SGD
from fastai.callback.schedule import LRFinder, SchedLin
from fastai.callback.training import GradientAccumulation
from fastai.vision.data import ImageDataLoaders
from torch import nn

from phantom_nb.contract import _close, _n_hooks, check_regularizer
from phantom_nb.core import _OneBatch, ActivationRegularizer, L2Penalty, TrainingCallback, gradient_norm, select_layers, weight_view
from phantom_nb.data import get_dls
from phantom_nb.measures.sparsity_monitor import SparsityMonitor
from phantom_nb.plain import attach
from phantom_nb.regularizers.activations import AL2
from phantom_nb.regularizers.flatness import SAM
from phantom_nb.regularizers.norms import NormalizeAndProject
from phantom_nb.regularizers.phantom import PhantomEmbeddings
from phantom_nb.regularizers.semantic import ISDA
from phantom_nb.regularizers.sparsity import TargetedSparsity


class Activity(ActivationRegularizer):
    def penalty(self): return torch.stack([a.float().square().mean() for a in self.acts.values()]).mean()

# One class for every way to break a promise: the promise, and what the contract says

BROKEN = []
def breaks(promise, words):
    def add(cls):
        BROKEN.append((cls, promise, words))
        return cls
    return add

@breaks(1, 'moves the global random state')
class NotOffAtZero(L2Penalty):
    "Draws from the global generator, so that even lam=0 changes what follows"
    def penalty(self):
        torch.rand(1)
        return super().penalty()

@breaks(1, 'lam=1 gives the gradients of no regularizer')
@breaks(5, 'penalty() carries no gradient')
class NoGradient(L2Penalty):
    "A printed number without force"
    def penalty(self): return super().penalty().detach()

@breaks(1, 'lam=1 gives the weights of no projection')
class NoProjection(NormalizeAndProject):
    def _project(self): pass

@breaks(1, 'the second pass moves the global random state')
class OtherDropout(SAM):
    "Leaves the random state where the second pass ends"
    def _pass(self, weights, displacement):
        if self.lam_now(): torch.rand(1)
        return super()._pass(weights, displacement)

@breaks(1, 'the second pass leaves other weights or running statistics behind')
class MovesStatistics(SAM):
    def _pass(self, weights, displacement):
        result = super()._pass(weights, displacement)
        if self.lam_now(): next(b for b in self.model.buffers() if b.is_floating_point()).data.add_(1.)
        return result

@breaks(2, 'the reported training loss contains the penalty')
class InTheLoss(L2Penalty):
    def after_loss(self):
        super().after_loss()
        self.learn.loss = self.loss_grad

@breaks(2, 'no finite penalty was recorded')
class RecordsNothing(L2Penalty):
    def _record(self, *row): pass

@breaks(2, 'no finite penalty was recorded')
class NotANumber(L2Penalty):
    def penalty(self): return super().penalty()*math.nan

@breaks(2, 'the validation loss contains the penalty')
class InTheValidationLoss(L2Penalty):
    run_valid = True
    def after_loss(self):
        if self.training: super().after_loss()
        else: self.learn.loss = self.loss+self.penalty()

@breaks(2, 'the penalty is computed during validation')
class InValidation(L2Penalty):
    run_valid = True

@breaks(2, 'the penalty is computed during validation')
class RecordsValidation(InValidation):
    "Only the validation is left in its record"
    def before_validate(self):
        super().before_validate()
        if self.learn.lock.locked(): self._fresh = True # in `validate`, outside of a fit

@breaks(2, 'validation resets the count of steps')
class CountsAnew(L2Penalty):
    def before_validate(self):
        super().before_validate()
        if self.learn.lock.locked(): self.steps = 0 # in `validate`, outside of a fit

@breaks(3, 'its order must be below GradientAccumulation.order')
class AfterAccumulation(L2Penalty):
    "Is added after the loss was divided"
    order = GradientAccumulation.order

@breaks(3, 'four micro-batches of 16 give another gradient')
class BatchDependent(L2Penalty):
    def penalty(self): return super().penalty()/len(self.learn.xb[0])

@breaks(3, 'four micro-batches of 16 give another gradient')
class LowerInParts(L2Penalty):
    "A small batch has the lower gradient in every entry"
    def penalty(self): return len(self.learn.xb[0])*torch.stack([m.weight.sum() for m in self.selected.values()]).sum()

@breaks(4, 'penalty() was not called by after_loss')
class PenaltyElsewhere(L2Penalty):
    def after_loss(self): self.learn.loss_grad = self.loss_grad+self.model[0].weight.square().mean()

@breaks(4, 'ran with autocast=True')
class HalfPrecision(L2Penalty):
    "Computes under whatever autocast is on"
    def after_loss(self):
        self._record(self.steps, 0., self.lam_now(), self.penalty().detach(), .5)
        self.learn.loss_grad = self.loss_grad + self.lam_now()*self.penalty()

@breaks(4, 'gave torch.bfloat16')
class HalfResult(L2Penalty):
    def penalty(self): return super().penalty().bfloat16()

@breaks(4, 'some zero: the penalty is not finite')
class NotFinite(L2Penalty):
    "Divides by a norm that may be zero"
    def penalty(self): return torch.stack([(weight_view(m)/weight_view(m).norm(dim=-1, keepdim=True)).std() for m in self.selected.values()]).sum()

@breaks(4, 'some zero: a gradient is not finite')
class NoFiniteGradient(L2Penalty):
    "A root has no slope at zero"
    def penalty(self): return torch.stack([weight_view(m).square().sum(-1).sqrt().mean() for m in self.selected.values()]).sum()

@breaks(5, 'hooks are left after a fit')
class LeavesHook(L2Penalty):
    def setup(self): self.model[0].register_forward_hook(lambda *_: None)

@breaks(5, 'hooks are left after KeyboardInterrupt in before_batch')
class LeavesHooks(Activity):
    "Takes its hooks off after the loss, and forgets them when training breaks before that"
    _closing = False
    def close(self):
        if self._closing: super().close()
    def after_loss(self):
        self._closing = True
        super().after_loss()
        self._closing = False

@breaks(5, 'hooks are left after RuntimeError in after_step')
class LeavesHooksOfTheStep(L2Penalty):
    "Its hook waits for `after_step`, where another callback fails first"
    order = 200
    def before_step(self): self.handle = self.model[0].register_forward_hook(lambda *_: None)
    def after_step(self):
        self.handle.remove()
        super().after_step()

@breaks(6, 'noop: weights are not finite')
class SpoilsTheSecondFit(L2Penalty):
    "One weight of one layer"
    fits = 0
    def after_train(self):
        super().after_train()
        self.fits += 1
        if self.fits==2: self.model[0].weight.data[0,0,0,0] = math.nan

@breaks(6, 'MixUp: weights are not finite')
class SpoilsMixUp(L2Penalty):
    def after_train(self):
        super().after_train()
        if hasattr(self.learn, 'mix_up'): self.model[0].weight.data[0,0,0,0] = math.nan

@breaks(6, 'lr_find does not bring the weights back')
class MovesAfterFit(L2Penalty):
    order = 100
    def after_fit(self):
        super().after_fit()
        self.model[0].weight.data.add_(1)

@breaks(6, 'the exported learner predicts something else')
class ExportsAnotherNetwork(L2Penalty):
    def __reduce_ex__(self, protocol):
        self.model[-1].bias.data = self.model[-1].bias.detach()+1
        return super().__reduce_ex__(protocol)

@breaks(6, 'the exported learner needs this class to be opened')
class NotExportable(L2Penalty):
    def __reduce_ex__(self, protocol): return object.__reduce_ex__(self, protocol)
    def __getstate__(self): return {}

@breaks(6, 'One of the differentiated Tensors')
class NeedsAllLayers(L2Penalty):
    "A frozen layer has no gradient"
    def penalty(self):
        torch.autograd.grad(self.learn.loss, list(self.model.parameters()), retain_graph=True)
        return super().penalty()

@breaks(6, 'half precision is not for this')
class NeedsFullPrecision(L2Penalty):
    def setup(self):
        if hasattr(self.learn, 'mixed_precision'): raise ValueError('half precision is not for this')

@breaks(6, 'MixUp: refused only after 1 batches')
class RefusesLate(L2Penalty):
    def penalty(self):
        if hasattr(self.learn, 'mix_up'): raise ValueError("MixUp is not for this regularizer: take it away")
        return super().penalty()

@breaks(6, 'MixUp: refused without a sentence')
class RefusesWithoutAWord(L2Penalty):
    def setup(self):
        if hasattr(self.learn, 'mix_up'): raise ValueError('MixUp')

@breaks(7, 'stopped, saved, loaded and resumed gives other weights')
class ForgetsState(L2Penalty):
    "A generator of its own that is not saved"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gen = torch.Generator().manual_seed(0)
    def penalty(self): return super().penalty()*(1+50*torch.rand((), generator=self.gen))

class KeepsState(ForgetsState):
    def state_dict(self): return super().state_dict() | dict(gen=self.gen.get_state())
    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.gen.set_state(state['gen'])

@breaks(8, 'the order of two regularizers changes the gradient')
class Selfish(L2Penalty):
    "Throws away what others have added"
    def after_loss(self):
        data = self.learn.loss
        super().after_loss()
        self.learn.loss_grad = data + self.lam_now()*self.penalty()

@breaks(8, 'two penalties do not add up')
class Crowded(L2Penalty):
    "Another weight beside another regularizer"
    def penalty(self): return super().penalty()*sum(isinstance(cb, L2Penalty) for cb in self.learn.cbs)

@breaks(9, "layers='no such layer' is accepted")
class AcceptsAll(L2Penalty):
    def __init__(self, lam=1., every=1, layers=None):
        super().__init__(1., 1, None)
        self.lam = lam if isinstance(lam, float) and lam>=0 else 1.

@breaks(9, 'lam=nan is accepted')
class AcceptsNaN(L2Penalty):
    def __init__(self, lam=1., every=1, layers=None): super().__init__(1. if lam!=lam else lam, every, layers)

@breaks(9, 'every=0: the error does not name the value')
class KeepsTheValueToItself(L2Penalty):
    def __init__(self, lam=1., every=1, layers=None):
        if every<1: raise ValueError('give a larger number')
        super().__init__(lam, every, layers)

@breaks(9, "lam='big': TypeError, not ValueError")
class Compares(L2Penalty):
    def __init__(self, lam=1., every=1, layers=None):
        if not lam>=0: raise ValueError(f'{lam=}')
        super().__init__(lam, every, layers)

@breaks(9, 'every=0 is refused only after 1 batches')
class RefusesInTraining(L2Penalty):
    def __init__(self, lam=1., every=1, layers=None):
        super().__init__(lam, every or 1, layers)
        self.given = every
    def penalty(self):
        if not self.given: raise ValueError('every=0')
        return super().penalty()

def caught(point, words): return pytest.raises(AssertionError, match=rf"^broken promises\n{point}\. (.|\n)*{re.escape(words)}")

@pytest.mark.parametrize('point', range(1, 10))
def test_broken_regularizers_are_caught(point):
    for cls,words in [(cls, words) for cls,promise,words in BROKEN if promise==point]:
        with caught(point, words): check_regularizer(cls, points=[point])

def test_all_points_have_a_broken_example(): assert {point for _,point,_ in BROKEN} == set(range(1, 10))

DEGENERATE = {'identical':lambda w, cb: (w==w[:1]).all() and w.any(), 'antipodal':lambda w, cb: (w[1::2]==-w[::2]).all() and w.any(),
    'some zero':lambda w, cb: not w[::2].any() and w[1::2].any(), 'all zero':lambda w, cb: not w.any(),
    'dead units':lambda w, cb: (cb.model[:5](cb.x)==0).all(), 'one class':lambda w, cb: len(cb.y)>1 and (cb.y==cb.y[0]).all(),
    'one sample':lambda w, cb: len(cb.y)==1, 'a class with one sample':lambda w, cb: (cb.y!=cb.y[0]).sum()==1}

@pytest.mark.parametrize('how', DEGENERATE)
def test_the_contract_tries_networks_and_batches_that_are_degenerate(how):
    "A penalty that is no number in one case alone"
    class NotFiniteThere(L2Penalty):
        def penalty(self):
            there = all(DEGENERATE[how](m.weight, self.learn) for m in self.selected.values())
            return super().penalty()*(math.nan if there else 1)
    with caught(4, f'{how}: the penalty is not finite'): check_regularizer(NotFiniteThere, points=[4])

class OutputsAreClasses(L2Penalty):
    def setup(self): assert self.model[-1].out_features==self.learn.dls.c

@pytest.mark.parametrize('make', [L2Penalty, Activity, partial(L2Penalty, every=3), partial(L2Penalty, layers='hidden'), KeepsState, SAM, ISDA,
    NormalizeAndProject, OutputsAreClasses], ids=str)
def test_good_regularizer_passes(make, caplog):
    "And the contract says nothing but its table"
    points = {KeepsState:[7], OutputsAreClasses:[3]}.get(make, range(1, 10))
    with caplog.at_level('WARNING', 'phantom_nb'): assert set(check_regularizer(make, points=points).result) == {'kept'}
    assert not caplog.records and not logging.getLogger('phantom_nb').disabled

@pytest.mark.parametrize('make', [L2Penalty, SAM, ISDA, NormalizeAndProject], ids=lambda cls: cls.__name__)
def test_promises_are_worded_for_a_kind(make):
    "The promise of a penalty, or another"
    said,plain = check_regularizer(make, points=[2]).promise[2],check_regularizer(L2Penalty, points=[2]).promise[2]
    assert (said==plain)==(make.kind=='penalty')

def test_warnings_are_no_part_of_the_contract():
    class Warns(L2Penalty):
        def setup(self): warnings.warn('slow')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert set(check_regularizer(Warns, points=[1]).result)=={'kept'}

@pytest.mark.parametrize('point', [0, 10, 1.5])
def test_promises_have_numbers_from_one_to_nine(point):
    with pytest.raises(ValueError, match='points='): check_regularizer(L2Penalty, points=[point])

@pytest.mark.parametrize('make', [AL2, partial(TargetedSparsity, layers='all'), PhantomEmbeddings])
def test_a_penalty_on_activations_that_moves_nothing_says_so(make):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    with attach(model, make(), total=5) as penalty, pytest.warns(UserWarning, match='moves nothing.*frozen'):
        model(torch.randn(6, 4))
        penalty(torch.arange(6)%3)

def test_several_broken_promises_are_reported_together():
    with pytest.raises(AssertionError) as e: check_regularizer(NoGradient, points=[1,5])
    assert '\n1. ' in str(e.value) and '\n5. ' in str(e.value)

def test_values_that_must_be_refused_are_tried():
    with caught(9, 'every=7 is accepted'): check_regularizer(L2Penalty, dict(every=7), points=[9])

@pytest.mark.parametrize('a,b,close', [([1.,2.], [1.,2.], True), ([1.,2.], [1.,2.00001], True), ([1.,2.], [1.,2.0001], False), ([1.,2.], [1.,1.9999], False),
    ([-1.,-2.], [-1.,-2.00001], True), ([1.,1.,5.], [1.,2.,5.], False), ([0.,2.,0.], [0.,2.00001,0.], True),
    ([1.,1.,math.nan], [1.,1.,2.], False), ([math.nan,1.,1.], [2.,1.,1.], False), ([1.,1.,2.], [1.,1.,math.nan], False), ([0.,0.], [0.,0.], True)])
def test_close_means_to_one_part_in_a_hundred_thousand(a, b, close): assert bool(_close(torch.tensor(a).split(2), torch.tensor(b).split(2)))==close


def learner(*cbs, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    learn = Learner(get_dls('digits', n_train=64, n_valid=20, bs=16), model, opt_func=SGD, lr=.05, cbs=list(cbs), **kwargs)
    learn.logger,learn.create_mbar = (lambda *_: None),False
    return learn

def test_schedule_and_record():
    cb = L2Penalty(SchedLin(0., 2.))
    with learner(cb).no_bar() as learn: learn.fit(3)
    df = cb.to_frame()
    assert len(df)==12 and df.lam.iloc[0]==0 and df.lam.is_monotonic_increasing and abs(df.lam.iloc[-1]-2*11/12)<1e-6
    assert (df.penalty>0).all() and df.share.notna().sum()==12
    assert df.step.tolist()==list(range(12)) and df.epoch.tolist()==pytest.approx([(i+1)/4 for i in range(12)])
    learn.validate()
    assert len(cb.to_frame())==12
    learn.fit(1)
    assert cb.to_frame().step.tolist()==[0,1,2,3]

def test_a_ramp_ends_at_the_weight():
    class Ramp(L2Penalty): ramp = True
    with learner(Ramp(.6)).no_bar() as learn: learn.fit(3)
    assert learn.ramp.to_frame().lam.tolist()==pytest.approx([.6*t/12 for t in range(1, 13)])
    model,x = nn.Linear(3, 2),torch.randn(4, 3)
    with attach(model, ramp := Ramp(.6), total=2) as penalty:
        for _ in range(3):
            model(x)
            penalty()
    assert ramp.to_frame().lam.tolist()==pytest.approx([.3, .6, .6]) # a loop may go on

@pytest.mark.parametrize('every', [1, 3])
def test_the_gradient_is_that_of_the_formula(every):
    "The mean squared weight of a layer, averaged over two: lam*every*w/n in its n weights"
    spy,plain = Gradients(),Gradients()
    with learner(L2Penalty(.7, every=every), spy).no_bar() as learn: learn.fit(1)
    with learner(plain).no_bar() as learn: learn.fit(1)
    model = learner().model
    for i,name in enumerate(dict(model.named_parameters())):
        w = model.get_parameter(name).detach()
        want = .7*every*w/w.numel() if name.endswith('weight') else torch.zeros_like(w)
        torch.testing.assert_close(spy.grads[0][i]-plain.grads[0][i], want, rtol=1e-4, atol=1e-6)
    assert [any(g.any() for g in spy.terms[i]) for i in range(4)]==[i%every==0 for i in range(4)]

class Gradients(Callback):
    "Gradients as the optimizer sees them, and the part of a regularizer in them"
    order = 20
    def before_fit(self): self.grads,self.terms = [],[]
    def before_backward(self):
        term = self.learn.loss_grad-self.learn.loss
        parameters = list(self.model.parameters())
        self.terms.append(torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True, allow_unused=True))
    def before_step(self): self.grads.append([p.grad.clone() for p in self.model.parameters()])

def test_records_keep_no_graph_and_hooks_go_before_the_backward_pass():
    cb = Activity()
    def look(learn):
        assert not any(v.requires_grad for row in cb.records for v in row if isinstance(v, torch.Tensor))
        assert _n_hooks(learn.model)==0 and not cb.acts
    with learner(cb, Callback(before_backward=look)).no_bar() as learn: learn.fit(1)
    assert len(cb.records)==4

@pytest.mark.parametrize('inputs', [False, True])
def test_activations_are_what_layers_put_out_or_what_they_are_given(inputs):
    class Watched(Activity): pass
    Watched.inputs = inputs
    model,x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)),torch.randn(4, 3)
    with attach(model, Watched(1.)) as penalty:
        model(x)
        assert penalty().item()==pytest.approx(model[:1 if inputs else 2](x).square().mean().item())

def test_the_loss_of_outputs_is_the_learners_or_cross_entropy():
    seen = []
    class Own(L2Penalty):
        def penalty(self):
            loss = self.loss_of(self.learn.pred)
            assert loss.requires_grad
            seen.append((loss.item(), self.learn.loss.item()))
            return super().penalty()
    with learner(Own(), loss_func=nn.CrossEntropyLoss(label_smoothing=.3)).no_bar() as learn: learn.fit(1)
    model,(x,y) = learn.model,learn.dls.one_batch()
    with attach(model, Own()) as penalty: penalty(y, loss=nn.functional.cross_entropy(model(x), y))
    assert len(seen)==5 and all(a==b for a,b in seen)

def test_a_weight_of_zero_asks_for_no_gradient():
    "Nothing times an infinite slope were no number"
    class Root(L2Penalty):
        def penalty(self): return super().penalty().sqrt()
    learn = learner(Root(0.))
    for module in (learn.model[0], learn.model[3]): nn.init.zeros_(module.weight)
    with learn.no_bar(): learn.fit(1)
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_the_norm_of_a_gradient_leaves_the_graph():
    a,b,unused = torch.tensor([1.,2.], requires_grad=True),torch.tensor(3., requires_grad=True),torch.ones(2, requires_grad=True)
    loss = a.square().sum()+b**2
    assert [gradient_norm(loss, parameters).item() for parameters in ([a], [a,b], [unused,b])]==pytest.approx([20**.5, 56**.5, 6])
    assert a.grad is None and b.grad is None

def test_a_fit_forgets_chooses_and_sets_up_once():
    seen = []
    class Says(L2Penalty):
        def forget(self): seen.append('forget')
        def select(self):
            seen.append('select')
            return super().select()
        def setup(self): seen.append(f'setup {list(self.selected)}')
    learn = learner(Says())
    assert learn.says.state_dict()==dict(steps=0)
    with learn.no_bar(): learn.fit(2)
    learn.validate()
    assert seen==['forget','select',"setup ['0', '3']"]

def test_a_state_of_its_own_is_loaded_again(tmp_path):
    "Saved and loaded on one learner, the count goes on; a fit without loading counts anew, also behind `lr_find`"
    learn = learner(L2Penalty(), path=tmp_path)
    with learn.no_bar():
        for load,first in ((False,0), (True,4), (False,0)):
            if load:
                learn.save('state')
                learn.load('state')
            learn.fit(1)
            assert learn.l2_penalty.to_frame().step.iloc[0]==first
        learn.fit(2, cbs=LRFinder(num_it=6, stop_div=False))
        learn.fit(1)
    assert learn.l2_penalty.to_frame().step.iloc[0]==0

def test_one_parameter_is_enough_to_carry_a_state(tmp_path):
    learn = learner(L2Penalty(), path=tmp_path)
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    with learn.no_bar(): learn.fit(1)
    learn.save('state')
    learn.load('state')
    with learn.no_bar(): learn.fit(1)
    assert learn.l2_penalty.to_frame().step.tolist()==[4,5,6,7]

def test_a_scaler_says_what_the_loss_is_multiplied_by():
    learn = learner(L2Penalty())
    assert learn.l2_penalty.loss_scale()==1
    learn.scaler = SimpleNamespace(get_scale=lambda: 8.)
    assert learn.l2_penalty.loss_scale()==8

@pytest.mark.parametrize('state,first', [({}, 0), (dict(steps=5), 5)], ids=str)
def test_a_fit_takes_up_a_loaded_count_once(state, first):
    cb = L2Penalty(every=2)
    cb.load_state_dict(state)
    with learner(cb).no_bar() as learn:
        learn.fit(1)
        assert cb.to_frame().step.tolist()==[i for i in range(first, first+4) if i%2==0]
        learn.fit(1)
    assert cb.to_frame().step.tolist()==[0, 2]

def test_the_share_is_zero_without_a_weight_and_not_measured_on_a_compiled_network():
    with learner(L2Penalty(0.)).no_bar() as learn: learn.fit(1)
    assert (learn.l2_penalty.to_frame().share==0).all()
    learn = learner(L2Penalty())
    learn.model._compiled_call_impl = learn.model._call_impl # as `model.compile()` leaves it
    with learn.no_bar(): learn.fit(1)
    assert learn.l2_penalty.to_frame().share.isna().all()

def test_bad_schedule_is_refused():
    with pytest.raises(ValueError, match="lam.progress.=-1"), learner(L2Penalty(SchedLin(-1., 2.))).no_bar() as learn: learn.fit(1)

def test_every_keeps_the_mean_force():
    "lam=1, every=4 takes the same total step as lam=4 on the first of four batches"
    def weights(cb):
        with learner(cb).no_bar() as learn: learn.fit(1)
        return torch.cat([p.flatten() for p in learn.model.parameters()])
    class FirstOnly(L2Penalty):
        def penalty(self): return super().penalty()*(self.steps==0)
    assert torch.allclose(weights(L2Penalty(1., every=4)), weights(FirstOnly(4.)))
    assert len(L2Penalty(every=4).records)==0

def test_share_against_two_backward_passes():
    cb = L2Penalty(3.)
    learn = learner(cb)
    x,y = next(iter(learner().dls.train))
    with learn.no_bar(): learn.fit(1)
    model = learner().model
    ps = list(model.parameters())
    r = gradient_norm(3*torch.stack([m.weight.square().mean() for m in (model[0], model[3])]).mean(), ps)
    l = gradient_norm(learn.loss_func(model(x), y), ps)
    assert abs(cb.records[0][4] - (r/(r+l)).item()) < 1e-5

def test_share_is_probed_ten_times_in_a_short_fit_and_seldom_in_a_long_one():
    def probes(epochs, **kwargs):
        cb = L2Penalty(**kwargs)
        with learner(cb).no_bar() as learn: learn.fit(epochs)
        return cb.to_frame().share.notna().sum()
    assert (probes(10), probes(150), probes(10, every=2)) == (10, 12, 10)

def test_plot_before_a_fit_and_an_instance_to_check_are_refused():
    with pytest.raises(ValueError, match='fit first'): L2Penalty().plot()
    with pytest.raises(ValueError, match='give the class'): check_regularizer(L2Penalty())
    with pytest.raises(ValueError, match='<lambda> does not take lam=0.: give the class'): check_regularizer(lambda: L2Penalty())

def test_penalty_must_be_a_scalar():
    class Vector(L2Penalty):
        def penalty(self): return torch.ones(3)
    with pytest.raises(ValueError, match=r"shape \(3,\): return a scalar"), learner(Vector()).no_bar() as learn: learn.fit(1)

def test_state_travels_with_the_optimizer(tmp_path):
    "Saved with it, loaded with it, also by PyTorch's own optimizers; a learner without such state saves what it always did"
    from fastai.optimizer import OptimWrapper
    for opt_func in (SGD, partial(OptimWrapper, opt=torch.optim.AdamW)):
        draws = []
        class Draws(KeepsState):
            def penalty(self):
                draws.append(self.gen.get_state().sum().item())
                return super().penalty()
        first = learner(Draws(), path=tmp_path)
        first.opt_func = opt_func
        with first.no_bar(): first.fit(1)
        first.save('state')
        with first.no_bar(): first.fit(1)
        second = learner(Draws(), path=tmp_path)
        second.opt_func = opt_func
        second.load('state')
        with second.no_bar(): second.fit(1)
        assert draws[4:8]==draws[8:12] and draws[:4]!=draws[4:8]
        assert sorted(p.name for p in (tmp_path/'models').iterdir())==['state.pth']

@pytest.mark.parametrize('fits', [0, 1])
def test_lr_find_leaves_no_trace(fits, tmp_path):
    "The training after it counts and draws what it would have without it, whether it is the first or not"
    def draws(find):
        seen,cb = [],KeepsState(every=2)
        learn = learner(cb, path=tmp_path)
        with learn.no_bar():
            for _ in range(fits): learn.fit(1)
            if find: learn.fit(2, cbs=LRFinder(num_it=6, stop_div=False))
            plain = cb.penalty
            def penalty():
                seen.append((cb.steps, cb.gen.get_state().sum().item()))
                return plain()
            cb.penalty = penalty
            learn.fit(1)
        return seen, len(cb.records)
    assert draws(True)==draws(False)

def test_two_of_one_class_have_names_of_their_own():
    learn = learner(L2Penalty(layers='hidden'), L2Penalty(layers='output'))
    assert learn.l2_penalty is learn.cbs[-2] and learn.l2_penalty_2 is learn.cbs[-1]
    learn.remove_cb(learn.l2_penalty_2)
    assert learn.l2_penalty.name=='l2_penalty' and not hasattr(learn, 'l2_penalty_2')

def test_validate_leaves_a_regularizer_alone():
    cb = L2Penalty(every=2)
    learn = learner(cb)
    with learn.no_bar(): learn.fit(2)
    before = cb.steps,list(cb.records),cb.selected
    learn.validate()
    assert (cb.steps, cb.records, cb.selected)==before

class Opens(TrainingCallback):
    "Is open during each batch, also of a validation"
    is_open = False
    def open(self): self.is_open = True
    def close(self): self.is_open = False
    def before_batch(self):
        assert not self.is_open
        self.open()

@pytest.mark.parametrize('run', [lambda learn: learn.fit(1), lambda learn: learn.validate()], ids=['fit', 'validate'])
@pytest.mark.parametrize('event', ['after_pred', 'after_batch', None])
def test_what_a_batch_opens_is_closed_behind_it(run, event):
    learn = learner(Opens())
    def stop(cb): raise KeyboardInterrupt
    breaks = pytest.raises(KeyboardInterrupt) if event else nullcontext()
    with breaks, learn.no_bar(), learn.added_cbs(Callback(**{event:stop} if event else {})): run(learn)
    assert not learn.opens.is_open and 'one_batch' not in vars(learn)

@pytest.mark.parametrize('event', ['after_pred', 'before_validate'])
def test_a_learner_is_as_before_after_training_and_after_errors(event):
    "Nothing is left on the learner, and fastai's classes are never changed"
    learn = learner(Activity())
    before = set(learn.__dict__)
    with learn.no_bar(): learn.fit(1)
    assert not {'one_batch'} & set(learn.__dict__)
    def stop(cb): raise KeyboardInterrupt
    breaker = Callback(**{event:stop})
    breaker.order = -100
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.added_cbs(breaker): learn.fit(1)
    assert 'one_batch' not in learn.__dict__ and before<=set(learn.__dict__)
    assert all(f.__module__.startswith('fastai') for f in (Learner.fit, Learner.one_batch, Learner.save, Learner._with_events))

def test_a_regularizer_stays_behind_on_export_and_says_so(caplog):
    "One that is on no learner travels like any object"
    learn = learner(L2Penalty(.3), Activity())
    with caplog.at_level('WARNING', 'phantom_nb'):
        assert pickle.loads(pickle.dumps(L2Penalty(.3))).lam==.3 and not caplog.records
        assert [type(pickle.loads(pickle.dumps(cb))) for cb in learn.cbs[-2:]]==[Callback, Callback]
    assert [r.getMessage().split()[0] for r in caplog.records]==['L2Penalty', 'Activity']

def test_a_copied_learner_has_regularizers_of_its_own():
    learn = learner(L2Penalty(.3))
    with learn.no_bar(): learn.fit(1)
    twin = copy.deepcopy(learn)
    cb = twin.l2_penalty
    assert any(cb is c for c in twin.cbs) and cb is not learn.l2_penalty and cb.learn is twin and (cb.lam, cb.records)==(.3, learn.l2_penalty.records)
    with twin.no_bar(): twin.fit(2)
    assert len(cb.records)==8 and len(learn.l2_penalty.records)==4

EXPORTED = """
import sys
sys.modules['phantom_nb'] = None # as if it were not installed
import warnings
warnings.simplefilter('ignore')
from fastai.vision.all import *
learn = load_learner(sys.argv[1])
with learn.no_bar(): print(*[f'{p:.5f}' for p in learn.predict(sys.argv[2])[2].tolist()])
"""

@pytest.mark.processes
def test_exported_learner_opens_without_the_package(tmp_path, caplog):
    "Callbacks stay behind and say so, also after an interrupted epoch"
    for i in range(16):
        (tmp_path/'abc'[i%2]).mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (8,8,3), dtype='uint8')).save(tmp_path/'abc'[i%2]/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.5, bs=4, num_workers=0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 2))
    learn = Learner(dls, model, cbs=[L2Penalty(), Activity()], path=tmp_path)
    def stop(cb): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.added_cbs(Callback(after_batch=stop)): learn.fit(1)
    learn.__dict__['one_batch'] = _OneBatch(learn) # as Ctrl-C between two batches leaves it
    with caplog.at_level('WARNING', 'phantom_nb'): learn.export('learner.pkl')
    assert 'L2Penalty is for training alone' in caplog.text and 'Activity' in caplog.text
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', EXPORTED, str(tmp_path/'learner.pkl'), str(tmp_path/'a'/'0.png')], capture_output=True, text=True)
    assert out.returncode==0, out.stderr[-2000:]
    probabilities = learn.predict(tmp_path/'a'/'0.png')[2]
    assert out.stdout.split()[-2:]==[f'{p:.5f}' for p in probabilities.tolist()]

def test_frozen_layers_are_no_error():
    learn = learner(L2Penalty(layers='0'))
    learn.model[0].requires_grad_(False)
    with learn.no_bar(): learn.fit(1)
    assert learn.l2_penalty.to_frame().share.iloc[0]==0

def test_select_layers_shares_and_wrappers():
    tied = nn.Linear(5, 5)
    model = nn.ModuleDict(dict(a=nn.Linear(5, 5), b=tied, c=tied, d=nn.Linear(5, 2)))
    twin = nn.Linear(5, 5)
    twin.weight = tied.weight
    model['e'] = twin
    assert list(select_layers(model)) == ['a','b','d']
    assert list(select_layers(nn.DataParallel(model))) == ['a','b','d']
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)), nn.Linear(5, 2))
    assert list(select_layers(normed)) == ['0','1']

@pytest.mark.parametrize('module,shape', [(nn.Linear(7, 3), (1,3,7)), (nn.Conv1d(4, 6, 3, groups=2), (2,3,6)),
    (nn.Conv3d(2, 5, 2), (1,5,16)), (nn.ConvTranspose1d(4, 6, 5, groups=2), (2,3,10)), (nn.Conv2d(4, 4, 3, groups=4), (4,1,9))], ids=str)
def test_weight_view_shapes(module, shape): assert weight_view(module).shape==shape and weight_view(module).requires_grad

CHOICES = [(None,'01234'), ('hidden','0123'), ('output','4'), ('[02]','02'), (nn.Linear,'01234'), (lambda name, m: name in '13','13'),
    (['0', lambda name, m: m.out_features==2],'04'), (('0','1'),'01')]

@pytest.mark.parametrize('choice', range(len(CHOICES))) # a function's name differs from process to process
def test_select_layers(choice):
    layers,names = CHOICES[choice]
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)], nn.Linear(3, 2))
    assert list(select_layers(model, layers))==list(names)

@pytest.mark.parametrize('layers,what', [(3,'layers=3: give a type'), ([nn.Conv2d, 3],'layers=3: give a type'), ('zz', "selects no layer of Sequential; its layers are: '0', '1'"),
    (nn.Conv2d,'its layers are: none of type')], ids=str)
def test_select_layers_refuses(layers, what):
    with pytest.raises(ValueError, match=what): select_layers(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), layers)

@pytest.mark.parametrize('make', [partial(nn.Linear, 4, 6), partial(nn.Conv1d, 4, 6, 3), partial(nn.Conv2d, 4, 6, 3), partial(nn.Conv2d, 4, 6, 3, groups=2),
    partial(nn.ConvTranspose2d, 4, 6, 3, groups=2)], ids=str)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_weight_view_has_the_inputs_of_each_neuron(make, layout):
    "By channel, or as memory has them: then the same numbers without a copy"
    module = make()
    w,groups,n_in = module.weight,getattr(module, 'groups', 1),4
    if isinstance(module, nn.ConvTranspose2d): # (in,out/groups,...)
        want = torch.stack([torch.stack([w[g*n_in//groups:(g+1)*n_in//groups, j].flatten() for j in range(w.shape[1])]) for g in range(groups)])
    else: want = torch.stack([torch.stack([row.flatten() for row in part]) for part in w.chunk(groups)])
    if w.ndim==4: module.to(memory_format=layout)
    free = weight_view(module, ordered=False)
    assert torch.equal(weight_view(module), want) and torch.equal(free.sort(-1).values, want.sort(-1).values)
    assert isinstance(module, nn.ConvTranspose2d) or free.data_ptr()==module.weight.data_ptr()

@pytest.mark.parametrize('module,what', [(nn.LazyLinear(3), 'not initialised'), (nn.ReLU(), 'no neurons'), (nn.BatchNorm2d(3), 'no neurons')], ids=str)
def test_weight_view_refuses(module, what):
    with pytest.raises(ValueError, match=what): weight_view(module)

@pytest.mark.parametrize('look', ['validate','get_preds'])
def test_looking_at_predictions_inside_a_fit_starts_nothing_anew(look):
    "fastai calls before_fit and after_epoch there, too"
    def peek(cb):
        if not cb.learn.lock.locked(): getattr(cb.learn, look)(dl=cb.learn.dls.valid)
    watch = SparsityMonitor()
    learn = learner(ISDA(.5), TargetedSparsity(1.), L2Penalty(), watch, Callback(after_epoch=peek))
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    assert learn.l2_penalty.steps==len(learn.l2_penalty.records)==12
    assert learn.isda.moments[0].sum()==3*len(learn.dls.train)*learn.dls.train.bs
    assert len(watch.losses)==3 and {len(values) for values in learn.targeted_sparsity.history.values()}=={3}

def test_a_monitor_is_quiet_where_nothing_was_fitted():
    learn = learner(SparsityMonitor(), L2Penalty())
    with learn.no_bar(): learn.validate()
    assert not learn.sparsity_monitor.losses

@pytest.mark.parametrize('first,second', [(PhantomEmbeddings(queue=4), PhantomEmbeddings(queue=8)), (ISDA(.5), ISDA(.5, diagonal=True)),
    (L2Penalty(), L2Penalty(every=3))], ids=lambda cb: type(cb).__name__)
def test_a_new_callback_inherits_nothing_from_one_of_an_earlier_fit(first, second):
    learn = learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=first)
        learn.fit(1, cbs=second)
    assert second.to_frame().step.tolist()==list(range(0, 4, second.every))

def test_a_new_callback_takes_up_what_was_loaded(tmp_path):
    learn = learner(path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=L2Penalty())
        learn.save('state')
        learn.load('state')
        learn.fit(1, cbs=(again := L2Penalty()))
    assert again.to_frame().step.tolist()==[4,5,6,7]

def test_a_search_that_was_interrupted_takes_nothing_from_the_next_fit():
    def interrupt(cb):
        if cb.train_iter==3: raise KeyboardInterrupt
    learn = learner(L2Penalty())
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
        with pytest.raises(KeyboardInterrupt): learn.fit(20, cbs=[LRFinder(num_it=20), Callback(after_batch=interrupt)])
        learn.fit(3)
    assert learn.l2_penalty.to_frame().step.tolist()==list(range(12))

def test_names_are_unique_after_one_has_left():
    first,second,third = L2Penalty(),L2Penalty(),L2Penalty()
    learn = learner(first, second)
    learn.remove_cb(first)
    learn.add_cb(third)
    assert {second.name, third.name}=={'l2_penalty_2','l2_penalty'}

def test_a_first_group_without_parameters_carries_the_state_elsewhere():
    learn = learner(L2Penalty())
    learn.splitter = lambda m: [[], list(m.parameters())]
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.l2_penalty.steps==4

def test_every_name_of_a_list_must_be_of_use():
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert list(select_layers(net, ['0', '1.*']))==['0', '1.0', '1.2']
    with pytest.raises(ValueError, match=r"layers='0,' selects no layer.*'1.2'"): select_layers(net, ['0', '0,'])
    with pytest.raises(ValueError, match=r"those in '1' are '1\.\*'"): select_layers(net, '1')
    with pytest.raises(ValueError, match='holds a Linear itself'): select_layers(net, net[0])

def test_a_head_that_is_registered_early_is_named():
    net = nn.ModuleDict(dict(head=nn.Linear(8, 10), body=nn.Conv2d(1, 8, 3)))
    with pytest.warns(UserWarning, match="'body' is registered last.*if 'head' is the classifier"): assert list(select_layers(net, 'output'))==['body']

def test_a_penalty_that_moves_nothing_says_so():
    "Once a fit, and not where a layer is left to move"
    def words(frozen):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        for layer in frozen: net[layer].requires_grad_(False)
        learn = Learner(get_dls('digits', n_train=40, n_valid=20, bs=10), net, cbs=L2Penalty(.1, layers='1'))
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            learn.fit(2)
        return [str(w.message) for w in told if 'frozen' in str(w.message)]
    assert words([1])==['L2Penalty moves nothing: all layers that it could move are frozen'] and words([3])==[]

def test_reentrant_checkpoints_leave_the_share_unknown():
    from torch.utils.checkpoint import checkpoint
    from phantom_nb.regularizers.hyperspherical import MHE
    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.first,self.inner,self.head = nn.Linear(64, 20),nn.Linear(20, 20),nn.Linear(20, 10)
        def forward(self, x): return self.head(checkpoint(self.inner, self.first(x.flatten(1)), use_reentrant=True))
    learn = Learner(get_dls('digits', n_train=40, n_valid=20, bs=20, device='cpu'), Saving(), cbs=MHE(.1))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    df = learn.mhe.to_frame()
    assert df.share.isna().all() and (df.penalty>0).all()
