"Sizes at which a matrix of all pairs cannot be made: the operating system refuses the memory for it"
import os, subprocess, sys, time
from pathlib import Path

import pandas as pd, pytest, torch

from phantom_nb import cli
from phantom_nb.experiments.bench import BENCHES
from phantom_nb.experiments.report import filter_rows
from phantom_nb.experiments.scale import CURVES, PROGRAMS, made_up_rows, peak_memory
from phantom_nb.experiments.store import load_results

linux = pytest.mark.skipif(sys.platform!='linux', reason="the limit on data is Linux's")

LIMIT = '''
import resource, sys, tempfile, torch, warnings
from pathlib import Path
torch.set_num_threads(1)
{imports}
warnings.simplefilter('error')
def used(): return 1024*int(next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith('VmData')).split()[1])
with tempfile.TemporaryDirectory() as folder:
    {prepare}
    resource.setrlimit(resource.RLIMIT_DATA, (used()+{mb}*10**6, -1))
    {run}
print('within')
'''

def within(mb, imports, prepare, run):
    "Whether a program gets along with so many MB above what it has when it starts; what it frees goes back at once, as it counts"
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='1000000') # a number that is given stays; glibc's own grows with what is freed
    code = LIMIT.format(mb=mb, imports=imports, prepare=prepare, run=run)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env=env)
    assert done.returncode==0 or "can't allocate memory" in done.stderr or 'MemoryError' in done.stderr or 'Killed' in done.stderr or done.returncode<0, done.stderr
    return done.stdout.strip().endswith('within')

ENERGY = 'from phantom_nb.regularizers.hyperspherical import hyperspherical_energy'
PLAIN = 'from phantom_nb.experiments.bench import plain_energy'
WEIGHTS = 'w = torch.randn(12_000, 32, requires_grad=True); (w[:64]@w[:64].T).sum().backward()'

MEASURES = '''import numpy as np
from phantom_nb.measures.clustering import cosine_distance_std, silhouette_cosine
from phantom_nb.experiments.scale import samples
from phantom_nb.experiments import scale
scale.IN_MEMORY = 0'''
FILE = "samples(150_000, 128, 10, folder); x = np.memmap(next(Path(folder).glob('*.bin')), 'float32', 'r+', shape=(150_000,128)); y = torch.arange(len(x))%10"

LAYER = MEASURES+'''
from phantom_nb.measures.clustering import layer_values'''

BOUNDED = {
    'energy of 12,000 neurons, whose pairs take 576 MB once': (300, WEIGHTS, (ENERGY, 'hyperspherical_energy(w, half_space=True).backward()'),
        (PLAIN, 'plain_energy(w).backward()')),
    'silhouettes and spreads of 150,000 samples of 77 MB in a file, whose pairs take 90 GB': (70, FILE,
        (MEASURES, 'silhouette_cosine(x, y), cosine_distance_std(x)'), (MEASURES, 'torch.nn.functional.normalize(torch.tensor(np.asarray(x)))')),
    'c1 to c4 of that file, panel by panel': (70, FILE, (LAYER, 'layer_values(x, y//2, y)'),
        (LAYER, 'torch.from_numpy(x).kthvalue(len(x)//2, 0)'))}

@linux
@pytest.mark.processes
@pytest.mark.parametrize('case', BOUNDED)
def test_memory_is_bounded(case):
    "So many MB are enough for the package's function, and not for the plain one"
    mb,prepare,ours,plain = BOUNDED[case]
    assert within(mb, ours[0], prepare, ours[1])
    assert not within(mb, plain[0], prepare, plain[1]), "the limit does not hold"

CAPTURE = '''from phantom_nb.measures.capture import capture
from phantom_nb.models import create_model
model = create_model('resnet18', n_in=3, n_out=10, size=(32,32), seed=0)
def batches(n):
    for i in range(n): yield torch.full((16,3,32,32), i/n), torch.zeros(16, dtype=torch.long)'''

@linux
@pytest.mark.processes
def test_capture_of_a_large_network_holds_no_data():
    "Sixty batches of a loader, one at a time: what is kept is a few numbers an image"
    assert within(120, CAPTURE, 'capture(model, batches(2))', "acts = capture(model, batches(60), layers=lambda name, m: name.startswith('layer4')) or 1")
    assert not within(120, CAPTURE, 'capture(model, batches(2))', 'acts = [model.conv1(x).detach() for x,_ in batches(60)]'), "the limit does not hold"

def test_a_hundred_thousand_rows_are_read_filtered_and_drawn_in_seconds(tmp_path):
    n = 20_000 # a fifth of them, in a fifth of the time
    path = made_up_rows(n, tmp_path/'rows.jsonl')
    start = time.process_time()
    df = load_results(path)
    assert len(df)==n and len(filter_rows(df, ['method=mhe']))==n//8
    assert time.process_time()-start < 4
    with pytest.raises(SystemExit) as e: cli.main(['results', str(path), '--plot', str(tmp_path/'x.png')])
    assert not e.value.code
    assert time.process_time()-start < 8 and (tmp_path/'x.png').exists()

def test_every_program_has_a_curve(): assert {c['what'] for c in CURVES}==set(PROGRAMS) and 'scale' in BENCHES and 'scale' in cli.BENCH_NAMES

@linux
def test_memory_is_seen():
    with peak_memory() as seen:
        a = torch.ones(20_000_000)
        time.sleep(.2) # on a busy machine too there is a look at it
        del a
    assert 70<seen['mb']<120

def test_recorded_curves_are_complete():
    rows = pd.read_json(Path(__file__).parent.parent/'results'/'bench-scale.jsonl', lines=True)
    for c in CURVES: assert len(rows[(rows.what==c['what']) & (rows.axis==c['axis']) & (rows[c['axis']]==c[c['axis']])])>=1, c
