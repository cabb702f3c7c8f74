"Normalize-and-project: lengths stay, functions too"
import copy, warnings
import pytest, torch
from fastai.basics import Learner, SGD
from fastai.callback.training import GradientAccumulation
from torch import nn
from torch.nn import functional as F

from phantom_nb.data import get_dls
from phantom_nb.plain import attach
from phantom_nb.regularizers.norms import NormalizeAndProject, project_norm, weight_norm

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 10))

def fit(*cbs, epochs=3, model=None, wd=None):
    learn = Learner(get_dls('digits', n_train=64, n_valid=20, bs=16, device='cpu'), model or network(), opt_func=SGD, lr=.5, cbs=list(cbs), wd=wd)
    learn.logger,learn.create_mbar = (lambda *_: None),False
    with learn.no_bar(): learn.fit(epochs)
    return learn

@pytest.mark.parametrize('cbs', [(), (GradientAccumulation(32),)])
def test_lengths_stay_where_they_are_free(cbs):
    first = {i:weight_norm(network()[i]).item() for i in (0, 4, 7)}
    model = fit(NormalizeAndProject(), *cbs, wd=.1).model
    assert [weight_norm(model[i]).item() for i in (0, 4)]==pytest.approx([first[0], first[4]], rel=1e-5)
    assert abs(weight_norm(model[7]).item()/first[7]-1)>1e-3

@pytest.mark.parametrize('train', [True, False])
def test_the_function_stays(train):
    learn = fit()
    model = learn.model.double().train(train)
    for m in (model[1], model[5]): m.eps = 1e-12
    moved,x = copy.deepcopy(model),torch.randn(9, 1, 8, 8, dtype=torch.float64)
    for i in (0, 4): project_norm(moved[i], moved[i+1], weight_norm(moved[i])/5)
    assert torch.allclose(model(x), moved(x), atol=1e-6) and not torch.allclose(model[0].weight, moved[0].weight)

def test_halfway():
    model = network()
    norm = weight_norm(model[0]).item()
    project_norm(model[0], model[1], 4*norm, lam=.5)
    assert weight_norm(model[0]).item()==pytest.approx(2*norm, rel=1e-5)
    model[0].weight.data.zero_()
    project_norm(model[0], model[1], 1.)
    assert (model[0].weight==0).all()

def test_record_shows_the_growth():
    growth = [row[3] for row in fit(NormalizeAndProject()).normalize_and_project.records]
    assert growth[0]==0 and all(g>0 for g in growth[1:])

def test_refusals():
    with pytest.raises(ValueError, match='no normalisation'): fit(NormalizeAndProject(), model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(ValueError, match='project_norm'): attach(network(), NormalizeAndProject())
    with pytest.raises(ValueError, match='lam=2'): NormalizeAndProject(2)
    model = network()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match='parametrized'): fit(NormalizeAndProject(), model=model)

def n_hooks(model): return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for m in model.modules())

def test_a_weight_of_zero_changes_nothing_and_hooks_go():
    plain,off,on = fit().model,fit(NormalizeAndProject(0.)).model,fit(NormalizeAndProject()).model
    assert all(torch.equal(a, b) for a,b in zip(plain.state_dict().values(), off.state_dict().values()))
    assert not torch.equal(plain[0].weight, on[0].weight) and n_hooks(on)==n_hooks(off)==0

def test_a_second_fit_keeps_the_lengths_that_it_finds():
    learn = fit(NormalizeAndProject(), epochs=1)
    with torch.no_grad(): learn.model[0].weight.mul_(3)
    length = weight_norm(learn.model[0]).item()
    with learn.no_bar(): learn.fit(1)
    assert weight_norm(learn.model[0]).item()==pytest.approx(length, rel=1e-5)

def test_a_loaded_fit_goes_back_to_the_lengths_of_then(tmp_path):
    learn = fit(NormalizeAndProject(), epochs=1)
    learn.path,length = tmp_path,weight_norm(learn.model[0]).item()
    learn.save('state')
    other = Learner(learn.dls, network(), opt_func=SGD, lr=.5, cbs=[NormalizeAndProject()], path=tmp_path)
    other.logger,other.create_mbar = (lambda *_: None),False
    other.load('state')
    with torch.no_grad(): other.model[0].weight.mul_(3)
    with other.no_bar(): other.fit(1)
    assert weight_norm(other.model[0]).item()==pytest.approx(length, rel=1e-5)

def test_a_layer_of_zeros_grows_by_nothing():
    model = network()
    nn.init.zeros_(model[0].weight)
    growth = [row[3] for row in fit(NormalizeAndProject(), model=model).normalize_and_project.records]
    assert all(0<=g<1 for g in growth)

def test_the_growth_is_the_mean_over_layers_of_how_far_each_is_from_its_length():
    "Twice as long is as far as half as long; a layer that became zero has no logarithm and counts as none"
    cb = fit(NormalizeAndProject(lam=0.)).normalize_and_project
    first = network()
    def growth(*factors):
        for name,factor in zip('04', factors):
            cb.norms[name] = weight_norm(first[int(name)])
            cb.pairs[name][0].weight.data = first[int(name)].weight.data*factor
        cb._project()
        return cb._growth.item()
    assert growth(1, 1)==pytest.approx(0, abs=1e-6)
    assert growth(2, 8)==pytest.approx(growth(.5, 1/8))==pytest.approx(2*torch.tensor(2.).log().item(), rel=1e-5)
    assert growth(4, 0)==pytest.approx(torch.tensor(2.).log().item(), rel=1e-5)
    cb.norms['0'] = torch.tensor(0.) # zeros that stay zeros: no logarithm either
    cb.pairs['0'][0].weight.data.zero_()
    cb.pairs['4'][0].weight.data = 4*first[4].weight.data
    cb._project()
    assert cb._growth.item()==pytest.approx(torch.tensor(2.).log().item(), rel=1e-5)

class Residual(nn.Module):
    "What the first layer gives goes through the normalisation, and past it; the second goes through one alone"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem,self.bn = nn.Conv2d(1, 4, 3, padding=1),nn.BatchNorm2d(4)
        self.inner,self.inner_bn = nn.Conv2d(4, 4, 3, padding=1),nn.BatchNorm2d(4)
        self.head = nn.Linear(256, 10)
    def forward(self, x):
        x = self.stem(x)
        return self.head((x+self.inner_bn(self.inner(self.bn(x).relu()))).flatten(1))

def test_a_layer_that_a_residual_branch_reads_is_left_out():
    first = weight_norm(Residual().inner).item()
    with pytest.warns(UserWarning, match='leaves out stem'): learn = fit(NormalizeAndProject(), model=Residual())
    assert list(learn.normalize_and_project.pairs)==['inner'] and weight_norm(learn.model.inner).item()==pytest.approx(first, rel=1e-5)
    assert abs(weight_norm(learn.model.stem).item()/weight_norm(Residual().stem).item()-1)>1e-3

def test_a_chain_is_left_as_it_is(recwarn):
    assert set(fit(NormalizeAndProject()).normalize_and_project.pairs)=={'0','4'}
    assert not [w for w in recwarn if 'leaves out' in str(w.message)]

@pytest.mark.parametrize('make', [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_old_parametrizations_are_refused_too(make):
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)
        make(model[0])
    with pytest.raises(ValueError, match="'0' is parametrized"): fit(NormalizeAndProject(), model=model)

class Between(nn.Module):
    "Something works on the output of a layer ahead of its normalisation"
    def __init__(self, work):
        super().__init__()
        torch.manual_seed(0)
        self.first,self.bn1 = nn.Conv2d(1, 4, 3, padding=1),nn.BatchNorm2d(4)
        self.second,self.bn2 = nn.Conv2d(4, 4, 3, padding=1),nn.BatchNorm2d(4)
        self.head,self.work = nn.Linear(256, 10),work
    def forward(self, x):
        x = self.bn1(self.first(x)).relu()
        return self.head(self.bn2(self.work(self.second(x), x)).flatten(1))

@pytest.mark.parametrize('work', [lambda out, x: out.add_(x), lambda out, x: F.elu_(out), lambda out, x: out.mul_(2).sigmoid()])
def test_what_works_in_place_is_seen(work):
    cb = fit(NormalizeAndProject(), model=Between(work)).normalize_and_project
    assert list(cb.pairs)==['first']

@pytest.mark.parametrize('inplace', [True, False])
@pytest.mark.parametrize('rectifier', [nn.ReLU, nn.LeakyReLU])
def test_a_rectifier_lets_a_factor_through(rectifier, inplace):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), rectifier(inplace=inplace), nn.BatchNorm1d(16), nn.Linear(16, 10))
    learn = fit(NormalizeAndProject(), model=model)
    assert list(learn.normalize_and_project.pairs)==['1']
    x,model = torch.randn(5, 64),learn.model.eval()
    before = model(x)
    project_norm(model[1], model[3], 2*weight_norm(model[1]))
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)

class Siamese(nn.Module):
    "One layer runs twice, each time into the same normalisation"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(256, 10)
    def forward(self, x): return self.head((self.body(x)+self.body(x.flip(-1))).flatten(1))

def test_a_layer_that_runs_twice_into_one_normalisation_is_free(recwarn):
    assert list(fit(NormalizeAndProject(), model=Siamese()).normalize_and_project.pairs)==['body.0']
    assert not [w for w in recwarn if 'leaves out' in str(w.message)]

class Twice(nn.Module):
    "One layer runs twice; each of its outputs has a normalisation of its own, or only the first has one"
    def __init__(self, both):
        super().__init__()
        torch.manual_seed(0)
        self.stem,self.bn = nn.Conv2d(1, 4, 3, padding=1),nn.BatchNorm2d(4)
        self.conv,self.bn1,self.bn2 = nn.Conv2d(4, 4, 3, padding=1),nn.BatchNorm2d(4),nn.BatchNorm2d(4)
        self.head,self.both = nn.Linear(256, 10),both
    def forward(self, x):
        x = self.bn1(self.conv(self.bn(self.stem(x)).relu())).relu()
        x = self.conv(x)
        return self.head((self.bn2(x) if self.both else x).relu().flatten(1))

@pytest.mark.parametrize('both', [True, False])
def test_a_layer_that_runs_twice_is_left_out(both):
    with pytest.warns(UserWarning, match='leaves out conv'): cb = fit(NormalizeAndProject(), model=Twice(both)).normalize_and_project
    assert list(cb.pairs)==['stem']
