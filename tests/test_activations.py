"AL2: growing weight, in a learner and in a plain loop"
import pytest, torch
from fastai.basics import Learner, SGD
from fastai.callback.schedule import SchedNo
from torch import nn

from phantom_nb.data import get_dls
from phantom_nb.plain import attach
from phantom_nb.regularizers.activations import AL2, mean_square

def fit(*cbs, epochs=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))
    learn = Learner(get_dls('digits', n_train=64, n_valid=20, bs=32, device='cpu'), model, opt_func=SGD, lr=.1, cbs=list(cbs))
    learn.logger,learn.create_mbar = (lambda *_: None),False
    with learn.no_bar(): learn.fit(epochs)
    return learn

def test_weights():
    assert [row[2] for row in fit(AL2(.4)).al2.records]==pytest.approx([.1, .2, .3, .4])
    assert {row[2] for row in fit(AL2(SchedNo(.4, .4))).al2.records}=={.4}

def test_a_strong_penalty_holds_activations_down():
    plain,held = fit(AL2(0.), epochs=10),fit(AL2(10.), epochs=10)
    assert held.al2.records[-1][3]<.5*plain.al2.records[-1][3]

def test_plain_loop():
    torch.manual_seed(0)
    model,x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),torch.randn(6, 4)
    with attach(model, AL2(.5), total=4) as penalty:
        model(x)
        assert torch.isclose(penalty(), .5/4*mean_square(model[:2](x)))
    with pytest.raises(ValueError, match='give total='): attach(model, AL2())
    with attach(model, AL2(), total=2) as penalty, pytest.raises(ValueError, match='forward pass'): penalty()
