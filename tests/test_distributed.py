"Training one model in two processes: gloo on CPU, through fastai's `distrib_ctx`"
import os, socket, subprocess, sys
from pathlib import Path

import pytest, torch

pytest.importorskip('accelerate')

SCRIPT = '''
import os, sys, warnings
warnings.filterwarnings('ignore')
import torch
from fastai.basics import Learner, SGD, noop
from fastai.callback.progress import ProgressCallback
from fastai.distributed import DistributedDL
from phantom_nb.data import get_dls
from phantom_nb.models import create_model
from phantom_nb.regularizers.hyperspherical import MHE

DistributedDL._broadcast = lambda self, t, rank: t # fastai's sends the order through the GPU; ours is the same on every rank
torch.set_num_threads(1)
lam,out = float(sys.argv[1]),sys.argv[2]
world = int(os.environ.get('WORLD_SIZE', 1))
dls = get_dls('digits', n_train=64, n_valid=20, bs=32//world, seed=0, device='cpu')
cb = MHE(lam, half_space=True)
learn = Learner(dls, create_model('small_cnn', n_in=1, n_out=10, size=(8,8), seed=0), opt_func=SGD, lr=.1, cbs=[cb])
learn.logger,learn.create_mbar = noop,False
learn.remove_cbs([o for o in learn.cbs if isinstance(o, ProgressCallback)])
if world>1:
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(1)
else: learn.fit(1)
state = dict(weights=[p.detach().clone() for p in learn.model.parameters()], penalty=cb.to_frame().penalty.tolist(), n=len(cb.records))
torch.save(state, f"{out}/{world}-{os.environ.get('RANK', 0)}-{lam:g}.pth")
'''

def launch(lam, out, world):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'PYTHONPATH':str(Path(__file__).parent.parent), 'OMP_NUM_THREADS':'1', 'ACCELERATE_USE_CPU':'true', 'CUDA_VISIBLE_DEVICES':''}
    cmd = [sys.executable, '-W', 'ignore', '-c', SCRIPT, str(lam), str(out)]
    if world==1: procs = [subprocess.Popen(cmd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)]
    else:
        more = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(world))
        procs = [subprocess.Popen(cmd, env={**env, **more, 'RANK':str(r), 'LOCAL_RANK':str(r)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True) for r in range(world)]
    texts = [p.communicate(timeout=300)[0] for p in procs]
    assert [p.returncode for p in procs]==[0]*world, '\n'.join(texts)
    return [torch.load(out/f'{world}-{r}-{lam:g}.pth') for r in range(world)]

def test_two_processes_train_one_model_with_its_penalty(tmp_path):
    "Both ranks hold the same weights, and the penalty acts as it does in one process"
    (a,b),(one,) = launch(3., tmp_path, 2),launch(3., tmp_path, 1)
    off,_ = launch(0., tmp_path, 2)
    assert all(torch.equal(x, y) for x,y in zip(a['weights'], b['weights'])) and a['n']==b['n']==2==one['n']
    assert abs(a['penalty'][0]-one['penalty'][0]) < 1e-5*one['penalty'][0]
    assert max((x-y).abs().max() for x,y in zip(a['weights'], off['weights'])) > 1e-3
    assert a['penalty'][1] < off['penalty'][1]
