"The contract must be able to fail: one broken regularizer for each of its nine promises, and the base class's own edges"
import threading, warnings
from functools import partial

import pytest, torch
from fastai.basics import Learner, SGD
from fastai.callback.schedule import SchedLin
from torch import nn

from phantom_nb.core import (ActivationRegularizer, L2Penalty, capture_activations, check_regularizer, gradient_norm,
    select_layers, weight_view)
from phantom_nb.data import get_dls


class Activity(ActivationRegularizer):
    def penalty(self): return torch.stack([a.float().square().mean() for a in self.acts().values()]).mean()

class NotOffAtZero(L2Penalty):
    "1: draws from the global generator, so that even lam=0 changes what follows"
    def penalty(self):
        torch.rand(1)
        return super().penalty()

class NoGradient(L2Penalty):
    "1 and 5: a printed number without force"
    def penalty(self): return super().penalty().detach()

class InTheLoss(L2Penalty):
    "2: adds to the reported loss"
    def after_loss(self):
        super().after_loss()
        self.learn.loss = self.loss_grad

class InValidation(L2Penalty):
    "2: computes and records while validating"
    run_valid = True

class AfterAccumulation(L2Penalty):
    "3: is added after the loss was divided"
    order = 20

class BatchDependent(L2Penalty):
    "3: depends on the batch and does not say so"
    def penalty(self): return super().penalty()/len(self.learn.xb[0])

class HalfPrecision(L2Penalty):
    "4: computes under whatever autocast is on"
    def after_loss(self):
        self._record(self.steps, 0., self.lam_now(), self.penalty().detach(), .5)
        self.learn.loss_grad = self.loss_grad + self.lam_now()*self.penalty()

class NotFinite(L2Penalty):
    "4: divides by a norm that may be zero"
    def penalty(self): return torch.stack([(weight_view(m)/weight_view(m).norm(dim=-1, keepdim=True)).std() for m in self.selected.values()]).sum()

class LeavesHooks(Activity):
    "5: forgets its hooks when training breaks"
    def release(self): pass

class NotExportable(L2Penalty):
    "6: holds what cannot be pickled"
    def setup(self): self.lock = threading.Lock()

class RefusesLate(L2Penalty):
    "6: refuses MixUp with an error in the middle of training"
    def penalty(self):
        if self.learn.xb[0].requires_grad or 'mix_up' in [cb.name for cb in self.learn.cbs]: raise ValueError("MixUp is not for this regularizer: take it away")
        return super().penalty()

class ForgetsState(L2Penalty):
    "7: a generator of its own that is not saved"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gen = torch.Generator().manual_seed(0)
    def penalty(self): return super().penalty()*(1+50*torch.rand((), generator=self.gen))

class KeepsState(ForgetsState):
    "7, kept"
    def state_dict(self): return dict(gen=self.gen.get_state())
    def load_state_dict(self, state): self.gen.set_state(state['gen'])
    def __getstate__(self): return {k:v for k,v in self.__dict__.items() if k!='gen'} | dict(gen_state=self.gen.get_state())
    def __setstate__(self, d):
        gen_state = d.pop('gen_state')
        self.__dict__.update(d)
        self.gen = torch.Generator()
        self.gen.set_state(gen_state)

class Selfish(L2Penalty):
    "8: throws away what others have added"
    def after_loss(self):
        data = self.learn.loss
        super().after_loss()
        self.learn.loss_grad = data + self.lam_now()*self.penalty()

class AcceptsAll(L2Penalty):
    "9: takes any value"
    def __init__(self, lam=1., every=1, layers=None):
        super().__init__(1., 1, None)
        self.lam = lam if isinstance(lam, float) and lam>=0 else 1.


BROKEN = [(NotOffAtZero, 1), (NoGradient, 1), (NoGradient, 5), (InTheLoss, 2), (InValidation, 2), (AfterAccumulation, 3), (BatchDependent, 3),
    (HalfPrecision, 4), (NotFinite, 4), (LeavesHooks, 5), (NotExportable, 6), (RefusesLate, 6), (ForgetsState, 7), (Selfish, 8), (AcceptsAll, 9)]

@pytest.mark.parametrize('cls,point', BROKEN, ids=[f'{c.__name__}-{p}' for c,p in BROKEN])
def test_broken_regularizer_is_caught(cls, point):
    with pytest.raises(AssertionError, match=rf"^broken promises\n{point}\. "): check_regularizer(cls, points=[point])

def test_all_points_have_a_broken_example(): assert {p for _,p in BROKEN} == set(range(1, 10))

@pytest.mark.parametrize('make', [L2Penalty, Activity, partial(L2Penalty, every=3), partial(L2Penalty, layers='hidden'), KeepsState], ids=str)
def test_good_regularizer_passes(make):
    points = range(1, 10) if make is not KeepsState else [7]
    assert set(check_regularizer(make, points=points).result) == {'kept'}

def test_several_broken_promises_are_reported_together():
    with pytest.raises(AssertionError) as e: check_regularizer(NoGradient, points=[1,5])
    assert '\n1. ' in str(e.value) and '\n5. ' in str(e.value)


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
    learn.validate()
    assert len(cb.to_frame())==12
    learn.fit(1)
    assert len(cb.to_frame())==4

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

def test_penalty_must_be_a_scalar():
    class Vector(L2Penalty):
        def penalty(self): return torch.ones(3)
    with pytest.raises(ValueError, match=r"shape \(3,\): return a scalar"), learner(Vector()).no_bar() as learn: learn.fit(1)

def test_load_without_saved_state_warns(tmp_path):
    learn = learner(KeepsState(), path=tmp_path)
    learn.create_opt()
    learn.save('with')
    assert (tmp_path/'models/with.regularizers.pth').exists()
    plain = learner(path=tmp_path)
    plain.create_opt()
    plain.save('without')
    assert not (tmp_path/'models/without.regularizers.pth').exists()
    with pytest.warns(UserWarning, match="holds no state for 0.keeps_state"): learn.load('without')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.load('with')

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

@pytest.mark.parametrize('module,what', [(nn.LazyLinear(3), 'not initialised'), (nn.ReLU(), 'no neurons'), (nn.BatchNorm2d(3), 'no neurons')], ids=str)
def test_weight_view_refuses(module, what):
    with pytest.raises(ValueError, match=what): weight_view(module)

def test_capture_activations_keeps_gradient_and_goes():
    m = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(RuntimeError), capture_activations(select_layers(m, nn.Linear), inputs=True) as acts:
        m(torch.randn(5, 3))
        assert acts()['0'].shape==(5,3) and acts()['2'].requires_grad
        raise RuntimeError
    assert not any(o._forward_hooks for o in m)
