"Adapters of other libraries, and all pairs of methods"
from functools import partial
import pytest, torch
from fastai.basics import Callback

from phantom_nb.experiments.checkpoint import Checkpoint
from phantom_nb.experiments.learner import make_learner
from phantom_nb.experiments.libraries import AugmentImages, SpatialDropout, StochasticDepth
from phantom_nb.experiments.methods import make_method
from phantom_nb.experiments.pairs import FAMILIES, pair_outcome
from phantom_nb.experiments.run import Run
from phantom_nb.experiments.runner import run_one

RUN = Run(n_train=32, bs=16, epochs=1, model='resnet9', width=.125)

def test_images_change_anew_in_every_epoch_and_the_loader_is_given_back():
    learn = make_learner(Run(n_train=32, bs=16, epochs=2, augment='crop', method='trivial_augment'), device='cpu')
    before,seen = learn.dls.train.augment,[]
    class Look(AugmentImages): # sees the images that the method has changed
        def __init__(self): pass
        def before_fit(self): pass
        def after_fit(self): pass
        def before_batch(self): seen.append(self.x.clone())
    learn.fit(2, cbs=Look())
    assert learn.dls.train.augment is before and not any(torch.equal(a, b) for a,b in zip(seen[:2], seen[2:]))

def test_floating_point_recipes_are_refused():
    with pytest.raises(ValueError, match="augment='crop'"):
        make_learner(Run(n_train=32, bs=16, epochs=1, augment='resized', method='trivial_augment'), device='cpu').fit(1)

def test_stochastic_depth_needs_residual_blocks():
    learn = make_learner(Run(n_train=32, epochs=1, method='stochastic_depth'), device='cpu')
    with pytest.raises(ValueError, match='no residual blocks'): learn.fit(1)
    with pytest.raises(ValueError, match='p=1'): StochasticDepth(1)

def test_spatial_dropout_drops_whole_maps_and_leaves_no_hooks():
    learn = make_learner(RUN, device='cpu')
    learn.add_cb(SpatialDropout(.5))
    seen = []
    handle = learn.model.stage1.register_forward_pre_hook(lambda module, args: seen.append((args[0]==0).flatten(2).all(2).float().mean()))
    learn.fit(1)
    handle.remove()
    assert .3<torch.stack(seen).mean()<.75
    assert not any(m._forward_hooks for m in learn.model.modules())
    with pytest.raises(ValueError, match='p=1'): SpatialDropout(1)

def test_two_mixers_are_refused():
    with pytest.raises(ValueError, match='both mix'): make_method('mixup+cutmix')

@pytest.mark.parametrize('first', ['sam', 'isda', 'gradient_penalty', 'normalize_project', 'ema'])
def test_pairs_work_or_are_refused(first):
    outcomes = {second:pair_outcome(first, second) for second in FAMILIES if second!=first}
    assert {outcome for outcome,_ in outcomes.values()} <= {'works','refused'}, outcomes
    assert all(len(why)>20 for outcome,why in outcomes.values() if outcome=='refused')

def test_an_average_is_put_in_where_training_reached_its_loss():
    nets = {}
    for name in ('none','ema'):
        learn = make_learner(Run(method=name, n_train=100, epochs=12, stop_loss=1.), device='cpu')
        learn.fit(12)
        assert learn.epoch<11
        nets[name] = learn.model.state_dict()
    assert not all(a.equal(b) for a,b in zip(nets['none'].values(), nets['ema'].values()))

def test_a_run_that_was_stopped_while_it_was_judged_is_taken_up(tmp_path, monkeypatch):
    from phantom_nb.experiments import runner
    run,judge = Run(method='ema', n_train=48, bs=16, epochs=2),runner.measure_learner
    monkeypatch.setattr(runner, 'Checkpoint', partial(Checkpoint, interval=0))
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(runner, 'measure_learner', stop)
    with pytest.raises(KeyboardInterrupt): run_one(run, tmp_path, device='cpu')
    monkeypatch.setattr(runner, 'measure_learner', judge)
    row = run_one(run, tmp_path, device='cpu')
    assert row['status']=='done' and row['accuracy']==run_one(run, tmp_path/'new', device='cpu')['accuracy']

def test_an_interrupted_fit_leaves_one_policy():
    learn = make_learner(Run(method='trivial_augment', n_train=100, epochs=2), device='cpu')
    def stop(cb): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Callback(after_step=stop))
    seen = []
    learn.fit(1, cbs=Callback(before_train=lambda cb: seen.append(cb.dls.train.augment)))
    assert seen[0].first is None and learn.dls.train.augment is None
