"Silhouettes and spreads against scikit-learn, c0 to c4 against the authors' recorded values, and what they do at the edges"
import json, math, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import silhouette_samples
from sklearn.metrics.pairwise import cosine_distances

from phantom_nb.measures import clustering
from phantom_nb.measures.clustering import layer_spread_ratio
from phantom_nb.measures.intraclass import class_table, cosine_distance_std, distance_spread_ratio, interpolation_drop
from phantom_nb.measures.intraclass import intraclass_table, layer_silhouette, silhouette_cosine, subclass_selectivity
from phantom_nb.measures.intraclass import subclass_silhouette, unit_selectivity, unit_variance_ratio, variance_ratio

REF = Path(__file__).parent/'reference'
Z,REFERENCE = np.load(REF/'intraclass.npz'),json.loads((REF/'intraclass.json').read_text())
ACTS,SUP,SUB = [Z[f'A_act{i}'] for i in range(3)],Z['A_superclass'],Z['A_subclass']
WANT = REFERENCE['A']['values']
MEASURES = [('c1_k1', lambda a: subclass_selectivity(a, SUP, SUB)), ('c2_k1', lambda a: subclass_silhouette(a, SUP, SUB))]
MEASURES += [(f'c3_k{k}', lambda a, k=k: variance_ratio(a, SUP, k)) for k in (1,5,30)]
MEASURES += [(f'c4_k{k}', lambda a, k=k: distance_spread_ratio(a, SUP, k)) for k in (1,2)]
both_floats = pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)

def gen(seed): return torch.Generator().manual_seed(seed)
def close(a, b, tol): return np.abs(np.asarray(a)-np.asarray(b)).max() < tol


# Parity with the authors' code

@pytest.mark.parametrize('name,f', MEASURES, ids=[o[0] for o in MEASURES])
def test_parity(name, f):
    assert abs(f(ACTS)/WANT[name]-1) < 1e-5
    assert isinstance(f(ACTS), float)

@pytest.mark.parametrize('i', range(3))
def test_parity_of_each_layer(i):
    a = [ACTS[i]]
    got = subclass_selectivity(a, SUP, SUB),subclass_silhouette(a, SUP, SUB),distance_spread_ratio(a, SUP)
    assert close(got, [WANT[f'c{o}_layerwise'][i] for o in ('1_k1','2','4')], 1e-5)

def test_c0_lies_in_the_spread_of_the_authors_draws():
    def predict(x): return ((x@torch.tensor(Z['A_c0_W'])).relu()@torch.tensor(Z['A_c0_V'])).softmax(1)
    draws = [interpolation_drop(predict, Z['A_c0_x'], SUP, SUB, generator=gen(i)) for i in range(20)]
    assert abs(np.mean(draws)-WANT['c0_mean_of_20_draws']) < 4*WANT['c0_std_of_draws']*math.sqrt(2/20)
    assert draws[0]==interpolation_drop(predict, Z['A_c0_x'], SUP, SUB, generator=gen(0))
    assert draws[0]!=draws[1]

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('name,f', MEASURES, ids=[o[0] for o in MEASURES])
def test_other_float_types(name, f, dtype):
    assert abs(f([torch.tensor(a).to(dtype) for a in ACTS])/WANT[name]-1) < (2e-2 if dtype==torch.bfloat16 else 3e-3)

def test_names_of_classes_and_order_of_samples_do_not_matter():
    i = torch.randperm(900, generator=gen(0)).numpy()
    acts,sup,sub = [a[i] for a in ACTS],torch.tensor(7-3*SUP[i].astype(int)),(10*SUB[i].astype(int)-50).tolist()
    assert abs(subclass_selectivity(acts, sup, sub)/WANT['c1_k1']-1) < 1e-5
    assert abs(subclass_silhouette(acts, sup, sub)/WANT['c2_k1']-1) < 1e-5
    assert abs(variance_ratio(acts, sup)/WANT['c3_k30']-1) < 1e-5
    assert abs(distance_spread_ratio(acts, sup)/WANT['c4_k1']-1) < 1e-5


# Silhouettes and spreads against scikit-learn

def cloud(n, d, k, seed, shift, zeros, dtype=torch.float64):
    x = torch.randn(n, d, generator=gen(seed), dtype=dtype)+shift
    x[:zeros] = 0
    return x,5-2*(torch.arange(n)%k)[torch.randperm(n, generator=gen(seed+1))]

@settings(max_examples=60, deadline=None)
@given(n=st.integers(7, 60), d=st.integers(2, 40), k=st.integers(2, 4), seed=st.integers(0, 10**6), shift=st.sampled_from([0.,1.,30.]),
    zeros=st.integers(0, 4))
def test_against_scikit_learn(n, d, k, seed, shift, zeros):
    x,y = cloud(n, d, k, seed, shift, zeros)
    y[0] = 99 # a cluster of one
    assert close(silhouette_cosine(x, y), silhouette_samples(x, y, metric='cosine'), 1e-7)
    assert abs(cosine_distance_std(x)-cosine_distances(x).std()) < 1e-9
    assert close(silhouette_cosine(x.float(), y), silhouette_samples(x.float().double(), y, metric='cosine'), 1e-3 if shift>9 else 1e-5) # angles of .001 have four digits

def test_many_blocks_give_what_one_gives(monkeypatch):
    x,y = cloud(300, 200, 5, 0, .5, 3)
    def values(): return [silhouette_cosine(x, y),cosine_distance_std(x),*clustering.layer_values(x, y//8, y).values(),
        silhouette_cosine(x[:,:3], torch.arange(300)%40), layer_spread_ratio(x[:150], y[:150])]
    whole = values()
    monkeypatch.setattr(clustering, '_BLOCK', 1400)
    parts = values()
    assert all(torch.allclose(a, b, rtol=1e-10) for a,b in zip(whole, parts))

@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('p', [0, 31, 75, 100])
def test_thresholds_of_many_samples_are_those_of_few(monkeypatch, dtype, p):
    "Numbers of every size and sign, equal ones, zeros of both signs, a constant unit, rows with steps between them"
    x = torch.randn(999, 6, generator=gen(0))*10**torch.linspace(-4, 4, 6)
    x[:,1],x[:,2],x[:400,3],x[300:900,3] = -7.,x[:,2].round(),0.,-0.
    x = x.to(dtype)
    few = clustering._percentile(x, p)
    monkeypatch.setattr(clustering, '_BLOCK', 100)
    for many in (x, x.T.contiguous().T, x.repeat(1, 2)[:,:6]): assert torch.equal(clustering._percentile(many, p), few)
    assert close(few, np.percentile(x.to(few.dtype), p, axis=0), 1e-9 if dtype==torch.float64 else 1e-2)

@pytest.mark.parametrize('n,d', [(400,200), (200,400), (50,161), (1000,321)])
def test_spread_of_more_samples_or_more_units(n, d):
    x,_ = cloud(n, d, 2, 0, .3, 5)
    assert abs(cosine_distance_std(x)-cosine_distances(x).std()) < 1e-10

@both_floats
@pytest.mark.parametrize('scale', [1e-25, 1e-12, 1e18], ids=str)
def test_directions_do_not_depend_on_scale(scale, dtype):
    x,y = cloud(40, 6, 3, 0, 0., 2, dtype)
    assert close(silhouette_cosine(scale*x, y), silhouette_cosine(x, y), 1e-5)
    assert abs(cosine_distance_std(scale*x)-cosine_distance_std(x)) < 1e-5

@both_floats
def test_equal_rows_score_zero(dtype):
    x = torch.rand(9, 1, generator=gen(0), dtype=dtype)*torch.randn(5, generator=gen(1), dtype=dtype)
    assert silhouette_cosine(x, torch.arange(9)%3).abs().max()==0
    assert cosine_distance_std(x) < 1e-6

def test_two_points_far_apart_score_one():
    x = torch.eye(2).repeat(5, 1)
    assert torch.equal(silhouette_cosine(x, torch.arange(10)%2), torch.ones(10))

def test_near_directions_keep_their_digits():
    "Cosines are all above 0.9999; 1-cosine in 32 bits would keep three digits of the distance"
    x,y = cloud(200, 30, 4, 0, 100., 0, torch.float32)
    assert close(silhouette_cosine(x, y), silhouette_samples(x.double(), y, metric='cosine'), 2e-3)
    assert abs(cosine_distance_std(x)/cosine_distances(x.double()).std()-1) < 1e-3

def test_inputs_are_not_touched_and_nothing_is_differentiated():
    x,y = cloud(50, 8, 3, 0, 0., 1, torch.float32)
    before = x.clone()
    x.requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16): s,d = silhouette_cosine(x, y),cosine_distance_std(x)
    assert torch.equal(x, before) and not s.requires_grad and not d.requires_grad and s.dtype==torch.float32
    assert torch.equal(s, silhouette_cosine(before, y)) and torch.equal(d, cosine_distance_std(before))

@pytest.mark.processes
def test_memory_of_a_large_layer():
    "50,000 samples of 3,000 units, 600 MB: half of a gigabyte on top is more than enough, and a copy would pass it"
    code = ("import torch, resource; from phantom_nb.measures.intraclass import *; x = torch.empty(50000, 3000).uniform_(-1, 1); "
        "y = torch.arange(50000)%10; a = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3; "
        "silhouette_cosine(x[:200], y[:200]); b = a(); silhouette_cosine(x, y); variance_ratio([x], y); print(a()-b)")
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    assert float(out.stdout.split()[-1]) < 500

@pytest.mark.parametrize('n', [1000, 1333], ids=['fewer samples than units', 'more'])
def test_spread_needs_no_matrix_of_samples(n):
    x = torch.randn(n, 1100, generator=gen(0))
    with torch.profiler.profile(record_shapes=True) as prof: cosine_distance_std(x)
    assert not [s for e in prof.events() for s in e.input_shapes if len(s)==2 and min(s)>1100]


# Edges of c1 to c4

def hierarchy(n=240): return torch.arange(n)%2,torch.arange(n)%6

def test_single_unit_and_class_values():
    a = torch.zeros(240, 3)
    sup,sub = hierarchy()
    a[:,0] = 1.+(sub==2)
    a[:,1] = -1.-torch.rand(240, generator=gen(0))
    a[:,2] = torch.randn(240, generator=gen(0))
    u = unit_selectivity(a, sup, sub)
    assert u.shape==(6,3) and u[2,0]>1e5 and (u[:,1]==0).all()
    v = unit_variance_ratio(a, sup)
    assert v.shape==(2,3) and v[1,0]==0 and v[0,0]>1 and (v[:,1]==0).all()
    loop = torch.stack([a[sup==c].std(0, correction=0)/(a.std(0, correction=0)+1e-7) for c in (0,1)])*torch.tensor([1,0,1])
    assert torch.allclose(v.float(), loop, atol=1e-5)
    assert u[2,0].item()==pytest.approx(1e7), "1 above the others, and no deviation on either side: the authors' 1e-7 alone"
    faint = 1e-6*a[:,2:].double()
    ratio = faint[sup==0].std(0, correction=0)/(faint.std(0, correction=0)+1e-7)
    assert unit_variance_ratio(faint, sup)[0].item()==pytest.approx(ratio.item(), rel=1e-9)

def test_constant_units_do_not_vary_even_far_from_zero():
    a = torch.full((240, 2), 1e4/3)
    sup,sub = hierarchy()
    assert variance_ratio([a], sup)==0 and subclass_selectivity([a], sup, sub)==0
    assert torch.isfinite(unit_selectivity(a, sup, sub)).all()
    assert distance_spread_ratio([a, torch.randn(240, 30, generator=gen(0))], sup)>0

def test_dead_layers_are_left_out_of_c4_and_a_dead_network_is_refused():
    live,dead = torch.randn(240, 30, generator=gen(0)),-1-torch.rand(240, 5)
    sup,sub = hierarchy()
    assert distance_spread_ratio([live, dead], sup)==distance_spread_ratio([live], sup)
    assert distance_spread_ratio([torch.cat([live,dead], 1)], sup)==pytest.approx(distance_spread_ratio([live], sup), rel=1e-6)
    with pytest.raises(ValueError, match='never above zero|ever above zero'): distance_spread_ratio([dead], sup)
    t = intraclass_table(dict(a=live, b=dead), sup, sub)
    assert t.loc['network'].notna().all() and t.loc['a'].notna().all()

def test_a_subclass_alone_is_left_out():
    sup,sub = hierarchy()
    sub = torch.where(sup==1, 1, sub) # superclass 1 has one subclass
    a = torch.randn(240, 9, generator=gen(0))
    one = sup==0
    assert unit_selectivity(a, sup, sub)[1].isnan().all() and layer_silhouette(a, sup, sub)[1].isnan()
    assert subclass_silhouette([a], sup, sub)==pytest.approx(subclass_silhouette([torch.cat([a[one],a[:1]])], 
        torch.cat([sup[one],torch.tensor([1])]), torch.cat([sub[one],torch.tensor([1])])), rel=1e-6)

def test_silhouettes_within_superclasses_against_scikit_learn():
    a = torch.randn(240, 9, generator=gen(0)).double()
    sup,sub = hierarchy()
    got = layer_silhouette(a, sup, sub)
    own = sup==1
    s = silhouette_samples(a[own].relu(), sub[own], metric='cosine')
    assert close(got[[1,3,5]], [s[sub[own]==o].mean() for o in (1,3,5)], 1e-9)

@pytest.mark.parametrize('units,size', [(3, 1), (11, 1), (39, 1e-7), (41, 1), (200, 1)])
def test_c4_threshold_by_width(units, size):
    "The definition, step by step in numpy, for layers on both sides of 40 units"
    a = np.random.default_rng(0).normal(size=(101, units))*np.arange(1, units+1)*size
    y = np.arange(101)%4
    z = (a-a.mean(0))/(a.std(0)+1e-7)
    z = np.maximum(z-np.percentile(z, max(min(round(100-1000/units), 75), 0), axis=0), 0)
    want = np.mean([cosine_distances(z[y==c]).std()/(cosine_distances(z).std()+1e-7) for c in range(4)])
    assert distance_spread_ratio([a], y)==pytest.approx(want, rel=1e-7)

def test_tables_agree_with_the_measures():
    t = intraclass_table(dict(zip('abc', ACTS)), SUP, SUB)
    assert list(t.index)==['a','b','c','network']
    for c,k in dict(c1='c1_k1', c2='c2_k1', c3='c3_k30', c4='c4_k1').items(): assert abs(t.loc['network',c]/WANT[k]-1) < 1e-5
    assert close(t.c2[:3], WANT['c2_layerwise'], 1e-5)
    assert intraclass_table(ACTS, SUP, c3=5).loc['network','c3']==pytest.approx(WANT['c3_k5'], rel=1e-5)
    assert list(intraclass_table(ACTS, SUP).columns)==['c3','c4']
    by_class = class_table(dict(zip('abc', ACTS)), SUP)
    assert close(by_class.c4.mean(), t.c4[:3], 1e-6) and close(by_class.c3.mean(), t.c3[:3], 1e-6)


# c0

def test_partners_of_c0_lie_in_the_same_superclass():
    "Inputs carry their subclass; a way between superclasses would be seen by the classifier"
    sup,sub = hierarchy(60)
    x,seen = torch.nn.functional.one_hot(sub, 6).float(),[]
    def predict(b):
        seen.append(b)
        p = (b@torch.nn.functional.one_hot(torch.arange(6)%2, 2).float())
        return p/p.sum(1, keepdim=True)
    assert interpolation_drop(predict, x, sup, sub, generator=gen(0))==pytest.approx(1, abs=.5)
    mixed = torch.cat(seen)
    assert ((mixed[:,::2].sum(1)>0)!=(mixed[:,1::2].sum(1)>0)).all()

def test_c0_takes_superclasses_that_are_true_or_false():
    x,sub = torch.randn(40, 6),torch.arange(40)%4
    w = torch.randn(6, 2)
    def predict(x): return (x@w).softmax(1)
    found = [interpolation_drop(predict, x, sup, sub, torch.Generator().manual_seed(0)) for sup in (sub%2==1, sub%2)]
    assert found[0]==found[1] and np.isfinite(found[0])

def test_c0_of_a_known_classifier():
    "The probability is 1-0.4 half-way between subclasses, 0.9 elsewhere: 0.4/0.1"
    sup,sub = torch.zeros(40, dtype=torch.long),torch.arange(40)%2
    x = sub[:,None].float()
    def predict(b):
        p = torch.where((b[:,0]-.5).abs()<.01, .6, .9)
        return torch.stack([p,1-p], 1)
    assert interpolation_drop(predict, x, sup, sub)==pytest.approx(4, rel=1e-4)

def test_c0_where_the_rest_is_smaller_than_the_subclass():
    sup,sub = torch.zeros(40, dtype=torch.long),(torch.arange(40)<3).long()
    assert interpolation_drop(lambda b: torch.full((len(b),2), .5), torch.randn(40, 2, 3), sup, sub, bs=7)==pytest.approx(1)


# What is refused

X,Y = torch.randn(12, 4, generator=gen(0)),torch.arange(12)%3
@pytest.mark.parametrize('f,message', [
    (lambda: silhouette_cosine(X, Y[:5]), 'labels of shape'), (lambda: silhouette_cosine(X, Y*0), '1 clusters of 12'),
    (lambda: silhouette_cosine(X, torch.arange(12)), '12 clusters of 12'), (lambda: silhouette_cosine(X, Y.float()), 'whole numbers'),
    (lambda: silhouette_cosine(X[:,0], Y), r'shape \(12,\)'), (lambda: silhouette_cosine(X/0, Y), 'NaN or infinite'),
    (lambda: cosine_distance_std(X*math.nan), 'NaN or infinite'), (lambda: variance_ratio([X*math.inf], Y), 'NaN or infinite'),
    (lambda: variance_ratio([X.where(X<X.max(), math.nan)], Y), 'NaN or infinite'),
    (lambda: variance_ratio([X], Y, k=0), 'k=0'), (lambda: variance_ratio([], Y), 'at least one layer'),
    (lambda: variance_ratio([X,X[:5]], Y), r'\[12, 5\] samples'), (lambda: distance_spread_ratio([X], Y, k=1.5), 'k=1.5'),
    (lambda: subclass_selectivity([X], Y, Y), 'has two subclasses'), (lambda: subclass_silhouette([X], Y, Y//2), 'subclass 0 lies in more than one superclass'),
    (lambda: intraclass_table([X], Y, c5=1), 'c5'),
    (lambda: class_table([X], Y, k=0), 'k=0'), (lambda: interpolation_drop(lambda b: b.softmax(1), X, Y//2, Y, bs=0), 'bs=0'),
    (lambda: interpolation_drop(lambda b: b, X, Y//2, Y), 'softmax'),
    (lambda: interpolation_drop(lambda b: b.softmax(1)[:,:2], X, Y*0, Y), 'softmax'),
    (lambda: interpolation_drop(lambda b: b.softmax(1), X, Y*0+7, Y), 'column numbers')])
def test_refused_with_a_sentence(f, message):
    with pytest.raises(ValueError, match=message): f()

def test_layers_keep_their_order_in_the_table_by_class():
    acts = {name:torch.randn(20, 6) for name in ('late','early','middle')}
    table = class_table(acts, torch.arange(20)%2)
    assert [name for _,name in table.c3.columns.to_frame().itertuples()]==list(acts)==list(table.c4)

def test_a_cluster_of_one_has_no_silhouette():
    x = torch.tensor([[1.,0.],[.9,.1],[0.,1.]])
    assert silhouette_cosine(x, torch.tensor([0,0,1]))[2]==0
