"Intervals, corrections, verdicts and tables: against SciPy, by brute force, and by simulation"
from itertools import combinations

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from rich.console import Console
from scipy import stats

from phantom_nb.experiments.stats import (as_markdown, as_rich, claims, comparison, comparisons, effect_size, holm, mean_interval, paired_difference,
    plot_comparison, plot_comparisons, smallest_detectable, verdict)

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
    ref = stats.bootstrap([x-y], np.mean, confidence_level=.9, n_resamples=500, rng=np.random.default_rng(3)).confidence_interval
    assert paired_difference(pd.Series(x), pd.Series(y), .9, 'bootstrap', n_resamples=500, seed=3)[1:] == tuple(ref)

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('method', ['t','bootstrap'])
@pytest.mark.parametrize('x', [[1.], [1.,np.nan], [1.]*4, [.1+.2,.3]], ids=str)
def test_no_interval_without_spread(x, method):
    m,*ends = mean_interval(x, method=method)
    assert np.isclose(m, np.nanmean(x)) and np.isnan(ends).all()

@pytest.mark.filterwarnings('error')
def test_no_values(): assert np.isnan(mean_interval([])).all() and np.isnan(mean_interval([np.nan])).all()

@pytest.mark.parametrize('kw,what', [(dict(level=95), 'level=95: give a number between 0 and 1'), (dict(level=1), 'level=1'),
    (dict(method='bca'), "unknown method 'bca': choose from t, bootstrap")], ids=str)
def test_wrong_options_of_an_interval(kw, what):
    with pytest.raises(ValueError, match=what): mean_interval([1.,2.], **kw)

@pytest.mark.parametrize('n,level', [(2,.95), (5,.95), (5,.8), (20,.95)])
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

def test_bootstrap_covers_too_little_with_5_seeds_and_well_with_40():
    rng,times = np.random.default_rng(1),600
    def rate(n):
        ends = np.array([mean_interval(o, method='bootstrap', n_resamples=499)[1:] for o in rng.normal(1, 1, (times,n))])
        return ((ends[:,0]<1) & (1<ends[:,1])).mean()
    few,many = rate(5),rate(40)
    assert few<.9 and abs(many-.95)<.035, (few, many)

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
    with pytest.raises(ValueError, match='power=0.02: give more than 0.025'): smallest_detectable(5, 1., power=.02)
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
    assert verdict(t).startswith('Best against down: up, -0.100 [') and 'points' not in verdict(t)

def test_unfinished_runs_are_left_out_and_counted():
    df = frame(status='done')
    df.loc[(df.method=='up') & (df.seed>1), ['status','accuracy']] = ['diverged',np.nan]
    df.loc[df.method=='down', ['status','accuracy']] = ['failed',.99]
    t = comparison(df)
    assert t.runs.to_dict()==dict(none=4, up=2, noisy=4, down=0) and t.left_out.to_dict()==dict(none=0, up=2, noisy=0, down=4)
    assert t.pairs['up']==2 and np.isnan(t.accuracy['down']) and t.verdict['down']==''
    assert np.allclose(t.p_holm[['up','noisy']], holm(t.p[['up','noisy']]))
    assert '2/4' in as_markdown(t) and 'with fewer seeds: up' in verdict(t)

@pytest.mark.filterwarnings('error')
def test_no_verdict_without_spread_or_with_one_seed():
    t = comparison(frame(dict(none=LUCK, same=LUCK, plus=LUCK+.1)))
    assert t.p.isna().all() and (t.verdict[['same','plus']]=='no difference shown').all() and 'agree to the last digit' in verdict(t)
    t = comparison(frame(dict(none=[.5], up=[.9])))
    assert 'One seed has no interval' in verdict(t) and t.verdict['up']=='no difference shown'

def test_comparison_without_its_baseline():
    t = comparison(frame(dict(mhe=[.5,.6])))
    assert np.isnan(t['diff']).all() and verdict(t)=='Nothing can be compared with none: no two runs share a seed.'

@pytest.mark.parametrize('df,kw,what', [(frame().drop(columns='seed'), {}, "no column 'seed': pass a frame with"),
    (frame(), dict(metric='f1'), "no column 'f1': set metric="), (frame(), dict(by='model'), "no column 'model': set by="),
    (pd.concat([frame(), frame()]), {}, "seed 0 of 'none' occurs twice.*comparisons"), (frame(), dict(level=95), 'level=95'),
    (frame(), dict(interval='wald'), "unknown method 'wald'"), (frame(), dict(power=1.), 'power=1.0')], ids=str)
def test_unfit_frames_are_refused_with_the_remedy(df, kw, what):
    with pytest.raises(ValueError, match=what): comparison(df, **kw)

def test_bootstrap_intervals_leave_the_verdict_alone():
    t,b = comparison(frame()),comparison(frame(), interval='bootstrap')
    assert (t.verdict==b.verdict).all() and (t.dropna().diff_low!=b.dropna().diff_low).all()


def test_a_setting_may_be_what_is_compared():
    df = frame().assign(lam=lambda d: d.method.map(dict(none=0., up=.1, down=1., noisy=10.)))
    t = comparison(df, by='lam', baseline=0.)
    assert verdict(t).startswith('Best against 0.0: 0.1, +5.0 points') and 'vs 0.0, points' in as_markdown(t) and '0.1 ' in printed(t)
    t = comparisons(df.assign(data='x'), over='data', by='lam', baseline=0.)
    assert verdict(t).startswith('x: Best against 0.0: 0.1') and set(tick_names(plot_comparisons(t)[0,0]).values())=={'0.1','1.0','10.0'}
    plt.close('all')


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
    assert verdict(t).count('\n')==5 and verdict(t).startswith('digits, 50: Best against none: ')

def test_settings_that_are_missing_are_a_setting(many):
    many['n_train'] = many.n_train.where(many.n_train!=1000)
    t = comparisons(many)
    lines = verdict(t).splitlines()
    assert len(t)==42 and len(lines)==6 and lines[0].startswith('digits, 50:') and lines[2].startswith('digits, nan:')


# In words, tables, pictures

def test_verdict_in_words():
    text = verdict(comparison(frame()))
    assert 'Best against none: up, +5.0 points [+3.7, +6.3].' in text
    assert 'Corrected for 3 methods, better: up; worse: down; no difference shown: noisy.' in text
    assert f"4 seeds could have shown {100*comparison(frame()).detectable['noisy']:.1f} points or more." in text
    one = verdict(comparison(frame({k:RUNS[k] for k in ('none','up')})))
    assert one=='Best against none: up, +5.0 points [+3.7, +6.3]. Better: up.'
    loss = verdict(comparison(frame({k:RUNS[k] for k in ('none','down')})))
    assert loss=='No method is ahead; closest to none: down, -5.0 points [-6.3, -3.7]. Worse: down.'
    assert 'no difference shown for any' in verdict(comparison(null_frame(np.random.default_rng(3))))

def printed(table, width=80, **kwargs):
    console = Console(width=width, record=True, file=open('/dev/null', 'w'), **kwargs)
    console.print(as_rich(table, 'title'))
    return console.export_text(styles='force_terminal' in kwargs)

def test_terminal_table_fits_and_names_everything(many):
    table = comparison(frame({'label_smoothing' if k=='up' else k:v for k,v in RUNS.items()}, train_accuracy=1., seconds=12.3))
    text = printed(table)
    assert all(len(l)<=80 for l in text.splitlines()) and '…' not in text and 'title' in text
    line, = [l for l in text.splitlines() if l.startswith('label_smoothing')]
    assert '60.0 [38.6, 81.4]' in line and '+5.0 [+3.7, +6.3]' in line and 'better' in line and '12.3' in line and line.split()[-1]=='4'
    assert '\x1b[32m' in printed(table, force_terminal=True) and '\x1b[31m' in printed(table, force_terminal=True)
    assert 'mhe[lam=1]' in printed(comparison(frame({'none':LUCK, 'mhe[lam=1]':LUCK+.1}))) # no markup
    text = printed(comparisons(many))
    assert 'title: digits, 50' in text and text.count('vs none, points')==6

def test_markdown_table(many):
    lines = as_markdown(comparison(frame())).splitlines()
    assert len({l.count('|') for l in lines})==1 and len(lines)==2+4 and set(lines[1])<=set('|:- ')
    row = [o.strip() for o in next(l for l in lines if l.startswith('| up')).split('|')][1:-1]
    head = [o.strip() for o in lines[0].split('|')][1:-1]
    cells = dict(zip(head, row))
    assert cells['vs none, points']=='+5.0 [+3.7, +6.3]' and cells['shown']=='better' and cells['gap']=='-' and cells['runs']=='4'
    lines = as_markdown(comparisons(many)).splitlines()
    assert len(lines)==2+42 and lines[2].startswith('| digits, 50 | none |')
    assert 'test loss |' in as_markdown(comparison(frame().rename(columns=dict(accuracy='loss')), metric='loss'))

def places(ax, names):
    "What is drawn beside each name"
    points = np.ma.filled(ax.collections[-1].get_offsets(), np.nan) if len(ax.collections)<3 else np.ma.filled(ax.collections[1].get_offsets(), np.nan)
    return {names[round(y)]:x for x,y in points if not np.isnan(x)}

def tick_names(ax): return {round(y):t.get_text() for y,t in zip(ax.get_yticks(), ax.get_yticklabels())}

def test_picture_has_every_method_beside_its_own_name():
    table = comparison(frame())
    axs = plot_comparison(table)
    names = tick_names(axs[0])
    for ax,col in zip(axs, ('accuracy','diff')): assert places(ax, names) == pytest.approx((table[col].dropna()*100).to_dict())
    greens = {tuple(c) for c in axs[1].collections[1].get_facecolors()}
    assert len(greens)==3 # better, worse, no difference shown
    plt.close('all')

def test_pictures_of_many_comparisons(many):
    t = comparisons(many)
    axs = plot_comparisons(t, ncols=4)
    assert axs.shape==(2,4) and [a.axison for a in axs.flat]==[True]*6+[False]*2
    names = tick_names(axs[0,0])
    assert 'none' not in names.values()
    for ax,(k,o) in zip(axs.flat, t.groupby(level=[0,1], sort=False)):
        assert ax.get_title()==f'{k[0]}, {k[1]}' and places(ax, names)==pytest.approx((o.droplevel([0,1])['diff'].dropna()*100).to_dict())
    plt.close('all')

def test_loss_is_drawn_in_its_own_unit():
    df = frame().rename(columns=dict(accuracy='loss'))
    table = comparison(df, metric='loss', higher_is_better=False)
    axs = plot_comparison(table)
    assert axs[0].get_xlabel()=='test loss' and axs[1].get_xlabel()=='difference to none'
    assert places(axs[0], tick_names(axs[0]))==pytest.approx(table.loss.to_dict())
    plt.close('all')

def test_claims_are_answered_in_their_direction_and_corrected_over_the_whole_table():
    d = np.array([.010, .012, .009, .011, .013])
    df = pd.concat([frame(dict(none=.5+0*d, a=.5+d, b=.5-d), data='x', n_train=9),
        frame(dict(none=.5+0*d, a=.489+d), data='y', n_train=9)])
    t = claims(df, [('a','none'), ('b','none')])
    assert t.answer.to_dict()=={('a > none','x',9):'yes', ('a > none','y',9):'unclear', ('b > none','x',9):'no'}
    assert t.loc['a > none','x'].p_holm.item()==pytest.approx(3*stats.ttest_1samp(d, 0).pvalue)
    assert claims(df, [('a','none')], higher_is_better=False).answer.tolist()==['no','unclear']
    with pytest.raises(ValueError, match="no rows of 'c': run it"): claims(df, [('c','none')])
