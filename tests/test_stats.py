"Intervals, corrections and answers: against SciPy, by brute force, and by simulation"
import gc
from itertools import combinations

import numpy as np, pandas as pd, pytest
from scipy import stats

from phantom_nb.experiments.stats import (Claim, about, answer, claims, comparison, comparisons, differences, effect_size, holm, lower_is_better, mean_interval,
    paired_difference, smallest_detectable)

@pytest.fixture(autouse=True, scope='module')
def quick_garbage():
    "statsmodels collects garbage at every correction; what is frozen is skipped"
    gc.freeze()
    yield
    gc.unfreeze()

LUCK = np.array([.5,.6,.4,.7])
RUNS = dict(none=LUCK, up=LUCK+[.05,.06,.04,.05], down=LUCK-[.05,.06,.04,.05], noisy=LUCK+[.3,-.2,.28,-.2])

def frame(runs=RUNS, **kwargs):
    "Runs as `load_results` gives them, the least of it"
    return pd.concat([pd.DataFrame(dict(method=m, seed=range(len(v)), accuracy=v, **kwargs)) for m,v in runs.items()], ignore_index=True)

def within(rate, expected, times): return abs(rate-expected) < 4*(expected*(1-expected)/times)**.5

def null_frame(rng, methods=7, seeds=5):
    "Methods that are all the same, with luck that they share"
    luck = rng.normal(.8, .05, seeds)
    return frame({m:luck+rng.normal(0, .02, seeds) for m in ['none', *map(str, range(1, methods))]})


# Intervals

def test_intervals_against_scipy():
    rng = np.random.default_rng(0)
    x,y = rng.normal(size=(2,6))
    m,lo,hi = mean_interval(x)
    assert np.allclose((lo,hi), stats.t.interval(.95, 5, loc=x.mean(), scale=stats.sem(x))) and m==x.mean()
    assert np.allclose(paired_difference(pd.Series(x), pd.Series(y))[1:], stats.ttest_rel(x, y).confidence_interval(.95))
    x,y = rng.normal(size=(2,30))
    ref = stats.bootstrap([x-y], np.mean, confidence_level=.9, n_resamples=500, rng=np.random.default_rng(3)).confidence_interval
    assert paired_difference(pd.Series(x), pd.Series(y), .9, 'bootstrap', n_resamples=500, seed=3)[1:] == tuple(ref)

def test_the_bootstrap_needs_twenty_values():
    with pytest.raises(ValueError, match="method='bootstrap' with 19 values.*give 20 or more, or use 't'"): mean_interval(range(19), method='bootstrap')
    assert np.isfinite(mean_interval(range(20), method='bootstrap', n_resamples=99)).all()

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('method', ['t','bootstrap'])
@pytest.mark.parametrize('x', [[1.], [1.,np.nan], [1.]*4, [.1+.2,.3]*2, [71.,73.]], ids=str)
def test_no_interval_without_spread(x, method):
    m,*ends = mean_interval(x, method=method)
    assert np.isclose(m, np.nanmean(x)) and np.isnan(ends).all()

@pytest.mark.filterwarnings('error')
def test_no_values(): assert np.isnan(mean_interval([])).all() and np.isnan(mean_interval([np.nan])).all()

@pytest.mark.parametrize('kw,what', [(dict(level=95), r'level=95: give a number in \(0, 1\)'), (dict(level=1), 'level=1'),
    (dict(method='bca'), "method='bca': give one of t, bootstrap")], ids=str)
def test_wrong_options_of_an_interval(kw, what):
    with pytest.raises(ValueError, match=what): mean_interval([1.,2.], **kw)

@pytest.mark.parametrize('n,level', [(3,.95), (5,.95), (5,.8), (20,.95)])
def test_coverage_for_normal_values(n, level):
    rng,times = np.random.default_rng(n),3000
    ends = np.array([mean_interval(o, level)[1:] for o in rng.normal(3, 2, (times,n))])
    assert within(((ends[:,0]<3) & (3<ends[:,1])).mean(), level, times)

def test_coverage_for_differences_of_skewed_accuracies():
    "Equal shapes make the difference symmetric; the interval may then be too wide, not too narrow"
    rng,times = np.random.default_rng(0),3000
    a,b = rng.beta(8, .5, (2,times,5))
    ends = np.array([mean_interval(o)[1:] for o in a-b])
    rate = ((ends[:,0]<0) & (0<ends[:,1])).mean()
    assert rate > .95-4*(.95*.05/times)**.5 and rate<.99

def test_the_bootstrap_covers_well_with_40():
    rng,times = np.random.default_rng(1),600
    ends = np.array([mean_interval(o, method='bootstrap', n_resamples=499)[1:] for o in rng.normal(1, 1, (times,40))])
    assert abs(((ends[:,0]<1) & (1<ends[:,1])).mean()-.95)<.035

def test_pairing_by_seed_not_by_position():
    a,b = pd.Series([.9,.8,.7], index=[0,1,2]),pd.Series([.6,.5], index=[2,1])
    assert np.isclose(paired_difference(a, b)[0], ((.8-.5)+(.7-.6))/2)
    with pytest.raises(ValueError, match='seed 1 occurs twice'): paired_difference(pd.Series([1,2], index=[1,1]), b)


# Effects, corrections, power

@pytest.mark.parametrize('n', [3,4,5,10,50])
def test_effect_size_is_unbiased(n):
    d = np.random.default_rng(n).normal(.7, 1, (20_000,n))
    got = np.array([effect_size(o) for o in d])
    assert abs(got.mean()-.7) < 5*got.std()/len(got)**.5
    assert effect_size([*d[0], np.nan])==effect_size(d[0])==-effect_size(-d[0])

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('d', [[], [.1], [.1,.2], [.1]*5, [0.]*5, [.1+.2-.3]*3], ids=str)
def test_no_effect_size_without_spread(d): assert np.isnan(effect_size(d))

def closed_testing(p):
    "Holm's procedure from its definition: p of a hypothesis is the largest Bonferroni p of all sets that hold it"
    sets = [s for r in range(1, len(p)+1) for s in combinations(range(len(p)), r)]
    return [max(min(1, len(s)*min(p[j] for j in s)) for s in sets if i in s) for i in range(len(p))]

@pytest.mark.parametrize('m', range(1, 8))
def test_holm_is_closed_testing(m):
    rng = np.random.default_rng(m)
    for _ in range(30):
        p = rng.uniform(size=m)**3
        if m>2: p[1] = p[0]
        assert np.allclose(holm(p), closed_testing(p))

def test_holm_examples():
    assert np.allclose(holm([.01,.02,.03,.04,.05]), [.05,.08,.09,.09,.09]) # p.adjust of R
    assert np.allclose(holm([.01,.04,.03,.005]), [.03,.06,.06,.02])
    assert np.allclose(holm([.9,np.nan,.01]), [.9,np.nan,.02], equal_nan=True) and np.isnan(holm([np.nan])).all() and not len(holm([]))

@pytest.mark.parametrize('n,level,power', [(2,.95,.8), (5,.95,.8), (5,1-.05/6,.8), (5,.95,.5), (10,.9,.95), (60,.95,.9)])
def test_smallest_detectable_is_shown_as_often_as_said(n, level, power):
    rng,times = np.random.default_rng(n),20_000
    d = rng.normal(smallest_detectable(n, .3, level, power), .3, (times,n))
    shown = (stats.ttest_1samp(d, 0, axis=1).pvalue<1-level) & (d.mean(1)>0)
    assert within(shown.mean(), power, times)

def test_smallest_detectable_without_an_answer():
    for n,sd in ((1,.1), (0,.1), (5,0.), (5,np.nan)): assert np.isnan(smallest_detectable(n, sd))
    with pytest.raises(ValueError, match=r'power=0.02: give a chance in \(0.025'): smallest_detectable(5, 1., power=.02)
    with pytest.raises(ValueError, match='power=80'): smallest_detectable(5, 1., power=80)

def test_false_verdicts_are_as_rare_as_said():
    rng,times = np.random.default_rng(0),250
    tables = [comparison(null_frame(rng)) for _ in range(times)]
    said = np.mean([t.verdict.isin(['better','worse']).any() for t in tables])
    uncorrected = np.mean([((t.diff_low>0)|(t.diff_high<0)).any() for t in tables])
    assert said < .05+4*(.05*.95/times)**.5 and uncorrected>.15
    assert all(((t.diff_low>0)|(t.diff_high<0))[t.verdict.isin(['better','worse'])].all() for t in tables)

def test_false_verdicts_when_one_method_is_really_better():
    "A true effect must not make false verdicts about the others more frequent"
    rng,times,false,found = np.random.default_rng(1),150,0,0
    for _ in range(times):
        df = null_frame(rng, 4)
        df.loc[df.method=='1', 'accuracy'] += .3
        v = comparison(df).verdict
        false,found = false+v[['2','3']].isin(['better','worse']).any(), found+(v['1']=='better')
    assert false/times < .05+4*(.05*.95/times)**.5 and found/times>.95


# The table

def test_columns_against_scipy_by_hand():
    t = comparison(frame())
    d = {m:v-LUCK for m,v in RUNS.items() if m!='none'}
    p = {m:stats.ttest_1samp(o, 0).pvalue for m,o in d.items()}
    assert t.loc[list(p)].p.to_dict()==pytest.approx(p) and t.loc[list(p)].p_holm.tolist()==pytest.approx(list(holm(list(p.values()))))
    for m,o in d.items():
        assert t.effect[m]==pytest.approx(effect_size(o)) and t.diff_sd[m]==pytest.approx(o.std(ddof=1))
        assert t.detectable[m]==pytest.approx(smallest_detectable(4, o.std(ddof=1), 1-.05/3))
    assert t.verdict.to_dict()==dict(none='', up='better', down='worse', noisy='no difference shown')
    assert t.loc['none', ['diff','p','p_holm','effect','detectable']].isna().all() and t.pairs.to_dict()==dict(none=0, up=4, down=4, noisy=4)
    assert t.gap.isna().all() and t.seconds.isna().all()

def test_order_and_direction():
    t = comparison(frame())
    assert list(t.index)[0]=='none' and t.accuracy.iloc[1:].is_monotonic_decreasing
    err = frame().assign(error=lambda d: 1-d.accuracy, train_error=.1).rename(columns=dict(method='how'))
    t = comparison(err, metric='error', by='how', baseline='down', higher_is_better=False)
    assert list(t.index)[0]=='down' and t.error.iloc[1:].is_monotonic_increasing
    assert t.verdict['up']==t.verdict['none']=='better' and t['diff']['up']<0 and t.gap['up']==pytest.approx(.1-t.error['up'])

def test_what_a_table_is_about():
    known = dict(by='method', baseline='none', metric='accuracy', higher_is_better=True)
    assert about(pd.DataFrame())==known
    table = comparison(frame().rename(columns=dict(accuracy='loss')), metric='loss', baseline='up')
    assert about(table)==known | dict(metric='loss', baseline='up', higher_is_better=False)

def test_unfinished_runs_are_left_out_and_counted():
    df = frame(status='done')
    df.loc[(df.method=='up') & (df.seed>2), ['status','accuracy']] = ['diverged',np.nan]
    df.loc[df.method=='down', ['status','accuracy']] = ['failed',.99]
    t = comparison(df)
    assert t.runs.to_dict()==dict(none=4, up=3, noisy=4, down=0) and t.left_out.to_dict()==dict(none=0, up=1, noisy=0, down=4)
    assert t.pairs['up']==3 and np.isnan(t.accuracy['down']) and t.verdict['down']==''
    assert np.allclose(t.p_holm[['up','noisy']], holm(t.p[['up','noisy']]))

@pytest.mark.filterwarnings('error')
def test_no_verdict_without_spread_or_with_one_seed():
    t = comparison(frame(dict(none=LUCK, same=LUCK, plus=LUCK+.1)))
    assert t.p.isna().all() and (t.verdict[['same','plus']]=='no difference shown').all()
    for n in (1,2):
        t = comparison(frame(dict(none=[.5,.6][:n], up=[.9,1.][:n])))
        assert t.verdict['up']=='no difference shown' and t.loc['up', ['p','diff_low','low','detectable']].isna().all() and t['diff']['up']==pytest.approx(.4)

def test_comparison_without_its_baseline():
    t = comparison(frame(dict(mhe=[.5,.6])))
    assert np.isnan(t['diff']).all() and (t.verdict=='').all()

@pytest.mark.parametrize('df,kw,what', [(frame().drop(columns='seed'), {}, "no column 'seed': pass a frame with"),
    (frame(), dict(metric='f1'), "no column 'f1': set metric="), (frame(), dict(by='model'), "no column 'model': set by="),
    (pd.concat([frame(), frame()]), {}, "seed 0 of 'none' occurs twice.*comparisons"), (frame(), dict(level=95), 'level=95'),
    (frame(), dict(power=1.), 'power=1.0')], ids=str)
def test_unfit_frames_are_refused_with_the_remedy(df, kw, what):
    with pytest.raises(ValueError, match=what): comparison(df, **kw)

def test_the_direction_of_a_metric_is_known():
    for metric in ('loss','valid_loss','similarity','test_similarity','gap','ece'): assert lower_is_better(metric)
    for metric in ('accuracy','valid_accuracy','f1','glossy'): assert not lower_is_better(metric)
    t = comparison(frame().rename(columns=dict(accuracy='similarity')), metric='similarity')
    assert t.verdict['up']=='worse' and t.verdict['down']=='better' and not t.attrs['higher_is_better']
    assert comparison(frame().rename(columns=dict(accuracy='similarity')), metric='similarity', higher_is_better=True).verdict['up']=='better'


# Many comparisons

@pytest.fixture
def many():
    rng,rows = np.random.default_rng(0),[]
    for data in ('digits','fashion_mnist'):
        for n in (50,200,1000): rows.append(null_frame(rng).assign(data=data, n_train=n))
    return pd.concat(rows)

def test_comparisons_are_corrected_one_by_one(many):
    t = comparisons(many)
    assert t.index.names==['data','n_train','method'] and len(t)==42
    for (d,n),o in many.groupby(['data','n_train']): pd.testing.assert_frame_equal(t.loc[(d,n)], comparison(o), check_like=True)
    assert len(comparisons(many[many.data=='digits'], over='n_train'))==21
    with pytest.raises(ValueError, match="no column 'model': set over="): comparisons(many, over=['model'])
    with pytest.raises(ValueError, match='no rows'): comparisons(many[:0])
    with pytest.raises(ValueError, match='occurs twice'): comparisons(many, over='data')

def test_one_correction_for_all_settings(many):
    each,all_ = comparisons(many),comparisons(many, together=True)
    assert all_.attrs['tests']==36 and np.allclose(all_.p_holm, holm(each.p), equal_nan=True) and (all_.detectable.dropna()>=each.detectable.dropna()).all()
    names = sorted({*many.method}-{'none'})
    asked = claims(many, [(name,'none') for name in names])
    said = all_[all_.verdict!=''].verdict.map(dict(better='yes', worse='no')).fillna('unclear')
    assert all(said[d,n,c.split()[0]]==a for (c,d,n),a in asked.answer.items())

def test_settings_that_are_missing_are_a_setting(many):
    many['n_train'] = many.n_train.where(many.n_train!=1000)
    assert len(comparisons(many))==42


# Answers

def test_claims_are_answered_in_their_direction_and_corrected_over_the_whole_table():
    d = np.array([.010, .012, .009, .011, .013])
    df = pd.concat([frame(dict(none=.5+0*d, a=.5+d, b=.5-d), data='x', n_train=9),
        frame(dict(none=.5+0*d, a=.489+d), data='y', n_train=9)])
    t = claims(df, [('a','none'), ('b','none')])
    assert t.answer.to_dict()=={('a > none','x',9):'yes', ('a > none','y',9):'unclear', ('b > none','x',9):'no'}
    assert t.loc['a > none','x'].p_holm.item()==pytest.approx(3*stats.ttest_1samp(d, 0).pvalue)
    assert claims(df, [('a','none')], higher_is_better=False).answer.tolist()==['no','unclear']
    with pytest.raises(ValueError, match="no rows of 'c': run it"): claims(df, [('c','none')])
    assert claims(df.rename(columns=dict(accuracy='loss')), [('a','none')], metric='loss').answer.tolist()==['no','unclear']
    pooled = claims(df, [('a','none'), ('b','none')], pool=True)
    assert pooled.index.tolist()==['a > none','b > none'] and pooled['diff'].tolist()==pytest.approx([.0055,-.011]) and pooled.answer.tolist()==['yes','no']

def test_differences_are_paired_in_every_setting_and_pooled_over_complete_seeds():
    df = pd.concat([frame(dict(none=[.1,.2,.3,.4], a=[.2,.4,.6,.8]), data='x', n_train=9), frame(dict(none=[.1,.1,.1], a=[.2,.2,.2]), data='y', n_train=9)])
    d = differences(df, 'a', 'none')
    assert d.columns.names==['data','n_train'] and d['x',9].tolist()==pytest.approx([.1,.2,.3,.4]) and d['y',9].isna().tolist()==[False]*3+[True]
    assert differences(df, 'a', 'none', pool=True).tolist()==pytest.approx([.1,.15,.2])
    alone = pd.concat([df, frame(dict(none=[.1]*4), data='z', n_train=9)])
    pd.testing.assert_frame_equal(differences(alone, 'a', 'none'), d)
    unpaired = frame(dict(none=[.1,.1], a=[.2,.2]), data='w', n_train=9)
    unpaired.loc[unpaired.method=='a','seed'] += 2 # no seed in common
    pd.testing.assert_frame_equal(differences(pd.concat([df, unpaired]), 'a', 'none'), d)
    for kw,what in ((dict(a='c'), "no rows of 'c'"), (dict(metric='f1'), 'set metric='), (dict(by='model'), 'set by='), (dict(over='size'), 'set over=')):
        with pytest.raises(ValueError, match=what): differences(df, **{**dict(a='a', b='none'), **kw})
    with pytest.raises(ValueError, match='occurs twice'): differences(pd.concat([df, df]), 'a', 'none')

def test_answers_against_scipy():
    d = np.random.default_rng(0).normal(.5, 1, 8)
    def p(bound, alternative='two-sided'): return stats.ttest_1samp(d, bound, alternative=alternative).pvalue
    t = answer(dict(above=Claim(d), below=Claim(d, 'below', .2), within=Claim(d, 'within', 3.), outside=Claim(d, 'within', 1e-9)))
    assert t.p.tolist()==pytest.approx([p(0), p(.2), max(p(-3, 'greater'), p(3, 'less')), p(1e-9)], rel=1e-6)
    assert t.p_holm.tolist()==pytest.approx(holm(t.p)) and t.claimed.tolist()==['> 0','< 0.2','within 3','within 1e-09']
    assert (t.n==8).all() and np.allclose(t[['estimate','low','high']], [mean_interval(d)]*4)

def test_answers_of_every_kind():
    d = np.array([1.,1.1,.9,1.05,.95])
    asked = dict(yes=d, no=Claim(d, 'below'), margin=Claim(d, 'above', .5), inside=Claim(d, 'within', 2.),
        outside=Claim(d, 'within', .1), few=d[:2], flat=[1.]*5, other=Claim(3.2, p=.001),
        weak=Claim(3.2, p=.5, interval=(-1.,7.)))
    t = answer(asked)
    assert t.answer.to_dict()==dict(yes='yes', no='no', margin='yes', inside='yes', outside='no', few='unclear', flat='unclear', other='yes', weak='unclear')
    assert t.p[['few','flat']].isna().all() and np.isnan(t.low['other']) and (t.low['weak'],t.high['weak'])==(-1,7) and t.p_holm['weak']==.5
    assert answer(dict(bound=Claim(3.2, p=1-.95))).answer['bound']=='yes', "the threshold itself is enough"
    assert answer({('a',1):d, ('b',2):d}, names=['claim','n']).index.names==['claim','n']

@pytest.mark.parametrize('make,what', [(lambda: Claim([1.], 'over'), "kind='over'.*: give one of above, below, within"),
    (lambda: Claim([1.], 'within'), 'bound=0.0'), (lambda: Claim([1.], p=2.), 'p=2.0'), (lambda: answer({}), 'nothing is asked'),
    (lambda: answer(dict(a=[1.,2.,3.]), level=95), 'level=95')], ids=['kind','bound','p','nothing','level'])
def test_wrong_claims_are_refused(make, what):
    with pytest.raises(ValueError, match=what): make()

def test_wrong_answers_are_as_rare_as_said():
    "Ten claims without an effect, and an equality at the very edge of its bound"
    rng,times = np.random.default_rng(0),400
    said = np.mean([(answer({i:rng.normal(size=5) for i in range(10)}).answer!='unclear').any() for _ in range(times)])
    edge = np.mean([answer({0:Claim(rng.normal(1, 1, 6), 'within', 1.)}).answer.iloc[0]=='yes' for _ in range(times)])
    assert max(said, edge) < .05+4*(.05*.95/times)**.5

def test_claims_need_a_level_that_is_one():
    with pytest.raises(ValueError, match='level=2'): answer({'a':Claim(np.array([.1,.2,.3]))}, level=2)
