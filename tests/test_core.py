"The contract must be able to fail: one broken regularizer for each of its nine promises, and the base class's own edges"
import subprocess, sys
from functools import partial

import numpy as np, pytest, torch
from PIL import Image
from fastai.basics import Callback, Learner, SGD
from fastai.callback.schedule import LRFinder, SchedLin
from fastai.vision.data import ImageDataLoaders
from torch import nn

from phantom_nb.contract import check_regularizer
from phantom_nb.core import _OneBatch, ActivationRegularizer, L2Penalty, gradient_norm, select_layers, weight_view
from phantom_nb.data import get_dls


class Activity(ActivationRegularizer):
    def penalty(self): return torch.stack([a.float().square().mean() for a in self.acts.values()]).mean()

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
    "5: takes its hooks off after the loss, and forgets them when training breaks before that"
    def close(self):
        if self.learn.loss_grad is not None and getattr(self, '_closing', False): super().close()
    def after_loss(self):
        self._closing = True
        super().after_loss()
        self._closing = False

class NotExportable(L2Penalty):
    "6: goes with the exported learner, which then needs its class"
    def __reduce_ex__(self, protocol): return object.__reduce_ex__(self, protocol)
    def __getstate__(self): return {}

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
    def state_dict(self): return super().state_dict() | dict(gen=self.gen.get_state())
    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.gen.set_state(state['gen'])

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

def test_a_learner_is_as_before_after_training_and_after_errors():
    "Nothing is left on the learner, and fastai's classes are never changed"
    learn = learner(Activity())
    before = set(learn.__dict__)
    with learn.no_bar(): learn.fit(1)
    assert not {'one_batch'} & set(learn.__dict__)
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.added_cbs(Callback(after_pred=lambda cb: (_ for _ in ()).throw(KeyboardInterrupt()))):
        learn.fit(1)
    assert 'one_batch' not in learn.__dict__ and before<=set(learn.__dict__)
    assert all(f.__module__.startswith('fastai') for f in (Learner.fit, Learner.one_batch, Learner.save, Learner._with_events))

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

@pytest.mark.parametrize('module,what', [(nn.LazyLinear(3), 'not initialised'), (nn.ReLU(), 'no neurons'), (nn.BatchNorm2d(3), 'no neurons')], ids=str)
def test_weight_view_refuses(module, what):
    with pytest.raises(ValueError, match=what): weight_view(module)
