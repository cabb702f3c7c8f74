"Numbers: scale, type, order, layout and degenerate rows of every function, against float64 and against itself"
import math

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from phantom_nb.floats import length, unit, wide
from phantom_nb.experiments.quantities import calibration_error
from phantom_nb.measures import clustering
from phantom_nb.measures.clustering import (cosine_distance_std, distance_spread_ratio, silhouette_cosine, subclass_selectivity,
    subclass_silhouette, variance_ratio)
from phantom_nb.measures.embeddings import (class_margins, class_means, directions, embedding_metrics, interclass_similarity,
    lookalike_margin, nearest_class_similarity, within_class_share)
from phantom_nb.measures.sharpness import norm_measures, sharpness
from phantom_nb.measures.sparsity import SparsityMeter, activation_sparsity, dead_units, filter_correlation, perplexity
from phantom_nb.regularizers.activations import mean_square
from phantom_nb.regularizers.energy import Form, hyperspherical_energy
from phantom_nb.regularizers.flatness import amp_displacement, sam_displacement
from phantom_nb.regularizers.norms import project_norm, weight_norm
from phantom_nb.regularizers.orthogonality import FORMS, orthogonality, squared_cosine
from phantom_nb.regularizers.phantoms import MODES, class_phantoms, phantom_loss
from phantom_nb.regularizers.projections import (SLOPES, adversarial_energy, angle_distortion, angle_preserving_energy, cosines,
    group_energy, projected_energy)
from phantom_nb.regularizers.semantic import isda_logits, merge_moments
from phantom_nb.regularizers.smoothness import gradient_penalty, spectral_norm

SEEDS = st.integers(0, 10**6)
few = settings(max_examples=25, deadline=None)

def randn(*shape, seed=0, **kwargs): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)
def classes(n, k=3): return torch.arange(n)%k
def head(z): return z@randn(z.shape[1], 5, seed=9).to(z)
P = randn(2, 3, 8, seed=1)
COV = randn(5, 8, 8, seed=2)
COV = COV@COV.mT

# What sees directions alone: function of (rows (N,8), classes)
FREE = {f'phantom {mode}':(lambda z, y, mode=mode: phantom_loss(z, y, mode)) for mode in ('contrast','margin','separate','pairs')}
FREE |= {'nearest phantoms':lambda z, y: phantom_loss(z, y, choose='nearest', k=2)}
FREE |= {f.__name__:f for f in (interclass_similarity, nearest_class_similarity, within_class_share, lookalike_margin)}
FREE |= {'class_margins':lambda z, y: class_margins(z, y).square().sum(), 'directions':lambda z, y: directions(z).pow(3).sum()}
FREE |= {f'sparsity of {over}':(lambda z, y, over=over: activation_sparsity(z, over)) for over in ('units','samples')}
FREE |= {'sparsity of maps':lambda z, y: activation_sparsity(z.unflatten(1, (2,4)), 'positions')}
FREE |= {'perplexity':lambda z, y: perplexity(z).sum(), 'correlation':lambda z, y: filter_correlation(z)}
FREE |= {f'orthogonality {form}':(lambda z, y, form=form: orthogonality(z, form, normalize=True)) for form in FORMS}
FREE |= {'squared cosine':lambda z, y: squared_cosine(z), 'energy':lambda z, y: hyperspherical_energy(z, half_space=True)}
FREE |= dict(projected=lambda z, y: projected_energy(z, P), distortion=lambda z, y: angle_distortion(z, P),
    angle=lambda z, y: angle_preserving_energy(z, P, .1), adversarial=lambda z, y: adversarial_energy(z, P, .1),
    group=lambda z, y: group_energy(z, 2))
PROJECTED = 'projected','angle','adversarial','group'
MEASURES = dict(silhouette=lambda z, y: silhouette_cosine(z, y).sum(), spread=lambda z, y: cosine_distance_std(z),
    dead=lambda z, y: dead_units(z))

def value_and_gradient(f, z, y):
    z = z.detach().clone().requires_grad_()
    value = f(z, y)
    gradient, = torch.autograd.grad(value, z)
    return value.item(),gradient.double()

@pytest.mark.parametrize('name', FREE)
@pytest.mark.parametrize('power', [-25, -18, -9, 9, 18, 25])
def test_directions_have_no_scale(name, power):
    "The value stays and the gradient goes with the inverse, in float32, from 1e-25 to 1e25"
    z,y = randn(12, 8),classes(12)
    factor = 2.**round(power*math.log2(10)) # exact: else each entry is rounded, which some forms make twenty times more of
    value,gradient = value_and_gradient(FREE[name], z, y)
    moved,its_gradient = value_and_gradient(FREE[name], z*factor, y)
    assert abs(moved-value)<=2e-5*max(1, abs(value))
    assert (its_gradient*factor-gradient).norm()<=1e-3*gradient.norm()

@pytest.mark.parametrize('name', MEASURES)
@pytest.mark.parametrize('power', [-25, -18, -9, 9, 18, 25])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_measures_of_directions_have_no_scale(name, power, dtype):
    z,y = randn(12, 8).to(dtype),classes(12)
    want = MEASURES[name](z, y)
    assert abs(MEASURES[name]((z.double()*2.**(power*3)).to(dtype), y)-want)<=1e-5*max(1, abs(want))

TYPES = {torch.float32:1e-4, torch.bfloat16:1e-4, torch.float16:1e-4}

def closeness(name, z):
    "Mean of distance^-4 of the projected directions: what the rounding of a cosine g is worth in 1/(2-2g)"
    if name=='group': return group_energy(z, 2, s=4.)
    def energy(p): return projected_energy(z, p, 'max', s=4.)
    if name=='projected': return energy(P)
    w,p = z[None,None],P.to(z)[None]
    slopes,sign = SLOPES[name]
    moved = (p+sign*.1*slopes([w], [p], Form(), [cosines(w)])[0])[0]
    if name=='angle': return max(energy(P), energy(moved))
    return energy(P)*energy(moved) # the error of the step comes with the rows before it

@few
@given(name=st.sampled_from(list(FREE)+list(MEASURES)), dtype=st.sampled_from(list(TYPES)), n=st.integers(7, 20), seed=SEEDS)
def test_types_against_float64(name, dtype, n, seed):
    "Halves are computed in float32, so the rounding of the input is all that is lost: the oracle sees the rounded rows"
    f,y = (FREE | MEASURES)[name],classes(n)
    z = randn(n, 8, seed=seed).to(dtype)
    value,exact = f(z, y).double(),f(z.double(), y)
    bound = TYPES[dtype]*max(1, abs(exact))
    if name in PROJECTED: bound = 4*torch.finfo(torch.float32).eps*max(1, closeness(name, z.double())) # of near rows, digits are lost
    assert value.isfinite() and abs(value-exact)<=bound

@pytest.mark.parametrize('near, told, most', [(.1, 0, .001), (.01, .045, .006), (.003, .31, .06)])
def test_weights_stored_in_bf16_lose_near_neurons_as_the_card_says(near, told, most):
    "Two of 32 neurons are near; the same weights in float32 lose far less"
    lost,kept = [],[]
    for seed in range(20):
        gen = torch.Generator().manual_seed(seed)
        w = torch.randn(32, 128, generator=gen)
        w[1] = w[0]+near*torch.randn(128, generator=gen)
        true = hyperspherical_energy(w.double())
        lost.append(abs(hyperspherical_energy(w.bfloat16())/true-1).item())
        kept.append(abs(hyperspherical_energy(w)/true-1).item())
    assert abs(sum(lost)/20-told)<.01 and max(kept)<most, (sum(lost)/20, max(kept))

@pytest.mark.parametrize('name', FREE)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_half_precision_are_those_of_float32(name, dtype):
    "Rounded once, when they come back: by a half unit in the last of eleven or eight binary places"
    z,y = randn(12, 8).to(dtype),classes(12)
    for a,b in zip(*(value_and_gradient(FREE[name], x, y)[1] for x in (z, z.float()))): assert (a-b).norm()<=2*torch.finfo(dtype).eps*b.norm()+1e-4

@few
@given(name=st.sampled_from(list(FREE)+list(MEASURES)), seed=SEEDS)
def test_order_and_layout_do_not_matter(name, seed):
    "Rows in another order, columns of a wider matrix, a transposed matrix"
    f,y,z = (FREE | MEASURES)[name],classes(12),randn(12, 8, seed=seed, dtype=torch.float64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    wide = torch.zeros(12, 16, dtype=torch.float64)
    wide[:,::2] = z
    want = f(z, y)
    for x in (wide[:,::2], z.T.contiguous().T): assert abs(f(x, y)-want)<=1e-9*max(1, abs(want))
    if 'spectral' not in name: assert abs(f(z[order], y[order])-want)<=1e-9*max(1, abs(want)) # it starts from random numbers, a row each

@pytest.mark.parametrize('name', FREE)
@pytest.mark.parametrize('how', ['same', 'opposite', 'zero', 'all zero', 'one column', 'tiny among large', 'subnormal'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_degenerate_rows_give_finite_values_and_gradients(name, how, dtype):
    z,y = randn(12, 8),classes(12)
    if how=='same': z[:] = z[0]
    if how=='opposite': z[1::2] = -z[::2]
    if how=='zero': z[::3] = 0
    if how=='all zero': z[:] = 0
    if how=='one column': z[:,1:] = 0
    if how=='tiny among large': z[3] *= 1e-7
    if how=='subnormal': z *= torch.finfo(dtype).tiny/8
    value,gradient = value_and_gradient(FREE[name], z.to(dtype), y)
    assert math.isfinite(value) and gradient.isfinite().all()

REFUSE_NAN = ('silhouette', 'spread')

@pytest.mark.parametrize('name', list(FREE)+list(MEASURES))
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_rows_that_are_no_numbers_are_refused_or_seen(name, bad):
    "No finite number comes of NaN; the measures of clusters say what is wrong"
    z,y,f = randn(12, 8),classes(12),(FREE | MEASURES)[name]
    z[4,2] = bad
    if name in REFUSE_NAN:
        with pytest.raises(ValueError, match='NaN or infinite'): f(z, y)
    elif name=='dead': assert 0<=f(z, y)<=1
    else: assert not f(z, y).isfinite()


# What has a scale keeps to it

@pytest.mark.parametrize('power', [-30, -22, -12, 0, 12, 25])
@pytest.mark.parametrize('adaptive', [False, True])
def test_displacements_have_their_length_whatever_the_gradient(power, adaptive):
    "A fitted network has gradients of 1e-22, whose squares float32 does not hold"
    weights,gradients = [randn(4, 5), randn(6)],[randn(4, 5, seed=1)*10.**power, randn(6, seed=2)*10.**power]
    moves = sam_displacement(weights, gradients, .05, adaptive)
    scales = [w.abs()+.01 if adaptive else torch.ones_like(w) for w in weights]
    assert torch.cat([(e/t).flatten() for e,t in zip(moves, scales)]).norm().item()==pytest.approx(.05, rel=1e-4)
    if not adaptive:
        moves = amp_displacement(gradients, lambda e: gradients, eps=.5, lr=.2, steps=2)
        assert torch.cat([e.flatten() for e in moves]).norm().item()==pytest.approx(.4, rel=1e-4)
    nothing = [0*g for g in gradients]
    assert all((e==0).all() for e in sam_displacement(weights, nothing, .05, adaptive))
    for eps in (0., .5): assert all((e==0).all() for e in amp_displacement(nothing, lambda e: nothing, eps, steps=2))

@pytest.mark.parametrize('power', [-25, -18, 0, 18, 25])
@pytest.mark.parametrize('layer', [nn.Linear(6, 4), nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(2, 3, 3)], ids=['linear','conv','transposed'])
def test_norms_go_with_the_weight(power, layer):
    with torch.no_grad(): layer.weight.copy_(randn(*layer.weight.shape))
    length,stretch = weight_norm(layer).item(),spectral_norm(layer, (5,5)).item()
    with torch.no_grad(): layer.weight.mul_(10.**power)
    assert weight_norm(layer).item()==pytest.approx(length*10.**power, rel=1e-5)
    assert spectral_norm(layer, (5,5)).item()==pytest.approx(stretch*10.**power, rel=1e-4)
    bn = nn.BatchNorm2d(4)
    project_norm(layer, bn, length)
    assert weight_norm(layer).item()==pytest.approx(length, rel=1e-5) and bn.running_mean.isfinite().all()

@pytest.mark.parametrize('value', [0., math.nan, math.inf])
def test_weights_without_a_length_stay(value):
    layer,bn = nn.Conv2d(2, 3, 3),nn.BatchNorm2d(3)
    nn.init.constant_(layer.weight, value)
    before = layer.weight.detach().clone()
    project_norm(layer, bn, 1.)
    assert torch.equal(layer.weight.nan_to_num(7., 8., 9.), before.nan_to_num(7., 8., 9.)) and torch.equal(bn.running_var, torch.ones(3))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('f', [mean_square, orthogonality, lambda z: orthogonality(z, 'double'), lambda z: orthogonality(z, 'coherence')],
    ids=['mean_square','soft','double','coherence'])
def test_halves_are_squared_in_float32(f, dtype):
    "300 squared is more than float16 holds"
    z = (100*randn(30, 8)).to(dtype)
    assert f(z).dtype==torch.float32 and abs(f(z)/f(z.double())-1)<1e-5
    with torch.autocast('cpu', dtype=torch.bfloat16): assert abs(f(z.float())/f(z.double())-1)<1e-5

def test_mean_square_is_the_mean_of_squares():
    z = randn(5, 3)
    assert mean_square(z).item()==pytest.approx(sum(v*v for row in z.tolist() for v in row)/15, rel=1e-6)

@few
@given(d=st.integers(1, 6), c=st.integers(2, 6), n=st.integers(1, 9), diagonal=st.booleans(), shift=st.floats(0, 100), seed=SEEDS)
def test_moved_logits_against_float64(d, c, n, diagonal, shift, seed):
    """Off by at most 4(d+4) units of the last place of the terms: a cancellation of weights far from zero costs the diagonal form as many
    digits as their squares have more than their differences'"""
    z,weight,y = randn(30, d, seed=seed),randn(c, d, seed=seed+1)+shift,torch.randint(c, (n,), generator=torch.Generator().manual_seed(seed))
    _,_,cov = merge_moments(None, z, classes(30, c), c, diagonal)
    logits = randn(n, c, seed=seed+2)
    found = isda_logits(logits, y, weight, cov, .5)
    full = torch.diag_embed(cov) if diagonal else cov
    difference = weight.double()-weight.double()[y][:,None]
    exact = logits.double()+.25*(difference@full.double()[y]*difference).sum(-1)
    size = difference.square().sum(-1).amax()*full.abs().amax()*d
    bound = 4*(d+4)*torch.finfo(torch.float32).eps*(size+logits.abs().amax()).item()
    assert (found-exact).abs().max()<=bound


# Labels

z4,HIGH = randn(4, 8),torch.tensor([0, 1, 7, 1])
TOO_HIGH = dict(means=lambda: class_means(z4, HIGH, 3), margins=lambda: class_margins(z4, HIGH, 3),
    metrics=lambda: embedding_metrics(z4, randn(4, 3), HIGH), calibration=lambda: calibration_error(randn(4, 3), HIGH),
    phantoms=lambda: class_phantoms(z4, HIGH, 3), moments=lambda: merge_moments(None, z4, HIGH, 3),
    logits=lambda: isda_logits(randn(4, 5), HIGH, randn(5, 8), COV), sharpness=lambda: sharpness(nn.Linear(8, 3), [(z4, HIGH)]),
    norm_measures=lambda: norm_measures(nn.Linear(8, 3), [(z4, HIGH)]))
TOO_HIGH |= {mode:(lambda mode=mode: phantom_loss(z4, HIGH, mode, head, n_classes=3)) for mode in MODES}

@pytest.mark.parametrize('name', TOO_HIGH)
def test_classes_that_there_are_none_of_are_refused_by_name(name):
    with pytest.raises(ValueError, match='class 7.*0 to [24]'): TOO_HIGH[name]()

NEGATIVE = torch.tensor([0, 1, -100, 1])
@pytest.mark.parametrize('f', [within_class_share, lambda z, y: embedding_metrics(z, randn(4, 3), y), lambda z, y: calibration_error(randn(4, 3), y),
    lambda z, y: sharpness(nn.Linear(8, 3), [(z, y)]), lambda z, y: norm_measures(nn.Linear(8, 3), [(z, y)])],
    ids=['within','metrics','calibration','sharpness','norm_measures'])
def test_labels_of_no_class_are_refused_where_every_sample_counts(f):
    with pytest.raises(ValueError, match='class -100'): f(z4, NEGATIVE)

@pytest.mark.parametrize('f', [interclass_similarity, lookalike_margin, lambda z, y: class_margins(z, y, 3).sum(),
    lambda z, y: class_means(z, y, 3)[0].sum(), lambda z, y: merge_moments(None, z, y, 3)[2].sum(), lambda z, y: merge_moments(None, z, y, 3, True)[2].sum(),
    *[lambda z, y, mode=mode: phantom_loss(z, y, mode, head, n_classes=5) for mode in MODES]])
def test_labels_of_no_class_are_left_out_where_it_says_so(f):
    z,y = randn(9, 8),classes(9)
    ignored = torch.cat([y, torch.tensor([-100, -1])])
    torch.testing.assert_close(f(torch.cat([z, randn(2, 8, seed=5)]), ignored), f(z, y))

def test_logits_of_no_class_stay():
    y = torch.tensor([0, -100, 4, -1])
    for logits,weight,cov in ((randn(4, 5), randn(5, 8), COV), (randn(4, 3), randn(3, 8), COV[:3]), (randn(4, 5), randn(5, 8), COV.diagonal(dim1=1, dim2=2))):
        own = y.clamp_max(len(weight)-1)
        moved = isda_logits(logits, own, weight, cov)
        assert torch.equal(moved[y<0], logits[y<0])
        torch.testing.assert_close(moved[y>=0], isda_logits(logits[y>=0], own[y>=0], weight, cov))


# Few samples, one dimension, none

@pytest.mark.parametrize('n', [1, 2, 5])
@pytest.mark.parametrize('d', [1, 3])
@pytest.mark.parametrize('k', [1, 2, 5], ids=lambda k: f'{k} classes')
def test_small_batches(n, d, k):
    z,y = randn(n, d),classes(n, k)
    for mode in MODES:
        value,gradient = value_and_gradient(lambda z, y: phantom_loss(z, y, mode, head, n_classes=5)+0*z.sum(), z, y)
        assert math.isfinite(value) and gradient.isfinite().all()
    for f in (interclass_similarity, nearest_class_similarity, within_class_share, lookalike_margin): assert f(z, y).isfinite()
    for over in ('units', 'samples'): assert 0<=activation_sparsity(z, over)<=1
    assert 0<=filter_correlation(z)<=1 and cosine_distance_std(z)>=0 and variance_ratio([z.abs()], y)>=0
    for form in FORMS: assert orthogonality(z, form).isfinite()

@pytest.mark.parametrize('z,y', [(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)), (torch.zeros(4, 0), torch.arange(4))], ids=['n=0', 'd=0'])
def test_nothing_at_all(z, y):
    "The penalty and the similarities of nothing are 0, the measures of activations refuse it by its shape"
    for mode in MODES: assert phantom_loss(z, y, mode, lambda z: z.new_zeros(len(z), 5), n_classes=5)==0
    for f in (interclass_similarity, nearest_class_similarity, within_class_share, lookalike_margin): assert f(z, y)==0
    shape = rf"\({z.shape[0]}, {z.shape[1]}\)"
    for f in (activation_sparsity, filter_correlation, dead_units, SparsityMeter().add, cosine_distance_std, hyperspherical_energy, orthogonality,
        squared_cosine, lambda z: silhouette_cosine(z, y), lambda z: variance_ratio([z], y), lambda z: distance_spread_ratio([z], y)):
        with pytest.raises(ValueError, match=shape): f(z)

@pytest.mark.parametrize('f', [sharpness, norm_measures])
def test_no_batches(f):
    for batches in ([], [(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long))]):
        with pytest.raises(ValueError, match='no samples'): f(nn.Linear(8, 3), batches)

def test_classes_that_are_absent():
    "Names of classes may have gaps, and classes of the network may not be in a batch"
    z,y = randn(24, 8),classes(24, 4)
    gaps = torch.tensor([3, 70, 11, 500])[y]
    for f in (interclass_similarity, nearest_class_similarity, within_class_share, lookalike_margin, phantom_loss):
        torch.testing.assert_close(f(z, y), f(z, gaps))
    assert silhouette_cosine(z, y).equal(silhouette_cosine(z, gaps))
    for f in (variance_ratio, distance_spread_ratio): assert f([z], y)==pytest.approx(f([z], gaps), rel=1e-12)
    for f in (subclass_selectivity, subclass_silhouette): assert f([z], y%2, y)==pytest.approx(f([z], y%2, gaps-600), rel=1e-6)
    assert class_margins(z, y, 9)[4:].abs().sum()==0 and class_means(z, y, 9)[1].tolist()==[True]*4+[False]*5

def test_maps_in_any_layout():
    "channels_last, and a slice of a larger tensor"
    a = randn(6, 5, 4, 3).relu()
    larger = torch.zeros(6, 10, 4, 3)
    larger[:,::2] = a
    for other in (a.to(memory_format=torch.channels_last), larger[:,::2]):
        assert not other.is_contiguous()
        for over in ('units','samples','positions'): torch.testing.assert_close(activation_sparsity(other, over), activation_sparsity(a, over))
        torch.testing.assert_close(filter_correlation(other), filter_correlation(a))
        assert SparsityMeter().add(other) is None and dead_units(other)==dead_units(a)

def test_calibration_against_a_loop():
    logits,y = 3*randn(200, 4),torch.randint(4, (200,), generator=torch.Generator().manual_seed(1))
    sure,guess = logits.double().softmax(1).max(1)
    total = 0.
    for b in range(10):
        own = (sure*10).floor().clamp_max(9)==b
        if own.any(): total += own.sum()/200*abs((guess==y)[own].double().mean()-sure[own].mean())
    assert abs(calibration_error(logits, y, 10)-total)<1e-6 and calibration_error(torch.zeros(8, 2), torch.arange(8)%2)<1e-6
    assert calibration_error(torch.eye(4).mul(60), torch.arange(4))<1e-6 and abs(calibration_error(torch.eye(4).mul(60), (torch.arange(4)+1)%4)-1)<1e-6

@pytest.mark.parametrize('scale', [1e-18, 1., 1e15])
def test_gradients_at_the_input_go_with_the_square(scale):
    x,w = randn(6, 8),randn(8, seed=1)*scale
    x.requires_grad_()
    assert gradient_penalty((x@w).sum(), x).item()==pytest.approx(w.double().square().sum().item(), rel=1e-4)

def test_measures_multiply_in_full_float32(monkeypatch):
    "Whatever precision training allows; the setting is put back"
    seen,rows,backend = [],clustering._Rows.mean_direction,torch.backends.mkldnn.matmul
    def watched(self, *args, **kwargs):
        seen.append(backend.fp32_precision)
        return rows(self, *args, **kwargs)
    monkeypatch.setattr(clustering._Rows, 'mean_direction', watched)
    allowed = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        silhouette_cosine(randn(9, 4), classes(9)), cosine_distance_std(randn(9, 4))
        assert seen==['ieee','ieee'] and torch.get_float32_matmul_precision()=='medium'
    finally: torch.set_float32_matmul_precision(allowed)

def test_directions_have_length_one():
    "Also one a hundred-millionth as long in float64; a zero vector stays zero, without gradient"
    x = torch.tensor([[1.,0.],[3e-8,4e-8],[0.,0.]], dtype=torch.float64, requires_grad=True)
    out = unit(x)
    assert torch.allclose(out, torch.tensor([[1.,0.],[.6,.8],[0.,0.]], dtype=torch.float64), atol=1e-7)
    out.sum().backward()
    assert x.grad[1].abs().max()>1 and not x.grad[2].any()
    assert torch.equal(unit(torch.tensor([[1.,0.]])), torch.tensor([[1.,0.]]))

def test_a_gradient_in_float16_stops_at_its_largest_number():
    x = torch.ones(2, dtype=torch.float16, requires_grad=True)
    (wide(x)*torch.tensor([1e6,-1e6])).sum().backward()
    assert x.grad.tolist()==[65504.,-65504.]

@pytest.mark.parametrize('dtype,out', [(torch.float16,torch.float32), (torch.float32,torch.float32), (torch.float64,torch.float64)])
def test_a_length_has_no_gradient(dtype, out):
    found = length(torch.tensor([3.,4.], dtype=dtype, requires_grad=True))
    assert found==5 and found.dtype==out and not found.requires_grad
