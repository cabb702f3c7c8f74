"What every row says of a trained network beside accuracy"
import math

import pytest, torch
from torch import nn

from phantom_nb.data import get_dls
from phantom_nb.experiments.learner import make_learner, measure_learner
from phantom_nb.experiments.quantities import *
from phantom_nb.experiments.quantities import random_energy, relative_energies
from phantom_nb.experiments.run import Run
from phantom_nb.regularizers.energy import hyperspherical_energy

@pytest.mark.parametrize('n,d,half', [(10,20,False), (10,20,True), (3,64,True)])
def test_random_level(n, d, half):
    w = torch.randn(2000, n, d, generator=torch.Generator().manual_seed(1))
    assert hyperspherical_energy(w, half_space=half).item() == pytest.approx(random_energy(n, d, half), rel=5e-3)

def test_calibration_error_against_a_loop():
    logits,y = torch.randn(500, 4)*2,torch.randint(4, (500,))
    sure,guess = logits.softmax(1).max(1)
    total = 0.
    for b in range(15):
        mine = (sure>=b/15) & ((sure<(b+1)/15) | (b==14))
        if mine.any(): total += mine.float().mean()*(sure[mine].mean()-(guess==y)[mine].float().mean()).abs()
    assert calibration_error(logits, y).item() == pytest.approx(float(total), abs=1e-6)

def test_logits_that_are_not_numbers():
    assert calibration_error(torch.full((4,3), torch.nan), torch.zeros(4).long()).isnan()

def test_noise_is_local_and_the_same():
    x,state = torch.zeros(2, 1, 8, 8),torch.get_rng_state()
    assert add_noise(x).equal(add_noise(x))
    assert state.equal(torch.get_rng_state())
    assert not add_noise(x).equal(add_noise(x, seed=1))
    with pytest.raises(ValueError, match='sd=-1'): add_noise(x, -1)

@pytest.mark.parametrize('size', [(8,8), (9,5), (32,32), (128,96)])
def test_blur_keeps_shape_and_mean(size):
    x = torch.rand(2, 3, *size)
    assert blur(x).shape==x.shape
    assert blur(torch.ones_like(x)).allclose(torch.ones_like(x), atol=1e-5)

def test_spoilt_does_not_depend_on_the_network():
    dls = get_dls('digits', n_train=20, n_valid=0, device='cpu')
    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []
        def forward(self, x):
            self.seen.append(x)
            return x.flatten(1)[:,:10]
    a,b = Sees(),Sees()
    first = judge_spoilt(a, dls.test, n=300)
    assert first==judge_spoilt(b, dls.test, n=300)
    assert sum(map(len, a.seen))==600
    assert all(x.equal(y) for x,y in zip(a.seen, b.seen))
    assert judge_spoilt(a, []) == {}

def _row(run, fill=None):
    learn = make_learner(run, device='cpu')
    learn.fit(1)
    for p in learn.model.parameters() if fill is not None else (): p.data.fill_(fill)
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    row = measure_learner(learn, run)
    assert all(v.equal(learn.model.state_dict()[k]) or v.isnan().any() for k,v in before.items())
    return row

def test_a_row_has_them():
    row = _row(Run(n_train=50, epochs=1, n_valid=50, test=True))
    names = 'net_norm net_energy net_output_energy net_sparsity net_dead net_c3 net_c4 ece valid_ece train_ece noise_accuracy blur_accuracy'
    assert all(math.isfinite(row[name]) for name in names.split())

def test_validation_leaves_test_images_alone():
    assert 'noise_accuracy' not in _row(Run(n_train=50, epochs=1, n_valid=50))

@pytest.mark.parametrize('fill', [0., math.nan])
def test_a_spoilt_network_has_a_row(fill): assert 'net_norm' in _row(Run(n_train=50, epochs=1), fill)

def test_a_linear_network_has_no_activations():
    dls = get_dls('digits', n_train=20, n_valid=0, device='cpu')
    row = network_quantities(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), dls.train)
    assert set(row)=={'net_norm','net_output_energy'}
    assert relative_energies(nn.Linear(3, 5))=={} # no random level in three dimensions
