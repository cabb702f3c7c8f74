"Specifications, the store, and comparisons that fail, are interrupted, or share a folder"
import json, os, signal, subprocess, sys, time, warnings
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from fastai.basics import Learner, load_learner
from PIL import Image
from torch import nn

from phantom_nb import cli
from phantom_nb.data import AUGMENTATIONS, channel_stats, get_dls, load_dataset
from phantom_nb.experiments import learner, run as run_module, runner
from phantom_nb.experiments.bench import BENCHES
from phantom_nb.experiments.checkpoint import Checkpoint
from phantom_nb.experiments.engines import ENGINES
from phantom_nb.experiments.learner import SCHEDULES, OPTIMIZERS, evaluate, hold_out, loaders_for, make_learner, product_types
from phantom_nb.experiments.methods import METHODS, make_method
from phantom_nb.experiments.runner import Run, load_results, name_images, run_many, run_one, settle_precision, train_run
from phantom_nb.experiments.store import recorded_row, run_file, save_results, write_atomic, write_row
from phantom_nb.models import MODELS
from phantom_nb.pretrained import FreezeNorm

QUICK = Run(epochs=2, n_train=40)

def test_key_names_the_run_and_nothing_else():
    assert Run(method='mhe').key == Run(method='mhe', settings={'s':2., 'lam':1.}).key == Run(method='mhe', settings=(('lam',1.),)).key
    others = [replace(Run(), **{k:v}) for k,v in dict(data='fashion_mnist', n_train=None, n_valid=10, augment=True, model='wrn', width=2., depth=2.,
        method='mixup', opt='sgd', lr=.1, schedule='constant', bs=32, epochs=3, seed=1, experiment='x', mom=.8, stop_loss=.1, size=16, padding='reflect',
        imbalance=10., label_noise=.2, per_class=3, pretrained=True, frozen=1, body_lr=.1, folds=5, test=True, precision='bf16', compile=True).items()]
    others.append(Run(pretrained=True, frozen_norm=True))
    assert len({o.key for o in [Run(), *others]}) == len(others)+1

def test_key_is_stable_across_processes():
    code = "from phantom_nb.experiments.runner import Run; print(Run(method='half_mhe', settings=dict(lam=.3)).key)"
    keys = {subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONHASHSEED':str(i)}).stdout for i in (1,2)}
    assert keys == {Run(method='half_mhe', settings=dict(lam=.3)).key+'\n'}

@pytest.mark.parametrize('kw,what', [(dict(data='digit'), "did you mean 'digits'"), (dict(method='droput'), "did you mean 'dropout'"),
    (dict(model='resnet1'), "did you mean 'resnet18'"), (dict(opt='adamw'), "give one of adam, sgd"), (dict(schedule='linear'), 'one_cycle'),
    (dict(epochs=1.5), 'epochs=1.5'), (dict(seed=-1), 'seed=-1'), (dict(n_train=0), 'n_train=0'), (dict(bs=1), 'bs=1'), (dict(lr=0.), 'lr=0.0'),
    (dict(method='mhe', settings=dict(lamda=1)), "did you mean 'lam'"), (dict(settings=dict(p=.1)), "setting of none='p'"), (dict(schedule='step:2'), 'step:0.1@0.5,0.75'), (dict(data='./none'), 'no such folder'),
    (dict(method='none+mhe'), 'leave out none'), (dict(method='mhe+mhe'), 'occurs twice'), (dict(mom=1.), 'mom=1.0'), (dict(folds=1), 'folds=1'),
    (dict(frozen=60), 'frozen=60'), (dict(frozen_norm=True), 'pretrained=True, too'), (dict(label_noise=1.), 'label_noise=1.0'), (dict(imbalance=.5), 'imbalance=0.5'), (dict(test=1), 'test=1'),
    (dict(model='timm:'), 'give one of')], ids=str)
def test_wrong_specification_is_refused(kw, what):
    with pytest.raises(ValueError, match=what): Run(**kw)

@pytest.mark.parametrize('method', [m for m in METHODS if m!='stochastic_depth']) # which needs residual blocks: tests/test_libraries.py
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
    original,learner.load_data = learner.load_data,shuffled
    try: b = run_one(QUICK, tmp_path/'b', threads=1)
    finally: learner.load_data = original
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
    write_row(file, recorded_row(tmp_path, QUICK) | dict(accuracy=.123))
    assert run_one(QUICK, tmp_path)['accuracy']==.123
    assert len(run_many([QUICK, QUICK], jobs=1, store=tmp_path))==1 and len(list(tmp_path.glob('*.json')))==1 and not list(tmp_path.glob('.work/*'))

def test_spoilt_rows_are_named_put_aside_and_trained_again(tmp_path):
    whole = run_one(QUICK, tmp_path)
    file, = tmp_path.glob('*.json')
    good = file.read_text()
    for spoilt,why in ((good[:len(good)//2],'cut short'), (good.replace(str(whole['accuracy']), '0.99'),'was changed'), (json.dumps(whole | dict(key='0')),'another run')):
        file.write_text(spoilt)
        with pytest.warns(UserWarning, match=f'{file.name} .*{why}'): again = run_one(QUICK, tmp_path)
        assert again['accuracy']==whole['accuracy'] and Path(f'{file}.bad').read_text()==spoilt

def test_a_spoilt_row_does_not_hide_the_others(tmp_path):
    df = run_many([replace(QUICK, seed=s) for s in range(3)], jobs=1, store=tmp_path/'runs')
    save_results(df, tmp_path/'all.jsonl')
    lines = (tmp_path/'all.jsonl').read_text().splitlines()
    (tmp_path/'all.jsonl').write_text('\n'.join([lines[0][:50], lines[1], lines[2].replace('"seed": 2', '"seed": 1')]))
    with pytest.warns(UserWarning, match='all.jsonl, line 1, is cut short.*line 3, was changed'): rows = load_results(tmp_path/'all.jsonl')
    assert list(rows.seed)==[1]
    next((tmp_path/'runs').glob('*.json')).write_text('{')
    with pytest.warns(UserWarning, match='cut short'): assert len(load_results(tmp_path/'runs'))==2

def test_rows_that_were_put_together_by_other_means_are_read(tmp_path):
    "Another order, gaps left out and whole numbers with a point leave a row what it was"
    df = run_many([replace(QUICK, seed=s, method=m) for s in range(2) for m in ('none','mhe')], jobs=1, store=tmp_path/'runs')
    raw = pd.DataFrame([json.loads(p.read_text()) for p in (tmp_path/'runs').glob('*.json')])
    assert 'digest' in raw
    lines = [json.dumps({k:float(v) if type(v) is int else v for k,v in sorted(row.items()) if v is not None and v==v}) for row in raw.to_dict('records')]
    (tmp_path/'a.jsonl').write_text('\n'.join(lines))
    save_results(raw, tmp_path/'b.jsonl')
    for name in ('a','b'): assert set(load_results(tmp_path/f'{name}.jsonl').key)==set(df.key)

def test_other_images_make_another_run(tmp_path):
    "A row of other images is never taken for a row of these; a copy of the folder has the same digest"
    from PIL import Image
    rng = np.random.default_rng(0)
    def picture(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (12,12), dtype='uint8')).save(path)
    for name in ('a','b'):
        for k in range(5): picture(tmp_path/'photos'/name/f'{k}.png')
    run = Run(data=str(tmp_path/'photos'), n_train=None, epochs=1, experiment='x')
    first, = name_images([run])
    row = run_one(run, tmp_path/'runs')
    assert row['images']==first.images and row['key']==first.key!=run.key and run_one(run, tmp_path/'runs')==row
    os.utime(tmp_path/'photos'/'a'/'0.png', (1,1))
    assert name_images([run])==[first], 'the time alone says nothing'
    picture(tmp_path/'photos'/'a'/'0.png')
    second, = name_images([run])
    assert second.key!=first.key and run_one(run, tmp_path/'runs')['key']==second.key and len(list((tmp_path/'runs').glob('*.json')))==2
    with pytest.raises(ValueError, match='not those that the run began with'): make_learner(first)

def test_failed_and_diverged_runs_are_recorded_and_stop_nobody(tmp_path):
    specs = [replace(QUICK, model='cnn9'), replace(QUICK, lr=1e30), QUICK]
    df = run_many(specs, jobs=1, store=tmp_path)
    assert list(df.status)==['failed','diverged','done'] and '8×8' in df.error[0]
    assert len(load_results(tmp_path))==3 and load_results(tmp_path).accuracy.notna().sum()>=1
    for p in tmp_path.glob('*.json'): json.loads(p.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))

def test_time_budget_starts_no_further_run(tmp_path):
    assert len(run_many([replace(QUICK, seed=s) for s in range(50)], jobs=1, time_budget=.5, store=tmp_path)) < 50

def test_wrong_engine_and_jobs(tmp_path):
    with pytest.raises(ValueError, match="engine='slurm'"): run_many([QUICK], engine='slurm', store=tmp_path)
    with pytest.raises(ValueError, match="jobs=-1"): run_many([QUICK], jobs=-1, store=tmp_path)

def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    write_atomic(tmp_path/'a', 'old')
    with pytest.raises(TypeError): write_atomic(tmp_path/'a', 3)
    (tmp_path/'folder').mkdir()
    with pytest.raises(IsADirectoryError): write_atomic(tmp_path/'folder', 'new')
    assert (tmp_path/'a').read_text()=='old' and sorted(p.name for p in tmp_path.iterdir())==['a','folder'], 'nothing is left lying about'

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
    text = p.communicate(timeout=240)[0]
    kept = {f.name:f.stat().st_mtime_ns for f in tmp_path.glob('runs/*.json')}
    assert p.returncode==130 and 3<=len(kept)<16, text
    assert 'none' in text and 'goes on from here' in text and 'Traceback' not in text and 'Warning' not in text, text
    assert (tmp_path/'comparison.png').exists() and len(pd.read_csv(tmp_path/'results.csv'))>=3
    p = start_compare(tmp_path)
    text = p.communicate(timeout=300)[0]
    assert 'half_mhe' in text and f'{len(kept)} of 16 runs are recorded already' in text and p.returncode==0
    files = {f.name:f.stat().st_mtime_ns for f in tmp_path.glob('runs/*.json')}
    assert len(files)==16 and all(files[k]==v for k,v in kept.items())

def alive(group):
    "Processes of a group that still run"
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try: state,_,pgrp = stat.read_text().rpartition(')')[2].split()[:3]
        except OSError: continue
        if int(pgrp)==group and state!='Z': found.append(stat.parent.name)
    return found

@pytest.mark.processes
@pytest.mark.parametrize('signals', [[signal.SIGINT]*2, [signal.SIGINT]*9, [signal.SIGKILL]], ids=['two','nine','kill'])
def test_no_worker_outlives_its_command(signals, tmp_path):
    "Two Ctrl-C in a row, or a killed command: what it started is gone within seconds; a further Ctrl-C does not stop what is shown"
    p = start_compare(tmp_path)
    wait_for(tmp_path, 1)
    for s in signals:
        os.kill(p.pid, s)
        time.sleep(.1)
    text = p.communicate(timeout=60)[0]
    end = time.time()+20
    while alive(p.pid) and time.time()<end: time.sleep(.2)
    assert not alive(p.pid) and 'Traceback' not in text, text
    if signal.SIGINT in signals: assert p.returncode==130 and 'goes on from here' in text and (tmp_path/'comparison.png').exists(), text

@pytest.mark.processes
def test_two_processes_share_a_folder(tmp_path):
    ps = [start_compare(tmp_path, seeds=2) for _ in range(2)]
    texts = [p.communicate(timeout=300)[0] for p in ps]
    assert [p.returncode for p in ps]==[0,0], texts
    assert len(load_results(tmp_path/'runs'))==4

def test_names_are_those_of_the_tables():
    assert set(run_module.MODEL_NAMES)==set(MODELS) and set(run_module.AUGMENT_NAMES)==set(AUGMENTATIONS)
    assert set(cli.BENCH_NAMES)=={*BENCHES,'step'} and tuple(cli.ENGINE_NAMES)==tuple(ENGINES)
    assert set(run_module.SCHEDULE_NAMES)=={*SCHEDULES,'step'} and set(run_module.OPTIMIZER_NAMES)==set(OPTIMIZERS)

def test_methods_combine():
    three = make_method('weight_decay+dropout+half_mhe', **{'half_mhe.lam':3., 'weight_decay.decouple':False})
    assert (three.wd, three.decouple, three.dropout, [cb.lam for cb in three.cbs])==(.1, False, .5, [3.])
    learn = make_learner(replace(QUICK, method='weight_decay+dropout+half_mhe', opt='sgd', mom=.5))
    learn.create_opt()
    assert learn.wd==.1 and learn.opt.hypers[0]['mom']==.5
    assert train_run(replace(QUICK, method='label_smoothing+dropout+phantom'))['status']=='done'
    with pytest.raises(ValueError, match="setting of dropout.mhe='lam'"): Run(method='dropout+mhe', settings=dict(lam=1.))

def test_coupled_decay_is_added_to_the_gradient():
    "One step of plain SGD: both forms agree; with momentum, only the coupled one is remembered"
    def after(steps, **kw):
        learn = make_learner(replace(QUICK, method='weight_decay', opt='sgd', mom=.9, schedule='constant', epochs=steps, n_train=40, bs=64, **kw), device='cpu')
        learn.fit(steps)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    a,b = [[after(n, settings=dict(decouple=o)) for n in (1,2)] for o in (True,False)]
    assert torch.allclose(a[0], b[0], atol=1e-6) and not torch.allclose(a[1], b[1], atol=1e-6)

def test_lazy_penalty_is_reachable_and_named_only_when_asked():
    assert Run(method='mhe', settings=dict(every=1)).key==Run(method='mhe').key and 'every' not in dict(Run(method='mhe').settings)
    lazy = Run(method='comhe_random', settings=dict(every=4))
    assert dict(lazy.settings)['every']==4 and make_method('comhe_random', every=4).cbs[0].every==4 and lazy.key!=Run(method='comhe_random').key

def test_retired_settings_are_read_and_not_made():
    old = dict(lam=.3, mode='contrast', k=None, alpha=.5, tau=.3, weights='mean', detach=False, queue=0)
    assert Run(method='phantom', settings=old)==Run(method='phantom')
    assert Run(method='phantom', settings=old | dict(queue=8)).key!=Run(method='phantom').key
    with pytest.raises(ValueError, match="no setting 'queue' any more"): make_method('phantom', queue=8)

def test_training_stops_at_a_loss(tmp_path):
    row = run_one(replace(QUICK, epochs=50, n_train=100, stop_loss=.5), tmp_path)
    assert row['status']=='done' and row['loss_reached'] and 1<row['epochs_run']<50
    assert not train_run(replace(QUICK, stop_loss=1e-9))['loss_reached']

def test_head_is_trained_alone_at_first():
    learn = make_learner(replace(QUICK, frozen=1, body_lr=.1, schedule='constant'), device='cpu')
    before = [p.clone() for p in learn.model.parameters()]
    seen = []
    class Look(learner.Callback):
        def after_epoch(self): seen.append([bool((p!=q).any()) for p,q in zip(self.model.parameters(), before)])
    learn.fit(2, cbs=Look())
    moved = sum(seen[0])
    assert 0<moved<len(before)-2 and sum(seen[1])>moved
    assert [h['lr'] for h in learn.opt.hypers]==pytest.approx([.001, .01/10**.5, .01])

def test_frozen_norm_is_part_of_a_run():
    fake = replace(QUICK, model='timm:tf_efficientnet_lite0', pretrained=True, frozen_norm=True)
    for run in (fake, replace(fake, frozen_norm=False)):
        assert any(isinstance(cb, FreezeNorm) for cb in learner.callbacks_of(run, None))==run.frozen_norm

@pytest.mark.parametrize('model', ['small_cnn','resnet9'])
def test_products_of_weights_really_are_bf16(model):
    "fastai's to_bf16 asks for CUDA's autocast, which is off on a CPU"
    run = replace(QUICK, model=model, data='fashion_mnist' if model=='resnet9' else 'digits')
    try: learn = make_learner(replace(run, precision='bf16'), device='cpu')
    except FileNotFoundError: pytest.skip("needs Fashion-MNIST")
    assert product_types(learn)=={torch.bfloat16} and not torch.is_autocast_enabled('cpu')
    assert product_types(make_learner(run, device='cpu'))=={torch.float32}
    assert not learn.model._forward_hooks and not learn.model._forward_pre_hooks

def test_penalties_stay_float32_in_bf16():
    learn = make_learner(replace(QUICK, precision='bf16', method='half_mhe'), device='cpu')
    cb = learn.cbs.filter(lambda o: hasattr(o, 'penalty'))[0]
    types,original = [],cb.penalty
    def penalty():
        types.append((torch.is_autocast_enabled('cpu'), (p:=original()).dtype))
        return p
    cb.penalty = penalty
    learn.fit(1)
    assert set(types)=={(False, torch.float32)}

def test_autocast_is_off_again_after_an_error():
    learn = make_learner(replace(QUICK, precision='bf16'), device='cpu')
    def broken(*args): raise RuntimeError('on purpose')
    list(learn.model.modules())[-1].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match='on purpose'): learn.fit(1)
    assert not torch.is_autocast_enabled('cpu')

def test_precision_is_settled_once(tmp_path):
    runs = [replace(QUICK, precision='auto', seed=s) for s in range(3)]
    settled = settle_precision(runs, tmp_path)
    assert len({o.precision for o in settled})==1 and settled[0].precision in ('float32','bf16')
    note = tmp_path/'.work/precision.jsonl'
    assert len(note.read_text().splitlines())==1
    note.write_text(note.read_text().replace(f'"precision": "{settled[0].precision}"', '"precision": "bf16"'))
    assert {o.precision for o in settle_precision(runs, tmp_path)}=={'bf16'}
    assert {r for r in run_many(runs, jobs=1, store=tmp_path).precision}=={'bf16'}

def test_folds_hold_out_every_image_once():
    data = learner.load_dataset('digits')
    parts = [hold_out(data, 5, seed) for seed in range(5)]
    assert sum(len(o.x_test) for o in parts)==len(data.x_train)+len(data.x_test)==len(parts[0].x_train)+len(parts[0].x_test)
    counts = torch.stack([torch.bincount(o.y_test) for o in parts])
    assert (counts.max(0).values-counts.min(0).values).max()<=1
    sums = [sorted(o.x_test.flatten(1).float().mul(torch.arange(1, 65)).sum(1).tolist()) for o in parts]
    assert sorted(sum(sums, []))==sorted(torch.cat([data.x_train, data.x_test]).flatten(1).float().mul(torch.arange(1, 65)).sum(1).tolist())
    assert not torch.equal(hold_out(data, 5, 5).y_test[:50], parts[0].y_test[:50]) or not torch.equal(hold_out(data, 5, 5).x_test[:50], parts[0].x_test[:50])

def test_fields_of_data_reach_the_loaders():
    learn = make_learner(replace(QUICK, n_train=None, per_class=4, imbalance=4.), device='cpu')
    counts = torch.bincount(learn.dls.train.dataset.y)
    assert counts.max()==4 and counts.min()==1
    assert make_learner(replace(QUICK, size=16), device='cpu').dls.one_batch()[0].shape[-2:]==(16,16)

@pytest.mark.parametrize('args', [['--help'], ['--version'], ['compare','--data','digitz'], ['compare','--methods','mpu'], ['bench','speed']], ids=str)
def test_answers_without_pytorch(args):
    "Help and refusals import nothing heavy (their time: less than half a second on a free machine)"
    code = f"import sys; from phantom_nb import cli\ntry: cli.main({args})\nexcept SystemExit: pass\nprint(sorted({{'torch','pandas','fastai','matplotlib','scipy','numpy'}} & set(sys.modules)))"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.stdout.strip().endswith('[]'), out.stdout+out.stderr

@pytest.mark.parametrize('args,what', [(['compare','--data','digitz'], "did you mean 'digits'"), (['compare','--methods','mpu'], "did you mean 'amp'"),
    (['compare','--seeds','0'], 'seeds=0'), (['compare','--n-train','5000'], '5000'), (['bench','speed'], "benchmark='speed'"),
    (['data','cifar11'], "did you mean 'cifar10'"), (['compare','--time-budget','soon'], 'such as 90s, 30m'), (['sweep','none.toml'], 'does not exist'),
    (['compare','--model','timm:x','--epochs','0'], 'epochs=0'), (['data','--download'], 'needs a name'), (['compare','--model','cnn'], "model='cnn'"),
    (['compare','--data','cifar10'], 'phantom_nb data cifar10 --download')], ids=str)
def test_command_line_refuses_with_a_sentence(args, what, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in ('PHANTOM_NB_DATA','TORCH_HOME'): monkeypatch.setenv(k, str(tmp_path))
    with pytest.raises(SystemExit) as e: cli.main(args)
    err = ' '.join(capsys.readouterr().err.split())
    assert e.value.code==2 and what in err and 'Traceback' not in err
    assert not (tmp_path/'compare').exists()

def test_a_data_set_is_loaded_once_a_process_and_a_folder_every_time(tmp_path, monkeypatch):
    seen,load = [],learner.load_dataset
    monkeypatch.setattr(learner, 'load_dataset', lambda name, *args, **kwargs: seen.append(str(name)) or load('digits'))
    learner._known_data.cache_clear()
    for _ in range(2):
        make_learner(QUICK, device='cpu')
        learner.load_data(replace(QUICK, data=str(tmp_path)))
    learner._known_data.cache_clear()
    assert seen.count('digits')==1 and seen.count(str(tmp_path))==2

def test_all_that_is_wrong_with_a_run_is_said_at_once():
    with pytest.raises(ValueError) as e: Run(data='digit', model='cnn', lr=0., epochs=0, method='mpu', opt='sdg')
    for what in ("data='digit'", "model='cnn'", 'lr=0.0', 'epochs=0', "method='mpu'", "opt='sdg'"): assert what in str(e.value)
    assert 'folder of images' in str(e.value) and 'timm:NAME' in str(e.value)

@pytest.mark.parametrize('kw', [dict(data=3), dict(experiment='../up'), dict(method='isda', settings=dict(diagonal='x')),
    dict(method='mhe', settings=dict(every=True)), dict(lr=10**400), dict(method='mixup', settings=dict(alpha=-1))], ids=str)
def test_wrong_kinds_are_refused(kw):
    with pytest.raises(ValueError): make_method(Run(**kw).method, **kw.get('settings', {}))

def test_the_optimizer_remembers_across_epochs_of_a_frozen_start():
    "fastai's `freeze` forgets the moments; here each parameter counts the steps since it was thawed"
    learn = make_learner(replace(QUICK, epochs=4, frozen=2), device='cpu')
    learn.fit(4)
    n,steps = len(learn.dls.train),[int(s['step']) for s in learn.opt.state.values() if 'step' in s]
    assert set(steps)=={2*n, 4*n}

def test_a_trace_is_of_the_kind_that_is_asked_for(tmp_path):
    run = replace(QUICK, n_valid=20)
    rows = {trace:run_many([run], store=tmp_path, trace=trace).trace[0] for trace in ('means', 'layers', 'measures')}
    assert 'by_layer' not in rows['means'] and 'by_layer' in rows['layers'] and 'final' in rows['measures']
    with pytest.raises(ValueError, match="trace='layer'.*did you mean 'layers'"): run_many([run], store=tmp_path, trace='layer')
    with pytest.raises(ValueError, match='give n_valid='): run_many([QUICK], store=tmp_path, trace='means')

def _timeless(trace): return {k:v for k,v in trace.items() if k not in ('measuring','training')}

@pytest.mark.parametrize('method', ['none', 'targeted_sparsity'])
@pytest.mark.parametrize('trace', ['layers', 'measures'])
def test_a_traced_run_that_pauses_after_every_epoch_ends_as_if_it_had_not(tmp_path, trace, method):
    run,state = replace(QUICK, n_train=60, n_valid=20, epochs=4, method=method),tmp_path/'state'
    whole = train_run(run, device='cpu', trace=trace)
    sittings = [train_run(run, device='cpu', checkpoint=state, deadline=0., trace=trace) for _ in range(4)]
    assert [row['status'] for row in sittings]==['paused']*3+['done'] and sittings[-1]['resumed']==[1,2,3]
    assert _timeless(sittings[-1]['trace'])==_timeless(whole['trace']) and sittings[-1]['train_loss']==whole['train_loss']
    assert len(whole['trace']['points' if trace=='measures' else 'valid_loss'])>=2

@pytest.mark.parametrize('trace', ['means', 'measures'])
def test_a_traced_run_that_is_killed_in_an_epoch_goes_on(tmp_path, monkeypatch, trace):
    run,state = replace(QUICK, n_train=60, n_valid=20, bs=10, epochs=3),tmp_path/'state'
    whole = train_run(run, device='cpu', trace=trace)
    class Dies(Checkpoint):
        def __init__(self, path, deadline): super().__init__(path, deadline, interval=0.)
        def after_batch(self):
            super().after_batch()
            if (self.epoch,self.iter)==(1,3): raise KeyboardInterrupt
    with monkeypatch.context() as patched:
        patched.setattr(runner, 'Checkpoint', Dies)
        with pytest.raises(KeyboardInterrupt): train_run(run, device='cpu', checkpoint=state, trace=trace)
    row = train_run(run, device='cpu', checkpoint=state, trace=trace)
    assert row['resumed']==[1] and _timeless(row['trace'])==_timeless(whole['trace']) and row['train_loss']==whole['train_loss']

def test_no_failure_takes_the_place_of_a_result(tmp_path, monkeypatch):
    run = replace(QUICK, n_valid=20)
    accuracy = run_many([run], store=tmp_path, jobs=1).valid_accuracy[0]
    monkeypatch.setattr(runner, 'train_run', lambda run, *_: dict(key=run.key, method=run.method, seed=run.seed, status='failed', error='RuntimeError: x'))
    with pytest.warns(UserWarning, match='kept as it was'): df = run_many([run], store=tmp_path, jobs=1, trace='means')
    assert df.valid_accuracy[0]==accuracy and recorded_row(tmp_path, run)['status']=='done'

def test_a_failure_of_the_surroundings_is_tried_again(tmp_path):
    rows = [run_many([QUICK], store=tmp_path/'runs', root=root, jobs=1).iloc[0] for root in (tmp_path/'gone', tmp_path)]
    assert rows[0].error.startswith('FileNotFoundError') and rows[1].status=='done'

@pytest.mark.parametrize('settings', ['alpha=1', None, 3], ids=str)
def test_settings_are_a_dict(settings):
    with pytest.raises(ValueError, match=r"give a dict, \{'alpha'"): Run(method='mixup', settings=settings)

def test_what_was_missing_outside_is_tried_again(tmp_path):
    "A library, a connection, or the folder as it was; what fails by itself stays failed"
    run = Run(n_train=20, epochs=1)
    for error,again in (("ModuleNotFoundError: No module named 'timm'", True), ('ImportError: timm is not installed', True), ('ConnectionError: weights were not fetched', True),
        ("ImagesChanged: data='photos': its images are not those", True), ('ValueError: no such model', False)):
        write_row(run_file(tmp_path, run), dict(key=run.key, method='none', seed=0, status='failed', error=error))
        assert (run_one(run, tmp_path, device='cpu')['status']=='done')==again

def test_two_methods_tell_of_the_one_that_is_felt_most():
    alone,both = (runner.train_run(Run(n_train=40, epochs=1, method=name), device='cpu') for name in ('half_mhe','half_mhe+ema'))
    assert both['share']==pytest.approx(alone['share']) and alone['share']>0 and both['penalty']==pytest.approx(alone['penalty'])

def test_a_learner_of_the_engine_judges_and_predicts(tmp_path):
    "Validation is left out behind training alone; on a loaded file, too"
    learn = make_learner(Run(n_train=48, n_valid=20, bs=16, epochs=1), device='cpu')
    learn.fit(1)
    assert learn.get_preds(ds_idx=1)[0].shape==(20,10)
    image = learn.dls.train_ds[0][0]
    learn.export(tmp_path/'a.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'a.pkl')
    assert len(loaded.predict(image)[2])==10 and loaded.predict(image)[0]==learn.predict(image)[0]

def test_steps_are_timed_with_all_layers(monkeypatch):
    seen = []
    make = make_learner
    monkeypatch.setattr(learner, 'make_learner', lambda run, *args: seen.append(run.frozen) or make(run, *args))
    learner.step_seconds(Run(n_train=40, epochs=3, frozen=1, body_lr=.3), device='cpu', steps=2)
    assert seen==[0]

def test_what_is_held_out_shapes_no_normalisation():
    data = load_dataset('digits')
    held = hold_out(replace(data, mean=torch.tensor([.9]), std=torch.tensor([.1])), 5, 0)
    mean,std = channel_stats(held.x_train)
    assert held.mean.allclose(mean) and held.std.allclose(std)

def test_uneven_classes_are_loaded_whole(tmp_path):
    "A learner of a large and a small class"
    rng = np.random.default_rng(0)
    for name,n in (('a', 1400), ('b', 8)):
        (tmp_path/'train'/name).mkdir(parents=True)
        for i in range(n): Image.fromarray(rng.integers(0, 255, (4,4,3), dtype='uint8')).save(tmp_path/'train'/name/f'{i}.png')
    dls = get_dls(tmp_path, n_valid=0, bs=16, size=4, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(48, 2)))
    found = loaders_for(learn, str(tmp_path))
    assert len(found.train_ds)==len(dls.train_ds)>1000
