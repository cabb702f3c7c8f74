"Experiments from a file: checked, tuned with equal budgets, stopped and taken up, shown and exported"
import json, re, time, tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, pytest
from scipy.stats import ttest_1samp

from typer.testing import CliRunner
from phantom_nb import cli
from phantom_nb.experiments import learner
from phantom_nb.experiments.methods import METHODS, all_methods, search_space
from phantom_nb.experiments.report import run_rows, tell_apart
from phantom_nb.experiments.runner import Run, load_results
from phantom_nb.experiments.sweep import load_sweep, methods_of, parse_sweep, run_sweep, runs_of
from phantom_nb.experiments.stats import mean_interval
from phantom_nb.experiments.tune import choice_variance, leave_one_out, mark_best, study_name, tune_many, tune_one, tuned_interval, with_chosen, with_values

pytest.importorskip('optuna')
QUICK = Run(epochs=2, n_train=40)
USUAL = [name for name,method in METHODS.items() if not method.rival]

def test_all_methods_of_a_file_differ_from_one_another():
    assert methods_of('all')==all_methods() and 'phantom_contrast' not in all_methods() and 'none' in all_methods()

def test_grid_of_methods_data_sizes_seeds():
    s = parse_sweep(dict(methods=['none','mhe'], seeds=[3,5], epochs=2, settings=dict(mhe=dict(lam=[.1,1.])),
        runs=[dict(data='digits', n_train=[50,100]), dict(data='fashion_mnist', n_train=100, seeds=1, methods='mhe')]), 'x')
    got = [(o.data, o.n_train, o.seed, o.method, dict(o.settings).get('lam')) for o in s.runs]
    grid = [('digits', n, seed, m, lam) for n in (50,100) for seed in (3,5) for m,lam in (('none',None), ('mhe',.1), ('mhe',1.))]
    assert got == grid + [('fashion_mnist', 100, 0, 'mhe', lam) for lam in (.1, 1.)]
    assert {o.experiment for o in s.runs}=={'x'} and {o.epochs for o in s.runs}=={2}
    assert len(parse_sweep({}).runs)==5*len(all_methods())

@pytest.mark.parametrize('spec,what', [('epoch = 3', "key='epoch' (did you mean 'epochs'?)"), ('[[runs]]\nn_trian = 3', "did you mean 'n_train'"),
    ('methods = ["mpu"]', "method='mpu'"), ('[settings.mhe]\nlamb = 1', "did you mean 'lam'"), ('[settings.mpu]\nlam = 1', "method='mpu'"),
    ('[tune]\ntrial = 1', "did you mean 'trials'"), ('seeds = 0', 'seeds=0'), ('seeds = true', 'seeds=True'), ('epochs = "ten"', "epochs='ten'"),
    ('', 'the file is empty'), ('# methods = ["mhe"]', 'the file is empty'),
    ('data = ["digits", "mnist"]', "data='mnist'"), ('epochs = ', 'x.toml'), ('tune = 3', 'tune=3'), ('runs = 3', 'runs=3'), ('settings = 1', 'settings=1'),
    ('trace = "all"', "trace='all'"), ('trace = "means"\n[tune]', 'keeps no traces'), ('[tune]\ntrials = 0', 'trials=0'), ('methods = []', 'methods=[]'), ('seeds = [0.5]', 'seed=0.5'),
    ('[settings.mhe]\nlam = [1, 2]\n[tune]', 'settings.mhe.lam: tuning chooses it'), ('lr = [0.1, 0.2]\n[tune]', 'lr: tuning chooses it'),
    ('[settings]\nmhe = "lam=1"', "settings.mhe='lam=1': write it as a table"),
    ('[settings.phantom]\nlam = -1', 'lam=-1'), ('[settings.phantom]\nmode = ["mix", "mxi"]', "mode='mxi'"), ('[settings.mhe]\nlam = "one"', "lam='one'")], ids=str)
def test_wrong_file_is_refused_by_name(spec, what, tmp_path):
    (tmp_path/'x.toml').write_text(spec)
    with pytest.raises(ValueError) as e: load_sweep(tmp_path/'x.toml')
    assert what in str(e.value) and 'x.toml' in str(e.value)

def test_tuning_leaves_several_values_of_other_settings(tmp_path):
    (tmp_path/'x.toml').write_text('methods = ["mhe"]\nepochs = [1, 2]\n[settings.mhe]\ns = [0, 2]\n[tune]')
    assert len(load_sweep(tmp_path/'x.toml').runs)==20

def test_all_that_is_wrong_in_a_file_is_said_at_once(tmp_path):
    (tmp_path/'x.toml').write_text('epoch = 3\nlr = "fast"\nmethods = ["mpu", "mixup"]\nn_train = []\n[settings.mixup]\nalpha = -1\n[tune]\ntrial = 3\nseeds = 0\n')
    with pytest.raises(ValueError) as e: load_sweep(tmp_path/'x.toml')
    for what in ("did you mean 'epochs'", "lr='fast'", "method='mpu'", 'n_train=[]', "alpha=-1", "did you mean 'trials'", 'seeds=0'): assert what in str(e.value), what
    assert str(e.value).count('x.toml')==1

@pytest.mark.parametrize('line,hint', [('lr = 1.', 'write 1.0 for 1.'), ('lr = [.1, .2]', '0.5 for .5'), ('methods = [none, mixup]', 'a name stands in quotes'),
    ('data = digits', 'a name stands in quotes'), ('seeds = 3\nseeds = 4', 'a key is there twice')], ids=str)
def test_slips_of_toml_are_explained(line, hint, tmp_path):
    (tmp_path/'x.toml').write_text(line)
    with pytest.raises(ValueError) as e: load_sweep(tmp_path/'x.toml')
    assert hint in str(e.value)

@pytest.mark.parametrize('spec,what', [('seeds = 1000000000', 'seeds=1000000000'), ('seeds = 1000\nlr = [' + ','.join(['0.01']*1000) + ']', 'that is too many'),
    ('[tune]\nlr = [1, 0.1, "log"]', 'write it like [0.001, 0.03, "log"]'), ('runs = []', 'runs=[]'), ('experiment = "../up"', "experiment='../up'")], ids=str)
def test_absurd_files_are_refused_quickly(spec, what, tmp_path):
    (tmp_path/'x.toml').write_text(spec)
    start = time.time()
    with pytest.raises(ValueError, match=re.escape(what)): load_sweep(tmp_path/'x.toml')
    assert time.time()-start<10

def test_settings_reach_a_method_inside_a_combination():
    s = parse_sweep(dict(methods=['half_mhe','mixup+half_mhe'], seeds=1, settings={'half_mhe':dict(s=0., lam=[.1,1.]), 'mixup+half_mhe':{'half_mhe.lam':2.}}))
    found = [(run.method, {k.split('.')[-1]:v for k,v in run.settings}) for run in s.runs]
    assert [(m, v['lam'], v['s']) for m,v in found]==[('half_mhe',.1,0.), ('half_mhe',1.,0.), ('mixup+half_mhe',2.,0.)]

def test_settings_of_an_absent_method_are_refused():
    with pytest.raises(ValueError, match='settings.mhe: mhe is not among the methods'): parse_sweep(dict(methods=['none'], settings=dict(mhe=dict(lam=1.))))
    tables = [dict(methods=['mhe']), dict(methods=['none','dropout+half_mhe'])]
    assert parse_sweep(dict(runs=tables, settings=dict(mhe=dict(lam=1.), half_mhe=dict(lam=2.)))).runs
    with pytest.raises(ValueError, match='settings.mhe'): parse_sweep(dict(runs=[tables[0], tables[1] | dict(settings=dict(mhe=dict(lam=1.)))]))

@pytest.mark.parametrize('tune', [{}, dict(tune=dict(trials=1, n_valid=20, seeds=1))], ids=['plain','tuned'])
def test_interrupted_sweep_keeps_its_rows(tune, tmp_path):
    "What is in after Ctrl-C is written, also what an earlier sitting left; rows of another file are not among them"
    spec = dict(methods=['none','dropout'], seeds=3, epochs=1, n_train=40, **tune)
    run_sweep(parse_sweep(dict(spec, seeds=1, epochs=2)), tmp_path, jobs=1)
    old = set(load_results(tmp_path/'results.jsonl').key)
    for n in (2,1):
        told = []
        def stop(row):
            told.append(row['key'])
            if len(told)==n: raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt): run_sweep(parse_sweep(spec), tmp_path, jobs=1, on_row=stop)
        assert set(load_results(tmp_path/'results.jsonl').key)>=set(told) and len(load_results(tmp_path/'results.jsonl'))==2
    assert not old & set(load_results(tmp_path/'results.jsonl').key)

def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist'): load_sweep(tmp_path/'none.toml')

def test_trials_never_evaluate_the_test_images(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        data = original(*args, **kwargs)
        return replace(data, x_test=data.x_test[:0], y_test=data.y_test[:0])
    original = learner.load_dataset
    whole = tune_one(QUICK, tmp_path/'a', trials=2, n_valid=100, seeds=1)
    monkeypatch.setattr(learner, 'load_dataset', broken)
    df = tune_one(QUICK, tmp_path/'b', trials=2, n_valid=100, seeds=1)
    assert df.valid_accuracy.tolist()==whole.valid_accuracy.tolist() and not {'accuracy','loss'} & (set(df)|set(whole))

def test_every_method_gets_the_same_budget(tmp_path):
    runs = [replace(QUICK, method=m, seed=s) for s in range(3) for m in USUAL]
    df = tune_many(runs, tmp_path, trials=2, n_valid=100, seeds=1, jobs=1)
    assert df.groupby('method').size().to_dict()==dict.fromkeys(USUAL, 2) and df.groupby('method').chosen.sum().eq(1).all()
    assert set(df.seed)=={1000} and set(df.n_valid)=={100} and set(df.n_train)=={40}
    first = df[df.trial==0]
    assert set(first.lr)=={QUICK.lr} and all(dict(Run(method=r.method).settings)==r.settings for r in first.itertuples())
    for r in df[df.trial==1].itertuples():
        for k,(lo,hi,_) in search_space(r.method).items(): assert lo <= r.settings.get(k, r.lr) <= hi
    tuned = with_chosen(runs, df, n_valid=100, seeds=1)
    assert len(tuned)==len(runs)
    for a,b in zip(runs, tuned):
        r = df[(df.method==a.method) & df.chosen].iloc[0]
        assert replace(a, lr=b.lr, settings=b.settings)==b and (b.lr, dict(b.settings))==(r.lr, r.settings)

def test_stopped_study_proposes_what_it_would_have_proposed(tmp_path):
    run = replace(QUICK, method='half_mhe')
    whole = tune_one(run, tmp_path/'a', trials=5, n_valid=100, seeds=1)
    cut,i = [],0
    while not len(cut): # stops in the middle of a trial, however slow the machine
        i += 1
        cut = tune_one(run, tmp_path/'b', trials=5, n_valid=100, seeds=1, deadline=time.time()+.05*i)
    assert 1<=len(cut)<5 and not cut.chosen.any()
    again = tune_one(run, tmp_path/'b', trials=5, n_valid=100, seeds=1)
    cols = ['lr','settings','valid_accuracy','valid_loss','chosen']
    pd.testing.assert_frame_equal(whole[cols], again[cols])

def test_a_diverged_trial_is_never_chosen(tmp_path):
    df = tune_one(replace(QUICK, lr=1e30), tmp_path, trials=2, n_valid=100, seeds=1)
    assert df.status.tolist()==['diverged','done'] and df.chosen.tolist()==[False,True]

def test_a_trial_is_the_mean_of_its_seeds(tmp_path):
    df = tune_one(replace(QUICK, method='dropout'), tmp_path, trials=2, n_valid=100)
    assert df.groupby('trial').seed.apply(list).tolist()==[[1000,1001,1002]]*2 and df.groupby('trial').lr.nunique().eq(1).all()
    assert df[df.chosen].trial.unique().tolist()==[df.groupby('trial').valid_accuracy.mean().idxmax()] and df.chosen.sum()==3
    tuned, = with_chosen([replace(QUICK, method='dropout')], df, n_valid=100)
    assert tuned.lr==df[df.chosen].lr.iloc[0]
    with pytest.raises(ValueError, match='seeds=0'): tune_many([QUICK], tmp_path, seeds=0)

def test_values_keep_three_digits_and_other_settings():
    run = with_values(Run(method='mhe', settings=dict(s=0.)), dict(lr=.0123456, lam=2.34567))
    assert run.lr==.0123 and dict(run.settings)==dict(lam=2.35, s=0.)

SPEC = """
experiment = "small"
methods = ["none", "dropout"]
seeds = 2
epochs = 2
n_train = [40, 80]
tune = {trials = 2, n_valid = 100, seeds = 1}
"""

def test_sweep_stops_at_its_budget_and_goes_on(tmp_path):
    sweep = parse_sweep(tomllib.loads(SPEC))
    rows,trials = run_sweep(sweep, tmp_path, time_budget=.2, jobs=1)
    n = len(rows)
    assert n<8
    told = []
    rows,trials = run_sweep(sweep, tmp_path, jobs=1, on_row=lambda r: told.append(r['key']))
    assert len(rows)==8==len(told) and len(trials)==8 and set(rows.status)=={'done'}
    kept = load_results(tmp_path/'results.jsonl')
    assert set(kept.key)==set(rows.key) and set(kept.experiment)=={'small'} and len(load_results(tmp_path/'trials.jsonl'))==8
    assert {'space','chosen','trial','study'} <= set(json.loads((tmp_path/'trials.jsonl').read_text().splitlines()[0]))

def test_a_sweep_that_has_begun_is_told_apart_by_its_plan():
    "Two runs that differ in method and rate: alone they look like a comparison, and are none"
    runs = [Run(method=m, lr=lr, n_train=40) for m in ('none','mhe') for lr in (.01,.001)]
    rows = run_rows(runs).iloc[[0,3]]
    assert tell_apart(rows)[1]==['data','n_train'] and tell_apart(rows, run_rows(runs))[1]==['data','n_train','lr']

def test_a_grid_of_settings_and_models_is_told_apart(tmp_path, capsys, monkeypatch):
    "Each model has its comparison, and each setting of a method is a method of its own"
    monkeypatch.chdir(tmp_path)
    Path('grid.toml').write_text('methods = ["none", "mhe"]\nseeds = 2\nepochs = 1\nn_train = 40\nwidth = [0.5, 1.0]\n[settings.mhe]\nlam = [0.1, 1.0]\n')
    with pytest.raises(SystemExit) as e: cli.main(['sweep', 'grid.toml', '--jobs', '1'])
    out = capsys.readouterr()
    assert e.value.code==0, out.err
    df,over = tell_apart(load_results('sweeps/grid/results.jsonl'))
    assert over==['data','n_train','width'] and set(df.method)=={'none','mhe lam=0.1','mhe lam=1.0'}
    assert 'mhe lam=0.1' in out.out and 'digits, 40, width=0.5' in out.out and 'digits, 40, width=1' in out.out

def test_sweep_and_results_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('small.toml').write_text(SPEC)
    with pytest.raises(SystemExit) as e: cli.main(['sweep', 'small.toml', '--jobs', '1'])
    out = capsys.readouterr().out
    assert e.value.code==0 and '[12/12]' in out and 'tuned dropout on digits 40' in out and 'digits, 80' in out and 'results.jsonl' in out
    def results(*args):
        with pytest.raises(SystemExit) as e: cli.main(['results', 'sweeps/small', *args])
        return e.value.code,capsys.readouterr()
    for wrong,right in (('--baseline=non',"baseline='non' (did you mean 'none'?)"), ('--metric=accurac',"did you mean 'accuracy'?")):
        code,text = results(wrong)
        assert code==2 and right in text.err.replace('\n', ' ')
    code,text = results('--where', 'n_train=40', '--export', 'rows.jsonl', '--plot', 'forest.png')
    assert code==0 and 'digits, 40' in text.out and 'digits, 80' not in text.out and Path('forest.png').stat().st_size>1000
    assert set(load_results('rows.jsonl').n_train)=={40} and len(load_results('rows.jsonl'))==4
    assert results('--metric', 'loss', '--export', 'table.md')[0]==0 and Path('table.md').read_text().count('\n')==6
    assert results('--export', 'rows.csv')[0]==0 and np.isclose(pd.read_csv('rows.csv').accuracy.mean(), load_results('sweeps/small/results.jsonl').accuracy.mean())
    for args,what in ((['--where','n_train'], 'column=value'), (['--where','metod=none'], "did you mean 'method'"), (['--where','n_train=3'], 'no runs'),
        (['--over','data'], 'occurs twice'), (['--export','rows.xls'], '.jsonl, .csv, .md'), (['--metric','acuracy'], "acuracy")):
        code,text = results(*args)
        assert code==2 and what in ' '.join(text.err.split()), (args, text.err)

def test_a_sweep_on_validation_images_is_shown_and_leaves_the_test_images_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('valid.toml').write_text('methods = ["none", "phantom_contrast"]\nseeds = 2\nepochs = 1\nn_train = 40\nn_valid = 100\n[settings.phantom_contrast]\nk = [1, 2]\n')
    with pytest.raises(SystemExit) as e: cli.main(['sweep', 'valid.toml', '--jobs', '1'])
    out = capsys.readouterr()
    rows = load_results('sweeps/valid/results.jsonl')
    assert e.value.code==0, out.err
    assert len(rows)==6 and 'accuracy' not in rows and {'valid_accuracy','valid_similarity','valid_confusion'} <= set(rows) and 'vs none' in out.out

ROOT = Path(__file__).parents[1]

def test_examples_of_the_readme_are_sweeps():
    blocks = re.findall(r'```toml\n(.*?)```', (ROOT/'README.md').read_text(), re.S)
    assert blocks and all(parse_sweep(tomllib.loads(o), 'x').runs for o in blocks)

def test_what_tuning_chose_does_not_part_a_method_from_its_baseline():
    "Learning rates differ between methods that were tuned; only the networks tell comparisons apart"
    df,over = tell_apart(load_results(ROOT/'results/sparsity.jsonl'))
    assert over==['data','n_train','model'] and df.groupby(over).method.apply(lambda o: 'none' in set(o)).all()

def test_a_file_that_holds_no_results_is_named(tmp_path):
    (tmp_path/'mine.toml').write_text('seeds = 2')
    with pytest.raises(ValueError, match="mine.toml holds no results: give a folder of results"): load_results(tmp_path/'mine.toml')

def test_settings_that_are_no_numbers_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('tuned.toml').write_text('methods = ["phantom", "targeted_sparsity"]\nseeds = 1\nepochs = 1\nn_train = 40\n[tune]\ntrials = 1\nn_valid = 20\n')
    with pytest.raises(SystemExit) as e: cli.main(['sweep', 'tuned.toml', '--jobs', '1'])
    out = capsys.readouterr()
    assert e.value.code==0, out.err
    assert 'k=None' in out.out and 'layers=auto' in out.out

def test_specifications_of_the_record_make_the_recorded_runs():
    "Traces are a kind of sweep: their files give the runs that are recorded; studies keep their names"
    for name in ('sparsity-warning-trained','sparsity-long','sparsity-fair'):
        rows = load_results(ROOT/f'results/{name}.jsonl')
        assert len(rows) and set(rows.key)<={run.key for run in load_sweep(ROOT/f'results/{name}.toml').runs}
    for name in ('baselines','comhe','phantom','sparsity'):
        trials = load_results(ROOT/f'results/{name}-trials.jsonl')
        found = {study_name(run, *(part.tune[k] for k in ('n_valid','lr','seeds'))) for part in load_sweep(ROOT/f'results/{name}.toml').parts for run in part.runs}
        assert found==set(trials.study)

@pytest.mark.parametrize('name', ['lazy','practice'])
def test_specifications_that_wait_are_sound(name):
    runs = load_sweep(ROOT/f'results/{name}.toml').runs
    assert len({run.key for run in runs})==len(runs) and {run.model for run in runs}=={'resnet9'}

def test_a_traced_sweep_keeps_a_number_an_epoch(tmp_path):
    spec = dict(trace='layers', methods=['none'], seeds=1, epochs=3, n_train=60, n_valid=100)
    rows,_ = run_sweep(parse_sweep(spec), tmp_path, jobs=1)
    plain,_ = run_sweep(parse_sweep({k:v for k,v in spec.items() if k!='trace'}), tmp_path/'plain', jobs=1)
    trace = rows.trace[0]
    assert len(trace['valid_loss'])==3 and len(trace['by_layer']['samples'])==len(trace['layers'])
    assert rows.valid_accuracy[0]==plain.valid_accuracy[0] and rows.key[0]==plain.key[0]
    again,_ = run_sweep(parse_sweep(spec), tmp_path, jobs=1)
    assert again.date[0]==rows.date[0]

def test_all_images_and_joined_methods_in_a_file():
    s = parse_sweep(dict(methods='dropout+mhe', seeds=1, n_train=['all',50], settings={'dropout+mhe':{'mhe.lam':[1.,2.]}}))
    assert [(run.n_train, dict(run.settings)['mhe.lam']) for run in s.runs]==[(None,1.), (None,2.), (50,1.), (50,2.)]

# Intervals that carry the choice

def test_the_choice_has_no_variance_where_it_is_sure_and_much_where_settings_change_places():
    sure = np.array([[5.,6.,7.], [1.,2.,3.]])
    assert choice_variance(sure)==0
    unsure = np.array([[0.,0.,9.], [2.,2.,2.]])
    assert choice_variance(unsure)>0 and choice_variance(unsure)==choice_variance(unsure) and abs(choice_variance(10*unsure)/choice_variance(unsure)-100)<1e-6
    with pytest.raises(ValueError, match='seeds of scores=1'): choice_variance(np.ones((3,1)))

def test_no_seed_judges_a_choice_that_it_took_part_in():
    rng = np.random.default_rng(0)
    scores,values = rng.normal(size=(4,6)),rng.normal(size=(4,6))
    loop = [values[np.delete(scores, s, 1).mean(1).argmax(),s] for s in range(6)]
    assert np.allclose(leave_one_out(scores, values), loop)

def test_an_interval_without_choice_is_students():
    d = np.random.default_rng(0).normal(.3, 1, 8)
    mean,low,high,p = tuned_interval(d)
    assert np.allclose([mean,low,high], mean_interval(d)) and abs(p-ttest_1samp(d, 0).pvalue)<1e-12
    wider = tuned_interval(d, 1.)
    assert wider[1]<low and wider[2]>high and wider[3]>p

# factorial designs

FACTORS = [[dict(opt='sgd', lr=.1), dict(opt='adam', lr=.003, weight_decay=dict(wd=.01))], [{}, dict(dropout=dict(p=.2))], [dict(bs=20), dict(bs=60)]]

def test_a_factorial_design_has_every_combination_once_in_a_fixed_order():
    sweep = parse_sweep(dict(data='digits', epochs=2, factors=FACTORS, seeds=2))
    runs = sweep.runs
    assert len(runs)==len({run.key for run in runs})==16 and [run.seed for run in runs]==[0]*8+[1]*8
    assert {run.method for run in runs}=={'none','dropout','weight_decay','weight_decay+dropout'}
    both = next(run for run in runs if '+' in run.method)
    assert dict(both.settings)['weight_decay.wd']==.01 and dict(both.settings)['dropout.p']==.2 and both.opt=='adam'
    few = parse_sweep(dict(data='digits', epochs=2, factors=FACTORS, seeds=[3], take=5)).runs
    assert [replace(run, seed=0) for run in few]==runs[:5]

@pytest.mark.parametrize('table, said', [(dict(factors=FACTORS, methods=['none']), 'methods'), (dict(factors=[]), 'factors='),
    (dict(factors=[{}]), 'factors='), (dict(factors=FACTORS, take=0), 'take=0'), (dict(take=3), 'factors=None'),
    (dict(factors=[[dict(bs=20)], [dict(bs=30)]]), 'bs is set by two factors'), (dict(factors=[[dict(dropout=dict(p=2.))]]), 'p=2'),
    (dict(factors=[[dict(dropout=.2)]]), 'dropout')])
def test_a_wrong_design_is_refused(table, said):
    with pytest.raises(ValueError, match=said): parse_sweep(dict(data='digits', **table))

@pytest.mark.parametrize('name, runs', [('intraclass', 632), ('intraclass-digits', 192)])
def test_the_designs_of_the_intraclass_study(name, runs):
    sweep = load_sweep(Path(__file__).parent.parent/'results'/f'{name}.toml')
    assert len(sweep.runs)==len({run.key for run in sweep.runs})==runs and {part.trace for part in sweep.parts}=={'measures'}

@pytest.mark.parametrize('given,expected', [({}, (None,'auto')), (dict(n_train=6, augment='none'), (6,'none')), (dict(per_class=2), (200,'auto'))])
def test_a_folder_trains_on_all_its_images_augmented(given, expected, tmp_path):
    "As `compare` does; what the file says stays, also in a factorial design; a data set by name is as it was"
    (tmp_path/'photos').mkdir()
    table = dict(data=str(tmp_path/'photos'), **given)
    run, = runs_of(dict(table, methods=['none'], seeds=1), 'x')
    assert (run.n_train, run.augment)==expected
    designs = runs_of(dict(table, factors=[[dict(lr=.1), dict(lr=.2)]], seeds=1), 'x')
    assert {(run.n_train, run.augment) for run in designs}=={expected}
    assert runs_of(dict(methods=['none'], seeds=1), 'x')[0].augment is False

# What a file may get wrong without a word

def test_equal_runs_have_one_key():
    "2 and 2. are the same number; a folder may be a Path"
    assert Run(width=2).key==Run(width=2.).key and Run(method='half_mhe', settings=dict(lam=3)).key==Run(method='half_mhe', settings=dict(lam=3.)).key
    assert Run(data=Path('/tmp')).key==Run(data='/tmp').key
    assert len(parse_sweep(dict(methods=['none'], seeds=[0, 0, 1], epochs=[1, 1])).runs)==2

@pytest.mark.parametrize('spec,says', [(dict(trace='means'), 'give n_valid='), (dict(experiment=['a','b']), 'give one name')], ids=str)
def test_what_cannot_run_is_refused_at_once(spec, says):
    with pytest.raises(ValueError, match=says): parse_sweep(dict(methods=['none'], seeds=1, **spec))

def test_a_run_without_its_trace_is_trained_again(tmp_path):
    spec = dict(methods=['none'], seeds=1, epochs=1, n_train=20, n_valid=20)
    rows,_ = run_sweep(parse_sweep(spec), tmp_path, jobs=1)
    assert 'trace' not in rows
    rows,_ = run_sweep(parse_sweep(dict(spec, trace='means')), tmp_path, jobs=1)
    assert len(rows.trace[0]['valid_loss'])==1

def test_home_is_found_behind_an_equals_sign(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    Path('home').mkdir()
    Path('one.toml').write_text('methods = ["none"]\nseeds = 1\nepochs = 1\nn_train = 20\n')
    with pytest.raises(SystemExit): cli.main(['sweep', 'one.toml', '--jobs', '1', '--out=~/res'])
    assert (tmp_path/'home/res/results.jsonl').exists() and not Path('~').exists()
    for words,says in (['--over', 'settings'], 'holds no single values'), (['--where', 'lr=all'], 'no runs'), (['--where', 'lr=fast'], 'lr is a number'):
        with pytest.raises(SystemExit) as e: cli.main(['results', '~/res', *words])
        assert e.value.code and says in ' '.join(capsys.readouterr().err.split())

@pytest.mark.parametrize('spec,what', [(dict(methods=['half_mhe:lam=3']), r'\[settings.half_mhe\]'), (dict(lam=[1., 3.]), r'\[settings.METHOD\]'),
    (dict(experiment='tune'), 'give another name'), (dict(data=''), 'give a name or a folder')], ids=str)
def test_a_slip_is_shown_its_place(spec, what):
    with pytest.raises(ValueError, match=what): parse_sweep(spec)

def test_a_study_that_another_process_has_is_not_waited_for_beyond_the_deadline(tmp_path):
    from filelock import FileLock
    path = tmp_path/'studies'/f'{study_name(QUICK, 20, (.001, .03, "log"), 1)}.log'
    path.parent.mkdir()
    start = time.time()
    with FileLock(path.with_suffix('.lock')): df = tune_one(QUICK, tmp_path, trials=1, n_valid=20, lr=(.001, .03, 'log'), seeds=1, deadline=start+.5)
    assert df.empty and time.time()-start<5

def test_trials_are_laid_out_again_too(tmp_path):
    spec = parse_sweep(dict(methods=['none'], seeds=1, n_train=40, epochs=1, tune=dict(trials=1, n_valid=20, seeds=1)), 'x')
    first = run_sweep(spec, tmp_path, jobs=1)[1]
    import shutil
    shutil.rmtree(tmp_path/'runs')
    again = run_sweep(spec, tmp_path, jobs=1)[1]
    assert again.date.tolist()==first.date.tolist()

def test_a_choice_wants_two_seeds_and_numbers():
    with pytest.raises(ValueError, match='seeds of scores=1'): leave_one_out([[.1],[.9]], [[1.],[2.]])
    with pytest.raises(ValueError, match='hold NaN'): leave_one_out([[.1,np.nan],[.9,.2]], np.ones((2, 2)))
    assert leave_one_out([[.1]], [[.7]])==[.7] # one setting is no choice

def test_rows_beside_an_old_folder_of_runs_are_kept(tmp_path):
    "As a pull brings them: three rows in the file, of which the folder has one"
    sweep = parse_sweep(dict(data='digits', methods='none', seeds=3, n_train=20, epochs=1))
    run_sweep(sweep, tmp_path, jobs=1, device='cpu')
    for file in sorted((tmp_path/'runs').glob('*.json'))[1:]: file.unlink()
    before = load_results(tmp_path/'results.jsonl')
    df,_ = run_sweep(sweep, tmp_path, time_budget=-1., jobs=1, device='cpu')
    assert len(before)==len(df)==len(load_results(tmp_path/'results.jsonl'))==3

def test_failed_rows_of_runs_on_all_images_come_back(tmp_path):
    sweep = parse_sweep(dict(seeds=1, methods='none', n_train='all', per_class=100_000, epochs=1, data='digits'))
    for _ in range(2):
        df,_ = run_sweep(sweep, tmp_path, jobs=1, device='cpu')
        assert df.status.tolist()==['failed']
        for file in (tmp_path/'runs').glob('*.json'): file.unlink()

def test_unfinished_work_is_no_result(tmp_path):
    run_sweep(parse_sweep(dict(data='digits', methods='none', seeds=1, n_train=20, epochs=1)), tmp_path, jobs=1, device='cpu')
    (tmp_path/'runs'/'.work').mkdir(exist_ok=True)
    (tmp_path/'runs'/'.work'/'precision.jsonl').write_text('{"what": {"data": "dig')
    assert len(load_results(tmp_path/'runs'))==1

def test_a_diverged_trial_scores_nothing():
    "Though its network of NaN has an accuracy"
    rows = [dict(trial=0, status='done', valid_accuracy=.45, valid_loss=.8), dict(trial=1, status='diverged', valid_accuracy=.5, valid_loss=None)]
    assert mark_best(rows, 2).chosen.tolist()==[True,False]

def test_where_all_trials_failed_nothing_is_chosen():
    rows = [dict(trial=i, status='failed') for i in range(2)]
    assert mark_best(rows, 2).chosen.tolist()==[False,False]

def test_trials_without_enough_images_are_refused_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('t.toml').write_text('methods = ["none","mixup"]\nseeds = 1\nepochs = 1\nn_train = 50\n[tune]\ntrials = 2\nseeds = 1\n')
    with pytest.raises(SystemExit): cli.main(['sweep','t.toml','--jobs','1'])
    assert '[tune]: n_valid=1000' in ' '.join(capsys.readouterr().err.split()) and not Path('sweeps').exists()

@pytest.mark.parametrize('spec', [dict(n_train=[20,100], per_class=5), dict(factors=[[dict(n_train=20)]], per_class=5)])
def test_two_ways_to_say_how_many_train_are_refused(spec):
    with pytest.raises(ValueError, match='n_train=20 and per_class=5: give one of them'): parse_sweep(dict(data='digits', seeds=1, **spec))

def test_a_failed_run_is_tried_again_once_its_file_is_gone(tmp_path):
    sweep = parse_sweep(dict(data='digits', methods='none', seeds=1, n_train='all', per_class=100_000, epochs=1))
    dates = []
    for _ in range(3):
        df,_ = run_sweep(sweep, tmp_path, jobs=1, device='cpu')
        dates.append(df.date.iloc[0])
        if len(dates)<2: continue
        for file in (tmp_path/'runs').glob('*.json'): file.unlink()
        time.sleep(1.1)
    assert dates[0]==dates[1]<dates[2]

def test_a_study_remembers_a_diverged_trial_with_zero(tmp_path, monkeypatch):
    from phantom_nb.experiments import tune
    monkeypatch.setattr(tune, 'run_one', lambda run, *args, **kwargs: dict(key=run.key, status='diverged', valid_accuracy=.5))
    run = Run(method='dropout', n_train=20)
    tune_one(run, tmp_path, trials=1, n_valid=10, seeds=2)
    study,done = tune.open_study(next((tmp_path/'studies').glob('*.log')), study_name(run, 10, tune.LR, 2), {})
    assert len(done)==1 and study.best_value==0

def test_no_trial_learns_from_images_that_judge(tmp_path):
    with pytest.raises(ValueError, match='folds=5: trials would learn'): tune_one(Run(n_train=None, folds=5, n_valid=100), tmp_path)

def test_a_sweep_says_what_each_kind_of_run_sees(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('a.toml').write_text('data="digits"\nmethods="none"\nn_train=100\nepochs=1\nseeds=1\n[[runs]]\n[[runs]]\naugment="crop"\n[[runs]]\nimbalance=10.0\n')
    said = ' '.join(CliRunner().invoke(cli.app, ['sweep','a.toml','--jobs','1']).output.split())
    assert 'not augmented' in said and 'are augmented (crop)' in said and said.count('images train')==3
