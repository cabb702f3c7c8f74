"Runs that are stopped, killed, shared and spread: nothing is lost, and the numbers are those of an undisturbed run"
import json, os, platform, resource, shutil, signal, subprocess, sys, threading, time, warnings
from dataclasses import fields, replace
from pathlib import Path

import joblib, pytest, torch
from filelock import FileLock
from joblib.externals.loky import get_reusable_executor

from phantom_nb.experiments.engines import spread
from phantom_nb.experiments.methods import METHODS
from phantom_nb.experiments.runner import Run, load_results, run_many, run_one, train_run
from phantom_nb.experiments.sweep import load_sweep

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent
QUICK = Run(epochs=3, n_train=40)
LONG = Run(epochs=150, n_train=200, method='half_mhe')
NUMBERS = 'accuracy loss train_accuracy train_loss penalty share'.split()

def numbers(row): return {k:row.get(k) for k in NUMBERS}

@pytest.mark.parametrize('spec', [*({'method':o} for o in METHODS if o!='stochastic_depth'), dict(method='stochastic_depth', model='resnet9', width=.25),
    dict(augment=True, opt='sgd', schedule='flat_cos'), dict(precision='bf16', frozen=1, body_lr=.1),
    dict(method='dropout+comhe_random', settings={'comhe_random.every':2}, schedule='step', augment='crop')], ids=str)
def test_stopped_after_every_epoch_equals_undisturbed(spec, tmp_path):
    run = replace(QUICK, seed=2, **spec)
    whole = train_run(run)
    state = tmp_path/'.work'/f'{run.name}.pth' # where `run_one` looks; a deadline that has passed stops after one epoch
    sittings = [train_run(run, checkpoint=state, deadline=0)['status'] for _ in range(run.epochs-1)]
    assert sittings==['paused']*(run.epochs-1) and state.exists() and not list(tmp_path.glob('*.json'))
    row = run_one(run, tmp_path)
    assert whole['status']==row['status']=='done' and numbers(row)==numbers(whole) and row['resumed']==[1,2]
    assert row['seconds']>0 and not list(tmp_path.glob('.work/*'))

def test_time_budget_ends_between_epochs_and_goes_on(tmp_path):
    run = replace(LONG, epochs=400)
    start = time.time()
    assert run_many([run], jobs=1, time_budget=2, store=tmp_path).empty
    assert time.time()-start < 20
    state = torch.load(next(tmp_path.glob('.work/*.pth')), weights_only=True)
    assert 0 < state['epoch'] < 400
    assert run_many([run], jobs=1, time_budget=0, store=tmp_path).empty # no epoch without time

SCRIPT = '''
import sys
from phantom_nb.experiments.runner import Run, run_many
if __name__=='__main__':
    specs = [Run(epochs=150, n_train=200, method='half_mhe', seed=i) for i in range(4)]
    run_many(specs, engine=sys.argv[1], jobs=2, store=sys.argv[2], on_row=lambda r: print(r['seed'], flush=True))
    print('end', flush=True)
'''

def start(engine, store):
    env = {**os.environ, 'PYTHONPATH':str(ROOT), 'RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO':'0'}
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', SCRIPT, engine, str(store)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True)

def in_hand(store, seconds=180):
    "Epochs that are safe of the runs in hand, as soon as one is underway and one run is recorded"
    end = time.time()+seconds
    while time.time()<end:
        found = {}
        for p in store.glob('.work/*.pth'):
            try: found[p.stem] = torch.load(p, weights_only=True)['epoch']
            except FileNotFoundError: continue # recorded meanwhile
        if found and list(store.glob('*.json')) and 5<max(found.values())<120: return found
        time.sleep(.02)
    raise AssertionError("no run gets on")

def descendants(pid):
    "Processes below `pid`, from Linux's /proc"
    parents = {}
    for p in Path('/proc').glob('[0-9]*'):
        try: parents.setdefault(int((p/'stat').read_text().rsplit(')', 1)[1].split()[1]), []).append(int(p.name))
        except (FileNotFoundError, ProcessLookupError): continue
    def below(i): return [k for j in parents.get(i, []) for k in (j, *below(j))]
    return below(pid)

def is_worker(pid):
    try: cmd = Path(f'/proc/{pid}/cmdline').read_bytes()
    except FileNotFoundError: return False
    return b'loky.backend.popen' in cmd or cmd.startswith(b'ray::_call')

def check(store, whole, before, kept):
    df = load_results(store)
    assert len(df)==4 and set(df.status)=={'done'} and dict(zip(df.seed, df.accuracy))==whole
    assert {p.name for p in store.glob('*.json')} >= set(kept) and all((store/k).stat().st_mtime_ns==v for k,v in kept.items())
    for stem,epoch in before.items():
        row = json.loads((store/f'{stem}.json').read_text())
        assert row['resumed'] and row['resumed'][0]>=epoch, f"{stem}: {epoch} epochs were safe, taken up at {row['resumed']}"

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Accuracy by seed, undisturbed"
    df = run_many([replace(LONG, seed=i) for i in range(4)], jobs=2, store=tmp_path_factory.mktemp('whole'))
    return dict(zip(df.seed, df.accuracy))

@pytest.mark.skipif(sys.platform!='linux', reason="finds workers through /proc")
@pytest.mark.parametrize('engine', ['local','ray'])
def test_killed_worker_loses_its_last_epoch_at_most(engine, whole, tmp_path):
    if engine=='ray': pytest.importorskip('ray')
    p = start(engine, tmp_path)
    before = in_hand(tmp_path)
    kept = {f.name:f.stat().st_mtime_ns for f in tmp_path.glob('*.json')}
    workers = [o for o in descendants(p.pid) if is_worker(o)]
    assert workers, "no worker process is found"
    for o in workers: os.kill(o, signal.SIGKILL)
    text = p.communicate(timeout=300)[0]
    assert p.returncode==0 and text.rstrip().endswith('end'), text
    check(tmp_path, whole, before, kept)

@pytest.mark.parametrize('engine', ['local'])
def test_killed_altogether_goes_on(engine, whole, tmp_path):
    p = start(engine, tmp_path)
    before = in_hand(tmp_path)
    kept = {f.name:f.stat().st_mtime_ns for f in tmp_path.glob('*.json')}
    for o in descendants(p.pid): os.kill(o, signal.SIGKILL)
    p.kill()
    p.wait()
    text = start(engine, tmp_path).communicate(timeout=300)[0]
    assert text.rstrip().endswith('end'), text
    check(tmp_path, whole, before, kept)

def test_ray_gives_the_rows_of_local(tmp_path):
    pytest.importorskip('ray')
    specs = [replace(QUICK, seed=i) for i in range(2)] + [replace(QUICK, model='cnn9')]
    a,b = [run_many(specs, engine=e, jobs=2, store=tmp_path/e).set_index('key').sort_index() for e in ('local','ray')]
    assert list(a.status)==list(b.status) and sorted(a.status)==['done','done','failed']
    assert a[['accuracy','loss','train_loss']].equals(b[['accuracy','loss','train_loss']])
    assert len(list((tmp_path/'ray').glob('*.json')))==3

NODES = '''
import sys
from ray.cluster_utils import Cluster
from phantom_nb.experiments.runner import Run, run_many
if __name__=='__main__':
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1))
    other = cluster.add_node(num_cpus=1)
    specs = [Run(epochs=150, n_train=200, method='half_mhe', seed=i) for i in range(4)]
    def told(row):
        print(row['seed'], flush=True)
        if other in cluster.worker_nodes: cluster.remove_node(other, allow_graceful=False) # SIGKILL
    run_many(specs, engine='ray', jobs=1, store=sys.argv[1], address=cluster.address, on_row=told)
    print('end', len(cluster.worker_nodes), flush=True)
'''

def test_a_killed_node_of_a_cluster_loses_nothing(whole, tmp_path):
    "Two nodes on this machine; with the first result, one of them is killed, raylet, workers and all"
    pytest.importorskip('ray')
    env = {**os.environ, 'PYTHONPATH':str(ROOT), 'RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO':'0'}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', NODES, str(tmp_path)], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode==0 and done.stdout.rstrip().endswith('end 0'), done.stdout+done.stderr
    check(tmp_path, whole, {}, {})

FULL = '''
mount -t tmpfs -o size=3m full "$1" || exit 77
head -c 3135000 /dev/zero > "$1/filler"
"$3" -c "from phantom_nb.cli import main; main()" sweep "$2" --out "$1/out" --jobs 2 --engine "$4"
echo "status $? rows $(ls $1/out/runs/*.json | wc -l)"
rm "$1/filler"
"$3" -c "from phantom_nb.cli import main; main()" sweep "$2" --out "$1/out" --jobs 2 --engine "$4"
echo "status $? rows $(ls $1/out/runs/*.json | wc -l)"
'''

@pytest.mark.skipif(not shutil.which('unshare'), reason="a disk of its own needs Linux's user namespaces")
@pytest.mark.parametrize('engine', ['local','ray'])
def test_a_full_disk_ends_a_sweep_with_a_sentence(engine, tmp_path):
    "Three megabytes, of which two rows are free; when there is room, the same command goes on with the other four"
    if engine=='ray': pytest.importorskip('ray')
    file,disk = tmp_path/'six.toml',tmp_path/'disk'
    disk.mkdir()
    file.write_text('data = "digits"\nn_train = 40\nmethods = ["none","mixup"]\nseeds = 3\nepochs = 3\n')
    env = {**os.environ, 'PYTHONPATH':str(ROOT), 'RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO':'0'}
    done = subprocess.run(['unshare', '-Urm', 'sh', '-c', FULL, 'sh', str(disk), str(file), sys.executable, engine], env=env,
        capture_output=True, text=True, timeout=400)
    if done.returncode==77: pytest.skip("no file system can be mounted here")
    told = ' '.join(done.stderr.split())
    assert done.stdout.count('status')==2 and 'status 2 rows 2' in done.stdout and 'status 0 rows 6' in done.stdout, done.stdout+done.stderr
    assert 'No space left on device. What is finished is kept: make room' in told and 'Traceback' not in told and 'File "' not in told

def test_a_run_in_other_hands_is_passed_over_and_waited_for(tmp_path):
    a,b = [replace(QUICK, seed=i) for i in range(2)]
    name,held,finish = f'{a.method}-{a.seed}-{a.key}',threading.Event(),threading.Event()
    def other():
        "Another process: holds the run, records it when told to, lets go"
        with FileLock(tmp_path/'.work'/f'{name}.lock'):
            held.set()
            finish.wait(60)
            time.sleep(1.)
            (tmp_path/f'{name}.json').write_text(json.dumps(train_run(a) | dict(accuracy=.5)))
    (tmp_path/'.work').mkdir()
    t = threading.Thread(target=other)
    t.start()
    held.wait(60)
    assert run_one(a, tmp_path, wait=False) is None
    assert list(run_many([a, b], jobs=1, store=tmp_path, time_budget=4).seed)==[1]
    order = []
    finish.set()
    df = run_many([a, b], jobs=1, store=tmp_path, on_row=lambda r: order.append(r['seed']))
    t.join()
    assert order==[1,0] and dict(zip(df.seed, df.accuracy))[0]==.5

@pytest.mark.skipif(joblib.cpu_count()<2, reason="needs two cores")
def test_two_jobs_are_not_slower_than_one_after_the_other(tmp_path):
    "Threads are shared out: without that, two jobs on two cores fight for them"
    def seconds(jobs, tag):
        specs = [Run(experiment=tag, epochs=40, seed=i) for i in range(4)]
        start = time.perf_counter()
        run_many(specs, jobs=jobs, store=tmp_path/tag)
        return time.perf_counter()-start
    for j in (1,2): seconds(j, f'warm{j}')
    best = {j:min(seconds(j, f'{j}-{i}') for i in range(2)) for j in (1,2)}
    assert best[2] < 1.15*best[1], best

def interrupted(item, device, threads):
    os.kill(os.getpid(), signal.SIGINT)
    return item

def test_workers_do_not_hear_ctrl_c():
    "A terminal sends it to all processes of a command; only the command itself is to act"
    assert sorted(spread(interrupted, [1,2,3], jobs=2))==[1,2,3]

def lacking(item, device, threads):
    warnings.warn('photos: no test image of cat, so results say nothing about that')
    warnings.warn(f'another word of {item}')
    return item

def test_workers_do_not_repeat_what_the_data_lack(capfd):
    "Their parent has read the data and told it once"
    get_reusable_executor().shutdown()  # workers of an earlier test would write where that test was heard
    assert sorted(spread(lacking, [1,2], jobs=2))==[1,2]
    told = capfd.readouterr().err
    assert 'no test image' not in told and 'another word' in told

def faults(item, device, threads):
    "Page faults of a worker when it takes 128 MB in tensors of 16 MB again that it has just freed"
    def take(): return [torch.ones(4_000_000) for _ in range(8)]
    take(), take()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    take()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt-before

@pytest.mark.skipif(platform.libc_ver()[0]!='glibc', reason="another C library")
def test_workers_keep_freed_memory():
    assert max(spread(faults, [1,2], jobs=2))<1_000 # of 31,000 pages

@pytest.mark.skipif(not shutil.which('g++'), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize('method', ['none','half_mhe'])
def test_compiled_run_agrees(method):
    run = replace(QUICK, method=method)
    a,b = train_run(run),train_run(replace(run, compile=True))
    assert b['status']=='done', b.get('error')
    assert abs(a['train_loss']-b['train_loss']) < 1e-3*a['train_loss']

def test_a_worker_that_begins_after_its_parent_ended_ends():
    code = 'import os, time; from phantom_nb.experiments.engines import _end_with_parent as f; f(os.getppid()+1); time.sleep(60)'
    assert subprocess.run([sys.executable, '-c', code], timeout=50).returncode==1

def test_recorded_rows_keep_their_keys():
    "A new field, or a default that changes, must not rename what is recorded"
    rows = [json.loads(o) for p in (ROOT/'results').glob('*.jsonl') for o in p.read_text().splitlines() if '"key"' in o]
    assert len(rows)>=70
    long_tails = {run.key for run in load_sweep(ROOT/'results'/'atlas.toml').runs if run.imbalance>1}
    for r in rows:
        if r.get('imbalance', 1)>1: # so many train that are fewer than the run asked for
            assert r['key'] in long_tails, (r['experiment'], r['method'])
            continue
        given = {f.name:r[f.name] for f in fields(Run) if f.name in r}
        # a row says how many images trained; the run may have asked for all of them, or for so many a class
        asked = [r['n_train'], None] if r.get('per_class') is None else [Run.n_train]
        assert r['key'] in [Run(**given | dict(n_train=n)).key for n in asked], (r['experiment'], r['method'])

@pytest.mark.skipif(not shutil.which('g++'), reason="torch.compile needs a C++ compiler")
def test_compiled_run_in_sixteen_bits():
    row = train_run(replace(QUICK, compile=True, precision='bf16'))
    assert row['status']=='done', row.get('error')

def deadly(i, device=None, threads=None):
    "Kills its process if it is number 0"
    if i==0: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(.01)
    return i

def test_an_item_that_kills_its_process_stops_no_other():
    found = []
    with pytest.raises(ValueError, match='1 of 12 ended their process whenever they were tried'):
        for i in spread(deadly, range(12), jobs=2, device='cpu', retries=1): found.append(i)
    assert sorted(found)==list(range(1, 12))
