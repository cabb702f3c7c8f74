"Specifications, the store, and comparisons that fail, are interrupted, or share a folder"
import json, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from torch import nn

from phantom_nb import cli
from phantom_nb.experiments import runner
from phantom_nb.experiments.methods import METHODS, make_method
from phantom_nb.experiments.runner import Run, evaluate, load_results, make_learner, run_many, run_one, save_results, write_atomic

QUICK = Run(epochs=2, n_train=40)

def test_key_names_the_run_and_nothing_else():
    assert Run(method='mhe').key == Run(method='mhe', settings={'s':2., 'lam':1.}).key == Run(method='mhe', settings=(('lam',1.),)).key
    others = [replace(Run(), **{k:v}) for k,v in dict(data='fashion_mnist', n_train=None, n_valid=10, augment=True, model='wrn', width=2., depth=2.,
        method='mixup', opt='sgd', lr=.1, schedule='constant', bs=32, epochs=3, seed=1, experiment='x').items()]
    assert len({o.key for o in [Run(), *others]}) == len(others)+1

def test_key_is_stable_across_processes():
    code = "from phantom_nb.experiments.runner import Run; print(Run(method='half_mhe', settings=dict(lam=.3)).key)"
    keys = {subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONHASHSEED':str(i)}).stdout for i in (1,2)}
    assert keys == {Run(method='half_mhe', settings=dict(lam=.3)).key+'\n'}

@pytest.mark.parametrize('kw,what', [(dict(data='digit'), "did you mean 'digits'"), (dict(method='droput'), "did you mean 'dropout'"),
    (dict(model='resnet'), "did you mean 'resnet18'"), (dict(opt='adamw'), "choose from adam, sgd"), (dict(schedule='cosine'), 'one_cycle'),
    (dict(epochs=1.5), 'epochs=1.5'), (dict(seed=-1), 'seed=-1'), (dict(n_train=0), 'n_train=0'), (dict(bs=1), 'bs=1'), (dict(lr=0.), 'lr=0.0'),
    (dict(method='mhe', settings=dict(lamda=1)), "did you mean 'lam'"), (dict(settings=dict(p=.1)), "unknown setting of none 'p'")], ids=str)
def test_wrong_specification_is_refused(kw, what):
    with pytest.raises(ValueError, match=what): Run(**kw)

@pytest.mark.parametrize('method', METHODS)
def test_every_method_trains_and_is_reproducible(method, tmp_path):
    a,b = [run_one(replace(QUICK, method=method, seed=3), tmp_path/str(i), threads=1) for i in (1,2)]
    assert a['status']=='done', a.get('error')
    for k in ('accuracy', 'loss', 'train_loss', 'penalty'): assert a.get(k)==b.get(k)
    assert {'source','commit','torch','device','seconds','date','params'} <= set(a) and a['settings']==METHODS[method].defaults

def test_methods_meet_the_same_data_and_weights():
    def start(m):
        learn = make_learner(replace(QUICK, method=m, seed=5))
        return [p.clone() for p in learn.model.parameters()],[b for b in learn.dls.train]
    (w0,b0),*others = map(start, METHODS)
    for w,b in others:
        assert all(map(torch.equal, w0, w))
        assert all(torch.equal(s, t) for x,y in zip(b0, b) for s,t in zip(x, y))

def test_methods_change_what_they_say():
    assert make_learner(replace(QUICK, method='weight_decay')).wd == .1 and make_learner(QUICK).wd == 0
    drops = [[m.p for m in make_learner(replace(QUICK, method=o)).model.modules() if isinstance(m, nn.Dropout)] for o in ('none','dropout')]
    assert drops == [[0.],[.5]]
    assert make_method('label_smoothing').loss_func.func.eps==.1 and make_method('mixup').cbs[0].distrib.concentration1==.4

def test_training_moves_only_with_the_training_data(tmp_path):
    "The test images choose nothing: their labels may be anything"
    a = run_one(QUICK, tmp_path/'a', threads=1)
    def shuffled(*args, **kwargs):
        data = original(*args, **kwargs)
        return replace(data, y_test=data.y_test.flip(0))
    original,runner.load_dataset = runner.load_dataset,shuffled
    try: b = run_one(QUICK, tmp_path/'b', threads=1)
    finally: runner.load_dataset = original
    assert a['train_loss']==b['train_loss'] and a['accuracy']!=b['accuracy']

def test_evaluate_against_by_hand():
    x,y = torch.randn(7, 4),torch.tensor([0,1,2,0,1,2,0])
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(.9))
    got = evaluate(net, [(x[:5],y[:5]), (x[5:],y[5:])])
    z = net[0](x)
    assert np.isclose(got['loss'], nn.functional.cross_entropy(z, y).item()) and np.isclose(got['accuracy'], (z.argmax(1)==y).float().mean().item())
    assert evaluate(net, [])=={}

def test_recorded_run_is_not_run_again(tmp_path):
    run_one(QUICK, tmp_path)
    file, = tmp_path.glob('*.json')
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(accuracy=.123)))
    assert run_one(QUICK, tmp_path)['accuracy']==.123
    assert len(run_many([QUICK, QUICK], jobs=1, store=tmp_path))==1 and len(list(tmp_path.glob('*.json')))==1 and not list(tmp_path.glob('.work/*'))

def test_failed_and_diverged_runs_are_recorded_and_stop_nobody(tmp_path):
    specs = [replace(QUICK, model='cnn9'), replace(QUICK, lr=1e30), QUICK]
    df = run_many(specs, jobs=1, store=tmp_path)
    assert list(df.status)==['failed','diverged','done'] and '8×8' in df.error[0]
    assert len(load_results(tmp_path))==3 and load_results(tmp_path).accuracy.notna().sum()>=1
    for p in tmp_path.glob('*.json'): json.loads(p.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))

def test_time_budget_starts_no_further_run(tmp_path):
    assert len(run_many([replace(QUICK, seed=s) for s in range(50)], jobs=1, time_budget=.5, store=tmp_path)) < 50

def test_wrong_engine_and_jobs(tmp_path):
    with pytest.raises(ValueError, match="unknown engine 'slurm'"): run_many([QUICK], engine='slurm', store=tmp_path)
    with pytest.raises(ValueError, match="jobs=-1"): run_many([QUICK], jobs=-1, store=tmp_path)

def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    write_atomic(tmp_path/'a', 'old')
    with pytest.raises(TypeError): write_atomic(tmp_path/'a', 3)
    assert (tmp_path/'a').read_text()=='old'

def test_results_in_one_file(tmp_path):
    df = run_many([replace(QUICK, seed=s) for s in (1,0)], jobs=1, store=tmp_path/'runs')
    save_results(df, tmp_path/'all.jsonl')
    one,folder = load_results(tmp_path/'all.jsonl'),load_results(tmp_path/'runs')
    assert list(one.seed)==[0,1] and set(one.accuracy)==set(folder.accuracy)
    with pytest.raises(FileNotFoundError, match='does not exist'): load_results(tmp_path/'none')
    (tmp_path/'empty').mkdir()
    assert len(load_results(tmp_path/'empty'))==0

def start_compare(out, seeds=8, **kwargs):
    cmd = [str(Path(sys.executable).parent/'phantom_nb'), 'compare', '--methods', 'none,half_mhe', '--seeds', str(seeds),
        '--epochs', '20', '--jobs', '2', '--out', str(out)]
    return subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **kwargs)

def wait_for(out, n, seconds=120):
    end = time.time()+seconds
    while len(list(out.glob('runs/*.json')))<n:
        assert time.time()<end, "the comparison does not get on"
        time.sleep(.05)

@pytest.mark.processes
def test_interrupted_comparison_keeps_shows_and_resumes(tmp_path):
    p = start_compare(tmp_path)
    wait_for(tmp_path, 3)
    os.killpg(p.pid, signal.SIGINT)
    text = p.communicate(timeout=60)[0]
    kept = {f.name:f.stat().st_mtime_ns for f in tmp_path.glob('runs/*.json')}
    assert p.returncode==130 and 3<=len(kept)<16, text
    assert 'none' in text and 'goes on from here' in text and 'Traceback' not in text and 'Warning' not in text, text
    assert (tmp_path/'comparison.png').exists() and len(pd.read_csv(tmp_path/'results.csv'))>=3
    p = start_compare(tmp_path)
    text = p.communicate(timeout=300)[0]
    assert 'half_mhe' in text and f'{len(kept)} of 16 runs are recorded already' in text and p.returncode==0
    files = {f.name:f.stat().st_mtime_ns for f in tmp_path.glob('runs/*.json')}
    assert len(files)==16 and all(files[k]==v for k,v in kept.items())

@pytest.mark.processes
def test_two_processes_share_a_folder(tmp_path):
    ps = [start_compare(tmp_path, seeds=2) for _ in range(2)]
    texts = [p.communicate(timeout=300)[0] for p in ps]
    assert [p.returncode for p in ps]==[0,0], texts
    assert len(load_results(tmp_path/'runs'))==4

@pytest.mark.parametrize('args,what', [(['compare','--data','digitz'], "did you mean 'digits'"), (['compare','--methods','mpu'], 'choose from none'),
    (['compare','--seeds','0'], 'seeds=0'), (['compare','--n-train','5000'], '5000'), (['bench','speed'], "unknown benchmark 'speed'"),
    (['data','cifar11'], "did you mean 'cifar10'"), (['data','--download'], 'needs a name'), (['compare','--model','cnn'], "unknown model 'cnn'"),
    (['compare','--data','cifar10'], 'phantom_nb data cifar10 --download')], ids=str)
def test_command_line_refuses_with_a_sentence(args, what, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in ('PHANTOM_NB_DATA','TORCH_HOME'): monkeypatch.setenv(k, str(tmp_path))
    with pytest.raises(SystemExit) as e: cli.main(args)
    err = ' '.join(capsys.readouterr().err.split())
    assert e.value.code==2 and what in err and 'Traceback' not in err
    assert not (tmp_path/'compare').exists()
