"Trainings that are killed at a random step and go on: to the last bit those that were never stopped"
import os, random, signal, warnings
from functools import partial
from pathlib import Path

import pytest, torch
from fastai.basics import Callback, Learner, accuracy, noop, risinstance
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import SchedLin
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.all import DataLoader, DataLoaders
from torch import nn

from phantom_nb.core import L2Penalty, TrainingCallback
from phantom_nb.data import get_dls
from phantom_nb.experiments.checkpoint import Checkpoint, CheckpointError, callback_state, last_checkpoint
from phantom_nb.experiments.checkpoint import previous_file, random_state, storable
from phantom_nb.experiments.learner import make_learner
from phantom_nb.experiments.libraries import EMA
from phantom_nb.experiments.methods import METHODS
from phantom_nb.experiments.run import Run
from phantom_nb.experiments.runner import run_many, run_one
from phantom_nb.measures.intraclass import IntraclassMonitor
from phantom_nb.regularizers.activations import AL2
from phantom_nb.regularizers.flatness import AMP, SAM
from phantom_nb.regularizers.hyperspherical import MHE, CoMHE
from phantom_nb.regularizers.norms import NormalizeAndProject
from phantom_nb.regularizers.orthogonality import Orthogonality
from phantom_nb.regularizers.phantom import PhantomEmbeddings
from phantom_nb.regularizers.semantic import ISDA
from phantom_nb.regularizers.smoothness import GradientPenalty, SpectralPenalty
from phantom_nb.regularizers.sparsity import SparsityMonitor, TargetedSparsity

EPOCHS,BATCHES = 4,4

# what is added to a training, by name
CALLBACKS = dict(L2=L2Penalty, MHE=lambda: MHE(SchedLin(0., 1.)), Phantom=lambda: PhantomEmbeddings(k=2, queue=3),
    Mix=lambda: PhantomEmbeddings(mode='mix', k=1), Targeted=lambda: TargetedSparsity(rechoose=2, correlation=.5),
    SAM=lambda: SAM(every=2), AMP=lambda: AMP(steps=2), ISDA=ISDA, Diagonal=lambda: ISDA(diagonal=True), AL2=AL2,
    Orthogonality=Orthogonality, Gradient=GradientPenalty, Spectral=SpectralPenalty, Norms=NormalizeAndProject, EMA=EMA,
    Sparsity=lambda: SparsityMonitor(share=1.), Intraclass=lambda: IntraclassMonitor(n=40, keep=True),
    MixUp=MixUp, CutMix=CutMix, Accumulate=lambda: GradientAccumulation(32), Clip=GradientClip)
KINDS = 'random','angle','adversarial','group','expected'
CALLBACKS |= {f'CoMHE {kind}':partial(CoMHE, kind, k=8, p_lr=.1, **({} if kind=='expected' else dict(m=2, redraw=3))) for kind in KINDS}
TOGETHER = 'MHE+CoMHE random+Phantom+Targeted+SAM+Sparsity+Accumulate','MixUp+MHE+Gradient','CoMHE angle+MHE+MHE'

def with_dropout():
    "A small network that draws random numbers in its forward pass"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.2), nn.Conv2d(8, 12, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))

def by_name(name, folder):
    "A learner and the function that trains it"
    if name in METHODS:
        model = dict(model='resnet9', width=.25) if name=='stochastic_depth' else {}
        run = Run(method=name, epochs=EPOCHS, n_train=16*BATCHES, bs=16, n_valid=20, augment=True, **model)
        learn = make_learner(run, device='cpu')
        return learn,partial(learn.fit, EPOCHS)
    if name=='fastai': return plain_fastai(folder)
    dls = get_dls('digits', n_train=16*BATCHES, n_valid=20, bs=16, seed=0, augment=True, device='cpu')
    cbs = [CALLBACKS[part]() for part in name.split('+') if part in CALLBACKS]
    learn = Learner(dls, with_dropout(), lr=.01, cbs=cbs, metrics=accuracy, path=folder)
    return quiet(learn),partial(learn.fit_one_cycle, EPOCHS)

def quiet(learn):
    learn.logger,learn.create_mbar = noop,False
    return learn.remove_cbs(learn.cbs.filter(risinstance(ProgressCallback)))

class Noisy:
    "Images to which Python's, NumPy's and PyTorch's generators add noise when they are loaded"
    def __init__(self, data): self.data = data
    def __len__(self): return len(self.data)
    def __getitem__(self, i):
        x,y = self.data[i]
        return x.float()/255 + random.random()*torch.rand(1), y

def plain_fastai(folder):
    "fastai's own loaders, recorder and trackers"
    dls = get_dls('digits', n_train=16*BATCHES, n_valid=20, bs=16, seed=0, device='cpu')
    train = DataLoader(Noisy(dls.train_ds), bs=16, shuffle=True, num_workers=0)
    valid = DataLoader(Noisy(dls.valid_ds), bs=20, num_workers=0)
    cbs = [EarlyStoppingCallback(patience=9), SaveModelCallback(fname='best'), ReduceLROnPlateau(patience=1)]
    learn = Learner(DataLoaders(train, valid), with_dropout(), loss_func=nn.CrossEntropyLoss(), lr=.02, metrics=accuracy, path=folder, cbs=cbs)
    return quiet(learn),partial(learn.fit, EPOCHS)

EVENTS = 'before_batch after_pred after_loss before_step after_step after_batch after_train after_epoch'.split()

def killer(rng):
    "A callback that kills its process at a random event of a random step, before or behind all others"
    at = rng.randrange(EPOCHS),rng.randrange(BATCHES)
    event = rng.choice(EVENTS)
    def kill(cb):
        inside = event in ('after_train', 'after_epoch')
        if (cb.epoch, at[1] if inside else cb.iter)==at and (cb.training or inside): os.kill(os.getpid(), signal.SIGKILL)
    cb = Callback(**{event:kill})
    cb.order = rng.choice([-50, 2000])
    return cb

def train(name, folder, out, seed, interval):
    "Train to the end, or until the killer comes; leave everything that can be compared"
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    for f in (random.seed, torch.manual_seed, __import__('numpy').random.seed): f(0)
    Path(folder).mkdir(exist_ok=True)
    learn,fit = by_name(name, folder)
    if interval is not None: learn.add_cb(Checkpoint(f'{folder}/training.pth', interval=interval))
    if seed is not None: learn.add_cb(killer(random.Random(seed)))
    fit()
    left = {cb.name:callback_state(cb) for cb in learn.cbs if not isinstance(cb, Checkpoint) and type(cb) is not Callback}
    left.get('recorder', {}).pop('start_epoch', None) # a time of day
    left.get('recorder', {}).pop('log', None) # holds the seconds of the last epoch
    state = dict(model=learn.model.state_dict(), opt=storable(learn.opt.state_dict()), callbacks=left, chance=random_state(),
        iter=learn.train_iter, resumed=learn.checkpoint.resumed if interval is not None else [])
    torch.save(state, out)

def same(a, b, at=''):
    "Where two states differ, to the last bit"
    if isinstance(a, dict) and isinstance(b, dict):
        return [o for k in dict.fromkeys([*a, *b]) if k!='stamp' for o in same(a.get(k), b.get(k), f'{at}.{k}')]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a)==len(b):
        return [o for i,(x,y) in enumerate(zip(a, b)) for o in same(x, y, f'{at}[{i}]')]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor): equal = torch.equal(a.nan_to_num(-9.), b.nan_to_num(-9.))
    else: equal = type(a)==type(b) and (a==b or a!=a and b!=b)
    return [] if equal else [f'{at}: {str(a)[:60]} and {str(b)[:60]}']

def run(fork, *args, kill_after=None):
    "Run a function in a process of its own; its exit code"
    process = fork(*args)
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join(300)
    return process.exitcode

def whole_and_resumed(fork, name, folder, seeds, interval=0):
    "States left by a training that was never stopped, and by one that was killed"
    assert run(fork, train, name, folder/'whole', folder/'whole.pth', None, None)==0
    killed = [run(fork, train, name, folder/'part', folder/'part.pth', f'{name} {seed}', interval) for seed in seeds]
    assert killed[0]==-signal.SIGKILL
    if killed[-1]!=0: assert run(fork, train, name, folder/'part', folder/'part.pth', None, interval)==0
    return [torch.load(folder/f'{o}.pth') for o in ('whole','part')]

NAMES = [*METHODS, *CALLBACKS, *TOGETHER, 'fastai']

@pytest.mark.processes
@pytest.mark.parametrize('name', NAMES)
def test_killed_at_random_steps_equals_undisturbed(name, fork, tmp_path):
    "Killed at random events of random steps; then weights, optimizer, generators, records and callbacks are compared"
    whole,part = whole_and_resumed(fork, name, tmp_path, seeds=range(1 if name in METHODS else 2))
    part.pop('resumed')
    whole.pop('resumed')
    assert not same(whole, part)[:5]

def subclasses(base): return {o for c in base.__subclasses__() for o in (c, *subclasses(c))}

def test_every_regularizer_and_monitor_is_in():
    seen = {type(cb) for name in NAMES for cb in by_name(name, '.')[0].cbs}
    public = {c for c in subclasses(TrainingCallback) if c.__module__.startswith('phantom_nb.') and not c.__subclasses__()}
    public -= {Checkpoint}
    missing = {c.__name__ for c in public if c not in seen and c.__module__.startswith(('phantom_nb.regularizers','phantom_nb.measures','phantom_nb.core'))}
    assert not missing, f"not killed: {missing}"

@pytest.mark.processes
def test_killed_while_it_writes(fork, tmp_path):
    "Killed at any time, writing included: the file or the one before is whole, and the end is the same"
    assert run(fork, train, 'dropout', tmp_path/'whole', tmp_path/'whole.pth', None, None)==0
    rng = random.Random(0)
    for _ in range(6):
        code = run(fork, train, 'dropout', tmp_path/'part', tmp_path/'part.pth', None, 0, kill_after=rng.uniform(.05, .4))
        last_checkpoint(tmp_path/'part'/'training.pth') # raises if neither is whole
        if code==0: break
    assert code==0 or run(fork, train, 'dropout', tmp_path/'part', tmp_path/'part.pth', None, 0)==0
    whole,part = [torch.load(tmp_path/f'{o}.pth') for o in ('whole','part')]
    assert not same(whole['model'], part['model']) and not same(whole['opt'], part['opt'])

@pytest.fixture
def stopped(tmp_path):
    "A learner, its weights after four epochs, and the checkpoint of a training that was stopped in the third"
    def make(**settings):
        learn = quiet(Learner(get_dls('digits', n_train=64, n_valid=20, bs=16, seed=0, device='cpu'), with_dropout(), lr=.01,
            cbs=[L2Penalty(**settings)], metrics=accuracy, path=tmp_path))
        torch.manual_seed(0)
        return learn
    whole = make()
    whole.fit(EPOCHS)
    def stop(cb):
        if (cb.epoch, cb.iter)==(2, 2): raise ZeroDivisionError('stopped')
    with pytest.raises(ZeroDivisionError): make().fit(EPOCHS, cbs=[Callback(before_batch=stop), Checkpoint(tmp_path/'a.pth', interval=0)])
    return make,weights(whole),tmp_path/'a.pth'

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
def cut(path): path.write_bytes(path.read_bytes()[:-100])
def flip(path):
    "One bit of the first weight"
    content = bytearray(path.read_bytes())
    content[content.find(torch.load(path)['model']['0.weight'].numpy().tobytes())] ^= 1
    path.write_bytes(content)
def foreign(path): torch.save(dict(model={}), path)
def code_in_it(path): torch.save(dict(kind=os.system), path)

@pytest.mark.parametrize('spoil', [cut, flip, foreign, code_in_it, lambda path: path.write_text('notes')], ids='cut flip foreign code notes'.split())
def test_a_spoilt_checkpoint_is_named_and_never_used(spoil, stopped):
    make,whole,path = stopped
    spoil(path)
    learn = make()
    with pytest.warns(UserWarning, match='(?s)a.pth is .*The one before is taken up'): learn.fit(EPOCHS, cbs=Checkpoint(path))
    assert torch.equal(weights(learn), whole)
    spoil(previous_file(path))
    learn = make()
    before = weights(learn)
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match='a.pth.previous is '): learn.fit(EPOCHS, cbs=Checkpoint(path))
    assert torch.equal(weights(learn), before)

def test_the_file_of_another_training_is_refused(stopped):
    make,whole,path = stopped
    for learn,epochs,what in ((make(), 3, 'epochs: 4 there, 3 here'), (make(lam=2.), EPOCHS, 'callback l2_penalty lam: 1.0 there, 2.0 here')):
        before = weights(learn)
        with pytest.raises(CheckpointError, match=f'(?s)of another training .*{what}'): learn.fit(epochs, cbs=Checkpoint(path))
        assert torch.equal(weights(learn), before)
    learn = make()
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    learn.opt = None
    with pytest.raises(CheckpointError, match='weight 0.weight: .8, 1, 3, 3. there, nothing here'): learn.fit(EPOCHS, cbs=Checkpoint(path))

def test_a_full_disk_is_said_and_training_goes_on(stopped, monkeypatch):
    make,whole,path = stopped
    before = path.read_bytes()
    def full(*args): raise OSError(28, 'No space left on device', str(path))
    with monkeypatch.context() as patch:
        patch.setattr('phantom_nb.experiments.store.os.replace', full)
        learn = make()
        with pytest.warns(UserWarning, match='no checkpoint could be written.*No space left'): learn.fit(EPOCHS, cbs=Checkpoint(path, interval=0))
    assert torch.equal(weights(learn), whole) and path.read_bytes()==before
    assert sorted(o.name for o in path.parent.glob('*a.pth*'))==['a.pth','a.pth.previous'] and not list(path.parent.glob('.tmp*'))

def test_validation_and_the_rate_finder_neither_read_nor_write(stopped, tmp_path):
    make,whole,path = stopped
    learn = make()
    before = weights(learn)
    saved = Checkpoint(path, interval=0)
    learn.add_cb(saved)
    at = path.stat().st_mtime_ns
    learn.validate()
    learn.get_preds()
    learn.lr_find(num_it=5, show_plot=False)
    assert torch.equal(weights(learn), before) and path.stat().st_mtime_ns==at and not saved.resumed

def test_an_interrupt_while_batches_are_passed_over_leaves_nothing(stopped):
    make,whole,path = stopped
    learn = make()
    create,count = learn.dls.train.create_batches,[]
    def interrupted(samps):
        for i,batch in enumerate(create(samps)):
            count.append(i)
            if i==1: raise KeyboardInterrupt
            yield batch
    learn.dls.train.create_batches = interrupted
    with pytest.raises(KeyboardInterrupt): learn.fit(EPOCHS, cbs=Checkpoint(path))
    learn.dls.train.create_batches = create
    assert count==[0,1] and vars(learn).get('one_batch') is not noop and all(cb.run for cb in learn.cbs)
    learn = make()
    learn.fit(EPOCHS, cbs=Checkpoint(path))
    assert torch.equal(weights(learn), whole)

def test_a_second_fit_begins_anew_and_a_second_process_finds_the_end(stopped):
    make,whole,path = stopped
    learn = make()
    learn.fit(EPOCHS, cbs=Checkpoint(path, interval=0))
    steps = Callback(after_step=lambda cb: cb.seen.append(1))
    steps.seen = []
    again,saved = make(),Checkpoint(path, interval=0)
    again.fit(EPOCHS, cbs=[saved, steps])
    assert not steps.seen and torch.equal(weights(again), whole) and len(again.recorder.values)==EPOCHS
    again.fit(EPOCHS, cbs=[saved, steps])
    assert len(steps.seen)==EPOCHS*BATCHES

def test_a_run_with_a_spoilt_checkpoint_begins_anew(tmp_path):
    "A result must not depend on what lies about: a bad file is named, and the run is trained from its beginning"
    run = Run(epochs=3, n_train=40)
    whole = run_one(run, tmp_path/'whole')
    work = tmp_path/'part'/'.work'/f'{run.name}.pth'
    work.parent.mkdir(parents=True)
    foreign(work)
    with pytest.warns(UserWarning, match='(?s)begins anew.*no checkpoint of a training'): row = run_one(run, tmp_path/'part')
    assert row['status']=='done' and row['loss']==whole['loss'] and not list(work.parent.iterdir())

def test_a_full_disk_ends_a_sweep_in_which_nothing_is_lost(tmp_path, monkeypatch):
    "The row that cannot be written is an error, no failed run; what was there stays, and later the rest is trained"
    specs = [Run(epochs=2, n_train=40, seed=seed) for seed in range(3)]
    whole = run_many(specs, jobs=1, store=tmp_path/'whole')
    replace,rows = os.replace,[]
    def full(source, target):
        if str(target).endswith('.json'): rows.append(target)
        if len(rows)>1: raise OSError(28, 'No space left on device', str(target))
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr('phantom_nb.experiments.store.os.replace', full)
        with pytest.raises(OSError, match='No space'): run_many(specs, jobs=1, store=tmp_path/'part')
    assert [o.name for o in (tmp_path/'part').iterdir() if o.name!='.work']==[Path(rows[0]).name]
    again = run_many(specs, jobs=1, store=tmp_path/'part')
    assert set(again.status)=={'done'} and dict(zip(again.seed, again.loss))==dict(zip(whole.seed, whole.loss))
