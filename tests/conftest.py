"What all tests share"
import multiprocessing, os, random, sys
from multiprocessing import forkserver

import numpy as np, pytest, torch

@pytest.fixture(autouse=True)
def seeded():
    "The same random numbers for a test whatever ran before it"
    for f in (random.seed, np.random.seed, torch.manual_seed): f(0)

def pytest_collection_modifyitems(items):
    "The file that takes longest first, so that no other waits for it at the end"
    items.sort(key=lambda item: item.path.name!='test_site.py')

@pytest.fixture(scope='session')
def fork():
    "Start a function in a process of its own, forked from one that has imported everything"
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['test_distributed','test_resume'])
    with pytest.MonkeyPatch.context() as patch: # the server does not look where this process does
        patch.setenv('PYTHONPATH', os.pathsep.join(o for o in sys.path if o))
        forkserver.ensure_running()
    def start(f, *args):
        process = context.Process(target=f, args=args)
        process.start()
        return process
    return start
