"Training one model in two processes: gloo on CPU, through fastai's `distrib_ctx`"
import os, socket, subprocess, sys
from pathlib import Path

import pytest, torch

pytest.importorskip('accelerate')
pytestmark = pytest.mark.processes

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

def launch(lam, out, world, script=SCRIPT):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'PYTHONPATH':str(Path(__file__).parent.parent), 'OMP_NUM_THREADS':'1', 'ACCELERATE_USE_CPU':'true', 'CUDA_VISIBLE_DEVICES':''}
    cmd = [sys.executable, '-W', 'ignore', '-c', script, str(lam), str(out)]
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

PHANTOM = SCRIPT.replace('n_train=64, n_valid=20, bs=32//world', 'n_train=40, n_valid=20, bs=40//world').replace('learn.fit(1)', 'learn.fit(3)')
PHANTOM = PHANTOM.replace("create_model('small_cnn', n_in=1, n_out=10, size=(8,8), seed=0)", "model").replace("MHE(lam, half_space=True)", """PhantomEmbeddings(lam, mode='mix', k=2, queue=2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 20), torch.nn.ReLU(), torch.nn.Linear(20, 10))""")
PHANTOM = PHANTOM.replace("from phantom_nb.regularizers.hyperspherical import MHE", """from phantom_nb.regularizers.phantom import PhantomEmbeddings, gather_batch""")
PHANTOM = PHANTOM.replace("state = dict(", """gathered = mixed = None
if world>1:
    torch.distributed.is_initialized() or torch.distributed.init_process_group('gloo')
    rank = torch.distributed.get_rank()
    z = torch.full((2+rank, 3), rank+1., requires_grad=True)
    all_z,all_y = gather_batch(z, torch.full((2+rank,), rank))
    weight = torch.arange(1., 7.)[:,None]
    gathered = all_z.detach(),all_y,torch.autograd.grad((weight*all_z).sum(), z)[0]
    mixed = gather_batch(z, torch.eye(2)[rank].expand(2+rank, 2))[1]
state = dict(gathered=gathered, mixed=mixed, """)

@pytest.fixture(scope='module')
def phantoms(tmp_path_factory):
    d = tmp_path_factory.mktemp('phantoms')
    return launch(2., d, 2, PHANTOM),launch(2., d, 1, PHANTOM),launch(0., d, 1, PHANTOM)

def test_phantoms_of_two_processes_are_those_of_one(phantoms):
    "Each rank sees half of every batch; penalties and weights after three steps are those of the whole batch, draws and memory included"
    (a,b),(one,),(off,) = phantoms
    assert a['penalty']==pytest.approx(one['penalty'], rel=1e-5) and a['n']==one['n']==3
    for x,y,z in zip(a['weights'], b['weights'], one['weights']):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, atol=1e-6, rtol=1e-5)
    assert max((x-y).abs().max() for x,y in zip(a['weights'], off['weights'])) > 1e-3

def test_batches_of_different_lengths_are_filled_up_and_keep_their_gradient(phantoms):
    for rank,o in enumerate(phantoms[0]):
        z,y,g = o['gathered']
        assert z[:,0].tolist()==[1,1,0,2,2,2] and y.tolist()==[0,0,-1,1,1,1]
        assert g[:,0].tolist()==[[2,4],[8,10,12]][rank] # from both processes
        assert o['mixed'].tolist()==[[1,0],[1,0],[0,0],[0,1],[0,1],[0,1]]
