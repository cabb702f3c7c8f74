"Rank scores against the authors' recorded values, SciPy, loops and closed forms; gaps and ties"
import json, math
from itertools import product
from pathlib import Path

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st

from phantom_nb.measures.ranking import bootstrap_draws, bootstrap_interval, bootstrap_p, conditional_information
from phantom_nb.measures.ranking import granulated_draws, granulated_kendall, kendall, rank_measures, rank_scores

REF = json.loads((Path(__file__).parent/'reference/intraclass.json').read_text())['kendall']
RUNS = pd.DataFrame(REF['params']).assign(m=REF['measure'], acc=REF['test_accuracy'])
HYPER = list(REF['granulated'])

def test_parity_with_the_authors_code():
    got = granulated_kendall(RUNS, 'm', 'acc', HYPER)
    assert list(got.index)==[*HYPER,'mean']
    assert all(abs(got[k]-v)<1e-12 for k,v in REF['granulated'].items())
    assert got['mean']==pytest.approx(np.mean(list(REF['granulated'].values())))
    assert kendall(RUNS, 'm', 'acc')==pytest.approx(REF['plain'], abs=1e-12)

def loop(df, hyper):
    "The authors' algorithm in words: groups, all ordered pairs, signs, pairs tied in both skipped; those that differ in nothing, too"
    out = {}
    for h in hyper:
        coeffs = []
        for _,g in df.groupby([o for o in hyper if o!=h], dropna=False):
            pairs = [(a,b) for a,b in product(zip(g[h], g.m, g.acc), repeat=2) if a[0]!=b[0] and a[1:]!=b[1:]]
            if pairs: coeffs.append(np.mean([np.sign(a[1]-b[1])*np.sign(a[2]-b[2]) for a,b in pairs]))
        out[h] = np.mean(coeffs)
    return out

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.integers(2, 6))
def test_against_a_loop_with_ties(seed, levels):
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(list(product(range(3), 'ab', (.1,.2))), columns=['x','y','z'])
    df = df.sample(11, random_state=seed, replace=bool(seed%2)) # some settings more than once, as with seeds
    df = df.assign(m=rng.integers(levels, size=11), acc=rng.integers(levels, size=11))
    try: got = granulated_kendall(df, 'm', 'acc', ['x','y','z'])
    except ValueError: return # every pair that differs in one alone is tied in both
    assert all(abs(got[k]-v)<1e-12 for k,v in loop(df, ['x','y','z']).items())

def test_any_order_of_rows_and_any_index():
    df = RUNS.sample(frac=1, random_state=0).set_index(np.zeros(36))
    assert np.allclose(granulated_kendall(df, 'm', 'acc', HYPER), granulated_kendall(RUNS, 'm', 'acc', HYPER))
    assert conditional_information(df, 'm', 'acc', HYPER)==pytest.approx(conditional_information(RUNS, 'm', 'acc', HYPER))

def test_perfect_and_reversed():
    df = RUNS.assign(up=RUNS.acc**3, down=-RUNS.acc)
    assert (granulated_kendall(df, 'up', 'acc', HYPER)==1).all() and (granulated_kendall(df, 'down', 'acc', HYPER)==-1).all()
    assert conditional_information(df, 'down', 'acc', HYPER)==pytest.approx(1)
    assert kendall(df, 'up', 'acc')==pytest.approx(1)

def test_hyperparameters_of_any_kind():
    "Dicts (settings of a method), None, NaN and texts are values"
    df = pd.DataFrame(dict(s=[dict(lam=1), dict(lam=2)]*2, w=[None,None,'a','a'], m=[1,2,1,2], acc=[1,2,2,1]))
    got = granulated_kendall(df, 'm', 'acc', ['s','w'])
    assert got['s']==0 and got['w']==0
    df['w'] = [math.nan,math.nan,1.,1.]
    assert granulated_kendall(df, 'm', 'acc', ['s','w'])['s']==0

def test_seeds_are_kept_apart_by_by():
    df = pd.concat([RUNS.assign(seed=0), RUNS.assign(seed=1, acc=-RUNS.acc)])
    assert granulated_kendall(df, 'm', 'acc', HYPER, by='seed')['mean']==pytest.approx(0, abs=1e-12)
    one = df[df.seed==0]
    assert np.allclose(granulated_kendall(one, 'm', 'acc', HYPER, by=['seed']), granulated_kendall(RUNS, 'm', 'acc', HYPER))

def test_seeds_of_one_setting_are_no_pair():
    "The measure orders depths right and seeds wrong"
    df = pd.DataFrame(dict(d=[1,1,2,2], m=[1,2,3,4], acc=[2,1,4,3]))
    assert granulated_kendall(df, 'm', 'acc', 'd')['d']==1
    with pytest.raises(ValueError, match="no two runs differ in 'd' alone"): granulated_kendall(df.assign(w=df.d), 'm', 'acc', ['d','w'])

@pytest.mark.parametrize('by', [(), 'seed'], ids=['seeds together','seeds apart'])
def test_draws_are_coefficients_of_repeated_runs(by):
    "A resample is a count of each run, drawn by the seed; NaN stands where the coefficient is refused"
    rng,hyper = np.random.default_rng(0),['x','y']
    df = pd.DataFrame(list(product(range(3), 'ab', range(2))), columns=['x','y','seed'])
    df = df.assign(m=rng.integers(4, size=12), n=rng.random(12), acc=rng.integers(4, size=12), none=0)
    draws = granulated_draws(df, ['m','n'], 'acc', hyper, by, times=30, seed=5)
    counts = [np.ones(12, int), *np.random.default_rng(5).multinomial(12, np.full(12, 1/12), 30)]
    for row,count in zip(draws, counts, strict=True):
        for got,name in zip(row, ('m','n')):
            repeated = df.loc[df.index.repeat(count)]
            if np.isnan(got).any():
                with pytest.raises(ValueError, match='alone'): granulated_kendall(repeated, name, 'acc', hyper, by)
            else: assert got==pytest.approx(granulated_kendall(repeated, name, 'acc', hyper, by)[hyper].to_numpy(), abs=1e-12)
    assert np.isnan(draws).mean()<.5 and np.isnan(granulated_draws(df, ['m'], 'acc', ['x','none'], by, times=2)[...,1]).all()

def test_a_measure_that_only_knows_one_hyperparameter():
    df = pd.DataFrame(list(product(range(4), range(4))), columns=['d','l'])
    df = df.assign(acc=df.d+.3*df.l, m=df.d-.01*df.l)
    got = granulated_kendall(df, 'm', 'acc', ['d','l'])
    assert got['d']==1 and got['l']==-1
    assert conditional_information(df, 'm', 'acc', ['d','l'], size=0) > .2

def test_information_by_hand():
    "Four runs, no hyperparameter: signs agree in 4 of 6 pairs; 1-H(1/3) of one bit"
    df = pd.DataFrame(dict(m=[1,2,3,4], acc=[2,1,4,3], h=[0]*4))
    p = np.array([2/3,1/3])
    assert conditional_information(df, 'm', 'acc', ['h'], size=0)==pytest.approx(1+(p*np.log2(p)).sum())

def test_information_given_a_hyperparameter_that_explains_all():
    "Given d of both runs the measure, which is d and noise, has little to tell about the order within d"
    rng = np.random.default_rng(0)
    df = pd.DataFrame(list(product(range(3), range(12))), columns=['d','l'])
    df = df.assign(acc=df.d+.05*df.l, m=df.d+.01*rng.normal(size=36))
    free,given = (conditional_information(df, 'm', 'acc', 'd', size=o) for o in (0, 1))
    assert free>.3 and given<.1

def test_intervals():
    got = bootstrap_interval(RUNS, lambda d: rank_scores(d, 'm', 'acc', HYPER), times=60)
    assert ((got.low<=got.estimate)|(got.index=='information')).all() and (got.low<got.high).all()
    again = bootstrap_interval(RUNS, lambda d: rank_scores(d, 'm', 'acc', HYPER), times=60)
    assert got.equals(again)
    assert not got.equals(bootstrap_interval(RUNS, lambda d: rank_scores(d, 'm', 'acc', HYPER), times=60, seed=1))
    assert bootstrap_interval(RUNS, lambda d: kendall(d, 'm', 'acc'), times=60).shape==(1,3)

def test_p_values_count_resamples_beyond_a_bound():
    draws = pd.Series(range(1, 100)) # 99 values, 9 of them below 10
    assert bootstrap_p(draws)==pytest.approx(2*1/100) and bootstrap_p(draws, 9.5)==pytest.approx(2*10/100)
    assert bootstrap_p(pd.Series([0.]*9))==1. # on the bound is on both sides of it
    assert bootstrap_p(draws, 50)==1. and bootstrap_p(draws, 1000)==pytest.approx(2/100)

def test_a_measure_without_relation_is_rarely_called_one():
    "p-values at 0.05 over 40 data sets without any relation: two are expected, seven would happen once in two hundred times"
    hits = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        df = pd.DataFrame(dict(m=rng.normal(size=50), acc=rng.normal(size=50)))
        hits += bootstrap_p(bootstrap_draws(df, lambda d: kendall(d, 'm', 'acc'), times=150)[0])<=.05
    assert hits<7

def test_draws_are_those_of_the_interval():
    def score(d): return kendall(d, 'm', 'acc')
    draws,got = bootstrap_draws(RUNS, score, times=60, seed=3),bootstrap_interval(RUNS, score, times=60, seed=3)
    assert len(draws)==60 and got.low.iloc[0]==draws[0].quantile(.025)

def test_interval_covers_the_truth():
    "95% intervals of a rank correlation of normal variables, whose truth is 2/pi arcsin(r)"
    truth,hits = 2/math.pi*math.asin(.6),0
    for seed in range(40):
        z = np.random.default_rng(seed).normal(size=(60, 2))
        df = pd.DataFrame(dict(m=z[:,0], acc=.6*z[:,0]+.8*z[:,1]))
        r = bootstrap_interval(df, lambda d: kendall(d, 'm', 'acc'), times=120).iloc[0]
        hits += r.low<=truth<=r.high
    assert hits>=33

def test_several_measures_with_gaps_and_signs():
    df = RUNS.assign(minus=-RUNS.m, gap=RUNS.m.where(RUNS.depth<3))
    got = rank_measures(df, ['m','-minus','gap'], 'acc', HYPER, times=10)
    assert got.loc['m'].equals(got.loc['-minus']) and set(got.loc['gap'].runs)=={24}
    assert got.loc['m'].estimate.to_dict()==rank_scores(RUNS, 'm', 'acc', HYPER).to_dict()

BAD = RUNS.assign(m=RUNS.m.where(RUNS.depth<3))
@pytest.mark.parametrize('f,message', [
    (lambda: granulated_kendall(BAD, 'm', 'acc', HYPER), '12 of 36 runs'), (lambda: granulated_kendall(RUNS, 'c3', 'acc', HYPER), "no column 'c3'"),
    (lambda: granulated_kendall(RUNS, 'm', 'acc', [*HYPER,'width']), "no column 'width'"), (lambda: granulated_kendall(RUNS, 'm', 'acc', []), 'empty'),
    (lambda: granulated_draws(RUNS, ['m'], 'acc', ()), 'empty'),
    (lambda: granulated_kendall(RUNS[RUNS.wd==0], 'm', 'acc', HYPER), "differ in 'wd'"),
    (lambda: granulated_kendall(RUNS.iloc[[0,7]], 'm', 'acc', HYPER), 'no two runs differ'), (lambda: kendall(RUNS[:1], 'm', 'acc'), '1 runs'),
    (lambda: conditional_information(RUNS, 'm', 'acc', HYPER, size=-1), 'size=-1'), (lambda: bootstrap_interval(RUNS, len, level=2), 'level=2'),
    (lambda: bootstrap_interval(RUNS, len, times=0), 'times=0'), (lambda: rank_measures(RUNS, ['-x'], 'acc', HYPER), "no column 'x'")])
def test_refused_with_a_sentence(f, message):
    with pytest.raises(ValueError, match=message): f()

def test_resamples_without_a_score_are_no_evidence():
    draws = pd.Series([.3, .2, -.1, .4])
    assert bootstrap_p(pd.concat([draws, pd.Series([math.nan]*995)]))==bootstrap_p(draws)==2*2/5
    assert math.isnan(bootstrap_p(pd.Series([math.nan]*9)))
