"The same regularizers in other people's loops: the gradients of a Learner, and a network that is left as it was"
import copy, io, logging, re, warnings
from functools import partial

import pytest, torch
from fastai.basics import Callback, CancelFitException, Learner, SGD
from fastai.callback.schedule import SchedLin
from torch import nn
from torch.nn.functional import cross_entropy
from torch.overrides import _get_current_function_mode_stack

from phantom_nb.core import L2Penalty, Regularizer
from phantom_nb.data import get_dls
from phantom_nb.plain import attach
from phantom_nb.regularizers.flatness import SAM
from phantom_nb.regularizers.hyperspherical import CoMHE, MHE
from phantom_nb.regularizers.phantom import PhantomEmbeddings
from phantom_nb.regularizers.smoothness import GradientPenalty
from phantom_nb.regularizers.sparsity import TargetedSparsity

MAKERS = dict(l2=L2Penalty, mhe=partial(MHE, half_space=True), every=partial(MHE, every=2), random=partial(CoMHE, 'random', k=4, m=2),
    angle=partial(CoMHE, 'angle', k=4), group=partial(CoMHE, 'group', k=3), phantom=PhantomEmbeddings,
    mix=partial(PhantomEmbeddings, mode='mix', k=2), sparsity=partial(TargetedSparsity, layers='all'))

class Confidence(Regularizer):
    "A penalty on the outputs (Pereyra 2017)"
    def penalty(self):
        log_p = self.learn.pred.log_softmax(1)
        return (log_p.exp()*log_p).sum(1).mean()

MAKERS['confidence'] = Confidence

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))

def digits(): return get_dls('digits', n_train=64, n_valid=20, bs=32, seed=0, device='cpu')
def n_hooks(model): return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for m in model.modules())

class Gradients(Callback):
    order = 20
    def before_step(self):
        self.grads = [p.grad.clone() for p in self.model.parameters()]
        raise CancelFitException()

def learner_gradients(*cbs):
    learn = Learner(digits(), network(), opt_func=SGD, cbs=[*cbs, Gradients()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn.gradients.grads

@pytest.fixture(scope='module')
def batch(): return next(iter(digits().train))

@pytest.mark.parametrize('name', MAKERS)
def test_gradients_are_those_of_a_learner_bit_for_bit(name, batch):
    model,(x,y) = network(),batch
    with attach(model, MAKERS[name](lam=.7)) as penalty: (cross_entropy(model(x), y) + penalty(y)).backward()
    assert all(torch.equal(p.grad, g) for p,g in zip(model.parameters(), learner_gradients(MAKERS[name](lam=.7)))) and n_hooks(model)==0

def test_several_at_once_are_those_of_a_learner(batch):
    model,(x,y) = network(),batch
    with attach(model, *[make(lam=.3) for make in MAKERS.values()]) as penalty: (cross_entropy(model(x), y) + penalty(y)).backward()
    grads = learner_gradients(*[make(lam=.3) for make in MAKERS.values()])
    assert all(torch.equal(p.grad, g) for p,g in zip(model.parameters(), grads))

def test_compiled_and_frozen_networks(batch):
    model,(x,y) = network(),batch
    model[0].requires_grad_(False)
    compiled = torch.compile(model, backend='eager')
    with attach(compiled, MHE(.5)) as penalty: (cross_entropy(compiled(x), y) + penalty(y)).backward()
    plain = network()
    plain[0].requires_grad_(False)
    with attach(plain, MHE(.5)) as penalty: (cross_entropy(plain(x), y) + penalty(y)).backward()
    for p,q in zip(model.parameters(), plain.parameters()):
        assert p.grad is None and q.grad is None or torch.allclose(p.grad, q.grad, atol=1e-7)

def test_schedule_every_record_and_accumulation(batch):
    model,(x,y) = network(),batch
    cb = L2Penalty(SchedLin(0., 1.), every=2)
    with attach(model, cb, total=8) as penalty:
        for i in range(16):
            loss = cross_entropy(model(x), y)
            value = penalty(y, loss=loss, update=i%2==1)
            assert (value.item()==0)==(i//2%2==1 or i<2)
    df = cb.to_frame()
    assert df.step.tolist()==[0,0,2,2,4,4,6,6] and df.lam.tolist()==[0,0,.25,.25,.5,.5,.75,.75]
    assert df.share.notna().any() and df.epoch.between(0, 1).all()

def test_passes_without_gradient_open_nothing(batch):
    model,(x,y) = network(),batch
    cb = TargetedSparsity(layers='all')
    with attach(model, cb) as penalty:
        before = n_hooks(model)
        with torch.no_grad(): model(x)
        assert n_hooks(model)==before
        model(x)
        assert n_hooks(model)>before
        value = penalty(y)
        assert n_hooks(model)==before and value.requires_grad
        model.eval()(x) # some train like this, to leave batch normalization alone
        assert penalty(y).requires_grad and n_hooks(model)==before

def test_state_goes_on_and_foreign_state_is_refused(batch):
    model,(x,y) = network(),batch
    def make(): return CoMHE('random', .5, k=4, m=2)
    def values(penalty, n):
        out = []
        for _ in range(n):
            model(x)
            out.append(penalty(y).item())
        return out
    with attach(model, make()) as penalty:
        first = values(penalty, 3)
        state = copy.deepcopy(penalty.state_dict())
        second = values(penalty, 3)
    with attach(model, make()) as penalty:
        penalty.load_state_dict(state)
        assert values(penalty, 3)==second!=first
        with pytest.raises(ValueError, match="the same regularizers"): penalty.load_state_dict(dict(step=0, regularizers={'0.MHE':{}}))

@pytest.mark.parametrize('wrap', [lambda z: (z, 1), lambda z: [z], lambda z: dict(logits=z)], ids=['tuple','list','dict'])
def test_outputs_are_understood(wrap, batch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
        def forward(self, x): return wrap(self.net(x))
    x,y = batch
    model,plain = Net(),network()
    with attach(model, Confidence()) as penalty:
        model(x)
        a = penalty(y)
    with attach(plain, Confidence()) as penalty:
        plain(x)
        assert penalty(y).item()==a.item()

def test_what_cannot_work_is_refused_with_the_remedy(batch):
    model,(x,y) = network(),batch
    with pytest.raises(ValueError, match="no regularizer"): attach(model)
    with pytest.raises(ValueError, match="give MHE"): attach(model, nn.ReLU())
    with pytest.raises(ValueError, match="nn.Module"): attach(3, MHE())
    with pytest.raises(ValueError, match="give total="): attach(model, MHE(SchedLin(0., 1.)))
    with pytest.raises(ValueError, match="selects no layer"):
        with attach(model, MHE(layers='zz')): pass
    assert n_hooks(model)==0
    penalty = attach(model, MHE())
    with pytest.raises(ValueError, match="inside `with attach"): penalty(y)
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
        def forward(self, x): return {'scores':self.net(x)}
    odd = Odd()
    with attach(odd, Confidence()) as penalty, pytest.raises(ValueError, match="pred="):
        odd(x)
        penalty(y)
    with attach(model, PhantomEmbeddings()) as penalty, pytest.raises(ValueError, match="one label"):
        model(x)
        penalty()
    with attach(model, PhantomEmbeddings()) as penalty, pytest.raises(ValueError, match="forward|applied 0 times"): penalty(y)


# Other people's trainers

def reference(batch, *cbs, steps=3):
    "Weights after some plain SGD steps on one batch"
    model,(x,y) = network(),batch
    opt = torch.optim.SGD(model.parameters(), .1)
    with attach(model, *cbs) as penalty:
        for _ in range(steps):
            opt.zero_grad()
            (cross_entropy(model(x), y) + penalty(y)).backward()
            opt.step()
    return list(model.parameters())

def same(a, b): return all(torch.allclose(p, q, atol=1e-6) for p,q in zip(a, b))
def cbs(): return MHE(.3, half_space=True), PhantomEmbeddings(.3)

def test_lightning(batch):
    L = pytest.importorskip('lightning.pytorch')
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
        def on_fit_start(self): self.penalty = attach(self.net, *cbs()).__enter__()
        def on_fit_end(self): self.penalty.close()
        def training_step(self, b, i): return cross_entropy(self.net(b[0]), b[1]) + self.penalty(b[1])
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .1)
    module = Module()
    trainer = L.Trainer(max_steps=3, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.fit(module, torch.utils.data.DataLoader([tuple(t.as_subclass(torch.Tensor) for t in batch)]*3, batch_size=None))
    assert same(module.net.parameters(), reference(batch, *cbs())) and n_hooks(module.net)==0

def test_accelerate(batch):
    accelerate = pytest.importorskip('accelerate')
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    model,opt = accelerator.prepare(model, torch.optim.SGD(model.parameters(), .1))
    x,y = batch
    with attach(model, *cbs()) as penalty:
        for _ in range(3):
            opt.zero_grad()
            accelerator.backward(cross_entropy(model(x), y) + penalty(y))
            opt.step()
    assert same(model.parameters(), reference(batch, *cbs()))

def test_hugging_face_trainer(batch, tmp_path):
    hf = pytest.importorskip('transformers')
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
        def forward(self, pixel_values, labels=None):
            logits = self.net(pixel_values)
            return hf.modeling_outputs.ImageClassifierOutput(loss=cross_entropy(logits, labels), logits=logits)
    class Trainer(hf.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            out = model(**inputs)
            loss = out.loss + self.penalty(inputs['labels'])
            return (loss, out) if return_outputs else loss
    x,y = (t.as_subclass(torch.Tensor) for t in batch)
    data = [dict(pixel_values=x[i], labels=y[i]) for i in range(len(x))]*3
    args = hf.TrainingArguments(tmp_path, max_steps=3, per_device_train_batch_size=len(x), learning_rate=.1, optim='sgd', max_grad_norm=0.,
        lr_scheduler_type='constant', report_to=[], save_strategy='no', use_cpu=True, disable_tqdm=True)
    model = Net()
    class InOrder(Trainer):
        def _get_train_sampler(self, *args): return torch.utils.data.SequentialSampler(data)
    trainer = InOrder(model=model, args=args, train_dataset=data)
    with attach(model, *cbs()) as trainer.penalty: trainer.train()
    assert same(model.net.parameters(), reference(batch, *cbs())) and n_hooks(model)==0

@pytest.mark.parametrize('given,what', [([MHE(.1)], 'give them one by one'), (MHE, 'MHE is a class: give MHE(...)')], ids=str)
def test_regularizers_come_one_by_one(given, what):
    with pytest.raises(ValueError, match=re.escape(what)): attach(nn.Linear(2, 2), given)

class Reads(Regularizer):
    "What a regularizer of one's own may read of the batch"
    def penalty(self):
        self.read = self.learn.xb,self.learn.y
        return self.learn.pred.square().mean()

def test_a_regularizer_reads_inputs_and_labels_and_outputs(batch):
    "Also of a network that is called by name and returns its logits among others, with their gradient"
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()
        def forward(self, images): return dict(hidden=images, logits=self.body(images))
    (x,y),model,reg = batch,Named(),Reads(1.)
    with attach(model, reg) as penalty:
        model(images=x)
        penalty(y).backward()
    assert reg.read[0][0] is x and reg.read[1] is y and model.body[-1].weight.grad.abs().sum()>0
    with attach(model, reg) as penalty:
        with pytest.raises(ValueError, match='no forward pass with gradient came before'): penalty(y)
    class Odd(nn.Module):
        def forward(self, x): return 'nothing'
    with attach(nn.Sequential(network(), Odd()), Reads(1.)) as penalty:
        penalty._loop.answer = 'nothing'
        with pytest.raises(ValueError, match='returned a str without logits'): penalty(y)

def test_a_schedule_ends_with_training_and_goes_on_after_a_pause(batch):
    "More steps than were told leave the weight at its end; a loaded state knows how far it was"
    (x,y),model = batch,network()
    def weights(steps, state=None):
        reg = L2Penalty(SchedLin(0., 1.))
        with attach(model, reg, total=4) as penalty:
            if state: penalty.load_state_dict(state)
            for _ in range(steps):
                model(x)
                penalty(y)
            return [round(row[2], 4) for row in reg.records],penalty.state_dict()
    first,state = weights(6)
    assert state['step']==6
    _,half = weights(2)
    again,_ = weights(4, half)
    assert first[-2:]==[1.,1.] and again==first[2:6], (first, again)
    assert weights(1, state)[0]==[1.] # further than it was told
    assert attach(model, L2Penalty(1.)).state_dict()['step']==0
    with pytest.raises(ValueError, match='total=0'): attach(model, L2Penalty(1.), total=0)
    attach(model, L2Penalty(1.), total=1)

def test_forward_passes_that_no_penalty_follows_leave_nothing(batch):
    (x,y),model = batch,network()
    before = n_hooks(model)
    with attach(model, TargetedSparsity(1., layers='all')) as penalty:
        model(x) # the first pass finds the layers
        model(x)
        hooks = n_hooks(model)
        model(x)
        assert n_hooks(model)==hooks>before
        penalty(y)
        model(x)
    assert n_hooks(model)==before

def test_a_loop_without_a_total_plots_over_steps():
    net,reg = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),L2Penalty()
    with attach(net, reg) as penalty:
        for _ in range(3):
            loss = cross_entropy(net(torch.randn(4, 1, 8, 8)), torch.arange(4))
            (loss+penalty(loss=loss)).backward()
    axs = reg.plot()
    assert axs[0].get_xlabel()=='step' and axs[0].lines[0].get_xdata().tolist()==reg.to_frame().step.tolist()
    assert len(axs[1].lines[0].get_xdata())==1 # measured at the first step

def test_a_regularizer_is_in_one_place():
    "Else its penalty would be of the other network"
    a,b,reg = network(),network(),MHE(1.)
    with attach(a, reg) as penalty:
        with pytest.raises(ValueError, match='attached to another network'), attach(b, reg): pass
        assert penalty().requires_grad
        Learner(digits(), b, cbs=reg)
        with pytest.raises(ValueError, match='in use elsewhere'): penalty()
    with attach(b, reg) as penalty: assert penalty().requires_grad

def test_the_state_after_the_block_knows_how_far_it_came():
    model,reg = nn.Linear(4, 3),L2Penalty(SchedLin(0., 1.))
    def steps(penalty, n):
        for _ in range(n): (cross_entropy(model(torch.randn(6, 4)), torch.arange(6)%3)+penalty()).backward()
    with attach(model, reg, total=40) as penalty: steps(penalty, 20)
    state = penalty.state_dict()
    assert state['step']==20
    again = L2Penalty(SchedLin(0., 1.))
    with attach(model, again, total=40) as penalty:
        penalty.load_state_dict(state)
        steps(penalty, 1)
    assert again.records[-1][2]==pytest.approx(.5)

def copied(model, how):
    if how=='copy': return copy.deepcopy(model)
    if how=='average': return torch.optim.swa_utils.AveragedModel(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)

@pytest.mark.parametrize('how', ['copy','average','save'])
def test_copies_of_an_attached_network_watch_nothing(how, batch):
    "A loop that keeps the best network, or an average, copies it in the block, perhaps ahead of the penalty"
    model,(x,y) = network(),batch
    with attach(model, TargetedSparsity(1., layers='all'), GradientPenalty(.1)) as penalty:
        loss = cross_entropy(model(x), y)
        penalty(y, loss=loss)
        later = copied(model, how)
        out = model(x)
        during = copied(model, 'copy' if how=='save' else how)
        assert penalty(y, loss=cross_entropy(out, y)).requires_grad
    fresh = torch.randn(4, 1, 8, 8)
    for other in (later, during):
        assert other(fresh).shape==(4, 10)
        assert not fresh.requires_grad and torch.backends.cuda.flash_sdp_enabled() and not _get_current_function_mode_stack()

def test_a_learner_has_its_regularizer_back_after_the_block():
    reg = MHE(.1)
    learn = Learner(digits(), network(), opt_func=SGD, cbs=reg)
    with attach(network(), reg) as penalty: assert penalty().requires_grad
    assert reg.learn is learn
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert len(reg.records)==2

@pytest.mark.parametrize('inside', [True, False])
def test_a_second_pass_has_the_precision_of_the_first(inside, batch):
    model,(x,y),seen = network(),batch,[]
    model[3].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    mixed = torch.autocast('cpu', dtype=torch.bfloat16)
    with attach(model, SAM(1.)) as penalty:
        with mixed:
            loss = cross_entropy(model(x), y)
            if inside: term = penalty(y, loss=loss, again=lambda: cross_entropy(model(x), y))
        if not inside: term = penalty(y, loss=loss, again=lambda: cross_entropy(model(x), y))
    assert seen==[torch.bfloat16]*2 and term.item()>.01 # at displaced weights, not at those of autocast's cache

def test_outputs_behind_a_loss_are_found(batch):
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
        def forward(self, x, y):
            out = self.net(x)
            return cross_entropy(out, y), out
    model,(x,y) = WithLoss(),batch
    with attach(model, Confidence(1.)) as penalty:
        model(x, y)
        assert penalty(y).requires_grad
