"The atlas: who chooses a weight, what is combined how"
from dataclasses import asdict, replace

import numpy as np, pandas as pd, pytest
from scipy.optimize import brentq
from scipy.stats import t as student, ttest_1samp

from phantom_nb.experiments.atlas import (best_weight, chosen_values, load_atlas, pair_gains, planned_weights, same_trainings, seed_differences,
    setting_claims, suggestion_table)
from phantom_nb.experiments.effects import effect_claim, effects_over_settings, pooled_effects, random_effects
from phantom_nb.experiments.methods import full_settings, read_method
from phantom_nb.experiments.run import Run
from phantom_nb.experiments.stats import answer
from phantom_nb.experiments.store import load_results, write_rows
from phantom_nb.experiments.suggest import load_table
from phantom_nb.experiments.sweep import load_sweep

SPEC = 'results/atlas.toml'

def test_claims_of_a_setting_are_in_points_and_have_a_direction():
    "Five seeds that scatter by a hundredth of a point around a mean in points; all eight p-values are one family (Holm)"
    means = dict(much=2., little=.2, worse=-2., nothing=0.)
    scatter = np.array([-.01, -.005, 0., .005, .01])
    rows = [dict(setting='a', method=name, seed=i, diff=(mean+d)/100) for name,mean in means.items() for i,d in enumerate(scatter)]
    found = setting_claims(pd.DataFrame(rows))
    said = found.answer.unstack('claim').droplevel('setting')
    assert dict(said.helps)==dict(much='yes', little='yes', worse='no', nothing='unclear')
    assert dict(said['worth it'])==dict(much='yes', little='no', worse='no', nothing='no')
    np.testing.assert_allclose(found.estimate.xs('helps', level='claim').droplevel('setting')[list(means)], list(means.values()), atol=1e-12)
    assert found.p['a','little','helps']==pytest.approx(ttest_1samp(.2+scatter, 0).pvalue)

def test_the_packages_table_is_that_of_the_rows():
    others = [f'results/{name}.jsonl' for name in ('sparsity-fair','hyperspherical-fair','phantom-forms')]
    assert suggestion_table(load_atlas('results/atlas.jsonl', SPEC, others), SPEC)==load_table()

@pytest.mark.parametrize('seed', range(20))
def test_spread_solves_its_equation(seed):
    rng = np.random.default_rng(seed)
    variance = rng.uniform(.1, 1, 8)
    effect = rng.normal(1, 2, 8) + variance**.5*rng.normal(size=8)
    def left(tau2):
        w = 1/(variance+tau2)
        return (w*(effect-np.average(effect, weights=w))**2).sum()-7
    tau = brentq(left, 0, 1e4)**.5 if left(0)>0 else 0.
    assert random_effects(effect, variance)['tau'] == pytest.approx(tau, abs=1e-3)

def test_units_do_not_matter():
    effect,variance = np.array([1., 3, -2, 4, 0]),np.array([.5, 1, .2, .7, .4])
    a,b = random_effects(effect, variance),random_effects(effect/100, variance/1e4)
    for name in ('mean','low','high','tau','new_low'): assert b[name]*100 == pytest.approx(a[name], abs=1e-3)
    assert a['p'] == pytest.approx(b['p'], abs=1e-6)

def test_too_few_settings_say_nothing():
    assert np.isnan(random_effects([1., 2], [.1, .1])['mean'])
    with pytest.raises(ValueError, match='above 0'): random_effects([1., 2, 3], [.1, 0, .1])

def test_claims_agree_with_student():
    effect = np.array([.02, .01, .03, .015, .005, .02])
    found = random_effects(effect, np.full(6, 1e-5))
    assert effect_claim(found).p == pytest.approx(ttest_1samp(effect, 0).pvalue, rel=1e-3)
    assert effect_claim(found, 'above', .005).p == pytest.approx(ttest_1samp(effect, .005).pvalue, rel=1e-3)
    said = answer({'in':effect_claim(found, 'within', .05), 'out':effect_claim(found, 'within', .001), 'down':effect_claim(found, 'below')})
    assert said.answer.tolist()==['yes','no','no']

def _rows(accuracies, valid):
    "Weights by seeds"
    return pd.DataFrame([dict(setting='a', method='m', weight=w, seed=i, accuracy=a, valid_accuracy=valid[w][i], status='done', machine='cpu')
        for w,values in accuracies.items() for i,a in enumerate(values)])

def test_the_other_seeds_choose():
    runs = _rows({.1:[1, 2, 3], 1.:[10, 20, 30]}, {.1:[.9, .5, .5], 1.:[.1, .6, .6]})
    assert chosen_values(runs).tolist()==[10, 2, 3] # seed 0: .5+.5 < .6+.6; seeds 1 and 2: .9+.5 > .1+.6

def test_diverged_is_never_chosen_where_there_is_another():
    runs = _rows({.1:[1, 2, 3], 1.:[10, np.nan, 30]}, {.1:[.1]*3, 1.:[.9, np.nan, .9]})
    runs.loc[runs.accuracy.isna(), 'status'] = 'diverged'
    assert chosen_values(runs)[0]==1 and chosen_values(runs)[2]==3 # the others' mean is -.05 with the diverged one

def test_a_seed_whose_chosen_run_diverged_is_left_out():
    "Though a network of NaN has an accuracy, that of its first class"
    runs = _rows({.1:[1, 2, 3], 1.:[.1, 20, 30]}, {.1:[.1]*3, 1.:[.1, .9, .9]}).assign(settings=[{'alpha':w} for w in (.1,1.) for _ in range(3)])
    runs.loc[3,'status'] = 'diverged'
    assert chosen_values(runs).to_dict()=={1:2, 2:3} # the others choose 1. for seed 0; for seed 2 they have -.05 and .1
    assert best_weight(runs.assign(method='mixup'), 'alpha')=='alpha=1' # a mean of .27 with the diverged one
    runs.loc[4,'status'] = 'failed'
    assert best_weight(runs.assign(method='mixup'), 'alpha')=='alpha=0.1'

def test_a_weight_is_not_suggested_for_the_seeds_that_it_alone_has():
    "A half of a pair is trained at one weight; here with seed 9, whose validation images are easy"
    runs = _rows({.1:[1, 2, 3], 1.:[10, 20, 30]}, {.1:[.1]*3, 1.:[.2]*3}).assign(method='mixup', settings=[{'alpha':w} for w in (.1,1.) for _ in range(3)])
    easy = runs.head(1).assign(seed=9, valid_accuracy=.9)
    assert best_weight(pd.concat([runs, easy], ignore_index=True), 'alpha')=='alpha=1'

def test_a_suggested_weight_makes_the_method_that_was_measured():
    "With the settings that are not its defaults"
    runs = _rows({1.:[1, 2, 3]}, {1.:[.1]*3}).assign(method='phantom_contrast', settings=[dict(lam=1., tau=1., k=None)]*3)
    words = best_weight(runs, 'lam')
    method,settings = read_method(f'phantom_contrast:{words}')
    assert words=='lam=1:tau=1' and full_settings(method, settings)['tau']==1. and full_settings(method, settings)['lam']==1.

def test_a_seed_without_all_weights_waits():
    runs = _rows({.1:[1, 2, 3], 1.:[10, 20, 30]}, {.1:[.1]*3, 1.:[.9]*3})
    assert list(chosen_values(runs[:-1]).index)==[0,1]

@pytest.fixture
def recorded(tmp_path):
    rows = []
    for name in ('atlas-cifar10-1000','atlas-fashion-100','atlas-fashion-1000'):
        for seed in range(3):
            for method,settings,gain,lr in (('none',{},0,.01), ('none',{},.5,.03), ('mixup',{'alpha':.1},.01,.01), ('mixup',{'alpha':.4},.02,.01),
                ('mixup',{'alpha':1.},.01,.01), ('mixup',{'alpha':2.},.9,.01), ('isda',{'lam':.5},.01,.01),
                ('mixup+isda',{'mixup.alpha':.4,'isda.lam':.5},.025,.01)):
                run = Run(experiment=name, method=method, settings=settings, seed=seed, lr=lr)
                accuracy = .5+gain+.001*seed
                rows.append(dict(experiment=name, data='digits', n_train=200, model='small_cnn', method=method, settings=settings, seed=seed, lr=lr,
                    key=run.key, status='done', accuracy=accuracy, valid_accuracy=accuracy,
                    device='cpu (x86_64)'))
    write_rows(pd.DataFrame(rows), tmp_path/'rows.jsonl')
    return load_atlas(tmp_path/'rows.jsonl', SPEC)

def test_only_the_plan_is_judged(recorded):
    "Three weights in two settings; in the third, isda is planned with another weight than the recorded one, and mixup with alpha 1 alone"
    found = seed_differences(recorded).groupby(['setting','method'])['diff'].agg(['mean','size'])
    expected = {('cifar10-1000','mixup'):.02, ('cifar10-1000','isda'):.01, ('fashion-100','mixup'):.02, ('fashion-100','isda'):.01, ('fashion-1000','mixup'):.01}
    assert found['mean'].to_dict()==pytest.approx(expected) and set(found['size'])=={3}

def test_a_seed_pairs_on_one_kind_of_machine(recorded):
    "What a GPU trained is not subtracted from what a CPU trained; where both have plain training, the one with more weights counts"
    recorded = recorded[recorded.setting!='fashion-1000']
    moved = recorded.assign(machine=recorded.machine.where((recorded.seed>0) | (recorded.method=='none'), 'cuda'))
    assert set(seed_differences(moved).seed)==set() # two seeds are left, three are needed
    gpu = recorded[(recorded.seed==0) & (recorded.method=='none')].assign(machine='cuda', accuracy=lambda d: d.accuracy-.1)
    found = seed_differences(pd.concat([moved, gpu], ignore_index=True))
    assert found[found.method=='mixup'].groupby('seed')['diff'].mean().tolist()==pytest.approx([.12, .02, .02])
    both = pd.concat([recorded, gpu, moved[(moved.machine=='cuda') & (moved.weight!=.1)]], ignore_index=True)
    assert seed_differences(both)['diff'].max()==pytest.approx(.02) # two weights of three are not enough
    elsewhere = recorded[recorded.method!='none'].assign(machine='another') # without plain training it is no match, and takes nothing away
    assert len(seed_differences(pd.concat([elsewhere, recorded], ignore_index=True)))==len(seed_differences(recorded))
    with pytest.raises(ValueError, match='record both'): seed_differences(recorded[recorded.method=='none'])
    with pytest.raises(ValueError, match='record both'): seed_differences(recorded[recorded.method!='none'])

def test_pairs(recorded):
    gains = pair_gains(recorded)
    assert len(gains)==6 # where both are planned alone
    assert gains[['gain','alone','surplus']].mean().tolist()==pytest.approx([.005, .01, -.005])

def test_the_plan_has_three_weights_a_method():
    weights = planned_weights(SPEC)
    assert len(weights)==14 and all(len(values)==3 for _,values in weights.values())
    carried = {(run.method, dict(run.settings)[weights[run.method][0]]) for run in load_sweep(SPEC).runs
        if run.experiment.endswith(('fashion-1000','grocery-5','wrong-labels','trashnet-20','long-tail')) and run.method!='none'}
    assert len(carried)==14 and all(value in weights[method][1] for method,value in carried)

def test_pooled_variance_is_that_of_one_way_anova():
    rng = np.random.default_rng(0)
    d = pd.DataFrame([('a', m, i, rng.normal()) for m in range(5) for i in range(3+m%2)], columns=['setting','method','seed','diff'])
    within = sum(((g['diff']-g['diff'].mean())**2).sum() for _,g in d.groupby('method'))/(len(d)-5)
    table = pooled_effects(d)
    assert (table.variance*table.seeds).tolist()==pytest.approx([within]*5)
    assert effects_over_settings(table).loc[0,'settings']==1

def test_a_method_far_less_stable_than_the_others_has_its_own_variance():
    "And leaves that of the others as it was; a little less stable is no reason"
    rng = np.random.default_rng(1)
    d = pd.DataFrame([(s, m, i, rng.normal()) for s in 'ab' for m in range(6) for i in range(3)], columns=['setting','method','seed','diff'])
    wild = d.assign(diff=d['diff'].where((d.setting=='b')|(d.method>0), [-50., 0, 30]*12))
    table,calm = pooled_effects(wild).set_index(['setting','method']).variance,pooled_effects(d[d.method>0]).set_index(['setting','method']).variance
    assert table['a',0]==pytest.approx(np.var([-50, 0, 30], ddof=1)/3)
    assert table['a'].loc[1:].tolist()==pytest.approx(calm['a'].tolist()) and table['b'].nunique()==1
    twice = d.assign(diff=d['diff'].where(d.method>0, 2*d['diff']))
    assert pooled_effects(twice).groupby('setting').variance.nunique().tolist()==[1,1]

def test_trainings_of_other_sweeps_count(tmp_path):
    wanted = next(run for run in load_sweep(SPEC).runs if run.method=='mixup')
    others = [replace(wanted, experiment='other', **told) for told in (dict(), dict(epochs=7), dict(lr=.5))]
    rows = [{**asdict(run), 'settings':dict(run.settings), 'key':run.key, 'status':'done', 'accuracy':.5, 'valid_accuracy':.5} for run in others]
    write_rows(pd.DataFrame(rows), tmp_path/'rows.jsonl')
    found = same_trainings(load_results(tmp_path/'rows.jsonl'), SPEC)
    assert found.key.tolist()==[others[0].key] and found.experiment.tolist()==[wanted.experiment]

def test_all_rows_of_the_atlas_are_trainings_of_its_plan():
    "Also where a number of images a class, or a share of them, makes a row's number of images"
    df = load_results('results/atlas.jsonl')
    own = df[df.key.isin({run.key for run in load_sweep(SPEC).runs})]
    found = same_trainings(own, SPEC)
    assert len(own)>600 and {'atlas-grocery-5','atlas-trashnet-20'}<=set(found.experiment) and (found.experiment==own.experiment).all()

@pytest.mark.parametrize('level', [.9, .95])
def test_intervals_over_settings_by_hand(level):
    "Equal variances: Student's interval of the effects themselves; a new setting lies within tau and the error of the mean"
    y,k = np.array([2., 0, 1, 3, -1]),5
    found = random_effects(y, np.full(k, .5), level)
    assert (found['low'], found['high'])==pytest.approx(student.interval(level, k-1, y.mean(), y.std(ddof=1)/k**.5), rel=1e-3)
    reach = student.ppf((1+level)/2, k-2)*(y.var(ddof=1)-.5+y.var(ddof=1)/k)**.5
    assert (found['new_low'], found['new_high'])==pytest.approx((y.mean()-reach, y.mean()+reach), rel=1e-3)
    with pytest.raises(ValueError, match='level=2'): random_effects(y, np.full(k, .5), 2)

def test_pooled_effects_keep_the_order_and_need_a_free_seed():
    d = pd.DataFrame(dict(setting=['z','z','a'], method='m', seed=[0,1,0], diff=[1.,3.,5.]))
    table = pooled_effects(d)
    assert table.setting.tolist()==['z','a'] and table.variance[0]==1. and np.isnan(table.variance[1])

def test_missing_and_equal_differences_say_nothing():
    d = pd.DataFrame([('a', m, i, x) for m,values in enumerate(([1.,2.,4.], [0.,1.,1.])) for i,x in enumerate(values)], columns=['setting','method','seed','diff'])
    gap = pd.concat([d, pd.DataFrame([('a', 0, 3, np.nan)], columns=d.columns)], ignore_index=True)
    assert pooled_effects(gap).variance.tolist()==pytest.approx(pooled_effects(d).variance.tolist())
    same = pd.DataFrame([(s, 'm', i, 1.) for s in 'abc' for i in range(3)], columns=d.columns)
    assert pooled_effects(same).variance.isna().all()
    none = effects_over_settings(pooled_effects(same))
    assert len(none)==0 and {'mean','low','high','settings'}<=set(none)
