"What every row says of a trained network beside accuracy"
import math

import pytest, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import gaussian_blur

from phantom_nb.data import get_dls
from phantom_nb.experiments.learner import make_learner, measure_learner
from phantom_nb.experiments.quantities import *
from phantom_nb.experiments.quantities import activation_quantities, blur, calibration_error, energy_floor, judge_spoilt, layer_weights
from phantom_nb.experiments.quantities import logit_margins, network_quantities, random_energy, relative_energies, weight_norm
from phantom_nb.experiments.run import Run
from phantom_nb.measures.sparsity import activation_sparsity
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

class Sees(nn.Module):
    "Keep the images, and answer with their first pixels"
    def __init__(self, n=10):
        super().__init__()
        self.seen,self.n = [],n
    def forward(self, x):
        self.seen.append(x)
        return x.flatten(1)[:,:self.n]

def test_spoilt_does_not_depend_on_the_network():
    dls = get_dls('digits', n_train=20, n_valid=0, device='cpu')
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

def test_noise_has_its_size():
    assert add_noise(torch.zeros(4, 1, 64, 64), .2).std().item()==pytest.approx(.2, rel=.02)

def test_a_wide_blur_reaches_as_far_as_the_image_allows():
    x = torch.rand(2, 3, 9, 12)
    assert blur(x, .5).allclose(gaussian_blur(x, [9,9], [6.,6.])) and blur(x, .1).allclose(gaussian_blur(x, [9,9], [1.2,1.2]))
    assert blur(x[:,:,:8], .5).allclose(gaussian_blur(x[:,:,:8], [7,7], [6.,6.]))

def test_a_network_that_is_quite_sure_has_a_bin():
    logits = torch.tensor([[500.,0.],[500.,0.],[0.,500.],[500.,0.]])
    assert calibration_error(logits, torch.tensor([0,0,1,1])).item()==.25

def test_margins_of_logits_by_hand():
    logits = torch.tensor([[3.,1.,2.],[3.,1.,2.],[-1.,-4.,-2.]])
    assert logit_margins(logits, torch.tensor([0,1,2])).tolist()==[1.,-2.,-1.]

def test_the_floor_is_the_energy_of_orthogonal_neurons():
    for n in (2, 3, 7): assert energy_floor(n)==pytest.approx(hyperspherical_energy(torch.eye(n, 9), half_space=True).item(), rel=1e-6)

def _fixed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))

def test_weights_of_layers_by_hand():
    "Energies in units of their random level, lengths in units of fresh ones; a layer of two neurons counts"
    model = _fixed()
    own = [m.weight.detach().flatten(1) for m in (model[0], model[2], model[5])]
    groups = [own[0][None], own[1].view(2, 3, -1), own[2][None]]
    units = [random_energy(w.shape[1], w.shape[2], half) for w,half in zip(groups, (True, True, False))]
    energies = [hyperspherical_energy(w, half_space=half).item()/unit for w,half,unit in zip(groups, (True, True, False), units)]
    found = relative_energies(model)
    assert found['energy']==pytest.approx((energies[0]+energies[1])/2, rel=1e-5) and found['output_energy']==pytest.approx(energies[2], rel=1e-5)
    table = layer_weights(model)
    assert table.neurons.tolist()==[2,3] and table.energy.tolist()==pytest.approx(energies[:2], rel=1e-5)
    lengths = [own[0].norm()/4**.5, own[1].norm()/12**.5] # a fresh neuron of He's has a squared length of 2
    assert table.norm.tolist()==pytest.approx(torch.stack(lengths).tolist(), rel=1e-5)
    assert table.floor.tolist()==pytest.approx([energy_floor(n)/unit for n,unit in zip((2,3), units)], rel=1e-5)
    assert weight_norm(model)==pytest.approx(torch.cat([w.flatten() for w in own]).norm().item(), rel=1e-5)

def test_sparsity_of_a_network_does_not_depend_on_the_batches():
    "Means over samples, units that never respond in any batch; a negative response is one"
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.LeakyReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.,-1.,0.])[:,None,None,None])
        model[0].bias.zero_()
        model[3].weight[0],model[3].bias[0] = 0.,-1. # always below zero
    x,y = torch.randn(7, 1, 4, 4),torch.arange(7)%2
    whole,_ = activation_quantities(model, [(x, y)])
    for cuts in ([3, 4], [1, 1, 5]):
        parts,layers = activation_quantities(model, list(zip(x.split(cuts), y.split(cuts))))
        assert all(parts[k]==pytest.approx(whole[k], rel=1e-4) for k in ('sparsity','dead','c3'))
    with torch.no_grad(): first,second = model[1](model[0](x)),model[4](model[3](model[1](model[0](x)).flatten(1)))
    want = [activation_sparsity(first).item(), activation_sparsity(second).item()]
    assert layers['sparsity']==pytest.approx(want, rel=1e-4) and layers['dead']==pytest.approx([1/3, 0.])
    assert whole['sparsity']==pytest.approx(sum(want)/2, rel=1e-4) and whole['dead']==pytest.approx(1/6)

def test_spoilt_images_are_counted():
    class First(nn.Module):
        def forward(self, x): return torch.tensor([[1.,0.]]).expand(len(x), 2)
    batches = [(torch.randn(4, 1, 8, 8), torch.tensor([0,0,1,0])), (torch.randn(4, 1, 8, 8), torch.tensor([0,1,1,1]))]
    assert judge_spoilt(First(), batches)==dict(noise_accuracy=.5, blur_accuracy=.5)
    assert judge_spoilt(First(), batches, n=4)['noise_accuracy']==.5 # images 0, 2, 4 and 7
    assert judge_spoilt(First(), batches, n=2)['blur_accuracy']==.5 # the first and the last

def test_a_network_is_looked_at_on_so_many_images():
    model,seen = _fixed(),[]
    model.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    batches = [(torch.randn(8, 1, 8, 8), torch.arange(8)%4) for _ in range(4)]
    found = network_quantities(model, batches, n=20)
    assert sum(seen)==20 and found['net_layers']['sparsity']==[float(f'{v:.4g}') for v in activation_quantities(model, [(torch.cat([x for x,_ in batches])[:20],
        torch.cat([y for _,y in batches])[:20])])[1]['sparsity']]

def test_a_random_level_needs_a_pair_and_four_dimensions():
    assert random_energy(2, 4)==1. # (d-2)/(2d-6)
    for n,d in ((1, 8), (4, 3)):
        with pytest.raises(ValueError): random_energy(n, d)

def test_spoilt_images_are_of_all_classes_and_noise_belongs_to_the_image():
    "Test images that lie class by class; whatever the size of a batch"
    class First(nn.Module):
        def forward(self, x): return torch.tensor([[1.,0.]]).expand(len(x), 2)
    x,y = torch.randn(600, 1, 4, 4),torch.arange(2).repeat_interleave(300)
    def loader(bs): return DataLoader(TensorDataset(x, y), bs)
    assert judge_spoilt(First(), loader(64), n=100)==dict(noise_accuracy=.5, blur_accuracy=.5)
    a,b = Sees(2),Sees(2)
    assert judge_spoilt(a, loader(64), n=90)==judge_spoilt(b, loader(7), n=90)
    assert torch.cat(a.seen[::2]).equal(torch.cat(b.seen[::2])) and sum(map(len, a.seen))==180
