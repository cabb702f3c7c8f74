"Training one model in several processes: gloo on CPU, through fastai's `distrib_ctx` and in a plain loop"
import os, signal, socket, subprocess, sys, time
from functools import partial
from pathlib import Path

import pytest, torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from phantom_nb.core import L2Penalty, Regularizer
from phantom_nb.experiments import libraries # chkstyle: ignore
from phantom_nb.plain import attach
from phantom_nb.regularizers.activations import AL2
from phantom_nb.regularizers.flatness import AMP, SAM
from phantom_nb.regularizers.hyperspherical import MHE, CoMHE
from phantom_nb.regularizers import norms # chkstyle: ignore
from phantom_nb.regularizers.orthogonality import Orthogonality, SquaredCosine
from phantom_nb.regularizers.phantom import PhantomEmbeddings
from phantom_nb.regularizers.semantic import ISDA
from phantom_nb.regularizers.smoothness import GradientPenalty, SpectralPenalty
from phantom_nb.regularizers.sparsity import TargetedSparsity

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
    weight = torch.arange(1., 6.)[:,None]
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

def test_batches_of_different_lengths_are_gathered_and_keep_their_gradient(phantoms):
    for rank,o in enumerate(phantoms[0]):
        z,y,g = o['gathered']
        assert z[:,0].tolist()==[1,1,2,2,2] and y.tolist()==[0,0,1,1,1]
        assert g[:,0].tolist()==[[2,4],[6,8,10]][rank] # from both processes
        assert o['mixed'].tolist()==[[1,0],[1,0],[0,1],[0,1],[0,1]]

class Nothing(Regularizer):
    "No penalty at all"
    def penalty(self): return torch.zeros(())

# what is trained with, by name; every regularizer that has a gradient must be here
MAKERS = dict(l2=L2Penalty, mhe=MHE, orthogonality=Orthogonality, squared=SquaredCosine, spectral=SpectralPenalty, al2=AL2, gradient=GradientPenalty,
    contrast=lambda: PhantomEmbeddings(k=2, queue=2), mix=lambda: PhantomEmbeddings(mode='mix', k=2), pairs=lambda: PhantomEmbeddings(mode='pairs'),
    samples=lambda: TargetedSparsity(layers='all'), units=lambda: TargetedSparsity(layers='all', over='units'),
    correlation=lambda: TargetedSparsity(layers='all', over='positions', correlation=1.), sam=SAM, adaptive=lambda: SAM(.5, adaptive=True),
    amp=lambda: AMP(steps=3), isda=ISDA, diagonal=lambda: ISDA(diagonal=True),
    **{kind:partial(CoMHE, kind, k=4, p_lr=.1) for kind in ('random','angle','adversarial','group','expected')})
BY_IMAGE = 'al2','gradient','units' # means over images: of unequal batches the mean of the means, as the data loss is
EVEN,UNEVEN = {1:[24], 2:[12,12], 4:[6,6,6,6]}, {1:[24], 2:[14,10], 4:[9,6,5,4]}

def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))

def mean_of_means(sizes):
    "The loss that processes with batches of these sizes minimise together"
    def loss(pred, y, **kwargs):
        if kwargs: return F.cross_entropy(pred, y, **kwargs)
        return torch.stack([F.cross_entropy(p, t) for p,t in zip(pred.split(sizes), y.split(sizes))]).mean()
    return loss

def gradients(name, sizes, rank=None):
    "Gradients of two steps: of one process with the whole batch, or of process `rank` with its part"
    bare,gen = network(),torch.Generator().manual_seed(1)
    model = bare if rank is None else DistributedDataParallel(bare)
    found,parts_apart = [],rank is None and name in BY_IMAGE
    with attach(model, MAKERS.get(name, Nothing)(), total=2) as penalty:
        loss_func = F.cross_entropy if rank is not None else mean_of_means(sizes)
        if not parts_apart: penalty._loop.loss_func = loss_func
        for _ in range(2):
            x,y = torch.randn(sum(sizes), 1, 6, 6, generator=gen),torch.randint(5, (sum(sizes),), generator=gen)
            parts = list(zip(x.split(sizes), y.split(sizes)))
            mine = [parts[rank]] if rank is not None else parts if parts_apart else [(x, y)]
            bare.zero_grad()
            for i,(x,y) in enumerate(mine, 1):
                loss = (F.cross_entropy if parts_apart else loss_func)(model(x), y)
                added = penalty(y, loss=loss, again=lambda: loss_func(bare(x), y), update=i==len(mine))
                ((loss+added)/len(mine)).backward()
            found.append([p.grad.clone() for p in bare.parameters()])
    return found

def one_of_several(rank, world, port, out):
    "What one process does"
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=world)
    found = {(kind,name):gradients(name, sizes[world], rank) for kind,sizes in (('even',EVEN), ('uneven',UNEVEN)) for name in MAKERS}
    torch.save(found, f'{out}/{world}-{rank}.pth')
    distributed.destroy_process_group()

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def run_together(fork, f, world, *args, seconds=300):
    "Exit codes of processes that train together; the time is an upper limit for all of them"
    port,end = free_port(),time.time()+seconds
    processes = [fork(f, rank, world, port, *args) for rank in range(world)]
    for p in processes: p.join(max(0, end-time.time()))
    codes = [p.exitcode for p in processes]
    for p in processes: p.kill()
    return codes

@pytest.fixture(scope='module')
def together(fork, tmp_path_factory):
    "What two and four processes found: (world, rank) -> (kind, name) -> gradients"
    out = tmp_path_factory.mktemp('together')
    for world in (2,4): assert run_together(fork, one_of_several, world, str(out))==[0]*world
    return {(world,rank):torch.load(out/f'{world}-{rank}.pth') for world in (2,4) for rank in range(world)}

@pytest.mark.parametrize('kind', ['even','uneven'])
@pytest.mark.parametrize('name', MAKERS)
def test_gradient_of_all_processes_is_that_of_one(name, kind, together):
    "Two steps, so that queues, covariances and generators take part; the last batch may give each process another number"
    for world in (2,4):
        sizes = dict(even=EVEN, uneven=UNEVEN)[kind][world]
        whole,plain = gradients(name, sizes),gradients('none', sizes)
        for rank in range(world):
            for step,(ours,theirs,without) in enumerate(zip(together[world,rank][kind,name], whole, plain)):
                largest = max(g.abs().max() for g in theirs)
                for a,b in zip(ours, theirs): assert (a-b).abs().max() < 2e-5*largest, (world, rank, step)
                assert max((b-c).abs().max() for b,c in zip(theirs, without)) > 1e-4*largest, "the regularizer does nothing"

def subclasses(base): return {o for c in base.__subclasses__() for o in (c, *subclasses(c))}

def test_every_regularizer_is_compared():
    public = {c for c in subclasses(Regularizer) if c.__module__.startswith('phantom_nb.') and not c.__subclasses__()}
    assert {c.__name__ for c in public if c.kind!='projection'} <= {type(make()).__name__ for make in MAKERS.values()}

def dies(rank, world, port, name):
    "A process trains; the last one is killed in its second step"
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=world)
    forward,count = nn.Flatten.forward,[]
    def killed(self, x):
        count.append(1)
        if rank==world-1 and len(count)==2: os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, x)
    nn.Flatten.forward = killed
    gradients(name, EVEN[world], rank)

@pytest.mark.parametrize('name', ['mhe','contrast','sam','isda'])
def test_a_process_that_dies_ends_the_others_with_an_error(name, fork):
    "None waits for the dead one: an error within a minute, not a hang"
    first,last = run_together(fork, dies, 2, name, seconds=60)
    assert last==-signal.SIGKILL and first not in (0, None)
